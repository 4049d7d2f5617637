"""The extension, and the package with and without it: what is linked, what is imported, how failures read."""

from __future__ import annotations

import ctypes.util
import importlib.util
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import flmoe_fast
from flmoe_fast import coalitions
from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.backends import Backends, backends, doctor
from flmoe_fast.environment import environment
from flmoe_fast.native import extension

ROOT = Path(__file__).resolve().parents[1]
EXTENSION, MISSING = extension()

needs_extension = pytest.mark.skipif(EXTENSION is None, reason=MISSING or "the extension is there")
needs_cuda_build = pytest.mark.skipif(
    EXTENSION is None or not EXTENSION.info()["cuda"], reason="built without CUDA kernels"
)

# A process in which the extension cannot be found, as after an install without a compiler.
WITHOUT_EXTENSION = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "flmoe_fast._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> str:
    """Run code in a fresh process from the repository's root; its standard output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checks():
    """csrc/check.py as a module."""
    spec = importlib.util.spec_from_file_location("source_checks", ROOT / "csrc" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("used", "wanted", "found"),
    [
        ("Used 167 registers, used 1 barriers, 496 bytes cmem[0]", True, ""),
        ("Used 4 registers, used 0 barriers, 1024 bytes smem, 496 bytes cmem[0]", False, ""),
        ("Used 4 registers, used 0 barriers, 496 bytes cmem[0]", False, "neither a kernel nor a stub that stops"),
        ("Used 4 registers, used 0 barriers, 1024 bytes smem, 496 bytes cmem[0]", True, "a stub"),
    ],
)
def test_code_that_would_compute_nothing_is_seen(checks, used, wanted, found):
    """Code for one architecture has a kernel or a stub that stops the program, never an empty body."""
    log = "Compiling entry function '_Z5fusedILi2EEv' for 'sm_90'\n0 bytes stack frame, 0 bytes spill stores, "
    (kernel,) = checks.RESOURCES.finditer(f"{log}0 bytes spill loads\nptxas info    : {used}\n")
    assert checks.fault(kernel, wanted) == found


def test_the_log_of_a_build_is_judged(checks, tmp_path):
    """`make nvcc-check` reads a build's log: the part about a source, its kernels, their spills, what is serialized."""
    used = "Used 167 registers, used 1 barriers, 496 bytes cmem[0]"
    entry = (
        "Compiling entry function '_Z{}{}ILi{}EEv' for 'sm_80'\n{} bytes stack frame, 0 bytes spill stores, 0 bytes "
    )
    entry += f"spill loads\nptxas info    : {used}\n"

    def written(*kernels, spilled=0, more=""):
        said = "".join(entry.format(len(name), name, 1, spilled) for name in kernels) + more
        text = f"[1/9] Building CXX object a.o\n[2/9] Building CUDA object x/width_64.cu.o\n{said}[3/9] Linking _C.so\n"
        (tmp_path / "build.log").write_text(text)
        return checks.logged(str(tmp_path / "build.log"), checks.CSRC / "fused" / "width_64.cu")

    def good(said):
        return checks.judged(said, checks.CSRC / "fused" / "width_64.cu", "sm_80")[0]

    assert good(written("fused_chain", "fused_last"))
    assert not good(written("fused_chain"))
    assert not good(written("fused_chain", "fused_last", spilled=8))
    assert not good(written("fused_chain", "fused_last", more=checks.SERIALIZED))
    assert checks.logged(str(tmp_path / "build.log"), checks.CSRC / "fused" / "width_128.cu") is None


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_plain_90_is_refused(tmp_path):
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DFLMOE_MODULE=OFF", "-DFLMOE_CUDA_ARCHS=80;90"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "got '90', expected '90a'" in " ".join(result.stderr.split())


@needs_extension
def test_extension_says_what_it_is():
    info = EXTENSION.info()
    assert set(info) == {"cuda", "without_cuda", "archs", "compiler", "nvcc", "version"}
    assert info["version"] == flmoe_fast.__version__
    assert bool(info["archs"]) == bool(info["nvcc"]) == info["cuda"] == (not info["without_cuda"])
    assert info["without_cuda"] in backends()["cuda"].reason


