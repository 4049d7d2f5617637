// The CUDA runtime's name and sentence for an error code.
#include <cuda_runtime_api.h>

#include "fused.h"

namespace flmoe::fused {

const char* error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }
const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace flmoe::fused
