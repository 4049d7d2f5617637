"""Encoder layers of other people's models in one form, and folded as engines take them.

One self-attention, a feed-forward block of two projections or of three, and two norms, before the sub-blocks or after
their residuals. How a layer is found to be of this form is in :mod:`flmoe_fast.adapt.layer_reading`, and it is compared
with what the layer computes before it is used (:mod:`flmoe_fast.adapt.tower`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.places import Places
from flmoe_fast.engines.stack import Layer, Norm, Stack, normalised


class Unsupported(ArgumentError):
    """A model that the encoder engine cannot take; the message names the layer and says why."""


@dataclass(frozen=True)
class NormParts:
    """A norm over the width H; by the rule "rms" the mean is left in, and "none" is no norm at all."""

    rule: str
    gain: torch.Tensor
    shift: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x, self.rule, self.gain, self.shift, self.epsilon)


@dataclass(frozen=True)
class LayerParts:
    """The weights of one encoder layer as ``x @ W.T + b`` has them, detached, in the model's dtype.

    Shapes: query, key and value (D, H) with biases (D,), out (H, D), up (F, H), down (H, F); D = heads * head width.
    Where the feed-forward block is gated, up is (2 F, H): what goes through the activation, then what multiplies it.
    """

    heads: int
    scale: float  # of scores
    pre: bool  # norms before each sub-block; otherwise after the residual
    either: bool  # the names of its parts do not tell, and ``pre`` is a guess
    qkv: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    out: tuple[torch.Tensor, torch.Tensor]
    norm1: NormParts
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    norm2: NormParts
    activation: Callable[[torch.Tensor], torch.Tensor]
    gated: bool = False

    def attend(self, x: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output (C, L, H) and its attention (C, h, L, L), written out so that both can be differentiated.

        ``places`` are those of all L tokens, in the dtype and on the device of ``x``.
        """
        everyone = torch.arange(x.shape[1], device=x.device)[None]
        read = self.norm1(x) if self.pre else x
        q, k, v = (F.linear(read, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv)
        q, k = places.rotated(q * self.scale, everyone), places.rotated(k, everyone)
        scores = q @ k.transpose(2, 3)
        added = places.added(q, k, everyone, everyone)
        scores = scores if added is None else scores + added
        if places.allowed is not None:
            scores = scores.masked_fill(~places.allowed, -torch.inf)
        attention = scores.softmax(-1)
        x = x + F.linear((attention @ v).transpose(1, 2).flatten(2), *self.out)
        x = x if self.pre else self.norm1(x)
        wide = F.linear(self.norm2(x) if self.pre else x, *self.up)
        if self.gated:
            through, factor = wide.chunk(2, dim=-1)
            wide = self.activation(through) * factor
        else:
            wide = self.activation(wide)
        x = x + F.linear(wide, *self.down)
        return x if self.pre else self.norm2(x), attention


def fold(parts: Sequence[LayerParts], placed: bool = False) -> Stack:
    """Layers as one stack, for the engines; ``placed`` where scores are more than queries times keys."""
    first = parts[0]
    probe = torch.linspace(-8, 8, 257, dtype=torch.float64)
    with torch.no_grad():
        exact = torch.equal(first.activation(probe), F.gelu(probe))
    layers = tuple(_folded(part, placed) for part in parts)
    activation = None if exact else first.activation
    return Stack(layers, first.heads, pre=first.pre, activation=activation, gated=first.gated)


def _folded(parts: LayerParts, placed: bool) -> Layer:
    def exact(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device="cpu", dtype=torch.float64)

    (q, q_bias), (k, k_bias), (v, v_bias) = ((exact(w), exact(b)) for w, b in parts.qkv)
    q, q_bias = q * parts.scale, q_bias * parts.scale
    out, out_bias = (exact(t) for t in parts.out)
    up, up_bias = (exact(t) for t in parts.up)
    (gain1, shift1), (gain2, shift2) = ((exact(n.gain), exact(n.shift)) for n in (parts.norm1, parts.norm2))
    norms = [
        Norm(norm.epsilon, rule=norm.rule)
        if parts.pre
        else Norm(norm.epsilon, gain[None, None], None if norm.rule == "rms" else shift[None, None], norm.rule)
        for norm, gain, shift in ((parts.norm1, gain1, shift1), (parts.norm2, gain2, shift2))
    ]
    if parts.pre:
        q_bias, k_bias, v_bias = q_bias + q @ shift1, k_bias + k @ shift1, v_bias + v @ shift1
        q, k, v = q * gain1, k * gain1, v * gain1
        up_bias = up_bias + up @ shift2
        up = up * gain2
    return Layer(
        qkv=torch.cat([q, k, v]).T[None].contiguous(),
        q_bias=q_bias[None, None],
        out=out.T[None].contiguous(),
        out_bias=(out_bias + out @ v_bias)[None, None],
        up=up.T[None].contiguous(),
        up_bias=up_bias[None, None],
        down=exact(parts.down[0]).T[None].contiguous(),
        down_bias=exact(parts.down[1])[None, None],
        norm1=norms[0],
        norm2=norms[1],
        k_bias=k_bias[None, None] if placed else None,
    )
