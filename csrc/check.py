"""Checks of the C++ and CUDA sources that need no GPU.

``python csrc/check.py host`` builds the host tests under sanitizers with CMake and runs them.
``python csrc/check.py portable`` builds cpu_test for a 64-bit Arm and, with every level in one program, for x86-64, and
runs both under QEMU: on Arm, and on x86-64 processors that lack the newer levels.
``python csrc/check.py nvcc [LOG]`` compiles every CUDA source for every architecture shipped, treats each warning, each
register spill and each product that cannot run on by itself as an error, and prints what every kernel uses; what the
log of a build of the extension tells already is taken from there. Without the tools, each prints why it was skipped and
succeeds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
HOST_TESTS = ("host_test", "fused_test", "cpu_test")
ARCHS = ("sm_80", "sm_90a")
WIDE = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
LEVELS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": WIDE,
    "amx": [*WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
#: Family, its compiler, its emulator, and the instruction levels it has beside the portable one.
EMULATED = (
    ("aarch64", "aarch64-linux-gnu-g++", "qemu-aarch64", {}),
    ("x86_64", "x86_64-linux-gnu-g++", "qemu-x86_64", LEVELS),
)
#: What QEMU is asked to be: from before AVX, and with AVX2.
PROCESSORS = {"aarch64": [[]], "x86_64": [["-cpu", "Nehalem"], ["-cpu", "Haswell"]]}
NVCC_FLAGS = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
NVCC_FLAGS += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
#: Groups of 64 rows in a block of the fused kernels, their last template argument; code for others is a stub. Nothing
#: is shipped for plain sm_90, but whoever compiles it has to get kernels that compute.
GROUPS = {"sm_80": 1, "sm_90a": 2, "sm_90": 1}
#: Every width has these.
KERNELS = {"fused_chain", "fused_last"}
#: What ptxas says where it has to wait for every product of Hopper's by itself.
SERIALIZED = "wgmma.mma_async instructions are serialized"
RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:, used \d+ barriers)?(?:, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def tool(module: str, directory: str) -> str | None:
    """A build tool from its Python package, else from PATH."""
    if importlib.util.find_spec(module) is not None:
        found = shutil.which(module, path=getattr(importlib.import_module(module), directory, None))
        if found:
            return found
    return shutil.which(module)


def host() -> int:
    """Build the host tests in build/host and run them. Returns an exit status."""
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not (cmake and ninja and compiler):
        print("host tests: skipped, it needs cmake, ninja and a C++ compiler")
        return 0
    tree = ROOT / "build" / "host"
    configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DFLMOE_MODULE=OFF", "-DFLMOE_CUDA=off", "--log-level=WARNING"]
    build = [cmake, "--build", str(tree), "--parallel", os.environ.get("MAX_JOBS") or "2", "--target", *HOST_TESTS]
    for command in (configure, build, *([str(tree / test)] for test in HOST_TESTS)):
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


def portable() -> int:
    """Run cpu_test on emulated processors: one build must run on all of a family. Returns an exit status."""
    sources = [str(CSRC / "cpu" / name) for name in ("cpu_test.cpp", "dispatch.cpp", "level_portable.cpp")]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=fast", "-static", "-pthread"]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for family, compiler, emulator, levels in EMULATED:
            missing = [name for name in (compiler, emulator) if not shutil.which(name)]
            if missing:
                print(f"cpu_test for {family}: skipped, there is no {' and no '.join(missing)}")
                continue
            program, objects, defined = str(Path(scratch) / family), [], []
            commands = []
            for level, options in levels.items():
                objects.append(f"{program}-{level}.o")
                defined.append(f"-DFLMOE_WITH_{level.upper()}")
                source = str(CSRC / "cpu" / f"level_{level}.cpp")
                # GCC's own intrinsics headers use values they leave undefined.
                quiet = [*flags, "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
                commands.append([compiler, *quiet, *options, "-c", source, "-o", objects[-1]])
            commands.append([compiler, *flags, *defined, *sources, *objects, "-o", program])
            commands += [[emulator, *cpu, program] for cpu in PROCESSORS[family]]
            for command in commands:
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                if result.returncode:
                    print(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
                    failed = 1
                    break
                if command[0] == emulator:
                    print(f"{' '.join([family, *command[2:-1]])}: {result.stdout.strip()}")
    return failed


def kernel_name(mangled: str) -> tuple[str, tuple[int, ...]]:
    """The last component of a mangled nested name, a length and that many characters, and its integer arguments."""
    rest, name = re.sub(r"^_ZN?", "", mangled), mangled
    while match := re.match(r"\d+", rest):
        length = int(match.group())
        rest = rest[match.end() :]
        name, rest = rest[:length], rest[length:]
    arguments = re.match(r"I((?:Li\d+E)+)E", rest)
    return name, tuple(map(int, re.findall(r"Li(\d+)E", arguments[1]))) if arguments else ()


def compiled(compiler: str, source: Path, arch: str) -> tuple[bool, str]:
    """Whether one source compiles for one architecture as it must, and what to print of it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [compiler, *NVCC_FLAGS, f"-arch={arch}", str(source), "-o", str(Path(scratch) / "out.cubin")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    log = result.stdout + result.stderr
    if result.returncode:
        return False, f"{source.name} for {arch} failed:\n{log}"
    return judged(log, source, arch)


def judged(log: str, source: Path, arch: str) -> tuple[bool, str]:
    """Whether the compiler's log of one source is as it must be for one architecture, and what to print of it."""
    kernels = [kernel for kernel in RESOURCES.finditer(log) if kernel["arch"] == arch]
    if not kernels or SERIALIZED in log:
        return False, f"{source.name} for {arch} failed:\n{log}"
    good, lines, seen = True, [], set()
    for kernel in kernels:
        name, arguments = kernel_name(kernel["name"])
        wrong = fault(kernel, arguments[-1] == GROUPS[arch])
        good &= not wrong
        if arguments[-1] != GROUPS[arch] and not wrong:
            continue
        seen.add(name)
        label = f"{name}<{', '.join(map(str, arguments))}>"
        line = f"{source.name:20} {arch:7} {label:28} {int(kernel['registers']):3} registers"
        lines.append(f"{line}, {wrong}  FAILED" if wrong else line)
    if not seen >= KERNELS:
        good = False
        lines.append(f"{source.name:20} {arch:7} has no {', '.join(sorted(KERNELS - seen))}  FAILED")
    return good, "\n".join(lines)


def fault(kernel: re.Match[str], wanted: bool) -> str:
    """What is wrong with a kernel; empty if nothing. One that is not wanted has to be a stub, and say so."""
    if wanted == (kernel["shared"] is not None):  # static shared memory is the mark of a stub
        return "a stub" if wanted else "neither a kernel nor a stub that stops"
    if not wanted:
        return ""
    stack, stores, loads = (int(kernel[field]) for field in ("stack", "stores", "loads"))
    return f"{stack} B stack, {stores + loads} B spilled" if stack + stores + loads else ""


def logged(path: str, source: Path) -> str | None:
    """The part about one source of a build's log, in which Ninja announces every object; None where it has none."""
    parts = re.split(r"^\[\d+/\d+\] ", Path(path).read_text(errors="replace"), flags=re.MULTILINE)
    said = [part for part in parts if part.startswith("Building CUDA object") and f"{source.name}.o\n" in part]
    return said[-1] if said else None


def nvcc(log: str | None = None) -> int:
    """Compile every .cu for every architecture that a build's log does not tell of. Returns an exit status."""
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not compiler:
        print("nvcc check: skipped, there is no nvcc")
        return 0
    failed = False
    tasks = []
    for source in sorted(CSRC.rglob("width_*.cu")):
        said = logged(log, source) if log is not None and Path(log).exists() else None
        for arch in ARCHS:
            if said is None or f"'{arch}'" not in said:
                tasks.append((compiler, source, arch))
                continue
            good, text = judged(said, source, arch)
            print(text, flush=True)
            failed |= not good
    tasks.append((compiler, CSRC / "fused" / "width_64.cu", "sm_90"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or "2")) as pool:
        for good, text in pool.map(lambda task: compiled(*task), tasks):
            print(text, flush=True)
            failed |= not good
    return 1 if failed else 0


if __name__ == "__main__":
    checks: dict[str, Callable[..., int]] = {"host": host, "portable": portable, "nvcc": nvcc}
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked not in checks or len(sys.argv) > (3 if asked == "nvcc" else 2):
        sys.exit(f"usage: python {Path(__file__).name} {'|'.join(checks)} (after nvcc: the log of a build)")
    sys.exit(checks[asked](*sys.argv[2:]))
