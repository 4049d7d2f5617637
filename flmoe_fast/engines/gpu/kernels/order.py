"""Sorting the slots of a sparse block by network, and within a network by coalition, modality, token and slot.

A slot is one network that a token goes to. Nothing depends on the order in which programs run: counts are added up in
the order of coalitions and modalities (:func:`scan`), and a slot's place in its queue is a sum over the slots before it
(:func:`place`). A queue that is longer than a network's room loses its end, as in the plain definition. Where a
network's slots begin is the sum of the totals before it, which every kernel that needs it adds up itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch
from flmoe_fast.engines.gpu.kernels.choice import TILE
from flmoe_fast.engines.gpu.kernels.configs import Config


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(
    counts_ptr,  # [E, X, C * M] int32
    starts_ptr,  # [E, X, C * M] int32: slots of the same network before each coalition and modality
    totals_ptr,  # [E, X] int32
    blocks,  # C * M
    BLOCK: tl.constexpr,
):
    """Grid: E * X."""
    group = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), dtype=tl.int32)
    for first in range(0, blocks, BLOCK):
        o = first + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + group * blocks + o, mask=o < blocks, other=0)
        tl.store(starts_ptr + group * blocks + o, total + tl.cumsum(count, 0) - count, mask=o < blocks)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + group, total)


def scan(counts: torch.Tensor, starts: torch.Tensor, totals: torch.Tensor, *, config: Config) -> None:
    """``starts`` (E, X, C * M) of each network's runs within its slots, and ``totals`` (E, X), from ``counts``."""
    experts, networks, blocks = counts.shape
    launch(scan_kernel, experts * networks, config, counts, starts, totals, blocks, BLOCK=config.rows)


@triton.jit(do_not_specialize=["coalitions", "length", "modalities", "networks"])
def place_kernel(
    chosen_ptr,  # [E, C * L, k] int32
    starts_ptr,  # [E, X, C * M] int32
    totals_ptr,  # [E, X] int32
    segments_ptr,  # [M + 1] int32
    room_ptr,  # [M] int32
    order_ptr,  # [E, C * L * k] int32: the slot at each place
    places_ptr,  # [E, C * L, k] int32: the place of each slot, -1 where it found no room
    coalitions,
    length,
    modalities,
    networks,
    SLOTS: tl.constexpr,
    PLACES: tl.constexpr,
    BS: tl.constexpr,
    BX: tl.constexpr,
):
    """Grid: E * C * M, modalities fastest."""
    program = tl.program_id(0)
    blocks = coalitions * modalities
    block = program % blocks
    expert = (program // blocks).to(tl.int64)
    modality = block % modalities
    start = tl.load(segments_ptr + modality) * SLOTS
    stop = tl.load(segments_ptr + modality + 1) * SLOTS
    room = tl.load(room_ptr + modality)
    o_x = tl.arange(0, BX)
    m_x = o_x < networks
    totals = tl.load(totals_ptr + expert * networks + o_x, mask=m_x, other=0)
    begin = tl.cumsum(totals, 0) - totals
    begin += tl.load(starts_ptr + (expert * networks + o_x) * blocks + block, mask=m_x, other=0)
    slots = coalitions * length * SLOTS  # of an expert
    came = tl.zeros((BX,), dtype=tl.int32)
    for first in range(start, stop, BS):
        o_s = first + tl.arange(0, BS)
        m_s = o_s < stop
        slot = (block // modalities) * length * SLOTS + o_s
        chosen = tl.load(chosen_ptr + expert * slots + slot, mask=m_s, other=-1)
        hot = (chosen[:, None] == o_x[None, :]).to(tl.int32)  # [BS, BX]
        queue = tl.sum(hot * (tl.cumsum(hot, 0) - hot + came[None, :]), 1)
        place = queue + tl.sum(hot * begin[None, :], 1)
        kept = m_s & (queue < room)
        tl.store(order_ptr + expert * slots + place, slot, mask=kept)
        if PLACES:
            tl.store(places_ptr + expert * slots + slot, tl.where(kept, place, -1), mask=m_s)
        came += tl.sum(hot, 0)


def place(
    chosen: torch.Tensor,
    starts: torch.Tensor,
    totals: torch.Tensor,
    segments: torch.Tensor,
    room: torch.Tensor,
    order: torch.Tensor,
    places: torch.Tensor | None,
    *,
    length: int,
    config: Config,
) -> None:
    """``order`` (E, C * L * k) of the slots by network, and optionally ``places`` (E, C * L, k), where each slot went.

    Places behind a coalition's totals are not written, and a slot without room has the place -1.
    """
    experts, networks, blocks = starts.shape
    columns = max(16, triton.next_power_of_2(networks))
    launch(
        place_kernel,
        experts * blocks,
        config,
        chosen,
        starts,
        totals,
        segments,
        room,
        order,
        places,
        chosen.shape[1] // length,
        length,
        len(segments) - 1,
        networks,
        SLOTS=chosen.shape[2],
        PLACES=places is not None,
        BS=max(16, min(config.rows, TILE // columns)),
        BX=columns,
    )
