"""Coalitions through a plain encoder stack of any depth, sharing what is exact to share.

* Where every token has two possible states, the first layer's LayerNorm, queries, keys and values are two rows a token.
* Removed tokens are left out altogether: coalitions are taken in groups of equal size, so that nothing is padded and
  no mask remains. They are only kept (and hidden as keys) where the head of the model reads them.
* Tokens from which no information reaches what the head reads are left out from the start: padding, and in a causal
  text everything after the token that is read.
* In the last layer, queries, projections and the feed-forward block are computed only for the tokens the head reads.

Tokens keep their places when others are left out: rotations and what is added to scores are taken from tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.engine import Engine
from flmoe_fast.engines.places import Places
from flmoe_fast.engines.problem import StackProblem
from flmoe_fast.engines.stack import Norm, Stack, normalised


def gelu_in_place(x: torch.Tensor) -> torch.Tensor:
    """The exact GELU of x, which is overwritten."""
    return torch.ops.aten.gelu_(x)


@dataclass(frozen=True)
class PackedNorm:
    """A norm of rows in one dtype on one device; gain and shift are None where they are folded into what follows."""

    rule: str
    epsilon: float
    gain: torch.Tensor | None
    shift: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return normalised(x, self.rule, self.gain, self.shift, self.epsilon)


@dataclass(frozen=True)
class PackedLayer:
    """One layer of a folded stack in one dtype on one device; every matrix is input-major, ready for ``x @ w``."""

    heads: int
    pre: bool
    qkv: torch.Tensor  # (H, 3 D)
    qkv_bias: torch.Tensor  # (3 D,) of Q, of K where it has one, then zeros
    out: torch.Tensor  # (D, H)
    out_bias: torch.Tensor  # (H,)
    norm1: PackedNorm
    up: torch.Tensor  # (H, F), or (H, 2 F)
    up_bias: torch.Tensor  # (F,), or (2 F,)
    down: torch.Tensor  # (F, H)
    down_bias: torch.Tensor  # (H,)
    norm2: PackedNorm
    activation: Callable[[torch.Tensor], torch.Tensor]
    gated: bool

    @staticmethod
    def of(stack: Stack, index: int, dtype: torch.dtype, device: torch.device) -> PackedLayer:
        """Lay out one layer."""
        layer = stack.layers[index]

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype).contiguous()

        def packed(norm: Norm) -> PackedNorm:
            gain, shift = (None if part is None else cast(part[0, 0]) for part in (norm.gain, norm.shift))
            return PackedNorm(norm.rule, norm.epsilon, gain, shift)

        qkv, qkv_bias = layer.projections()
        return PackedLayer(
            heads=stack.heads,
            pre=stack.pre,
            qkv=cast(qkv[0]),
            qkv_bias=cast(qkv_bias[0, 0]),
            out=cast(layer.out[0]),
            out_bias=cast(layer.out_bias[0, 0]),
            norm1=packed(layer.norm1),
            up=cast(layer.up[0]),
            up_bias=cast(layer.up_bias[0, 0]),
            down=cast(layer.down[0]),
            down_bias=cast(layer.down_bias[0, 0]),
            norm2=packed(layer.norm2),
            # The exact GELU is done in place.
            activation=gelu_in_place if stack.activation is None else stack.activation,
            gated=stack.gated,
        )

    @property
    def width(self) -> int:
        """D, the width of all heads together."""
        return len(self.out)

    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention reads of the stream (..., H): normalised where LayerNorms come first."""
        return self.norm1(x) if self.pre else x

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values (..., 3 D) of the stream (..., H)."""
        return torch.addmm(self.qkv_bias, self.attention_input(x).flatten(0, -2), self.qkv).unflatten(0, x.shape[:-1])

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output (R, H) from its input x (R, H) and the attention's output (R, D); ``x`` is overwritten."""
        x += self.out_bias
        x.addmm_(attended, self.out)
        x = x if self.pre else self.norm1(x)
        wide = torch.addmm(self.up_bias, self.norm2(x) if self.pre else x, self.up)
        if self.gated:
            through, factor = wide.chunk(2, dim=-1)
            wide = self.activation(through) * factor
        else:
            wide = self.activation(wide)
        x += self.down_bias
        x.addmm_(wide, self.down)
        return x if self.pre else self.norm2(x)


