"""After a fork, the child computes on one thread.

PyTorch's OpenMP threads do not survive a fork, and the first parallel region of a child whose parent had one waits for
them for ever. A region of one thread waits for nobody, so a child that takes PyTorch's setting at one works.
"""

from __future__ import annotations

import os

import torch


def _one_thread() -> None:
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_one_thread)
