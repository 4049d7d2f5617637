"""Commands of the command line in forks of one process, which has imported what they need and can plant faults.

A trial then costs what the command itself costs. Where there are a C compiler and glibc, that process has the functions
of ``faults.c`` before the system's. ``python -m tests.commands`` is the process: it reads a request a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
#: Kinds of calls that faults.c can let fail.
KINDS = {"ALLOCATION": 0, "THREAD": 1, "WRITE": 2, "SYNC": 3}
ALLOCATION, THREAD, WRITE, SYNC = KINDS.values()
#: Seconds after which a command hangs.
PATIENCE = 300.0
IMPORTED = (
    *("flmoe_fast.cli", "flmoe_fast.runs.train", "flmoe_fast.runs.explain", "flmoe_fast.runs.faithfulness"),
    *("flmoe_fast.runs.page", "flmoe_fast.pipeline.show", "sklearn.datasets", "pandas", "matplotlib.figure"),
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes
    ----------
    status : int
        Of its process; negative: the signal that ended it.
    said : str
        On both outputs.
    seconds : float
        Of processor time that it took, or still took after it was sent a signal.
    calls : dict of str to int
        Where it came to its end: ``events``, two for every file that got its name (see :func:`die_at`), and those of
        :data:`KINDS` since the last :func:`plant`.
    """

    status: int
    said: str
    seconds: float
    calls: dict[str, int]


class Commands:
    """The process that runs commands, one at a time; a context."""

    def __enter__(self) -> Commands:
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.can_plant = _compiled(folder / "faults.so")
        if self.can_plant:
            environment["LD_PRELOAD"] = str(folder / "faults.so")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.commands", str(folder)],
            **{"cwd": ROOT, "env": environment, "text": True, "bufsize": 1, "stdin": -1, "stdout": -1},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._scratch.cleanup()

    def run(self, *arguments: object, before: str = "", send: tuple[int, float] | None = None) -> Ended:
        """Run ``flmoe-fast`` with arguments to its end.

        Parameters
        ----------
        *arguments
            Of the command line.
        before : str
            Python that the process executes first, in this module: faults to plant.
        send : (signal, seconds), optional
            What it gets, so long after it has begun.
        """
        return self._run(list(map(str, arguments)), before, send)

    def python(self, code: str) -> Ended:
        """Run Python of this module instead of a command."""
        return self._run(None, code, None)

    def _run(self, arguments: list[str] | None, before: str, send: tuple[int, float] | None) -> Ended:
        self._process.stdin.write(json.dumps([arguments, before]) + "\n")
        pid, had = int(self._answer(PATIENCE)), 0.0
        if send is not None:
            number, seconds = send
            ready = select.select([self._process.stdout], [], [], seconds)[0]
            if not ready:
                had = _processor_time(pid)
                os.kill(pid, number)
        status, seconds = json.loads(self._answer(PATIENCE))
        folder = Path(self._scratch.name)
        calls = json.loads((folder / "calls").read_text()) if (folder / "calls").exists() else {}
        return Ended(status, (folder / "said").read_text(errors="replace"), seconds - had, calls)

    def _answer(self, seconds: float) -> str:
        if select.select([self._process.stdout], [], [], seconds)[0] and (line := self._process.stdout.readline()):
            return line
        self._process.kill()
        raise TimeoutError(f"a command has not answered after {seconds:.0f} s")


def _compiled(library: Path) -> bool:
    """Build ``faults.c``; whether that could be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return False
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests" / "faults.c", "-ldl"]
    return subprocess.run(list(map(str, command)), capture_output=True).returncode == 0


def _processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plant(kind: int, at: int, lasting: bool = False, large: int = 1 << 14) -> None:
    """Let the ``at``-th call of a kind fail in this process, with ``lasting`` all after it too; none with ``at`` 0.

    Allocations count from ``large`` bytes, writes where they are to files other than a command's own outputs.
    """
    library = ctypes.CDLL(None)
    library.fault_large(ctypes.c_long(large))
    library.fault_plant(kind, ctypes.c_long(at), int(lasting))


def seen(kind: int) -> int:
    """Calls of a kind since something was planted last."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "fault_seen"):
        return 0
    library.fault_seen.restype = ctypes.c_long
    return library.fault_seen(kind)


def die_at(event: int, name: str = "") -> None:
    """End this process by SIGKILL at an event: two n before the n-th file gets its name, two n + 1 right after.

    Files whose names do not contain ``name`` do not count.
    """
    at_names(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == event else None, name)


def at_names(call: Callable[[int], object], name: str = "") -> None:
    """Call with the number of the event, at every one, from now on."""
    replace, number = os.replace, itertools.count()

    @functools.wraps(replace)
    def watched(source, target, **options):
        counts = name in str(target)
        if counts:
            call(next(number))
        replace(source, target, **options)
        if counts:
            call(next(number))

    os.replace = watched


def _command(arguments: list[str] | None, before: str, folder: Path, ready: int) -> NoReturn:
    """What a fork does; it says when it is ready."""
    status, events = 1, [0]
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        from flmoe_fast.cli import main

        at_names(lambda number: events.append(number + 1))
        exec(before, globals())
        os.write(ready, b".")
        status = 0 if arguments is None else main(arguments)
        calls = {"events": events[-1], **{name: seen(kind) for name, kind in KINDS.items()}}
        for kind in KINDS.values() if any(calls[name] for name in KINDS) else ():
            plant(kind, 0)
        (folder / "calls").write_text(json.dumps(calls))
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _serve(folder: Path) -> None:
    """Answer requests until there are no more: the number of a fork, then its status and processor time."""
    for name in IMPORTED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    for line in sys.stdin:
        (folder / "calls").unlink(missing_ok=True)
        told, ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            _command(*json.loads(line), folder, ready)
        os.close(ready)
        os.read(told, 1)
        os.close(told)
        print(pid, flush=True)
        _, status, used = os.wait4(pid, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