@needs_extension
@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_extension_links_neither_torch_nor_cuda():
    libraries = subprocess.run(["ldd", EXTENSION.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc" in libraries
    for library in ("libtorch", "libc10", "libcudart", "libcuda.", "libpython"):
        assert library not in libraries


@needs_extension
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EXTENSION.pack(0, 0, -1, 4), "pack: coalitions is -1"),
        (lambda: EXTENSION.unpack(0, 0, 2, 4), "unpack: words is a null pointer"),
        (lambda: EXTENSION.sample_contexts(0, 0, 0, 1, 0, 0, 9, False), "sample_contexts: unknown mode 9"),
        (lambda: EXTENSION.sample_contexts(0, 0, 2**32, 1, 0, 0, 0, False), "below 2\\^32"),
    ],
)
def test_extension_refuses_nonsense(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


CHAIN = ("hidden", "terms", "depth", "experts", "coalitions", "length", "wide", "attended", "attended_plane", "tape")
CHAIN += ("tape_bytes", "out_bias", "up_bias", "down_bias", "qkv_bias", "residual", "residual_rows", "words", "width")
CHAIN += ("stream_rows", "query", "query_plane", "images", "where", "fault", "backwards", "stream")


def launch_chain(coalitions: int) -> None:
    """Launch a fused kernel on the current device, on addresses that it is never to read."""
    sizes = {"hidden": 64, "terms": 1, "depth": 64, "experts": 1, "coalitions": coalitions, "length": 1, "wide": 64}
    EXTENSION.fused_chain(**{name: sizes.get(name, 0) for name in CHAIN} | {"backwards": False})


@needs_cuda_build
def test_empty_launches_touch_no_driver():
    launch_chain(0)


@needs_cuda_build
@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a CUDA driver")
def test_launch_without_a_driver_names_the_kernel():
    with pytest.raises(RuntimeError, match="^fused_chain: CUDA error 35 \\(cudaErrorInsufficientDriver\\)"):
        launch_chain(1)


def test_works_without_the_extension():
    code = """
    import torch
    from flmoe_fast import coalitions
    from flmoe_fast.engines.backends import backends
    assert coalitions.implementation() == "numpy"
    native = backends()["native"]
    assert not native.available and "FLMOE_NATIVE" in native.reason, native
    words, u = coalitions.sample_contexts(70, 4, seed=2026)
    print(words.tolist())
    """
    expected = coalitions.sample_contexts(70, 4, seed=2026).words.tolist()
    assert python(WITHOUT_EXTENSION + textwrap.dedent(code)).strip() == str(expected)


@pytest.mark.parametrize("module", ["flmoe_fast", "flmoe_fast.environment"])
def test_import_is_light(module):
    heavy = ("triton", "transformers", "matplotlib", "pandas", "sklearn", "shapiq")
    code = f"""
    import sys
    import torch
    before = set(sys.modules)  # what torch itself imports is torch's business
    import {module}
    print(sorted({{m.split(".")[0] for m in set(sys.modules) - before}} & set({heavy!r})), torch.cuda.is_initialized())
    """
    assert python(code).split() == ["[]", "False"]


def test_backends_tell_the_truth():
    found = backends()
    assert isinstance(found, Backends)
    assert [b.name for b in found] == ["reference", "torch", "cpu", "native", "cuda", "triton"]
    assert found["torch"].available
    assert found[0] is found["reference"]
    assert found["native"].available == (EXTENSION is not None)
    for backend in found:
        assert backend.available == (backend.reason == "")
        assert "\n" not in backend.reason + backend.details
        assert backend.name in repr(found)
    with pytest.raises(ArgumentError, match="'torch'"):
        found["tensorflow"]


def test_environment_and_doctor():
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert (facts["gpu"] is not None) == torch.cuda.is_available()
    report = doctor()
    assert all(name in report for name in facts)
    assert repr(backends()) in report
