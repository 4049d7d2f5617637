"""Coalitions through a plain encoder stack of any depth, sharing what is exact to share.

* Where every token has two possible states, the first layer's LayerNorm, queries, keys and values are two rows a token.
* Removed tokens are left out altogether: coalitions are taken in groups of equal size, so that nothing is padded and
  no mask remains. They are only kept (and hidden as keys) where the head of the model reads them.
* Tokens from which no information reaches what the head reads are left out from the start: padding, and in a causal
  text everything after the token that is read.
* In the last layer, queries, projections and the feed-forward block are computed only for the tokens the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flmoe_fast.adapt.layers import PackedEncoderLayer
from flmoe_fast.checks import ArgumentError


@dataclass(frozen=True)
class StackProblem:
    """One sample before an encoder stack: L tokens, n players.

    Attributes
    ----------
    present, absent : Tensor (L, H)
        Both states of every token as they enter the first layer. Equal where a token has no owner.
    owner : LongTensor (L,)
        The player who owns a token, or -1.
    removed : BoolTensor (L,)
        Tokens that are hidden from attention when absent, instead of taking their other state.
    allowed : BoolTensor (L, L) or None
        Which query (row) may attend to which key; None: everybody to everybody.
    reads : LongTensor (R,)
        Tokens whose final state the head of the model reads.
    mixed : function or None
        States (C, L, H) of coalitions (C, n) where tokens have more than two states, because several players share
        them; then ``present``, ``absent`` and ``owner`` are not used.
    """

    present: torch.Tensor
    absent: torch.Tensor
    owner: torch.Tensor
    removed: torch.Tensor
    allowed: torch.Tensor | None
    reads: torch.Tensor
    mixed: Callable[[torch.Tensor], torch.Tensor] | None = None


class StackEngine:
    """Final states of the tokens that the head reads, for coalitions of one :class:`StackProblem`.

    Parameters
    ----------
    problem : StackProblem
    layers : sequence of PackedEncoderLayer
        In the dtype and on the device of the evaluation.
    memory : int
        Bytes of activations to hold at a time.
    """

    def __init__(self, problem: StackProblem, layers: tuple[PackedEncoderLayer, ...], memory: int):
        self.problem, self.layers, self.memory = problem, layers, memory
        self.dtype, self.device = layers[0].out.dtype, layers[0].out.device
        self.kept = reaching(problem.reads, problem.allowed, len(problem.owner)).to(self.device)  # (L',)
        self.owner = problem.owner.to(self.device)[self.kept]
        self.removed = problem.removed.to(self.device)[self.kept]
        reads = problem.reads.to(self.device)
        self.reads = torch.searchsorted(self.kept, reads)
        allowed = None if problem.allowed is None else problem.allowed.to(self.device)[self.kept][:, self.kept]
        self.allowed = None if allowed is None or bool(allowed.all()) else allowed
        self.causal = self.allowed is not None and bool((self.allowed == torch.ones_like(self.allowed).tril()).all())
        # A removed token can be left out unless the head looks at it.
        self.packed = not bool((self.removed & (self.owner >= 0))[self.reads].any())
        self.states = None if problem.mixed is not None else self._two_states()

    @property
    def two_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream (2, L', H) and first-layer queries, keys, values (2, L', 3 D) of tokens that have two states."""
        if self.states is None:
            raise ArgumentError("problem", "tokens of more than two states", "two states a token")
        return self.states

    @property
    def more_exact(self) -> str:
        """How to get less rounding, for a person to read."""
        return "dtype=torch.float64"

    def about(self) -> dict[str, str]:
        """What a result should remember about the engine."""
        return {}

    @property
    def length(self) -> int:
        """Tokens that matter, L'."""
        return len(self.kept)

    def evaluate(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H) of coalitions (C, n) bool, in the order of ``problem.reads``."""
        coalitions = coalitions.to(self.device)
        shape = (len(coalitions), len(self.reads), self.layers[0].out.shape[1])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for rows, tokens in self._groups(coalitions):
            out[rows] = self._run(coalitions[rows], tokens)
        return out

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
            for rows in torch.arange(len(coalitions), device=self.device).split(self._chunk(self.length)):
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
        mask = self._mask(coalitions, tokens)
        stream, qkv = self._first(coalitions, tokens)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if index:
                qkv = layer.project(stream)
            q, k, v = qkv.unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)  # (C, h, S, d) each
            causal = self.causal and mask is None
            if index == last and len(self.reads) < stream.shape[1]:
                at = reads[:, None, :, None].expand(-1, layer.heads, -1, q.shape[-1])
                q = q.gather(2, at)
                if causal:
                    causal, mask = False, self._causal_rows(reads, stream.shape[1])
                elif mask is not None and mask.shape[2] > 1:
                    mask = mask.gather(2, reads[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
                stream = stream.gather(1, reads[..., None].expand(-1, -1, stream.shape[2]))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0)
            rows = attended.transpose(1, 2).reshape(-1, layer.width)
            stream = layer.finish(stream.flatten(0, 1), rows).unflatten(0, (count, -1))
        return stream

    def _first(self, coalitions: torch.Tensor, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream (C, S, H) and queries, keys, values (C, S, 3 D) of the first layer."""
        if self.problem.mixed is not None:
            stream = self.problem.mixed(coalitions).to(device=self.device, dtype=self.dtype)[:, self.kept]
            return stream, self.layers[0].project(stream)
        if tokens is None:
            tokens = torch.arange(self.length, device=self.device).expand(len(coalitions), -1)
        # A hidden token that is not left out keeps its own state; nobody attends to it.
        state = (self._present(coalitions) | self.removed).long().gather(1, tokens)
        at = state * self.length + tokens
        stream, qkv = (part.flatten(0, 1)[at] for part in self.two_states)
        return stream, qkv

    def _mask(self, coalitions: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Which keys are visible, (C, 1, 1 or S, S) bool; None where all are, or where causality is all there is."""
        if tokens is not None:  # absent tokens are gone; order, and with it causality, is kept
            if self.allowed is None or self.causal:
                return None
            return self.allowed[tokens[:, :, None], tokens[:, None, :]][:, None]
        if self.packed or not bool(self.removed.any()):
            if self.allowed is None or self.causal:
                return None
            return self.allowed.expand(len(coalitions), 1, -1, -1)
        visible = (self._present(coalitions) | ~self.removed)[:, None, None, :]
        if self.allowed is None:
            return visible
        visible = visible & self.allowed
        # A query without any key would be NaN, and spread; what it sees instead reaches nobody.
        alone = ~visible.any(-1, keepdim=True)
        return visible | (alone & torch.eye(self.length, dtype=torch.bool, device=self.device))

    def _causal_rows(self, reads: torch.Tensor, tokens: int) -> torch.Tensor:
        return (torch.arange(tokens, device=self.device) <= reads[..., None])[:, None]


def reaching(reads: torch.Tensor, allowed: torch.Tensor | None, length: int) -> torch.Tensor:
    """Tokens, ascending, from which information can reach the tokens that are read."""
    if allowed is None:
        return torch.arange(length)
    reached = torch.zeros(length, dtype=torch.bool)
    reached[reads.cpu()] = True
    while True:
        more = reached | allowed.cpu()[reached].any(0)
        if bool((more == reached).all()):
            return reached.nonzero()[:, 0]
        reached = more
