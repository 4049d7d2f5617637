"""What the networks of a sparse block gave, weighted: put back to its tokens, or in the last layer pooled.

A token adds up its slots one after the other, and takes nothing where a slot found no room. In the last layer sums
are over the slots of a coalition, modality and network, which lie together: the down-projection follows them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch
from flmoe_fast.engines.gpu.kernels.configs import Config


@triton.jit(do_not_specialize=["rows", "tiles"])
def combine_kernel(
    found_ptr,  # [E, rows * k, N] fp32, by place
    places_ptr,  # [E, rows, k] int32, -1 where a slot found no room
    scores_ptr,  # [E, rows, k] fp32
    stream_ptr,  # [E, rows, N] fp32, added to
    statistics_ptr,  # [E, rows, blocks, 2] fp32
    rows,  # C * L
    tiles,  # row tiles of one expert
    columns,  # N
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid: E * row tiles * column blocks, column blocks fastest."""
    program = tl.program_id(0)
    blocks = tl.cdiv(columns, BN)
    block = program % blocks
    tile = program // blocks
    expert = (tile // tiles).to(tl.int64)
    o_m = (tile % tiles) * BM + tl.arange(0, BM)
    o_n = block * BN + tl.arange(0, BN)
    m_m = o_m < rows
    m_n = o_n < columns
    m_x = m_m[:, None] & m_n[None, :]
    row = expert * rows + o_m  # [BM] int64
    p_x = stream_ptr + row[:, None] * columns + o_n[None, :]
    x = tl.load(p_x, mask=m_x, other=0.0)
    for slot in range(SLOTS):
        place = tl.load(places_ptr + row * SLOTS + slot, mask=m_m, other=-1)
        score = tl.load(scores_ptr + row * SLOTS + slot, mask=m_m, other=0.0)
        there = place >= 0
        p_f = found_ptr + (expert * rows * SLOTS + place)[:, None] * columns + o_n[None, :]
        x += score[:, None] * tl.load(p_f, mask=there[:, None] & m_x, other=0.0)
    tl.store(p_x, x, mask=m_x)
    count = tl.minimum(columns - block * BN, BN).to(tl.float32)
    mean = tl.sum(x, 1) / count
    apart = tl.where(m_n[None, :], x - mean[:, None], 0.0)
    p_s = statistics_ptr + (row * blocks + block) * 2
    tl.store(p_s, mean, mask=m_m)
    tl.store(p_s + 1, tl.sum(apart * apart, 1), mask=m_m)


def combine(
    found: torch.Tensor,
    places: torch.Tensor,
    scores: torch.Tensor,
    stream: torch.Tensor,
    statistics: torch.Tensor,
    *,
    block: int,
    config: Config,
) -> None:
    """Add to every row of ``stream`` (E, rows, N) its slots' rows of ``found`` (E, rows * k, N) times their scores.

    ``places`` and ``scores`` are (E, rows, k). Leaves the ``statistics`` of blocks of ``block`` columns.
    """
    experts, rows, columns = stream.shape
    tiles = -(-rows // config.rows)
    launch(
        combine_kernel,
        experts * tiles * -(-columns // block),
        config,
        found,
        places,
        scores,
        stream,
        statistics,
        rows,
        tiles,
        columns,
        SLOTS=places.shape[2],
        BM=config.rows,
        BN=block,
    )


@triton.jit(do_not_specialize=["slots", "blocks", "networks"])
def pool_kernel(
    wide_ptr,  # [planes, E, C * L * k, F], by place
    order_ptr,  # [E, C * L * k] int32
    scores_ptr,  # [E, C * L, k] fp32
    counts_ptr,  # [E, X, C * M] int32
    starts_ptr,  # [E, X, C * M] int32
    totals_ptr,  # [E, X] int32
    out_ptr,  # [E, C * M, X, F + EXTRA] fp32
    plane,
    slots,  # C * L * k
    blocks,  # C * M
    networks,
    columns,  # F
    PLANES: tl.constexpr,
    EXTRA: tl.constexpr,
    BR: tl.constexpr,
    BX: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid: E * C * M * column blocks, column blocks fastest; networks one after the other."""
    program = tl.program_id(0)
    parts = tl.cdiv(columns, BN)
    part = program % parts
    block = (program // parts) % blocks
    expert = (program // parts // blocks).to(tl.int64)
    o_x = tl.arange(0, BX)
    o_n = part * BN + tl.arange(0, BN)
    m_n = o_n < columns
    totals = tl.load(totals_ptr + expert * networks + o_x, mask=o_x < networks, other=0)
    for network in range(0, networks):
        run = (expert * networks + network) * blocks + block
        start = tl.sum(tl.where(o_x < network, totals, 0), 0) + tl.load(starts_ptr + run)
        count = tl.load(counts_ptr + run)
        sums = tl.zeros((BN,), dtype=tl.float32)
        weight = tl.zeros((), dtype=tl.float32)
        for first in range(0, count, BR):
            o_r = first + tl.arange(0, BR)
            m_r = o_r < count
            place = expert * slots + start + o_r  # [BR] int64
            slot = tl.load(order_ptr + place, mask=m_r, other=0)
            score = tl.load(scores_ptr + expert * slots + slot, mask=m_r, other=0.0)
            p_w = wide_ptr + place[:, None] * columns + o_n[None, :]
            m_w = m_r[:, None] & m_n[None, :]
            rows = tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)
            if PLANES == 2:
                rows += tl.load(p_w + plane, mask=m_w, other=0.0).to(tl.float32)
            sums += tl.sum(score[:, None] * rows, 0)
            weight += tl.sum(score, 0)
        p_o = out_ptr + ((expert * blocks + block) * networks + network) * (columns + EXTRA)
        tl.store(p_o + o_n, sums, mask=m_n)
        if part == 0:
            o_e = tl.arange(0, EXTRA)
            tl.store(p_o + columns + o_e, tl.where(o_e == 0, weight, 0.0))


def pool(
    wide: torch.Tensor,
    order: torch.Tensor,
    scores: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    totals: torch.Tensor,
    out: torch.Tensor,
    *,
    config: Config,
) -> None:
    """Sums ``out`` (E, C, 1, M * X, F + extra) of ``wide`` (planes, E, C * L * k, F) times scores.

    They are over the slots of each coalition, modality and network, zero where there are none. The first column behind
    them is the sum of the scores, the others (a power of two in all) are zero.
    """
    planes, experts, slots, columns = wide.shape
    networks, blocks = counts.shape[1:]
    launch(
        pool_kernel,
        experts * blocks * -(-columns // config.columns),
        config,
        wide,
        order,
        scores,
        counts,
        starts,
        totals,
        out,
        wide.stride(0),
        slots,
        blocks,
        networks,
        columns,
        PLANES=planes,
        EXTRA=out.shape[-1] - columns,
        BR=config.rows,
        BX=max(16, triton.next_power_of_2(networks)),
        BN=config.columns,
    )
