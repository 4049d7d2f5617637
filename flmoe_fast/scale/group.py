"""The processes of a run, and a game whose coalitions they share.

Started by ``torchrun``, every process calls :func:`join`; without it a run is a group of one. Only CPU tensors of
modest size are exchanged, over gloo, whatever the models run on.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from flmoe_fast.checks import integer
from flmoe_fast.games.game import Game, as_game

#: How long a process waits for the others before it gives up.
PATIENCE = datetime.timedelta(minutes=30)


class Group:
    """The processes that work together.

    Attributes
    ----------
    rank, size : int
        This process's number and how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, handle: Any = None):
        self.rank, self.size, self._handle = rank, size, handle

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Every process's CPU tensor, which may differ in length, in the order of ranks."""
        if self.size == 1:
            return [part]
        length = torch.tensor([len(part)])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self._handle)
        most = max(int(n) for n in lengths)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._handle)
        return [whole[: int(n)] for whole, n in zip(parts, lengths)]


def join() -> Group:
    """The group that ``torchrun`` started this process in; a group of one where it did not.

    A process group that is initialised already is used as it is.
    """
    if not dist.is_initialized():
        if integer("WORLD_SIZE", int(os.environ.get("WORLD_SIZE", "1")), least=1) == 1 and "RANK" not in os.environ:
            return Group()
        dist.init_process_group("gloo", timeout=PATIENCE)
    gloo = dist.get_backend() == "gloo"
    handle = None if gloo else dist.new_group(backend="gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size(), handle)


class SharedGame(Game):
    """A game every process of a group holds, each evaluating its share of the coalitions.

    All processes have to ask for the same values at the same time: the same call of ``interactions`` with a shared game
    in each. Values, not sums, are exchanged, so every process computes what a single one would, to the last bit where
    the game's values do not depend on how coalitions are batched.

    Parameters
    ----------
    game : Game or callable
    group : Group
    n : int, optional
        Number of players, for a callable that has no ``n``.
    """

    def __init__(self, game: Game | Callable, group: Group, n: int | None = None):
        self.game, self.group = as_game(game, n), group
        self.n, self.player_names, self.groups = self.game.n, self.game.player_names, self.game.groups
        self.backend, self.more_exact = self.game.backend, self.game.more_exact
        self.block = self.game.block * group.size

    # Read-only, where other games have an attribute: a plain callable knows its heads from its first call on.
    @property
    def heads(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """Those of the game."""
        return self.game.heads

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        return self._shared(coalitions, self.game)

    def corner_values(self, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
        return self._shared(contexts, lambda mine: self.game.corner_values(mine, toggled))

    def precise(self) -> Game | None:
        precise = self.game.precise()
        return None if precise is None else SharedGame(precise, self.group)

    def finer(self) -> Game | None:
        finer = self.game.finer()
        return None if finer is None else SharedGame(finer, self.group)

    @property
    def arithmetic(self) -> str:
        return self.game.arithmetic

    @property
    def noise(self) -> dict[str, float]:
        return self.game.noise

    def about(self) -> dict[str, Any]:
        return self.game.about()

    def _shared(self, rows: torch.Tensor, evaluate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``evaluate`` of all rows from everybody's share; with fewer rows than processes, everybody does all."""
        if len(rows) < self.group.size:
            return evaluate(rows)
        mine = rows.tensor_split(self.group.size)[self.group.rank]
        return torch.cat(self.group.gather(evaluate(mine)))
