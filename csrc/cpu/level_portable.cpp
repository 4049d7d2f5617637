// float32 with the compiler's vectors of four; any processor.
#define FLMOE_LEVEL portable
#include "level.h"

namespace flmoe::cpu {
extern const Level level_portable;
const Level level_portable = portable::make_level("portable", "fp32");
}  // namespace flmoe::cpu
