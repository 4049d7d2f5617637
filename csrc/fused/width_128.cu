#include "kernels.cuh"

template struct flmoe::fused::Width<128>;
