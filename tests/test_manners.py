"""How the native engine behaves in a process: signals, threads that the system refuses, forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from flmoe_fast import native

pytestmark = [
    pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "the extension is there"),
    pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and forks as Linux has them"),
]

ROOT = Path(__file__).resolve().parents[1]
SETUP = """
import os, resource, signal, sys, time
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from edge_shapes import Edge
torch.set_num_threads({threads})
edge = Edge("long", (300, 200), (300, 200), hidden=128, heads=2)
game = edge.game(dtype=torch.float32, backend="cpu", heads=("mixture",))
coalitions = torch.rand(64, game.n) < 0.5
"""


def start(code: str, threads: int = 2) -> subprocess.Popen:
    program = SETUP.format(threads=threads) + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    return out.strip()


def test_ctrl_c_answers_within_a_second():
    """In the middle of one long native call."""
    code = """
    before = game(coalitions)
    begin = time.perf_counter()
    game(coalitions)
    once = time.perf_counter() - begin
    many = coalitions.repeat(int(10 / once) + 1, 1)  # about ten seconds
    print("ready", flush=True)
    try:
        game(many)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    print(torch.equal(game(coalitions), before))
    """
    process = start(code)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    answer = process.stdout.readline()
    waited = time.monotonic() - sent
    assert answer == "stopped\n" and waited < 1.0
    assert output(process) == "True"  # and the engine is still whole


def test_threads_that_the_system_refuses_are_done_without():
    """Under a limit of memory that leaves no room for the stack of a thread."""
    code = """
    alone = game(coalitions)
    torch.get_num_threads = lambda: 4  # of the native engine; PyTorch itself stays at one
    game(coalitions)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
    import threading
    try:
        threading.Thread(target=print).start()
        started = True
    except RuntimeError:
        started = False
    print(torch.equal(game(coalitions), alone), started)
    """
    resource = "import resource; resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, -1))"
    program = SETUP.format(threads=1) + textwrap.dedent(code)
    # The stack of a thread is as large as the limit was when the program started: a gigabyte.
    launcher = f"{resource}; import os, sys; os.execv(sys.executable, [sys.executable, '-c', {program!r}])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", launcher], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "False"]


def test_a_fork_after_use_computes():
    """The threads of PyTorch do not survive a fork; a child that waited for them would wait for ever."""
    code = """
    here = game(coalitions)
    big = torch.randn(600, 600) @ torch.randn(600, 600)  # PyTorch has its threads now
    child = os.fork()
    if child == 0:
        same = torch.allclose(game(coalitions), here, rtol=0, atol=1e-12)
        again = edge.game(dtype=torch.float32, backend="torch", heads=("mixture",))(coalitions[:4])
        os._exit(0 if same and bool(again.isfinite().all()) else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        status = "hangs"
    print(status)
    """
    assert output(start(code)) == "0"
