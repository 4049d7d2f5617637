"""The corner grid: one context and its single and double toggles give a sample of every pair's second difference.

For a context T drawn on *all* players and a pair {i, j}, the four corners of the pair are T, T^i, T^j and T^ij, where ^
toggles membership. Restricted to the other players, T has exactly the law the Shapley Interaction Index averages over,
whichever corner T itself is. So one context serves any set of P pairs on Q players with ``1 + Q + P`` evaluations
instead of ``4 P``, and all pairs see the same contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CornerGrid:
    """Which coalitions a set of pairs needs in every context, and where each pair finds its corners.

    Attributes
    ----------
    pairs : LongTensor (P, 2)
    toggled : BoolTensor (G, n)
        Players toggled for corner g: nobody, each player of the pairs, each pair; G = 1 + Q + P.
    single : LongTensor (P, 2)
        Corner in which only the first (second) player of the pair is toggled.
    players : LongTensor (Q,)
        The players of the pairs, ascending; corner 1 + q toggles players[q].
    """

    pairs: torch.Tensor
    toggled: torch.Tensor
    single: torch.Tensor
    players: torch.Tensor

    @staticmethod
    def of(pairs: torch.Tensor, n: int) -> CornerGrid:
        """The grid of ``pairs`` (P, 2) among ``n`` players."""
        players, position = pairs.unique(return_inverse=True)
        alone = torch.zeros(len(players), n, dtype=torch.bool)
        alone[torch.arange(len(players)), players] = True
        nobody = torch.zeros(1, n, dtype=torch.bool)
        together = alone[position[:, 0]] | alone[position[:, 1]]
        return CornerGrid(pairs, torch.cat([nobody, alone, together]), 1 + position, players)

    @staticmethod
    def singles(players: torch.Tensor, n: int) -> CornerGrid:
        """A grid without pairs: each context and its toggles of single ``players`` (Q,), ascending."""
        toggled = torch.zeros(1 + len(players), n, dtype=torch.bool)
        toggled[1 + torch.arange(len(players)), players] = True
        none = torch.zeros(0, 2, dtype=torch.long)
        return CornerGrid(none, toggled, none, players)

    @property
    def evaluations(self) -> int:
        """Evaluations per context, G."""
        return len(self.toggled)

    def corners(self, contexts: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values v11, v10, v01, v00 of every pair in every context, each (K, P, O).

        ``contexts`` (K, n) bool and ``values`` (K, G, O) in the order of ``toggled``.
        """
        row = torch.arange(len(contexts))[:, None]
        return tuple(values[row, where] for where in self.corner_numbers(contexts))

    def corner_numbers(self, contexts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Numbers of the corners 11, 10, 01, 00 of every pair in every context (K, n), each (K, P)."""
        count = len(self.pairs)
        corner = torch.stack(
            [
                torch.zeros(count, dtype=torch.long),
                self.single[:, 1],
                self.single[:, 0],
                torch.arange(self.evaluations - count, self.evaluations),
            ]
        )  # by (first toggled, second toggled) = 00, 01, 10, 11
        present = contexts[:, self.pairs]  # (K, P, 2)
        pair = torch.arange(count)

        def number(first: bool, second: bool) -> torch.Tensor:
            code = 2 * (present[..., 0] != first).long() + (present[..., 1] != second).long()
            return corner[code, pair]

        return number(True, True), number(True, False), number(False, True), number(False, False)

    def gains(self, contexts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What each of ``players`` adds, v(S+i) - v(S) with S the context without i: (K, Q, O).

        ``contexts`` and ``values`` as for :meth:`corners`.
        """
        change = values[:, :1] - values[:, 1 : 1 + len(self.players)]
        return torch.where(contexts[:, self.players, None], change, -change)
