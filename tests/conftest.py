"""Shared by all tests: every test has its own reproducible seed, and one thread; arrays of GPU engines start as NaN."""

from __future__ import annotations

import importlib
import os
import random
import sys
import zlib

import numpy as np
import pytest
import torch

from flmoe_fast import coalitions
from tests.interpreter import searching_once

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; without a GPU nothing else can run
# Test shapes are tiny: two threads would mostly wait for each other. Processes that tests start have one thread too,
# and so the same last bits.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header() -> str:
    """The versions a failure report needs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return (
        f"python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}, "
        f"coalitions {coalitions.implementation()}, gpu {gpu}"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the test's own name, so that order and selection change nothing."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the legacy state is what libraries still read
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def quick_interpreter():
    """See :func:`searching_once`."""
    with searching_once():
        yield


@pytest.fixture
def poison(monkeypatch):
    """Every array the engine allocates starts as NaN (all bits set), so that reading what nobody wrote is seen."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made.view(torch.uint8).fill_(255).view(made.dtype)

    for name in ("triton", "chunk", "plan", "weights"):
        module = importlib.import_module(f"flmoe_fast.engines.gpu.{name}")
        monkeypatch.setattr(module, "torch", _Torch(poisoned))


class _Torch:
    """torch, but for ``empty``."""

    def __init__(self, empty):
        self.empty = empty

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def engines_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Games take the engine where they can: at the sizes of tests its speed says nothing, and changes with the load."""
    monkeypatch.setattr("flmoe_fast.adapt.choice.LONG", 0.0)
