// Adds the fused kernels to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace flmoe::fused {
void bind(pybind11::module_& m);
}
