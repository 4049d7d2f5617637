"""Threads of the native engine follow PyTorch, and the processors that a container is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flmoe_fast.engines import cores

#: What a system's files say, and how many processors that is.
MANY = 1 << 16
SYSTEMS = {
    "no quota": ({"proc/self/cgroup": "0::/app\n", "sys/fs/cgroup/app/cpu.max": "max 100000\n"}, MANY),
    "one and a half": ({"proc/self/cgroup": "0::/app\n", "sys/fs/cgroup/app/cpu.max": "150000 100000\n"}, 2),
    "of a level above": (
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n",
        },
        3,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 without": (
        {
            "proc/self/cgroup": "1:cpu:/job\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        MANY,
    ),
    "no such files": ({}, MANY),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_quotas_of_control_groups(system: str, tmp_path: Path, monkeypatch):
    files, expected = SYSTEMS[system]
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert cores.granted(str(tmp_path)) == expected
    monkeypatch.setattr(cores, "granted", lambda: expected)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert cores.threads() == min(8, expected)
