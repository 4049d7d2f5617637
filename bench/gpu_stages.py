"""Everything that only a GPU can show, in stages that each end within nine minutes.

    bash bench/gpu.sh STAGE ...      build, correct, times, kernels, sanitize, tune, compiled; quick and full are lists

Any stage can run in a call of its own, in that order, and goes on where an earlier call was cut off. All of it runs
from a copy of the sources in a workplace of its own (FLMOE_GPU_WORK, else a folder of the user's cache), where the
build and the compile cache stay, so that the checkout may be read-only or replaced between calls. Results, logs and
tuned files are copied to ``$OUT`` where that is set, after every stage and after an interrupt. No network is needed;
the workplace can be removed at any time to start afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What is copied to the workplace.
SOURCES = (
    "flmoe_fast",
    "csrc",
    "bench",
    "tests",
    "setup.py",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
#: What stages write in the copy: never overwritten from the checkout once it is there.
WRITTEN = (
    "bench/results/gpu.jsonl",
    "bench/results/gpu_kernels.jsonl",
    "bench/results/gpu_tune.jsonl",
    "flmoe_fast/engines/gpu/fastest.json",
)
CONFIGS = "flmoe_fast/engines/gpu/kernels/configs"
#: A compile cache that was made without a GPU (make gpu-cache) and travels with the checkout.
CARRIED = "build/gpu-cache"
#: Kernels that a stage tunes: those that take most of a chunk's time.
TUNED = ("qkv", "up", "up_last", "later")
#: No stage may take longer; seconds.
LONGEST = 540
#: Seconds between an interrupt and the end of a stage that does not heed it.
GRACE = 10
#: Lines of a log that say what failed, and how many of them are shown.
FAILURE = re.compile(r"^(FAILED|ERROR|E  )|Error\b|error:|ERROR SUMMARY: [1-9]|CUDA is missing", re.MULTILINE)
FAILURES_SHOWN = 6

Command = Sequence[str]


@dataclass(frozen=True)
class Stage:
    """Commands that run one after the other until one fails, within ``seconds`` together."""

    name: str
    seconds: int
    commands: tuple[Command, ...]


@dataclass
class Outcome:
    """How a stage ended."""

    stage: str
    status: int
    seconds: float
    said: str


def python(module: str, *arguments: str) -> Command:
    """A module of the copy, run by the Python at hand."""
    return (sys.executable, "-m", module, *arguments)


def stages(architecture: str) -> dict[str, Stage]:
    """Every stage, for a device of that architecture ("90a")."""
    workers = ("-n", "6") if _has("xdist") else ()
    sanitizer = shutil.which("compute-sanitizer")
    sanitize: list[Command] = [python("bench.gpu", "sanitize")]  # fills the compile cache
    if sanitizer:
        sanitize += [(sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *python("bench.gpu", "sanitize"))]
    else:
        sanitize += [(sys.executable, "-c", "print('compute-sanitizer: skipped, it is not on PATH')")]
    tests = python("pytest", "-q", *workers, "--durations=10", "-p", "no:cacheprovider", "tests/test_gpu.py")
    built = python("bench.gpu_stages", "--built", architecture)
    return {
        stage.name: stage
        for stage in (
            Stage("build", 300, ((sys.executable, "setup.py", "-q", "build_ext", "--inplace"), built)),
            Stage("correct", 420, (tests,)),
            Stage("times", 480, (python("bench.gpu", "times"),)),
            Stage("kernels", 240, (python("bench.gpu_kernels"),)),
            Stage("sanitize", 300, tuple(sanitize)),
            Stage("tune", 520, (python("bench.tune", "--kernels", *TUNED, "--seconds", "480"),)),
            Stage("compiled", 520, (python("bench.gpu", "compiled"),)),
        )
    }


LISTS = {
    "quick": ("build", "correct", "times", "kernels", "sanitize"),
    "full": ("build", "correct", "times", "kernels", "sanitize", "tune", "compiled"),
}


# ---- the workplace


def workplace() -> Path:
    """Where the copy, the build and the caches stay between calls."""
    named = os.environ.get("FLMOE_GPU_WORK")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flmoe_fast" / "gpu"
    for place in (Path(named),) if named else (cache, Path(tempfile.gettempdir()) / "flmoe_fast_gpu"):
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            return place
    raise SystemExit(f"bench.gpu_stages: cannot write to {named or cache}; name a folder by FLMOE_GPU_WORK")


def mirror(root: Path, copy: Path) -> None:
    """Bring the copy up to the checkout; what stages wrote there, and what was built, stays."""
    there = set()
    for source in _files(root):
        relative = source.relative_to(root)
        there.add(relative)
        target = copy / relative
        if target.exists() and (str(relative) in WRITTEN or target.read_bytes() == source.read_bytes()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for target in list(_files(copy)):
        relative = target.relative_to(copy)
        if relative not in there and str(relative) not in WRITTEN and str(relative.parent) != CONFIGS:
            target.unlink()


def _files(root: Path) -> Iterator[Path]:
    """Sources under a folder, without what was built or cached."""
    for name in SOURCES:
        place = root / name
        for path in (place,) if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and path.suffix not in (".so", ".pyd", ".pyc") and "__pycache__" not in path.parts:
                yield path


def build_state(copy: Path, architecture: str) -> str:
    """A hash of everything that a build is made of."""
    digest = hashlib.sha256(f"{sys.version} {architecture}".encode())
    for path in _files(copy):
        relative = str(path.relative_to(copy))
        if relative.startswith("csrc/") or relative in ("setup.py", "CMakeLists.txt"):
            digest.update(relative.encode() + path.read_bytes())
    return digest.hexdigest()


def environment(copy: Path, work: Path, architecture: str) -> dict[str, str]:
    """What the commands of a stage see."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {
        "PYTHONPATH": str(copy),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "FLMOE_CUDA": "on",
        "FLMOE_CUDA_ARCHS": architecture,
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1),
    }


