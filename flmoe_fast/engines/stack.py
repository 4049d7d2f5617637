"""What engines know of transformers: layers of E stacks side by side, folded, in float64 on the CPU.

An FL-I2MoE is E stacks that read the same tokens, one for every expert; somebody else's encoder is one. Both are
described here in the same words, and engines lay the numbers out as they multiply them: cast, padded, tiled.

All folding is exact algebra, done in float64 so that an engine's cast is the only rounding:

* 1/sqrt(d) of the scores goes into Q.
* A constant added to every key moves all scores of a query alike, which a softmax does not see: K has no bias, unless
  keys are rotated by their places or compared with relative positions.
* Attention weights sum to one, so a constant added to every value comes out as it went in: V's bias goes through the
  output projection into the output's.
* Where LayerNorms come before the sub-blocks, gain g and shift s go into the projection behind them:
  ``W (g * n + s) = (W diag(g)) n + W s``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

T = TypeVar("T")

#: Scores times this are for softmaxes in base 2.
LOG2E = 1.0 / math.log(2.0)
#: Epsilon of LayerNorms that say nothing else.
EPSILON = 1e-5


@dataclass(frozen=True)
class Norm:
    """A LayerNorm; ``gain`` and ``shift`` (E, 1, H) are None where they are folded into what follows.

    By the rule "rms" the mean is left in; by "none" nothing happens.
    """

    epsilon: float = EPSILON
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    rule: str = "layer"


def normalised(
    x: torch.Tensor, rule: str, gain: torch.Tensor | None, shift: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Rows (..., H) by a rule of :class:`Norm`, with gain and shift (H,) where they are not folded."""
    if rule == "none":
        return x
    if rule == "rms":
        return F.rms_norm(x, x.shape[-1:], gain, epsilon)
    return F.layer_norm(x, x.shape[-1:], gain, shift, epsilon)


@dataclass(frozen=True)
class Networks:
    """A sparse feed-forward block of all E stacks: X networks each, stack after stack."""

    gate: torch.Tensor  # (E, H, X)
    gate_bias: torch.Tensor  # (E, 1, X)
    up: torch.Tensor  # (E X, H, F)
    up_bias: torch.Tensor  # (E X, 1, F)
    down: torch.Tensor  # (E X, F, H)
    down_bias: torch.Tensor  # (E X, 1, H)


@dataclass(frozen=True)
class Layer:
    """One layer of all E stacks; every matrix is stored input-major, ready for ``x @ w``. D = heads * head width.

    A sparse feed-forward block is in ``networks``; its layer's dense one, like that of a layer which has none, is of
    width F = 0. A gated one has 2 F columns in ``up``: those that go through the activation, then what multiplies them.
    """

    qkv: torch.Tensor  # (E, H, 3 D) columns of Q head by head, then of K, then of V
    q_bias: torch.Tensor  # (E, 1, D)
    out: torch.Tensor  # (E, D, H)
    out_bias: torch.Tensor  # (E, 1, H)
    up: torch.Tensor  # (E, H, F)
    up_bias: torch.Tensor  # (E, 1, F)
    down: torch.Tensor  # (E, F, H)
    down_bias: torch.Tensor  # (E, 1, H)
    networks: Networks | None = None
    norm1: Norm = Norm()
    norm2: Norm = Norm()
    k_bias: torch.Tensor | None = None  # (E, 1, D), where scores depend on more than queries times keys

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Layer:
        """The layer with every tensor replaced by what ``change`` makes of it."""
        return mapped(self, change)

    def projections(self, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Q, K and V as columns (E, H, 3 D) and their bias (E, 1, 3 D), scores times ``scale``."""
        q, k, v = self.qkv.chunk(3, dim=2)
        zeros = torch.zeros_like(self.q_bias)
        k_bias = zeros if self.k_bias is None else self.k_bias
        return torch.cat([q * scale, k, v], dim=2), torch.cat([self.q_bias * scale, k_bias, zeros], dim=2)


def mapped(part: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A dataclass of tensors, numbers and dataclasses with every tensor replaced."""
    if isinstance(part, torch.Tensor):
        return change(part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    return replace(part, **{field.name: mapped(getattr(part, field.name), change) for field in fields(part)})


@dataclass(frozen=True)
class Stack:
    """E stacks of layers of the same shape.

    Attributes
    ----------
    layers : tuple of Layer
    heads : int
    pre : bool
        LayerNorms before each sub-block, folded; otherwise after the residual.
    residual : bool
        Whether attention is added to its input (not in the original generation of I2MoE).
    activation : function or None
        Between the two projections of a feed-forward block, elementwise; None is the exact GELU.
    gate : str or None
        Rule by which tokens choose networks in sparse blocks, see :class:`FLI2MoEConfig`.
    slots : int
        Networks that a token goes to; 0 without sparse blocks.
    gated : bool
        Whether feed-forward blocks multiply what comes through the activation.
    """

    layers: tuple[Layer, ...]
    heads: int
    pre: bool = True
    residual: bool = True
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    gate: str | None = None
    slots: int = 0
    gated: bool = False

    @property
    def count(self) -> int:
        """E, how many stacks there are."""
        return len(self.layers[0].out)

    @property
    def width(self) -> int:
        """H, the width of the stream."""
        return self.layers[0].out.shape[2]

    @property
    def attended(self) -> int:
        """D, the width of all heads together."""
        return self.layers[0].out.shape[1]

    @property
    def expanded(self) -> int:
        """F, the width inside a feed-forward block."""
        return max(layer.up.shape[2] if layer.networks is None else layer.networks.up.shape[2] for layer in self.layers)

    @property
    def networks(self) -> int:
        """X, networks of a sparse block; 0 where all are dense."""
        return max(0 if layer.networks is None else layer.networks.gate.shape[2] for layer in self.layers)


class PreparedStack:
    """A stack, and what engines have laid out of it: any number of samples and threads share both.

    Attributes
    ----------
    stack : Stack
    """

    def __init__(self, stack: Stack):
        self.stack = stack
        self._keep()

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned the first time that it was asked for by ``key``."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            return self._kept[key]

    def _keep(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Without what engines laid out, which they do again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep()
