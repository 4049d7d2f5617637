"""Exact interactions by enumerating all coalitions: the truth that estimates are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.gap import DEFAULT_GAP, GAPS, redundancy_gap
from flmoe_fast.probes.naming import checked_names
from flmoe_fast.probes.pairs import resolve_pairs
from flmoe_fast.probes.parity import exact_weights
from flmoe_fast.probes.progress import progress_bar
from flmoe_fast.probes.result import InteractionResult

#: 2^24 values of one head take 128 MB; beyond that nobody waits for the model.
MOST_PLAYERS = 24


def exact_interactions(
    game: Game | Callable,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    n: int | None = None,
    gap: str = DEFAULT_GAP,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> InteractionResult:
    """Shapley Interaction Index and redundancy gap from all 2^n coalitions.

    Parameters
    ----------
    game : Game or callable
        As for :func:`interactions`; at most 24 players.
    pairs : (P, 2) players, optional
        Default: all cross-modal pairs, or all pairs where there are no modalities.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    gap : "max", "sum", "strict" or "ratio"
    names : sequence of n str, optional
        As for :func:`interactions`.
    progress : bool

    Returns
    -------
    InteractionResult
        With standard errors of zero.
    """
    game = as_game(game, n)
    one_of("gap", gap, GAPS)
    chosen = resolve_pairs(game, pairs)
    called = game.player_names if names is None else checked_names(names, game.n)
    if game.n > MOST_PLAYERS:
        raise ArgumentError("game", f"{game.n} players", f"at most {MOST_PLAYERS}; use interactions(...) beyond that")
    values = enumerate_values(game, progress)
    rows = values if values.dim() == 2 else values[:, None]
    both = [pair_interaction(rows, game.n, i, j, gap) for i, j in chosen.tolist()]
    sii, gaps = torch.stack([s for s, _ in both]), torch.stack([g for _, g in both])
    if game.heads is None:
        sii, gaps = sii[:, 0], gaps[:, 0]
    return InteractionResult(
        pairs=chosen.numpy(),
        sii=sii.numpy(),
        sii_stderr=np.zeros(sii.shape),
        gap=gaps.numpy(),
        gap_stderr=np.zeros(gaps.shape),
        degrees=np.full(len(chosen), np.inf),
        contexts=np.full(len(chosen), 2 ** (game.n - 2)),
        evaluations=2**game.n,
        check_evaluations=0,
        noise_share=np.full(sii.shape[1:], np.nan),
        seed=0,
        backend=game.backend,
        gap_kind=gap,
        heads=game.heads,
        player_names=called,
        about={**game.about(), "method": "enumeration"},
    )


def enumerate_values(game: Game, progress: bool = False) -> torch.Tensor:
    """Values of all coalitions, (2^n,) or (2^n, O); coalition c has player p iff bit p of c is set."""
    codes = torch.arange(2**game.n)
    bits = torch.arange(game.n)
    blocks = codes.split(max(1, game.block))
    values = []
    with progress_bar(len(codes), "enumeration", progress) as bar:
        for block in blocks:
            values.append(game(((block[:, None] >> bits) & 1).bool()))
            bar.update(len(block))
    return torch.cat(values)


def size_law(n: int) -> torch.Tensor:
    """Weight of one coalition of size s among n - 2 players, s = 0..n-2: ``s! (n-s-2)! / (n-1)!``, float64."""
    return torch.tensor([1.0 / ((n - 1) * math.comb(n - 2, s)) for s in range(n - 1)], dtype=torch.float64)


def pair_interaction(values: torch.Tensor, n: int, i: int, j: int, gap: str) -> tuple[torch.Tensor, torch.Tensor]:
    """SII and mean gap (O,) of one pair from the values (2^n, O) of all coalitions."""
    codes = torch.arange(2**n)
    neither = codes[((codes >> i) & 1 == 0) & ((codes >> j) & 1 == 0)]
    size = ((neither[:, None] >> torch.arange(n)) & 1).sum(1)
    weight = size_law(n)[size][:, None]
    v00, v10, v01 = values[neither], values[neither | 1 << i], values[neither | 1 << j]
    v11 = values[neither | 1 << i | 1 << j]
    gaps, defined = redundancy_gap(gap, v11, v10, v01, v00)
    share = (weight * (1.0 if defined is None else defined)).sum(0).clamp(max=1.0)
    mean = (weight * gaps).sum(0) / share if defined is not None else (weight * gaps).sum(0)
    return (weight * (v11 - v10 - v01 + v00)).sum(0), torch.where(share > 0, mean, torch.nan)


def exact_index(values: torch.Tensor, n: int, members: torch.Tensor, name: str, order: int) -> torch.Tensor:
    """An index (M, O) of ``members`` (M, order) from the values (2^n, O) of all coalitions."""
    total = torch.zeros(len(members), values.shape[1], dtype=torch.float64)
    base = ("SV", 1) if (name, order) == ("k-SII", 1) else (name, order)
    for codes, rows in zip(torch.arange(2**n).split(1 << 14), values.split(1 << 14)):
        x = 2.0 * ((codes[:, None] >> torch.arange(n)) & 1).double() - 1.0
        total += exact_weights(x, members, *base) @ rows
    if (name, order) == ("k-SII", 1):
        for row, player in enumerate(members[:, 0].tolist()):
            pairs = torch.tensor([(player, other) for other in range(n) if other != player])
            total[row] -= 0.5 * exact_index(values, n, pairs, "SII", 2).sum(0)
    return total
