// float32 with AVX2 and FMA.
#define FLMOE_LEVEL avx2
#include "level.h"

namespace flmoe::cpu {
extern const Level level_avx2;
const Level level_avx2 = avx2::make_level("avx2", "fp32");
}  // namespace flmoe::cpu
