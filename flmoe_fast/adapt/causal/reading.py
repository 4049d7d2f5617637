"""What a forward pass of a decoder shows: what enters its layers, what they are called with, who may look at whom.

Nothing of an architecture is known beforehand. The model runs once with the sample; its layers are then called again
with their own arguments, cut to the tokens at hand, and with keys and values that were kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.around import CACHES, count_returned, eager, instead, visible_keys
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.steady import steady


@dataclass(frozen=True)
class LayerCall:
    """How a layer is called with a sample of L tokens.

    Attributes
    ----------
    layer : nn.Module
    hidden : str
        The argument that states (1, L, H) come in.
    cache : str
        The argument that takes what keeps keys and values.
    mask : str
        The argument that takes an attention mask.
    others : dict
        All other arguments; tensors along the tokens among them.
    visible : int
        Which of :attr:`Reading.visible` says who sees whom.
    added : Tensor (L, H) or None
        What the model adds to the states after this layer.
    """

    layer: nn.Module
    hidden: str
    cache: str
    mask: str
    others: dict[str, Any]
    visible: int
    added: torch.Tensor | None

    def arguments(self, positions: torch.Tensor, length: int, known: dict[int, object]) -> dict[str, Any]:
        """The other arguments for some of the tokens; what layers have in common is cut once."""
        return {name: _at(value, positions, length, known) for name, value in self.others.items()}


@dataclass(frozen=True)
class Reading:
    """A decoder and one sample of L tokens.

    Attributes
    ----------
    name : str
        Where the layers are.
    calls : tuple of LayerCall
    states : Tensor (L, H)
        What enters the first layer.
    visible : tuple of BoolTensor (L, L)
        Which query (row) may attend to which key, one for every kind of layer.
    positions : Tensor or None
        Position ids that the model worked out, where it hands them to its layers' module.
    returned : int
        How many things the layers return, see :func:`count_returned`.
    logits : Tensor (1, R, V)
        The model's own, at the last positions.
    """

    name: str
    calls: tuple[LayerCall, ...]
    states: torch.Tensor
    visible: tuple[torch.Tensor, ...]
    positions: torch.Tensor | None
    returned: int
    logits: torch.Tensor

    @property
    def layers(self) -> list[nn.Module]:
        return [call.layer for call in self.calls]

    def closed(self) -> torch.Tensor:
        """BoolTensor (L + 1,): whether nothing before a position looks at it or beyond."""
        length = len(self.states)
        sees = torch.stack(list(self.visible)).any(0)
        last = torch.where(sees, torch.arange(length), -1).amax(1)
        furthest = torch.cat([torch.tensor([-1]), last.cummax(0).values])
        return furthest < torch.arange(length + 1)

    def seen(self) -> torch.Tensor:
        """BoolTensor (L,): whether anything but itself looks at a token; padding is looked at by nobody."""
        length = len(self.states)
        others = ~torch.eye(length, dtype=torch.bool)
        return (torch.stack(list(self.visible)) & others).flatten(0, 1).any(0)


def read_decoder(model: nn.Module, inputs: Mapping[str, torch.Tensor], reads: int) -> Reading:
    """Watch one forward pass.

    Raises
    ------
    Unsupported
        No list of layers takes states of all tokens, or the layers keep no keys and values.
    """
    length = inputs["input_ids"].shape[1]
    stacks = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    }
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in stacks}
    results: dict[str, list[torch.Tensor]] = {name: [] for name in stacks}
    started: list[str] = []
    returned: dict[str, int] = {}
    positions: dict[str, torch.Tensor | None] = {}

    def enters(name: str):
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            started.extend([name] if not seen[name] else [])
            seen[name].append(dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs)

        return keep

    def leaves(name: str):
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            returned[name] = count_returned(output)
            results[name].append(first_of(output))

        return keep

    def owner(name: str):
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            positions[name] = kwargs.get("position_ids")

        return keep

    with steady(model), eager(model), contextlib.ExitStack() as hooks:
        for name, layers in stacks.items():
            parent = model.get_submodule(name.rpartition(".")[0])
            hooks.callback(parent.register_forward_pre_hook(owner(name), with_kwargs=True).remove)
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(enters(name), with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(leaves(name)).remove)
        logits = model(**inputs, use_cache=False).logits[:, -reads:]
    used = [name for name in started if _takes(seen[name][0], length)]
    if not used or len(seen[used[-1]]) != len(stacks[used[-1]]):
        ran = ", ".join(started) or "none"
        got = f"no list of layers that each take all {length} tokens once (lists that run: {ran})"
        raise Unsupported("model", got, "a list of decoder layers")
    name = used[-1]  # whatever reads a picture comes before
    return _reading(name, stacks[name], seen[name], results[name], positions[name], returned[name], logits)


def _reading(
    name: str,
    layers: list[nn.Module],
    seen: list[dict[str, Any]],
    results: list[torch.Tensor],
    positions: torch.Tensor | None,
    returned: int,
    logits: torch.Tensor,
) -> Reading:
    states = next(iter(seen[0].values()))[0]
    length = len(states)
    visible: list[torch.Tensor] = []
    calls = []
    for index, (layer, given) in enumerate(zip(layers, seen)):
        what = f"{name}.{index} ({type(layer).__name__})"
        parameters = inspect.signature(layer.forward).parameters
        cache = next((c for c in CACHES if c in given or c in parameters), None)
        if cache is None:
            expected = "layers that keep keys and values (linear attention and convolutions over time keep other state)"
            raise Unsupported("model", f"{what}, which takes none of {CACHES}", expected)
        hidden = next(iter(given))
        mask = next((n for n, v in given.items() if isinstance(v, torch.Tensor) and v.dim() == 4 and n != hidden), None)
        sees = visible_keys(None if mask is None else given[mask], length, what)
        if mask is None:
            expected = "a mask written out (1, 1, L, L); linear attention has none, and keeps other state"
            raise Unsupported("model", f"{what} without an attention mask", expected)
        everybody = torch.ones(length, length, dtype=torch.bool)
        sees = everybody if sees is None else sees | torch.eye(length, dtype=torch.bool)
        kind = next((k for k, known in enumerate(visible) if torch.equal(known, sees)), len(visible))
        visible += [sees] if kind == len(visible) else []
        others = {n: v for n, v in given.items() if n not in (hidden, mask, cache)}
        added = None
        if index + 1 < len(layers):
            step = next(iter(seen[index + 1].values()))[0] - results[index][0]
            added = step if bool(step.any()) else None
        calls.append(LayerCall(layer, hidden, cache, mask, others, kind, added))
    return Reading(name, tuple(calls), states.clone(), tuple(visible), positions, returned, logits)


def entering(model: nn.Module, reading: Reading, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What enters the first layer (L, H) with other inputs; the layers do not run."""
    kept: list[torch.Tensor] = []

    def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append(args[0] if args else kwargs[reading.calls[0].hidden])

    with steady(model), eager(model), instead(reading.layers, None, reading.returned):
        hook = reading.layers[0].register_forward_pre_hook(enters, with_kwargs=True)
        try:
            model(**inputs, use_cache=False)
        finally:
            hook.remove()
    return kept[0][0].clone()


