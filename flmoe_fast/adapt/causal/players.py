"""Players of pictures in a prompt: image tokens that are hidden, and flattened patches that are replaced."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flmoe_fast.adapt.players import NOBODY, Players
from flmoe_fast.checks import ArgumentError, integer, one_of, shape

BY = ("patch", "image")


def image_token_players(
    input_ids: torch.Tensor,
    image_token: int,
    *,
    grids: Sequence[tuple[int, int]] | None = None,
    by: str = "patch",
    block: int = 1,
    group: str = "image",
    mask: str = "attention_mask",
) -> Players:
    """Players of the pictures in a prompt, whose tokens are hidden from attention when they are absent.

    The vision tower then runs once for all coalitions.

    Parameters
    ----------
    input_ids : integer Tensor (T,) or (1, T)
    image_token : int
        The token that stands for a place of a picture, ``config.image_token_id``.
    grids : sequence of (rows, columns), optional
        Tokens down and across of every picture, crop or frame, in the order of the prompt. By default every run of
        image tokens is one, square where that is possible and otherwise a single row.
    by : "patch" or "image"
        What a player is.
    block : int
        Tokens down and across of a patch.

    Returns
    -------
    Players
        Their places are ``(picture, top, left, bottom, right)`` in tokens.

    Raises
    ------
    ArgumentError
        There is no such token, or the grids have another number of tokens than the prompt.
    """
    ids = input_ids[0] if input_ids.dim() == 2 and len(input_ids) == 1 else input_ids
    shape("input_ids", ids, (None,), "(T,)")
    one_of("by", by, BY)
    block = integer("block", block, least=1)
    at = (ids == image_token).nonzero()[:, 0].cpu()
    if not len(at):
        raise ArgumentError("image_token", image_token, "a token of the prompt")
    sizes = _runs(at) if grids is None else [(rows, columns) for rows, columns in grids]
    total = sum(rows * columns for rows, columns in sizes)
    if total != len(at):
        raise ArgumentError("grids", f"{total} tokens in all", f"{len(at)}, the image tokens of the prompt")
    owner = torch.full((len(ids),), NOBODY)
    cells, names, places = _cells(sizes, by, block, group)
    owner[at] = cells
    return Players("input_ids", group, names, places, owner, ids.detach().clone(), mask)


def grid_players(
    pixel_values: torch.Tensor,
    grids: torch.Tensor,
    *,
    merge: int = 2,
    absent: float = 0.0,
    by: str = "patch",
    block: int = 1,
    group: str = "image",
    input: str = "pixel_values",
) -> Players:
    """Players of flattened patches, as the processors of Qwen's models of vision make them; absent ones are replaced.

    Parameters
    ----------
    pixel_values : Tensor (N, D)
        Patches, those that become one token next to each other.
    grids : integer Tensor (G, 3)
        Frames, and patches down and across, of every picture: ``image_grid_thw``.
    merge : int
        Patches down and across of a token, ``config.vision_config.spatial_merge_size``.
    absent : float
        What replaces absent pixels; 0 is the mean of normalised ones.
    by, block, group
        As for :func:`image_token_players`.
    """
    if pixel_values.dim() != 2 or not pixel_values.is_floating_point():
        raise ArgumentError("pixel_values", f"shape {tuple(pixel_values.shape)}", "floating point patches (N, D)")
    shape("grids", grids, (None, 3), "frames, rows and columns of every picture (G, 3)")
    one_of("by", by, BY)
    sizes = [(down // merge, across // merge) for frames, down, across in grids.tolist() for _ in range(frames)]
    cells, names, places = _cells(sizes, by, integer("block", block, least=1), group)
    owner = cells.repeat_interleave(merge * merge)
    if len(owner) != len(pixel_values):
        raise ArgumentError("grids", f"{len(owner)} patches in all", f"{len(pixel_values)}, the rows of pixel_values")
    blank = torch.full_like(pixel_values, absent)
    return Players(input, group, names, places, owner[:, None], blank, None, flat=True)


def _runs(at: torch.Tensor) -> list[tuple[int, int]]:
    """Rows and columns of every run of neighbouring positions."""
    edges = (at.diff() != 1).nonzero()[:, 0] + 1
    counts = [len(run) for run in at.tensor_split(edges)]
    sides = [round(count**0.5) for count in counts]
    return [(side, side) if side * side == count else (1, count) for side, count in zip(sides, counts)]


def _cells(
    sizes: Sequence[tuple[int, int]], by: str, block: int, group: str
) -> tuple[torch.Tensor, tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The player of every token of some grids, their names, and their places."""
    owners: list[torch.Tensor] = []
    names: list[str] = []
    places: list[tuple[int, ...]] = []
    several = len(sizes) > 1
    for picture, (rows, columns) in enumerate(sizes):
        before = f"{group} {picture}" if several else group
        if by == "image":
            owners.append(torch.full((rows * columns,), len(names)))
            names.append(before)
            places.append((picture, 0, 0, rows, columns))
            continue
        across = -(-columns // block)
        down, right = torch.arange(rows) // block, torch.arange(columns) // block
        owners.append((len(names) + down[:, None] * across + right).flatten())
        for top in range(0, rows, block):
            for left in range(0, columns, block):
                names.append(f"{before} {top // block},{left // block}")
                places.append((picture, top, left, min(top + block, rows), min(left + block, columns)))
    return torch.cat(owners), tuple(names), tuple(places)
