// Adds the CPU engine to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace flmoe::cpu {
void bind(pybind11::module_& m);
}
