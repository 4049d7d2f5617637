"""A model behind an endpoint: words of a prompt as players, values from whatever scores a list of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flmoe_fast.adapt.remember import Remembered
from flmoe_fast.checks import ArgumentError, integer, shape
from flmoe_fast.games.game import Game


class PromptGame(Game):
    """A prompt as a cooperative game of its pieces, played by a server.

    Prompts are sent in the order of their beginnings, those that begin alike one after another, each once: a server
    that caches prefixes then finds them. What a server computes for a prompt must not depend on the others.

    Parameters
    ----------
    score : function
        Takes a list of prompts to as many numbers, or to rows of O numbers: the log-probability of an answer that an
        endpoint reports, say.
    pieces : sequence of str
        The prompt, cut up; joined they are the prompt.
    players : sequence of int, optional
        Pieces that can be absent; all but blank ones by default.
    absent : str
        What stands for an absent piece.
    batch : int
        Prompts a call of ``score``.
    heads : sequence of O str, optional
        Names of the numbers, where there are several.

    Raises
    ------
    ArgumentError
        Fewer than two players, or a server that answers with another number of values.
    """

    backend = "served model"
    more_exact = "a server that computes in higher precision"

    def __init__(
        self,
        score: Callable[[list[str]], Sequence[float] | Sequence[Sequence[float]]],
        pieces: Sequence[str],
        players: Sequence[int] | None = None,
        *,
        absent: str = "",
        batch: int = 32,
        heads: Sequence[str] | None = None,
    ):
        if isinstance(pieces, str) or not all(isinstance(piece, str) for piece in pieces):
            raise ArgumentError("pieces", f"{pieces!r:.60}", "a sequence of str, the prompt cut up")
        self.score, self.pieces, self.absent = score, tuple(pieces), absent
        if players is None:
            players = [p for p, piece in enumerate(self.pieces) if piece.strip()]
        self.players = tuple(integer("players", p, least=0, most=len(self.pieces) - 1) for p in players)
        if len(set(self.players)) < len(self.players):
            raise ArgumentError("players", "a piece twice", "different pieces")
        self.n, self.batch = len(self.players), integer("batch", batch, least=1)
        if self.n < 2:
            raise ArgumentError("players", f"{self.n} players", "at least two pieces that can be absent")
        self.player_names = tuple(self.pieces[p].strip() for p in self.players)
        starts = [sum(map(len, self.pieces[:p])) for p in range(len(self.pieces) + 1)]
        self.places = tuple((starts[p], starts[p + 1]) for p in self.players)
        self.heads = None if heads is None else tuple(heads)
        self.block = max(256, self.batch)
        self._values = Remembered(self._compute)

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        if not len(coalitions):
            return torch.zeros((0,) if self.heads is None else (0, len(self.heads)), dtype=torch.float64)
        return self._values(coalitions)

    def prompt(self, coalition: torch.Tensor) -> str:
        """The prompt of a coalition (n,)."""
        gone = {p for p, present in zip(self.players, coalition.tolist()) if not present}
        return "".join(self.absent if p in gone else piece for p, piece in enumerate(self.pieces))

    def about(self) -> dict[str, Any]:
        return {"value": "a score", "places": [list(place) for place in self.places], "path": "a served model"}

    def _compute(self, coalitions: torch.Tensor) -> torch.Tensor:
        in_order = sorted(range(self.n), key=self.players.__getitem__)
        rows, again = coalitions[:, in_order].unique(dim=0, return_inverse=True)  # by what comes first in the prompt
        back = torch.empty_like(rows)
        back[:, in_order] = rows
        found = []
        for part in back.split(self.batch):
            values = torch.as_tensor(self.score([self.prompt(row) for row in part]), dtype=torch.float64)
            wanted = (len(part),) if self.heads is None else (len(part), len(self.heads))
            if tuple(values.shape) != wanted:
                raise ArgumentError(
                    "score", f"numbers of shape {tuple(values.shape)}", f"{wanted}, one for each prompt"
                )
            found.append(values)
        return torch.cat(found)[again]
