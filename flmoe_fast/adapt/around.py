"""Running a model around its layers: layers that hand over given states, attention written out, masks as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.layers import Unsupported

#: An additive mask below this hides a key; between it and zero it would be a bias, which no plain layer has.
HIDDEN = -1e4
#: What layers call the object that keeps keys and values.
CACHES = ("past_key_values", "past_key_value", "layer_past")


@contextlib.contextmanager
def instead(layers: list[nn.Module], states: torch.Tensor | None, returned: int) -> Iterator[None]:
    """Layers that return ``states``, or what they are given, without computing anything.

    ``returned`` is how many things they return, see :func:`count_returned`.
    """

    def forward(index: int) -> Callable:
        def skip(*args: object, **kwargs: object) -> object:
            given = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
            out = states if index == 0 and states is not None else given
            return (out, *[None] * (returned - 1)) if returned else out

        return skip

    # Other libraries may have put a forward on the layer itself; it has to be there again afterwards.
    own = [layer.__dict__.get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = forward(index)
    try:
        yield
    finally:
        for layer, forward_of_its_own in zip(layers, own):
            del layer.forward
            if forward_of_its_own is not None:
                layer.forward = forward_of_its_own


def count_returned(output: object) -> int:
    """How many things a layer returned in a tuple; 0 where it returned its states alone."""
    return len(output) if isinstance(output, tuple) else 0


@contextlib.contextmanager
def eager(model: nn.Module, unless: Sequence[str] = ()) -> Iterator[None]:
    """Attention written out, so that masks are explicit; afterwards the model's own choice again.

    Parts of the model whose choice is among ``unless`` keep it.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    chosen = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    chosen = [(config, name) for config, name in chosen if name not in unless]
    try:
        for config, _ in chosen:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in reversed(chosen):
            config._attn_implementation = name


def visible_keys(mask: torch.Tensor | None, length: int, name: str) -> torch.Tensor | None:
    """Attention mask (1, 1, 1 or L, L), additive or bool, as (L, L) bool on the CPU; None where nothing is hidden."""
    if mask is None:
        return None
    if mask.shape[0] != 1 or mask.shape[1] != 1 or mask.shape[3] != length:
        got = f"{name} with an attention mask of shape {tuple(mask.shape)}"
        raise Unsupported("model", got, "one mask for all heads (1, 1, 1 or L, L)")
    visible = mask.cpu() if mask.dtype == torch.bool else mask.cpu() == 0
    if mask.dtype != torch.bool and bool(((mask.cpu() > HIDDEN) & ~visible).any()):
        raise Unsupported("model", f"{name} with a bias on its attention scores", "a mask that shows or hides")
    visible = visible[0, 0].expand(length, length).contiguous()
    return None if bool(visible.all()) else visible


def torch_mask(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The masks of PyTorch's own encoder layers as one additive mask (1, 1, 1 or L, L)."""
    total: torch.Tensor | None = None
    for name, axes in (("src_mask", (None, None)), ("src_key_padding_mask", (slice(None), None, None))):
        mask = given.get(name)
        if mask is None:
            continue
        mask = torch.zeros(mask.shape).masked_fill(mask.cpu(), -torch.inf) if mask.dtype == torch.bool else mask.cpu()
        total = mask[axes] if total is None else total + mask[axes]
    return total
