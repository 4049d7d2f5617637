"""Which of two games of the same values is faster here: measured, where one forward pass is short enough to try."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from flmoe_fast.adapt.module_game import ModuleGame
from flmoe_fast.adapt.remember import forget
from flmoe_fast.games.game import Game
from flmoe_fast.probes.grid import CornerGrid

#: Seconds of a forward pass up to which both ways are tried, and those from which on calls cost nothing beside
#: arithmetic, so that less arithmetic is faster. In between it counts whether a few coalitions cost what one does.
#: Zeros try nothing.
QUICK, LONG = 0.02, 0.5
#: So many, and how many times as long they may take.
FEW, MUCH = 4, 2.5
#: Pairs across and contexts of the corner grids that are tried, how often, and after how many seconds not again.
SIDE, CONTEXTS, ROUNDS, ENOUGH = 3, 3, 5, 2.0
#: How often passes of few coalitions are timed.
PASSES = 3
#: How many times as fast the engine has to be: what is as good as equal goes to the simpler way.
MARGIN = 1.05


def slower_than(game: Game, module: Callable[[], ModuleGame]) -> tuple[ModuleGame | None, str]:
    """The module in batches where ``game`` is slower than that, and by how much; None where it is not.

    Both evaluate the same corner grids, in turns. The engine has to win by the fastest time of each, and by the median.
    """
    if not LONG:
        return None, ""
    other = module()
    side = min(SIDE, game.n // 2)
    pairs = torch.cartesian_prod(torch.arange(side), torch.arange(game.n - side, game.n))
    grid = CornerGrid.of(pairs, game.n)
    contexts = torch.rand(CONTEXTS, game.n, generator=torch.Generator().manual_seed(0)) < 0.5
    z = (contexts[:, None] ^ grid.toggled).flatten(0, 1)
    # A machine that does other things too makes a short pass a long one now and then, never the other way round.
    one = min(_seconds(other, z[:1]) for _ in range(PASSES))
    if one > LONG or (one > QUICK and min(_seconds(other, z[:FEW]) for _ in range(PASSES)) > MUCH * one):
        return None, ""
    times: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(times) < 2 or (len(times) < ROUNDS and time.perf_counter() - started < ENOUGH):
        times.append((_seconds(game, z), _seconds(other, z)))
    ours, theirs = zip(*times)
    if all(MARGIN * of(ours) <= of(theirs) for of in (min, statistics.median)):
        return None, ""
    each = (f"{1000 * min(found) / len(z):.2g}" for found in (theirs, ours))
    return other, f"{next(each)} ms a coalition against {next(each)} by the {game.backend}"


def _seconds(game: Game, coalitions: torch.Tensor) -> float:
    forget(game)
    started = time.perf_counter()
    game(coalitions)
    seconds = time.perf_counter() - started
    forget(game)
    return seconds
