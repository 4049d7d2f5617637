"""``python -m tests.soak``; processes that it starts cannot import this file, so all is in ``harness``."""

import sys

from tests.soak.harness import main

sys.exit(main())
