"""Ctrl-C ends a command soon, with one exit code and nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import pytest

#: Seconds between the signal and the end, in Python's own time; loading and training steps are far below.
LATENCY = 5.0

#: A probe that would take minutes, on an engine; it says when it is inside.
PROBE = """
    import signal, sys, threading
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
        sys.exit(INTERRUPTED)
"""


@pytest.mark.parametrize("backend", ("torch", "cpu"))
def test_a_probe_ends_soon(backend):
    program = [sys.executable, "-c", textwrap.dedent(PROBE), backend]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "inside\n", process.stderr.read()
    time.sleep(0.5)
    begin = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.perf_counter() - begin < LATENCY
