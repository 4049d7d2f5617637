"""One sample, one model: everything about a coalition evaluation that does not change between coalitions.

There are two kinds: an FL-I2MoE and its tokens, and the encoder stack of somebody else's model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flmoe_fast.engines.places import Places
from flmoe_fast.engines.stack import PreparedStack
from flmoe_fast.model.network import FLI2MoE


@dataclass(frozen=True)
class TokenProblem:
    """A fixed sample in which players (tokens) are present or replaced by their fill.

    The padded concatenation has ``Lp = sum(padded_lengths)`` positions; position ``p`` keeps its index in the
    positional encoding whether or not other positions are padding. ``valid`` lists the positions that are not
    padding, in increasing order; only they are ever attended to or pooled.

    Attributes
    ----------
    model : FLI2MoE
        The model whose experts and routing are evaluated. Its parameters are read, never changed.
    features, fills : Tensor (Lp, H)
        Token features and what replaces them when the token is absent, both before positional encoding; float64
        copies on the CPU, rounded by each engine to its own arithmetic.
    valid : LongTensor (L,)
        Positions of the non-padding tokens.
    segments : tuple of (start, stop)
        Per modality, the range of its tokens within ``valid`` (empty when the modality is wholly padding).
    players : LongTensor (n,)
        Index *into valid* of every player. Valid tokens that are not players are always present.
    padded_lengths : tuple of int
        Padded length of every modality; their sum is Lp.
    masked : bool
        Whether key masks are part of the input. Without them the routing network reads plain, unnormalised means.
    """

    model: FLI2MoE
    features: torch.Tensor
    fills: torch.Tensor
    valid: torch.Tensor
    segments: tuple[tuple[int, int], ...]
    players: torch.Tensor
    padded_lengths: tuple[int, ...]
    masked: bool

    @property
    def n(self) -> int:
        """Number of players."""
        return int(self.players.numel())

    @property
    def length(self) -> int:
        """Number of valid tokens L."""
        return int(self.valid.numel())

    @property
    def misplaced_padding(self) -> str:
        """What keeps engines that leave padding out from the problem; empty if nothing does."""
        if not self.model.config.slots_limit:
            return ""
        # Padding behind a modality's last valid token only counts; before one it would take that token's place.
        start = 0
        for length, (first, last) in zip(self.padded_lengths, self.segments):
            if last > first and int(self.valid[last - 1]) - start != last - first - 1:
                return "the capacity of sparse feed-forward blocks is limited, and padding precedes valid tokens"
            start += length
        return ""

    def presence(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Presence of every valid token (C, L) bool in coalitions (C, n); tokens that are not players are present."""
        tokens = torch.ones(len(coalitions), self.length, dtype=torch.bool, device=coalitions.device)
        tokens[:, self.players.to(coalitions.device)] = coalitions
        return tokens


@dataclass(frozen=True)
class StackProblem:
    """One sample before an encoder stack: L tokens, n players.

    Attributes
    ----------
    model : PreparedStack
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
    places : tuple of Places
        What every layer's attention makes of tokens' places. ``allowed`` is what any of them allows. Empty where all
        layers have nothing but that.
    """

    model: PreparedStack
    present: torch.Tensor
    absent: torch.Tensor
    owner: torch.Tensor
    removed: torch.Tensor
    allowed: torch.Tensor | None
    reads: torch.Tensor
    mixed: Callable[[torch.Tensor], torch.Tensor] | None = None
    places: tuple[Places, ...] = ()

    @functools.cached_property
    def reaching(self) -> torch.Tensor:
        """Tokens (L',), ascending, from which information can reach the tokens that are read."""
        if self.allowed is None:
            return torch.arange(len(self.owner))
        reached = torch.zeros(len(self.owner), dtype=torch.bool)
        reached[self.reads.cpu()] = True
        while True:
            more = reached | self.allowed.cpu()[reached].any(0)
            if bool((more == reached).all()):
                return reached.nonzero()[:, 0]
            reached = more

    @property
    def length(self) -> int:
        """Number of tokens that matter, L'."""
        return len(self.reaching)


@dataclass(frozen=True)
class Logits:
    """What an engine returns for C coalitions: ``experts`` (C, E, K) and routing ``weights`` (C, E), float64.

    An engine that has the ``mixture`` (C, K) as well hands it on.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    mixture: torch.Tensor | None = None

    def mixed(self) -> torch.Tensor:
        """The mixture's logits (C, K)."""
        if self.mixture is not None:
            return self.mixture
        return (self.weights[:, :, None] * self.experts).sum(1)