def bring_cache(root: Path, work: Path) -> None:
    """Put a compile cache that came with the checkout where kernels look for it."""
    carried = root / CARRIED
    if carried.is_dir():
        new = [path for path in carried.iterdir() if not (work / "triton" / path.name).exists()]
        for path in new:
            shutil.copytree(path, work / "triton" / path.name)
        print(f"compile cache: {len(new)} of {len(list(carried.iterdir()))} entries brought along", flush=True)


# ---- running


def run(stage: Stage, copy: Path, work: Path, variables: dict[str, str]) -> Outcome:
    """Run one stage, its output to the terminal and to a log."""
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    started, status, said = time.monotonic(), 0, "passed"
    before = _entries(work)
    with (logs / f"{stage.name}.log").open("w") as log:
        for command in stage.commands:
            left = min(stage.seconds, LONGEST) - (time.monotonic() - started)
            status, said = _command(command, copy, variables, log.write, left)
            if status:
                break
    seconds = time.monotonic() - started
    made = _entries(work) - before
    print(f"== {stage.name}: {said}, {seconds:.0f} s, {made} kernels compiled", flush=True)
    return Outcome(stage.name, status, seconds, said)


def _command(
    command: Command, copy: Path, variables: dict[str, str], log: Callable[[str], object], seconds: float
) -> tuple[int, str]:
    """Exit status of a command, and how it ended; when its time is up it is interrupted, and then killed."""
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    until = time.monotonic() + seconds
    signal.signal(signal.SIGALRM, lambda *_: _stop(process, until))
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds), 1.0)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log(line)
            print(line, end="", flush=True)
        status = process.wait()
    except BaseException:
        _stop(process, time.monotonic())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        _stop(process, 0.0)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    if time.monotonic() >= until:
        return status or 124, f"stopped after {seconds:.0f} s"
    return status, "passed" if status == 0 else f"failed with status {status}"


def _stop(process: subprocess.Popen, until: float) -> None:
    """Interrupt a command and what it started; kill it when it has had its grace."""
    late = time.monotonic() > until + GRACE
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if late else signal.SIGINT)


def _entries(work: Path) -> int:
    cache = work / "triton"
    return sum(1 for _ in cache.iterdir()) if cache.is_dir() else 0


def collect(copy: Path, work: Path, out: Path | None) -> None:
    """Copy results, tuned files and one file with all logs to where they are wanted."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    tuned = [path for path in (copy / CONFIGS).glob("*.json") if not (ROOT / CONFIGS / path.name).exists()]
    for path in (*(copy / name for name in WRITTEN), *tuned):
        if path.exists():
            shutil.copyfile(path, out / path.name)
    logs = sorted((work / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    (out / "logs.txt").write_text("".join(f"===== {path.stem}\n{path.read_text()}" for path in logs))


def summary(outcomes: list[Outcome], work: Path) -> str:
    """One line a stage; what failed comes last, and short."""
    lines = [f"{each.stage:10} {each.said}, {each.seconds:.0f} s" for each in outcomes]
    for each in outcomes:
        if each.status:
            log = (work / "logs" / f"{each.stage}.log").read_text().splitlines()
            found = [line for line in log if FAILURE.search(line)] or log
            lines += [f"{each.stage}: {line[:160]}" for line in found[-FAILURES_SHOWN:]]
    return "\n".join(lines)


# ---- the device


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def device() -> str:
    """Architecture of the device at hand, as nvcc calls it; an exit where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu_stages: torch finds no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def built(architecture: str) -> None:
    """Exit with a line unless the extension that is found has CUDA kernels for the device."""
    from flmoe_fast.native import extension

    module, missing = extension()
    info = module.info() if module is not None else {"cuda": False, "without_cuda": missing}
    if not info["cuda"]:
        raise SystemExit(f"CUDA is missing from the build: {info['without_cuda']}")
    print(f"built by nvcc {info['nvcc']} for {info['archs']}, the device is {architecture}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run stages. Exit status: 0, or that of the first stage that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[*LISTS, *stages("")], metavar="STAGE", default="quick")
    parser.add_argument("--built", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.built:
        built(options.built)
        return 0
    architecture = device()
    known, asked = stages(architecture), []
    for name in [options.stages] if isinstance(options.stages, str) else options.stages:
        asked += LISTS.get(name, (name,))
    work = workplace()
    copy = work / "copy"
    mirror(ROOT, copy)
    (work / "triton").mkdir(exist_ok=True)
    bring_cache(ROOT, work)
    variables = environment(copy, work, architecture)
    return perform([known[name] for name in asked], copy, work, variables, architecture)


def perform(asked: list[Stage], copy: Path, work: Path, variables: dict[str, str], architecture: str) -> int:
    """Run stages in order, collecting after each; an interrupt ends them, and what there is is collected."""
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    outcomes: list[Outcome] = []
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    stamp = work / "built"
    try:
        for stage in asked:
            state = build_state(copy, architecture)
            if stage.name == "build" and stamp.exists() and stamp.read_text() == state:
                print("== build: the sources are those of the last one", flush=True)
                continue
            outcomes.append(run(stage, copy, work, variables))
            if stage.name == "build" and not outcomes[-1].status:
                stamp.write_text(state)
            collect(copy, work, out)
    except KeyboardInterrupt:
        outcomes.append(Outcome(stage.name, 130, 0.0, "interrupted"))
    collect(copy, work, out)
    print(summary(outcomes, work), flush=True)
    return next((each.status for each in outcomes if each.status), 0)


if __name__ == "__main__":
    sys.exit(main())
