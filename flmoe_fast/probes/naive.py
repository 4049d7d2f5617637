"""The reference estimator: every pair, every sample, four evaluations, nothing shared.

It is what a probe does when it is written straight from the definition, and what the faster estimator is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flmoe_fast.games.game import Game, as_game
from flmoe_fast.probes.gap import DEFAULT_GAP, redundancy_gap


def four_corner_loop(
    game: Game | Callable,
    pairs: list[tuple[int, int]],
    samples: int,
    *,
    n: int | None = None,
    seed: int = 0,
    gap: str = DEFAULT_GAP,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """SII and redundancy gap of ``pairs``, with standard errors, from independent samples; each (P, O) float64.

    A sample draws a size s uniformly from 0..n-2, then a coalition S of that size uniformly among the other players,
    and evaluates S, S+i, S+j and S+ij one at a time. Costs ``4 * samples`` evaluations a pair.
    """
    game = as_game(game, n)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, j in pairs:
        others = torch.tensor([p for p in range(game.n) if p not in (i, j)], dtype=torch.long)
        second, gaps = [], []
        for _ in range(samples):
            size = int(torch.randint(0, game.n - 1, (), generator=generator))
            members = others[torch.randperm(game.n - 2, generator=generator)[:size]]
            v00, v10, v01, v11 = (_value(game, members, added) for added in ([], [i], [j], [i, j]))
            second.append(v11 - v10 - v01 + v00)
            value, defined = redundancy_gap(gap, v11, v10, v01, v00)
            gaps.append(value if defined is None else torch.where(defined, value, torch.nan))
        differences, drawn = torch.stack(second), torch.stack(gaps)
        counted = (~drawn.isnan()).sum(0)
        spread = (drawn - drawn.nanmean(0)).square().nansum(0) / (counted - 1).clamp(min=1)
        found.append(
            (
                differences.mean(0),
                differences.std(0) / math.sqrt(samples),
                drawn.nanmean(0),
                (spread / counted.clamp(min=1)).sqrt(),
            )
        )
    sii, sii_stderr, mean_gap, gap_stderr = (torch.stack(part) for part in zip(*found))
    return sii, sii_stderr, mean_gap, gap_stderr


def _value(game: Game, members: torch.Tensor, added: list[int]) -> torch.Tensor:
    """Value (O,) of one coalition."""
    coalition = torch.zeros(1, game.n, dtype=torch.bool)
    coalition[0, members] = True
    coalition[0, added] = True
    return torch.atleast_1d(game(coalition)[0])
