"""Ctrl-C ends a command soon, with one exit code and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

#: Seconds between the signal and the end, in Python's own time; loading and training steps are far below.
LATENCY = 5.0
#: Processor seconds between the signal and the interrupt: what it takes on a machine that does nothing else.
WORK = 1.0

#: A probe that would take minutes, on an engine; it says when it is inside.
PROBE = """
    import signal, sys, threading, time
    import torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    sys.path.insert(0, "tests")
    from edge_shapes import Edge
    from flmoe_fast.cli import INTERRUPTED
    from flmoe_fast import interactions
    game = Edge("large", (120, 120), (120, 120), hidden=128, heads=4).game(backend=sys.argv[1], dtype=torch.float32)
    threading.Timer(1.0, lambda: print("inside", flush=True)).start()
    try:
        interactions(game, rows=range(20), cols=range(120, 140), contexts=4096, progress=False)
    except KeyboardInterrupt:
        print(time.process_time(), flush=True)
        sys.exit(INTERRUPTED)
"""


def processor_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="the processor time of another process, as Linux tells it")
@pytest.mark.parametrize("backend", ("torch", "cpu"))
def test_a_probe_ends_soon(backend):
    program = [sys.executable, "-c", textwrap.dedent(PROBE), backend]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "inside\n", process.stderr.read()
    time.sleep(0.5)
    begin, worked = time.perf_counter(), processor_seconds(process.pid)
    process.send_signal(signal.SIGINT)
    answer, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.perf_counter() - begin < LATENCY
    assert float(answer) - worked < WORK