class TorchStack(Engine[StackProblem, torch.Tensor]):
    """Final states of the tokens that the head reads, for coalitions of one :class:`StackProblem`."""

    name = "torch"

    def __init__(self, problem: StackProblem, **options: Any):
        super().__init__(problem, **options)
        self.layers = problem.model.kept((PackedLayer, self.dtype, str(self.device)), self._lay_out)
        self.kept = problem.reaching.to(self.device)  # (L',)
        self.owner = problem.owner.to(self.device)[self.kept]
        self.removed = problem.removed.to(self.device)[self.kept]
        reads = problem.reads.to(self.device)
        self.reads = torch.searchsorted(self.kept, reads)
        self.places = self._layers_places()
        self.adds = any(places.adds for places in self.places)
        # Where all layers look at what is before, and order is kept, no mask is needed.
        first, kinds = self.places[0], {id(places) for places in self.places}
        causal = torch.ones(len(self.kept), len(self.kept), dtype=torch.bool, device=self.device).tril()
        plain = len(kinds) == 1 and first.masked_only
        self.causal = plain and first.allowed is not None and torch.equal(first.allowed, causal)
        # A removed token can be left out unless the head looks at it.
        self.packed = not bool((self.removed & (self.owner >= 0))[self.reads].any())
        self.states = None if problem.mixed is not None else self._two_states()

    @property
    def noise(self) -> dict[str, float]:
        return self.problem.model.kept("noise", dict)

    @property
    def two_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream (2, L', H) and first-layer queries, keys, values (2, L', 3 D) of tokens that have two states."""
        if self.states is None:
            raise ArgumentError("problem", "tokens of more than two states", "two states a token")
        return self.states

    def evaluate(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H) of coalitions (C, n) bool, in the order of ``problem.reads``."""
        coalitions = coalitions.to(self.device)
        shape = (len(coalitions), len(self.reads), self.layers[0].out.shape[1])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for rows, tokens in self._groups(coalitions):
            out[rows] = self._run(coalitions[rows], tokens)
        return out

    def _lay_out(self) -> tuple[PackedLayer, ...]:
        stack = self.problem.model.stack
        return tuple(PackedLayer.of(stack, i, self.dtype, self.device) for i in range(len(stack.layers)))

    def _layers_places(self) -> list[Places]:
        """Every layer's tables over the tokens that matter, each kind of them once."""
        given = self.problem.places or (Places(self.problem.allowed),) * len(self.layers)
        known: dict[int, Places] = {}
        for places in given:
            if id(places) not in known:
                here = places.map(self._cast).of(self.kept)
                hides = here.allowed is not None and not bool(here.allowed.all())
                known[id(places)] = here if hides else replace(here, allowed=None)
        return [known[id(places)] for places in given]

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)

    # ---- what is computed once per sample -----------------------------------------------------------------------

    def _two_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream (2, L', H) and first-layer queries, keys, values (2, L', 3 D); state 1 is the token itself."""
        both = torch.stack([self.problem.absent, self.problem.present])
        both = both.to(device=self.device, dtype=self.dtype)[:, self.kept]
        return both, self.layers[0].project(both)

    # ---- coalitions in groups of equal shape --------------------------------------------------------------------

    def _groups(self, coalitions: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Rows of coalitions to run together, with their tokens (C, S); None means all tokens."""
        if not len(coalitions):
            return
        if not self.packed or not bool(self.removed.any()):
            for rows in torch.arange(len(coalitions), device=self.device).split(self._chunk(self.problem.length)):
                yield rows, None
            return
        here = self._present(coalitions) | ~self.removed  # (C, L')
        sizes = here.sum(1)
        for size in sizes.unique().tolist():
            for rows in (sizes == size).nonzero()[:, 0].split(self._chunk(size)):
                yield rows, here[rows].nonzero()[:, 1].view(len(rows), size)

    def _chunk(self, tokens: int) -> int:
        """Coalitions of so many tokens that fit the memory."""
        hidden, wide = self.layers[0].up.shape
        per_token = 3 * hidden + max(4 * self.layers[0].width, 2 * wide)
        if self.adds:  # scores are written out, and what is added to them
            per_token += 3 * self.layers[0].heads * tokens
        return max(1, self.memory // (tokens * per_token * self.layers[0].out.element_size()))

    def _present(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Presence (C, L') of every token that matters."""
        always = torch.cat([coalitions, coalitions.new_ones(len(coalitions), 1)], dim=1)
        return always[:, self.owner]

    # ---- the stack ----------------------------------------------------------------------------------------------

    def _run(self, coalitions: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        """Final states (C, R, H) of coalitions that all have the same number of tokens."""
        count = len(coalitions)
        reads = self.reads.expand(count, -1)
        if tokens is not None:
            reads = torch.searchsorted(tokens, reads.contiguous())
        keys = torch.arange(self.problem.length, device=self.device)[None] if tokens is None else tokens
        masks: dict[int, torch.Tensor | None] = {}
        stream, qkv = self._first(coalitions, tokens)
        last = len(self.layers) - 1
        for index, (layer, places) in enumerate(zip(self.layers, self.places)):
            if index:
                qkv = layer.project(stream)
            if id(places) not in masks:
                masks[id(places)] = self._mask(coalitions, tokens, places.allowed)
            mask, causal, rows = masks[id(places)], self.causal and masks[id(places)] is None, keys
            q, k, v = qkv.unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)  # (C, h, S, d) each
            q, k = places.rotated(q, keys), places.rotated(k, keys)
            if index == last and len(self.reads) < stream.shape[1]:
                rows = self.reads.expand(len(keys), -1)
                at = reads[:, None, :, None].expand(-1, layer.heads, -1, q.shape[-1])
                q = q.gather(2, at)
                if causal:
                    causal, mask = False, self._causal_rows(reads, stream.shape[1])
                elif mask is not None and mask.shape[2] > 1:
                    mask = mask.gather(2, reads[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
                stream = stream.gather(1, reads[..., None].expand(-1, -1, stream.shape[2]))
            added = places.added(q, k, rows, keys)
            if added is not None:
                mask = added if mask is None else added.masked_fill(~mask, -torch.inf)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0)
            heads = attended.transpose(1, 2).reshape(-1, layer.width)
            stream = layer.finish(stream.flatten(0, 1), heads).unflatten(0, (count, -1))
        return stream

    def _first(self, coalitions: torch.Tensor, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream (C, S, H) and queries, keys, values (C, S, 3 D) of the first layer."""
        if self.problem.mixed is not None:
            stream = self.problem.mixed(coalitions).to(device=self.device, dtype=self.dtype)[:, self.kept]
            return stream, self.layers[0].project(stream)
        if tokens is None:
            tokens = torch.arange(self.problem.length, device=self.device).expand(len(coalitions), -1)
        # A hidden token that is not left out keeps its own state; nobody attends to it.
        state = (self._present(coalitions) | self.removed).long().gather(1, tokens)
        at = state * self.problem.length + tokens
        stream, qkv = (part.flatten(0, 1)[at] for part in self.two_states)
        return stream, qkv

    def _mask(
        self, coalitions: torch.Tensor, tokens: torch.Tensor | None, allowed: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Which keys are visible, (C, 1, 1 or S, S) bool; None where all are, or where causality is all there is."""
        if tokens is not None:  # absent tokens are gone; order, and with it causality, is kept
            if allowed is None or self.causal:
                return None
            return allowed[tokens[:, :, None], tokens[:, None, :]][:, None]
        if self.packed or not bool(self.removed.any()):
            if allowed is None or self.causal:
                return None
            return allowed.expand(len(coalitions), 1, -1, -1)
        visible = (self._present(coalitions) | ~self.removed)[:, None, None, :]
        if allowed is None:
            return visible
        visible = visible & allowed
        # A query without any key would be NaN, and spread; what it sees instead reaches nobody.
        alone = ~visible.any(-1, keepdim=True)
        return visible | (alone & torch.eye(self.problem.length, dtype=torch.bool, device=self.device))

    def _causal_rows(self, reads: torch.Tensor, tokens: int) -> torch.Tensor:
        return (torch.arange(tokens, device=self.device) <= reads[..., None])[:, None]
