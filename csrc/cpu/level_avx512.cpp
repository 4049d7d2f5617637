// float32 with AVX-512.
#define FLMOE_LEVEL avx512
#include "level.h"

namespace flmoe::cpu {
extern const Level level_avx512;
const Level level_avx512 = avx512::make_level("avx512", "fp32");
}  // namespace flmoe::cpu