def head(model: nn.Module, reading: Reading, states: torch.Tensor) -> torch.Tensor:
    """Logits (C, R, V) that the model makes of final states (C, R, H), by its own norm and projection."""
    with steady(model), instead(reading.layers, states, reading.returned):
        return _speaker(model, reading)(inputs_embeds=torch.zeros_like(states), use_cache=False).logits


def _speaker(model: nn.Module, reading: Reading) -> nn.Module:
    """The model, or the part of it that has the layers and asks for nothing but embeddings."""
    path = reading.name.split(".")
    for depth in range(len(path)):
        part = model.get_submodule(".".join(path[:depth]))
        asked = inspect.signature(part.forward).parameters
        needed = [p for p in asked.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if "inputs_embeds" in asked and not needed:
            return part
    return model


def first_of(output: Any) -> torch.Tensor:
    """The states that a layer returns, alone or with others."""
    return output[0] if isinstance(output, tuple) else output


def _takes(given: Mapping[str, Any], length: int) -> bool:
    states = next(iter(given.values()), None)
    return isinstance(states, torch.Tensor) and states.dim() == 3 and states.shape[:2] == (1, length)


def _at(value: Any, positions: torch.Tensor, length: int, known: dict[int, object]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_at(part, positions, length, known) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in known:
        axis = value.dim() - 2 if value.is_floating_point() else value.dim() - 1
        along = axis >= 0 and value.shape[axis] == length
        known[id(value)] = value.index_select(axis, positions.to(value.device)) if along else value
    return known[id(value)]
