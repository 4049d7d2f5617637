// Who works on one block of a kernel: its threads on a GPU, one thread on the host. A body that takes a Group strides its
// loops by it and synchronises where one loop reads what another wrote, and so is one text for both.
#pragma once

#include "hd.h"

namespace flmoe {

struct Alone {
  FLMOE_HD int rank() const { return 0; }
  FLMOE_HD int size() const { return 1; }
  FLMOE_HD void sync() const {}
};

}  // namespace flmoe
