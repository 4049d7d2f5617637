"""How many threads are worth starting: as many as PyTorch has, but no more than a container is given processors."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch


def threads() -> int:
    """Threads of an engine that starts its own."""
    return max(1, min(torch.get_num_threads(), granted()))


@functools.cache
def granted(root: str = "/") -> int:
    """Processors that the control groups of this process pay for, rounded up; a large number where they say nothing.

    PyTorch counts the processors of the machine. Threads beyond a quota do not compute faster: all of them are stopped
    together for the rest of every period.
    """
    least = math.inf
    for line in _lines(Path(root, "proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        below = Path(path.lstrip("/"))
        if not controllers:  # version 2: the hierarchy counts, every level may set a quota
            top, read = Path(root, "sys/fs/cgroup"), _quota
        elif "cpu" in controllers.split(","):
            top, read = Path(root, "sys/fs/cgroup/cpu"), _quota_of_version_1
        else:
            continue
        least = min([least, *(read(top / part) for part in (below, *below.parents))])
    return math.ceil(least) if least < math.inf else 1 << 16


def _quota(group: Path) -> float:
    """Processors by ``cpu.max``, such as ``150000 100000``, or ``max 100000`` for any number."""
    for line in _lines(group / "cpu.max"):
        most, period = line.split()
        return math.inf if most == "max" else int(most) / int(period)
    return math.inf


def _quota_of_version_1(group: Path) -> float:
    """Processors by ``cpu.cfs_quota_us``, -1 for any number, and ``cpu.cfs_period_us``."""
    for most, period in zip(_lines(group / "cpu.cfs_quota_us"), _lines(group / "cpu.cfs_period_us")):
        return math.inf if int(most) < 0 else int(most) / int(period)
    return math.inf


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system's; none where it is not there."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
