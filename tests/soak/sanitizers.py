"""The extension under AddressSanitizer and UBSan with the Python tests, and the CPU engine's host test under TSan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON_TESTS = tuple(f"tests/test_{what}.py" for what in ("coalitions", "cpu_engine", "parity", "threads"))
#: The deselected tests start processes of their own or measure memory, which means nothing here; or run no C++ of ours.
SELECTION = "not subprocess and not memory and not triton and not fused"
WIDE = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
LEVELS = {"avx2": ["-mavx2", "-mfma"], "avx512": WIDE,
          "amx": [*WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}  # fmt: skip


def _run(arguments: list, folder: Path, name: str, **options) -> subprocess.CompletedProcess:
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.run(list(map(str, arguments)), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, **options)


def address(folder: Path) -> dict:
    """Build ``_C`` with both sanitizers, and run the tests that use it."""
    tree, site = folder / "asan", folder / "asan-site"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    env = {**os.environ, "FLMOE_CUDA": "off", "CXXFLAGS": flags, "LDFLAGS": "-fsanitize=address,undefined"}
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", tree, "build_ext", "--build-lib", tree / "lib"]
    if _run(build, folder, "asan-build", env=env).returncode:
        return {"cases": 0, "wrong": [f"the sanitized extension was not built, see {folder}/asan-build.log"]}
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "flmoe_fast", site / "flmoe_fast", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    for built in (tree / "lib" / "flmoe_fast").glob("_C*.so"):
        shutil.copy(built, site / "flmoe_fast")
    env = {**os.environ, "LD_PRELOAD": library, "PYTHONPATH": f"{site}:{ROOT}", "OMP_NUM_THREADS": "1"}
    env |= {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    env |= {"PYTHONSAFEPATH": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTION, *PYTHON_TESTS]
    done = _run(tests, folder, "asan-tests", env=env)
    return _counted(folder, "asan-tests", done.returncode)


def _counted(folder: Path, name: str, status: int) -> dict:
    text = (folder / f"{name}.log").read_text(errors="replace")
    passed = re.search(r"(\d+) passed", text)
    reports = re.findall(r"ERROR: AddressSanitizer[^\n]*|runtime error:[^\n]*|WARNING: ThreadSanitizer[^\n]*", text)
    wrong = [*reports, *([f"exit status {status}, see {folder}/{name}.log"] if status else [])]
    return {"cases": int(passed[1]) if passed else 0, "wrong": wrong}


def thread(folder: Path) -> dict:
    """Build ``cpu_test`` with ThreadSanitizer, every level in one program, and run it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    source = ROOT / "csrc" / "cpu"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=fast", "-pthread", f"-I{ROOT / 'csrc'}"]
    objects = []
    for level, options in LEVELS.items():
        objects.append(folder / f"tsan-{level}.o")
        compile_one = [compiler, *flags, *options, "-c", source / f"level_{level}.cpp", "-o", objects[-1]]
        if _run(compile_one, folder, f"tsan-{level}").returncode:
            return {"cases": 0, "wrong": [f"level {level} was not built, see {folder}/tsan-{level}.log"]}
    defined = [f"-DFLMOE_WITH_{level.upper()}" for level in LEVELS]
    sources = [source / name for name in ("cpu_test.cpp", "dispatch.cpp", "level_portable.cpp")]
    program = folder / "cpu_test_tsan"
    if _run([compiler, *flags, *defined, *sources, *objects, "-o", program], folder, "tsan-build").returncode:
        return {"cases": 0, "wrong": [f"cpu_test was not built, see {folder}/tsan-build.log"]}
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=0:exitcode=66"}
    done = _run([program], folder, "tsan-run", env=env)
    return {**_counted(folder, "tsan-run", done.returncode), "cases": 1}


def run(seed: int, folder: Path) -> dict:
    """Seed 0 is both address sanitizers, seed 1 the thread sanitizer."""
    folder.mkdir(parents=True, exist_ok=True)
    found = (address, thread)[seed](folder)
    name = ("ASan and UBSan, Python tests", "TSan, host test")[seed]
    return {"cases": found["cases"], "wrong": found["wrong"], "trials": {name: found["cases"]}}
