// bfloat16 in two terms on AMX tiles, float32 sums; the rest as AVX-512.
#define FLMOE_LEVEL amx
#include "level.h"

namespace flmoe::cpu {
extern const Level level_amx;
const Level level_amx = amx::make_level("amx", "bf16x3");
}  // namespace flmoe::cpu
