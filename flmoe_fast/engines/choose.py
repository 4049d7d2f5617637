"""Which engine evaluates a game, and why: asked by games, by ``backends()`` and by ``flmoe-fast doctor``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import torch

from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.engines.engine import Engine, Request, TokenEngine
from flmoe_fast.engines.levels import arithmetics
from flmoe_fast.engines.problem import StackProblem, TokenProblem

#: Every backend's engines for a kind of problem, imported when one is asked for; of several, the first that fits.
ENGINES: dict[type, dict[str, tuple[str, ...]]] = {
    TokenProblem: {
        "cpu": ("cpu:CpuEngine",),
        "torch": ("portable:TorchEngine", "gated:GatedEngine"),
        "triton": ("gpu.triton:TritonEngine",),
        "cuda": ("gpu.cuda:CudaEngine",),
        "reference": ("reference:ReferenceEngine",),
    },
    StackProblem: {"cpu": ("cpu_stack:CpuStack",), "torch": ("torch_stack:TorchStack",)},
}
#: What a game of an FL-I2MoE can be asked to run on, and one of somebody else's encoder.
BACKENDS, STACK_BACKENDS = (("auto", *ENGINES[kind]) for kind in (TokenProblem, StackProblem))
#: Backends on a GPU, which have a choice of precisions.
ON_GPU = ("triton", "cuda")


def engines(backend: str, problem: TokenProblem | StackProblem | None = None) -> list[type[Engine]]:
    """The engines of a backend for a problem; without one those of an FL-I2MoE's."""
    found = []
    for path in ENGINES[TokenProblem if problem is None else type(problem)].get(backend, ()):
        module, _, name = path.partition(":")
        found.append(getattr(importlib.import_module(f"flmoe_fast.engines.{module}"), name))
    return found


def why_not(request: Request) -> str:
    """What keeps the backend of a request from it; empty if nothing does."""
    reasons = [engine.why_not(request) for engine in engines(request.backend, request.problem)]
    return reasons[0] if all(reasons) else ""


@overload
def choose(request: Request[TokenProblem]) -> tuple[TokenEngine, str]: ...
@overload
def choose(request: Request[StackProblem]) -> tuple[Engine[StackProblem, torch.Tensor], str]: ...
def choose(request: Request) -> tuple[Any, str]:
    """The engine of a request, and what about the model, not the machine, keeps a faster one from it.

    "auto" takes the fastest backend of the device that can run the model, and always finds one. A backend asked for by
    name runs or says why not.

    Raises
    ------
    ArgumentError
        The backend is unknown or cannot run the request, or ``precision`` is given to one that has no choice of it.
    """
    one_of("backend", request.backend, ("auto", *ENGINES[type(request.known_problem)]))
    if request.backend != "auto":
        _check_precision(request, request.backend)
        kinds = engines(request.backend, request.problem)
        fitting = [kind for kind in kinds if not kind.unfit(request)]
        return (fitting or kinds)[0].make(request), ""
    reasons: list[str] = []
    for backend in _candidates(request):
        for kind in engines(backend, request.problem):
            reason = kind.unfit(request) or kind.slower(request)
            if not reason and not kind.missing(request):
                _check_precision(request, backend)
                return kind.make(request), reasons[0] if reasons else ""
            reasons += [reason] if reason else []
    raise ArgumentError("backend", "'auto'", f"an engine that can run the model, but {'; '.join(reasons)}")


def _check_precision(request: Request, backend: str) -> None:
    """``precision`` is known, and given only where there is a choice of it."""
    if request.precision == "auto":
        return
    from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS

    here = arithmetics()
    if backend == "cpu" and request.precision in here:
        return
    one_of("precision", request.precision, ("auto", *dict.fromkeys((*PRECISIONS, *here))))
    if backend not in ON_GPU:
        got = f"{request.precision!r} with backend {backend!r}"
        raise ArgumentError("precision", got, "'auto', or backend 'triton' or 'cuda'")


def _candidates(request: Request) -> Sequence[str]:
    """Backends that "auto" tries, fastest first."""
    if request.device.type == "cuda" and isinstance(request.problem, TokenProblem):
        return _fastest_on_gpu(request), "torch", "reference"
    return "cpu", "torch", "reference"


def _fastest_on_gpu(request: Request) -> str:
    """The GPU backend that was measured to be the faster one on this device and shape, where both can run."""
    if any(why_not(replace(request, backend=backend)) for backend in ON_GPU):
        return "triton"
    from flmoe_fast.engines.gpu.fastest import fastest
    from flmoe_fast.engines.gpu.triton import AUTO_PRECISION

    config = request.known_problem.model.config
    precision = AUTO_PRECISION if request.precision == "auto" else request.precision
    name = torch.cuda.get_device_name(request.device)
    return fastest(name, config.hidden, config.heads, request.known_problem.length, precision)
