"""Sparse feed-forward blocks for many tokens at once: choose, rank, sort, multiply group by group, put back.

No step loops over tokens and none depends on the order in which threads finish. Slots (a token's j-th choice) are
sorted by expert, network, coalition and modality, stably, so that they stay in the order token, then slot within each
of these: a slot's place in its run is its place in the queue for the network's capacity, the rows of a network are
contiguous for one matrix product, and those of a modality are contiguous for pooling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Dispatch:
    """The A slots that reach a network, in sorted order.

    Attributes
    ----------
    slot : LongTensor (A,)
        Index into the flattened (E, R, k) slots; ``slot // k`` is the row of the flattened (E, R) tokens.
    bounds : list of E * X + 1 ints
        Slots ``bounds[g]`` to ``bounds[g + 1]`` go to network g % X of expert g // X.
    lengths : LongTensor (E * X * C * M,)
        Slots in each run of equal expert, network, coalition and modality.
    """

    slot: torch.Tensor
    bounds: list[int]
    lengths: torch.Tensor


def choose(logits: torch.Tensor, gate: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Networks and scores (..., k) of gate logits (..., X), in evaluation; ties go to the lower index."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if gate == "switch":  # the probability among all networks
        return order[..., :1], (ordered[..., :1] - ordered.logsumexp(-1, keepdim=True)).exp()
    return order[..., :count], ordered[..., :count].softmax(-1)


def dispatch(
    chosen: torch.Tensor, networks: int, block: torch.Tensor, blocks: int, room: torch.Tensor | None
) -> Dispatch:
    """Sort slots, and drop those that come too late.

    Parameters
    ----------
    chosen : LongTensor (E, R, k)
    networks : int
        X.
    block : LongTensor (R,)
        Which (coalition, modality) each token belongs to.
    blocks : int
        C * M, how many there are.
    room : LongTensor (C * M,), optional
        How many slots of a block each network takes; all of them where None.
    """
    experts = chosen.shape[0]
    group = torch.arange(experts, device=chosen.device)[:, None, None] * networks + chosen
    key = (group * blocks + block[:, None]).flatten()
    key, slot = key.sort(stable=True)
    lengths = torch.bincount(key, minlength=experts * networks * blocks)
    if room is not None:
        place = torch.arange(len(key), device=key.device) - (lengths.cumsum(0) - lengths)[key]
        kept = place < room.repeat(experts * networks)[key]
        key, slot = key[kept], slot[kept]
        lengths = torch.bincount(key, minlength=len(lengths))
    # Products of different heights need their sizes on the host: on a GPU this waits, once per block and chunk.
    bounds = [0, *lengths.view(experts * networks, blocks).sum(1).cumsum(0).tolist()]
    return Dispatch(slot, bounds, lengths)


def grouped_matmul(
    rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, bounds: list[int], out: torch.Tensor
) -> torch.Tensor:
    """Rows (A, in) times each group's own (G, in, out) matrix, plus its bias (G, 1, out), into ``out`` (A, out)."""
    for group, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if start < stop:
            torch.addmm(biases[group], rows[start:stop], weights[group], out=out[start:stop])
    return out


def combine(rows: torch.Tensor, sent: Dispatch, scores: torch.Tensor) -> torch.Tensor:
    """Sum of each token's rows times their scores: (A, H) and scores (E, R, k) to (E * R, H).

    A token whose slots were all dropped gets zeros.
    """
    place = sent.slot.new_full((scores.numel(),), -1)
    place[sent.slot] = torch.arange(len(sent.slot), device=place.device)
    kept = place >= 0
    found = kept.view(-1, scores.shape[-1]).sum(1)
    weights = scores.flatten()[kept]
    return F.embedding_bag(place[kept], rows, found.cumsum(0) - found, mode="sum", per_sample_weights=weights)


def pool(rows: torch.Tensor, sent: Dispatch, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of rows (A, F) times their scores, and of the scores, over each run: (E * X, C * M, F), (E * X, C * M, 1)."""
    weights = scores.flatten()[sent.slot]
    starts = sent.lengths.cumsum(0) - sent.lengths
    index = torch.arange(len(rows), device=rows.device)
    sums, totals = (
        F.embedding_bag(index, part, starts, mode="sum", per_sample_weights=weights)
        for part in (rows, torch.ones_like(rows[:, :1]))
    )
    groups = len(sent.bounds) - 1
    return sums.view(groups, -1, sums.shape[1]), totals.view(groups, -1, 1)
