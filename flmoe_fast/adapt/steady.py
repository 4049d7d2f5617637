"""Somebody else's model, run so that only its inputs matter: in eval mode, with the same random numbers each time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flmoe_fast.model.network import eval_mode

T = TypeVar("T")

#: The implementation of transformers' experts whose products exist in half and single precision only.
_GROUPED = "grouped_mm"

#: One run of a model at a time: games replace parts of it while it runs, and put them back.
_locks: WeakKeyDictionary[nn.Module, AbstractContextManager] = WeakKeyDictionary()
_locks_lock = threading.Lock()
#: PyTorch's generator belongs to the process, not to a model.
_generator_lock = threading.RLock()
#: Whether a whole forward pass of a model draws random numbers; models that are not here have not been asked.
_draws: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextlib.contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and the same random numbers inside the ``with`` block; one thread a model.

    Float64 experts of transformers run expert by expert there, since grouped products have no float64.
    """
    with _lock(model), contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_experts_in_double(model))
        if _draws.get(model, True):
            stack.enter_context(_generator_lock)
            stack.enter_context(torch.random.fork_rng(_devices(model)))
            torch.manual_seed(0)
        yield


def draws_random_numbers(model: nn.Module, run: Callable[[], T]) -> tuple[T, bool]:
    """What ``run`` returns, and whether it draws random numbers: then results depend on what shares a batch."""
    with steady(model):
        if model in _draws and not _draws[model]:
            return run(), False
        before = _generators(model)
        output = run()
        drawn = any(not torch.equal(a, b) for a, b in zip(before, _generators(model)))
    _draws[model] = drawn
    return output, drawn


def _lock(model: nn.Module) -> AbstractContextManager:
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _generators(model: nn.Module) -> list[torch.Tensor]:
    return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(model))]


@contextlib.contextmanager
def _experts_in_double(model: nn.Module) -> Iterator[None]:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or parameter.dtype != torch.float64:
        yield
        return
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    chosen = [(c, getattr(c, "_experts_implementation_internal", None)) for c in configs.values()]
    chosen = [(config, name) for config, name in chosen if name == _GROUPED]
    try:
        for config, _ in chosen:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, name in chosen:
            config._experts_implementation_internal = name
