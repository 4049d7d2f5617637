"""Builds the optional extension ``flmoe_fast._C`` with CMake and Ninja; everything else is in pyproject.toml.

The package works without the extension, so a machine without a C++ compiler, or one where the build fails, gets a
pure-Python install and one line that says so. Environment:

- ``FLMOE_NATIVE`` = auto (default) | on (a failed build fails the install) | off (do not build)
- ``FLMOE_CUDA`` = auto (default: CUDA kernels if an nvcc is found, which takes minutes) | on (or fail) | off
- ``FLMOE_CUDA_ARCHS`` = "80;90a" (default)
- ``MAX_JOBS`` = 2 (default): parallel compilations
- ``CXX``, ``CUDACXX``: compilers, as CMake reads them

No torch is imported and no hardware is probed: what is built depends on the tools found, never on the machine's GPU.
A wheel without the extension says so in its name (py3-none-any).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAME = "flmoe_fast._C"
SOURCES = ["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())]


class BuildError(Exception):
    """Why the extension could not be built."""


def choice(name: str) -> str:
    """The environment's ``name``, one of auto, on, off."""
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name}: got {value!r}, expected 'auto', 'on' or 'off'")
    return value


def notice(text: str) -> None:
    """One line to the installer's log."""
    print(f"flmoe_fast: {text}", file=sys.stderr, flush=True)


def announce(text: str) -> None:
    """A line that is seen also where the installer keeps a build's log to itself, as pip does without ``-v``."""
    notice(text)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"flmoe_fast: {text}", file=terminal)


def nvcc() -> str | None:
    """The CUDA compiler: ``CUDACXX`` if set, else the one on PATH."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def tool(module: str, directory: str) -> str | None:
    """A build tool from its Python package (found even when the environment is not activated), else from PATH."""
    if importlib.util.find_spec(module) is not None:
        found = shutil.which(module, path=getattr(importlib.import_module(module), directory, None))
        if found:
            return found
    return shutil.which(module)


def compiler() -> str | None:
    """A C++ compiler: ``CXX`` if set, else the usual names on PATH."""
    if os.environ.get("CXX"):
        return shutil.which(os.environ["CXX"].split()[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def run(command: list[str]) -> None:
    """Run a build step with its output shown; raise :class:`BuildError` when it fails."""
    result = subprocess.run(command, cwd=ROOT, check=False)
    if result.returncode:
        raise BuildError(f"`{' '.join(command[:3])} ...` failed with exit status {result.returncode}")


class CMakeBuild(build_ext):
    """Build the one extension with CMake and put it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        native, cuda = choice("FLMOE_NATIVE"), choice("FLMOE_CUDA")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # a module of an earlier build must not survive this one's failure
        if native == "off":
            if cuda == "on":
                raise SystemExit("FLMOE_CUDA=on needs the extension, but FLMOE_NATIVE=off skips it")
            notice("FLMOE_NATIVE=off: installed without the C++ extension")
            return
        try:
            self.build_somehow(target, cuda)
        except BuildError as error:
            if native == "on" or cuda == "on":
                raise SystemExit(f"flmoe_fast: {error}") from error
            notice(f"installed as pure Python, without the C++ extension: {error}")

    def build_somehow(self, target: Path, cuda: str) -> None:
        """Build with CUDA as asked; when CUDA is only welcome and something fails, once more without it."""
        if cuda == "on" and not nvcc():
            raise BuildError("FLMOE_CUDA=on, but there is no nvcc: put it on PATH or set CUDACXX")
        try:
            self.build(target, cuda)
        except BuildError as error:
            if cuda != "auto" or not nvcc():
                raise
            notice(f"trying again without CUDA kernels: {error}")
            self.build(target, "off", "the CUDA kernels did not build; the log of the build says why")

    def build(self, target: Path, cuda: str, without_cuda: str = "") -> None:
        """Build one setting of CUDA; the module remembers why it is without, where that is not its own choice."""
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        if compiler() is None:
            raise BuildError("there is no C++ compiler")
        if cmake is None or ninja is None:
            raise BuildError("cmake and ninja are needed to build it")
        import pybind11

        archs = os.environ.get("FLMOE_CUDA_ARCHS") or "80;90a"
        if cuda != "off" and nvcc():
            announce(f"compiling CUDA kernels with {nvcc()} for {archs}: some minutes; FLMOE_CUDA=off leaves them out")
        # One tree per CUDA setting and interpreter: a cache never has to change its mind about a compiler.
        tree = ROOT / "build" / f"{sys.implementation.cache_tag}-cuda-{cuda}"
        shutil.rmtree(tree, ignore_errors=True)
        run(
            [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(tree),
                "-G",
                "Ninja",
                "--log-level=NOTICE",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DFLMOE_CUDA={cuda}",
                f"-DFLMOE_WITHOUT_CUDA={without_cuda}",
                f"-DFLMOE_CUDA_ARCHS={archs}",
            ]
        )
        jobs = os.environ.get("MAX_JOBS") or "2"
        run([cmake, "--build", str(tree), "--target", "_C", "--parallel", jobs])
        built = next(tree.glob("_C*.so"), None) or next(tree.glob("_C*.pyd"), None)
        if built is None:
            raise BuildError(f"CMake finished, but left no module in {tree}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    def copy_extensions_to_source(self) -> None:
        """As in setuptools, but a module that was not built is not an error."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = self._get_inplace_equivalent(build_py, ext)
            Path(inplace).unlink(missing_ok=True)
            if Path(built).exists():
                self.copy_file(built, inplace, level=self.verbose)

    def get_outputs(self) -> list[str]:
        """Only what exists: the installer records these files."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {built: inplace for built, inplace in super().get_output_mapping().items() if Path(built).exists()}


class Wheel(bdist_wheel):
    """A wheel that is called pure when the extension was not built."""

    def run(self) -> None:
        self.run_command("build")
        if not self.get_finalized_command("build_ext").get_outputs():
            self.distribution.ext_modules = []  # what decides between the two library folders
            self.root_is_pure, self.plat_name_supplied = True, False
        super().run()


# Sources are listed so that a source distribution carries them.
setup(
    ext_modules=[Extension(NAME, sources=SOURCES)],
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild},
)
