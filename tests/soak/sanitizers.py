"""The extension under AddressSanitizer and UBSan with the Python tests, and the CPU engine's host test under TSan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from flmoe_fast import __version__

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PYTHON_TESTS = tuple(f"tests/test_{what}.py" for what in ("coalitions", "cpu_engine", "parity", "threads"))
#: The deselected tests start processes of their own or measure memory, which means nothing here; or run no C++ of ours.
SELECTION = "not subprocess and not memory and not triton and not fused"
WIDE = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
LEVELS = {"avx2": ["-mavx2", "-mfma"], "avx512": WIDE,
          "amx": [*WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}  # fmt: skip
FLAGS = ["-std=c++17", "-g1", "-pthread", "-fno-omit-frame-pointer", f"-I{CSRC}"]


class Unbuilt(Exception):
    """Something was not built; says where its compiler's words are."""


def _run(arguments: list, folder: Path, name: str, **options) -> subprocess.CompletedProcess:
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.run(list(map(str, arguments)), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, **options)


def _build(folder: Path, name: str, flags: list[str], sources: list[Path], product: Path, *link: str) -> None:
    """Compile sources and every level of the CPU engine, and link them; without the optimization of a whole program."""
    compiler = _compiler()
    product.parent.mkdir(parents=True, exist_ok=True)
    defined = [f"-DFLMOE_WITH_{level.upper()}" for level in LEVELS]
    plain = [*sources, CSRC / "cpu" / "dispatch.cpp"]
    levels = {CSRC / "cpu" / f"level_{level}.cpp": options for level, options in {"portable": [], **LEVELS}.items()}
    objects = []
    for source in [*plain, *levels]:
        # Optimizing what only describes functions to Python takes minutes, and is of no use.
        own = ["-O1", "-ffp-contract=fast", *levels[source]] if source in levels else ["-O0", "-ffp-contract=off"]
        objects.append(folder / f"{name}-{source.parent.name}-{source.stem}.o")
        log = objects[-1].stem
        if _run([compiler, *flags, *defined, *own, "-c", source, "-o", objects[-1]], folder, log).returncode:
            raise Unbuilt(f"{source.name} was not compiled, see {folder}/{log}.log")
    if _run([compiler, *flags, *objects, "-o", product, *link], folder, f"{name}-link").returncode:
        raise Unbuilt(f"{product.name} was not linked, see {folder}/{name}-link.log")


def _compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise Unbuilt("there is no C++ compiler")
    return found


def address(folder: Path) -> dict:
    """Build ``_C`` with both sanitizers beside a copy of the package, and run the tests that use it."""
    import pybind11

    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "flmoe_fast", site / "flmoe_fast", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    words = {"WITHOUT_CUDA": "built for a sanitizer", "VERSION": __version__, "COMPILER": "of a sanitizer"}
    says = [f'-DFLMOE_{name}="{text}"' for name, text in words.items()]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = [*FLAGS, *sanitize, "-fPIC", "-fvisibility=hidden", "-DNDEBUG", *includes, *says]
    sources = [CSRC / "bind.cpp", CSRC / "cpu" / "bind.cpp", CSRC / "fused" / "bind.cpp"]
    module = site / "flmoe_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    _build(folder, "asan", flags, sources, module, "-shared")
    # The sanitizer looks for what throws exceptions when it starts, and Python itself has no C++ library.
    preloaded = ":".join(map(_library, ("libasan.so", "libstdc++.so")))
    # In this order the copy is the package that is imported, also by processes that tests start.
    env = {**os.environ, "LD_PRELOAD": preloaded, "PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1"}
    env |= {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    env |= {"PYTHONSAFEPATH": "1"}
    seen = [sys.executable, "-c", "import flmoe_fast._C as c; print(c.__file__)"]
    found = subprocess.run(seen, capture_output=True, text=True, cwd=ROOT, env=env)
    if found.stdout.strip() != str(module):
        return {"cases": 0, "wrong": [f"not the sanitized extension: {found.stdout}{found.stderr[-500:]}"]}
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", SELECTION, *PYTHON_TESTS]
    done = _run(tests, folder, "asan-tests", env=env)
    return _counted(folder, "asan-tests", done.returncode)


def _library(name: str) -> str:
    asked = [_compiler(), f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def _counted(folder: Path, name: str, status: int) -> dict:
    text = (folder / f"{name}.log").read_text(errors="replace")
    passed = re.search(r"(\d+) passed", text)
    reports = re.findall(r"ERROR: AddressSanitizer[^\n]*|runtime error:[^\n]*|WARNING: ThreadSanitizer[^\n]*", text)
    wrong = [*reports, *([f"exit status {status}, see {folder}/{name}.log"] if status else [])]
    return {"cases": int(passed[1]) if passed else 0, "wrong": wrong}


def thread(folder: Path) -> dict:
    """Build ``cpu_test`` with ThreadSanitizer, every level in one program, and run it."""
    program = folder / "cpu_test_tsan"
    _build(folder, "tsan", [*FLAGS, "-fsanitize=thread"], [CSRC / "cpu" / "cpu_test.cpp"], program, "-ldl")
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=0:exitcode=66"}
    done = _run([program], folder, "tsan-run", env=env)
    return {**_counted(folder, "tsan-run", done.returncode), "cases": 1}


def run(seed: int, folder: Path) -> dict:
    """Seed 0 is both address sanitizers, seed 1 the thread sanitizer."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = (address, thread)[seed](folder)
    except Unbuilt as problem:
        found = {"cases": 0, "wrong": [str(problem)]}
    name = ("ASan and UBSan, Python tests", "TSan, host test")[seed]
    return {"cases": found["cases"], "wrong": found["wrong"], "trials": {name: found["cases"]}}
