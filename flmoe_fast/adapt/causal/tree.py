"""Coalitions as a prefix tree: each is the rest of a sequence whose beginning another one has computed already.

Sequences that begin alike share that beginning wherever no token of it looks beyond it. The tree is cut into paths,
each from the token at which it leaves another path to the end. At every fork the branch with most sequences goes on, so
that a path is never deeper than the logarithm of their number, and all paths of a depth can be computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Path:
    """What one sequence adds to the tree.

    Attributes
    ----------
    row : int
        The sequence, whose positions from ``start`` on are computed here.
    start : int
        First position that is not shared with the parent.
    parent : int
        Number of the path that has everything before ``start``; -1 for one that begins by itself.
    level : int
        Paths to go through before this one.
    """

    row: int
    start: int
    parent: int
    level: int


def paths(variants: torch.Tensor, closed: torch.Tensor) -> list[Path]:
    """The paths of distinct sequences, parents before their children.

    Parameters
    ----------
    variants : integer Tensor (C, L)
        What every position holds; sequences are alike up to the first position that differs.
    closed : BoolTensor (L + 1,)
        Whether nothing before a position looks at it or beyond: where a beginning may end.

    Returns
    -------
    C paths, the row of each a different one
    """
    order, common = beginnings(variants, closed)
    found: list[Path] = []
    pending = [(0, len(order), 0, -1, 0)]
    while pending:
        low, high, start, parent, level = pending.pop()
        number = len(found)
        found.append(Path(-1, start, parent, level))
        while high - low > 1:
            fork = min(common[low + 1 : high])
            edges = [low, *(i for i in range(low + 1, high) if common[i] == fork), high]
            branches = list(zip(edges, edges[1:]))
            main = max(branches, key=lambda branch: branch[1] - branch[0])
            pending += [(*branch, fork, number, level + 1) for branch in branches if branch != main]
            low, high = main
        found[number] = Path(order[low], start, parent, level)
    return found


def beginnings(variants: torch.Tensor, closed: torch.Tensor) -> tuple[list[int], list[int]]:
    """Rows in the order of their sequences, and how much of each the one before it has computed."""
    rows, place = variants.unique(dim=0, return_inverse=True)
    order = place.argsort().tolist()
    differs = rows[1:] != rows[:-1]
    first = torch.where(differs.any(1), differs.int().argmax(1), rows.shape[1])
    ends = torch.where(closed, torch.arange(len(closed)), 0).cummax(0).values
    return order, [0, *ends[first].tolist()]


def blocks(common: Sequence[int], own: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Runs (low, high) of neighbours that together have at most ``most`` tokens of their own, or a single one.

    They are cut where neighbours have least in common, since what they share is computed again.
    """
    found, low = [], 0
    while low < len(common):
        high, total = low + 1, own[low]
        while high < len(common) and total + own[high] <= most:
            total += own[high]
            high += 1
        if high < len(common):
            high = min(range(low + 1 + (high - low) // 2, high + 1), key=lambda i: (common[i], -i), default=high)
        found.append((low, high))
        low = high
    return found
