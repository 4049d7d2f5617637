"""The encoder layers of a model: where they are, what has been read of them, and that it is what they compute."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.around import CACHES, eager
from flmoe_fast.adapt.layer_reading import read_layer
from flmoe_fast.adapt.layers import LayerParts, Unsupported, fold
from flmoe_fast.adapt.module_game import quantised
from flmoe_fast.adapt.players import NOBODY
from flmoe_fast.adapt.steady import steady
from flmoe_fast.engines.places import Places
from flmoe_fast.engines.problem import StackProblem
from flmoe_fast.engines.stack import PreparedStack
from flmoe_fast.engines.torch_stack import TorchStack

#: Largest relative difference between a layer and what was read of it, both in float64. Anything a layer does beside
#: what a plain one does is far larger; some models take the softmax in float32 whatever the rest is in.
LAYER_TOLERANCE = 1e-6

#: Arguments and keywords.
Call = tuple[tuple, dict[str, Any]]


@dataclass
class Stack:
    """The encoder layers of a model: a list of modules, where they are, and what has been read of them.

    One that is kept serves any number of samples: engines lay out its weights once, and its layers are compared with
    what was read of them once.

    Attributes
    ----------
    name : str
    layers : list of modules
    parts : list of LayerParts
    compared : bool
    times : int
        How often the whole list runs, each time on what it returned.
    placed : bool
        Whether its attention makes more of tokens' places than a mask.
    """

    name: str
    layers: list[nn.Module]
    parts: list[LayerParts] = field(default_factory=list)
    compared: bool = False
    times: int = 1
    placed: bool = False

    @functools.cached_property
    def prepared(self) -> PreparedStack:
        """The layers as engines take them."""
        return PreparedStack(fold(self.parts_run, self.placed))

    @property
    def run(self) -> list[nn.Module]:
        """The layers in the order they run in."""
        return self.layers * self.times

    @property
    def parts_run(self) -> list[LayerParts]:
        """Their parts likewise."""
        return self.parts * self.times

    def turn(self) -> None:
        """Take norms to be on the other side of the sub-blocks."""
        self.parts = [replace(part, pre=not part.pre) for part in self.parts]
        self.__dict__.pop("prepared", None)


def find_stacks(model: nn.Module) -> list[Stack]:
    """All lists of plain encoder layers in a model.

    Raises
    ------
    Unsupported
        There is none; the message says why the layers of the longest list of equal modules are not plain.
    """
    if quantised(model):
        got = f"a {type(model).__name__} with quantised parts ({quantised(model)})"
        raise Unsupported("model", got, "floating point weights: what is computed together would change the scales")
    lists = [
        Stack(name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and len({type(m) for m in module}) == 1
    ]
    lists = [stack for stack in lists if any(True for _ in stack.layers[0].parameters())]
    found, reasons = [], []
    for stack in lists:
        try:
            stack.parts = [read_layer(layer, f"{stack.name}.{i}") for i, layer in enumerate(stack.layers)]
            found.append(stack)
        except Unsupported as reason:
            reasons.append((len(stack.layers) * sum(p.numel() for p in stack.layers[0].parameters()), reason))
    if found:
        return found
    if reasons:
        raise max(reasons, key=lambda pair: pair[0])[1]
    raise Unsupported("model", f"a {type(model).__name__} without a list of equal layers", "a stack of encoder layers")


def compare_layers(model: nn.Module, stack: Stack, calls: Sequence[Call], places: Sequence[Places]) -> None:
    """Every layer as it was read against what it returns for the full sample, both in float64.

    Raises
    ------
    Unsupported
        One differs.
    """

    def compare() -> None:
        with steady(model), eager(model):
            for index, (call, here) in enumerate(zip(calls, places)):
                _compare(stack, index, call, here)

    try:
        compare()
    except Unsupported:
        if not all(part.either for part in stack.parts):
            raise
        stack.turn()
        compare()
    stack.compared = True


def _compare(stack: Stack, index: int, call: Call, places: Places) -> None:
    layer = stack.run[index]
    name = f"{stack.name}.{index} ({type(layer).__name__})"
    double = torch.float64
    args = tuple(_cast(a, double) for a in call[0])
    kwargs = {k: _cast(v, double) for k, v in call[1].items() if k not in CACHES}  # it has this pass in it already
    before = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    after = copy.deepcopy(layer).double()(*args, **kwargs)
    after = after[0] if isinstance(after, tuple) else after
    everyone = torch.arange(before.shape[1])
    nobody = torch.full_like(everyone, NOBODY)
    whole = stack.prepared.stack
    alone = PreparedStack(replace(whole, layers=(whole.layers[index],)))
    allowed = places.allowed
    problem = StackProblem(alone, before[0], before[0], nobody, nobody >= 0, allowed, everyone, places=(places,))
    engine = TorchStack(problem, dtype=double, device=before.device, memory=1 << 30)
    ours = engine.evaluate(torch.ones(1, 1, dtype=torch.bool))
    # Nobody ever sees what a model makes of padding.
    others = ~torch.eye(len(everyone), dtype=torch.bool)
    seen = (others if allowed is None else others & allowed).any(0).to(before.device)
    seen = seen if bool(seen.any()) else ~seen
    error = float((ours - after).abs()[:, seen].max() / after.abs()[:, seen].max())
    if not error <= LAYER_TOLERANCE:
        got = f"{name}, whose output differs from a plain encoder layer's by {error:.1e}"
        raise Unsupported("model", got, f"the same output within {LAYER_TOLERANCE:.0e}")


def _cast(value: object, dtype: torch.dtype) -> object:
    """Floating point tensors, also inside tuples, in another dtype."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
