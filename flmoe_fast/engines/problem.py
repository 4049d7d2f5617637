"""One sample, one model: everything about a coalition evaluation that does not change between coalitions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    def presence(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Presence of every valid token (C, L) bool in coalitions (C, n); tokens that are not players are present."""
        tokens = torch.ones(len(coalitions), self.length, dtype=torch.bool, device=coalitions.device)
        tokens[:, self.players.to(coalitions.device)] = coalitions
        return tokens


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
