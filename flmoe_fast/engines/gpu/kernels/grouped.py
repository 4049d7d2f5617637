"""Linear layers of the networks of a sparse block: each on the slots that were sent to it.

A tile never spans two networks. How many tiles each has is known on the device only, so the grid has as many as there
can be, and a program finds its network from the totals; those left over do nothing. Before the product the rows of the
fp32 stream are gathered and normalised; after it comes the bias, and GELU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch, store_planes
from flmoe_fast.engines.gpu.kernels.configs import Config
from flmoe_fast.engines.gpu.kernels.linear import EPSILON, arithmetic, gelu, normaliser, product
from flmoe_fast.engines.gpu.kernels.precision import Precision


@triton.jit(do_not_specialize=["rows", "tiles", "networks"])
def grouped_kernel(
    a_ptr,  # the fp32 stream [E, rows, K] where GATHER, else [planes, E, rows * k, K] by place
    statistics_ptr,  # [E, rows, blocks of the producer, 2] fp32
    order_ptr,  # [E, rows * k] int32: the slot at each place
    totals_ptr,  # [E, X] int32: slots of each network
    w_ptr,  # [E * X, K, N]
    bias_ptr,  # [E * X, N] fp32
    out_ptr,  # [planes, E, rows * k, N] or fp32 [E, rows * k, N], by place
    a_plane,
    out_plane,
    rows,  # C * L
    tiles,  # most row tiles that an expert's slots can need
    networks,
    width,  # K
    columns,  # N
    SLOTS: tl.constexpr,  # k
    EPS: tl.constexpr,
    GATHER: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    STORE: tl.constexpr,
    TERMS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    STORED: tl.constexpr,
    EVEN: tl.constexpr,
    BX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: E * most row tiles * column blocks, column blocks fastest."""
    program = tl.program_id(0)
    blocks = tl.cdiv(columns, BN)
    block = program % blocks
    tile = (program // blocks) % tiles
    expert = (program // blocks // tiles).to(tl.int64)
    o_x = tl.arange(0, BX)
    totals = tl.load(totals_ptr + expert * networks + o_x, mask=o_x < networks, other=0)
    needed = tl.cdiv(totals, BM)
    network = tl.sum((tl.cumsum(needed, 0) <= tile).to(tl.int32), 0)  # those whose tiles all come before
    if network >= networks:
        return
    before = o_x < network
    within = (tile - tl.sum(tl.where(before, needed, 0), 0)) * BM + tl.arange(0, BM)
    m_m = within < tl.sum(tl.where(o_x == network, totals, 0), 0)
    place = expert * rows * SLOTS + tl.sum(tl.where(before, totals, 0), 0) + within  # [BM] int64
    o_n = block * BN + tl.arange(0, BN)
    m_n = o_n < columns
    matrix = expert * networks + network

    mean = tl.zeros((BM,), dtype=tl.float32)
    scale = mean
    if GATHER:
        row = expert * rows + tl.load(order_ptr + place, mask=m_m, other=0) // SLOTS
        mean, scale = normaliser(statistics_ptr, row, m_m, width, EPS, IN_BLOCKS, IN_BLOCK)
    else:
        row = place
    x = product(
        a_ptr,
        a_plane,
        row,
        m_m,
        mean,
        scale,
        w_ptr + matrix * width * columns,
        o_n,
        m_n,
        width,
        columns,
        GATHER,
        TERMS,
        ARITHMETIC,
        EVEN,
        BM,
        BN,
        BK,
    )
    x += tl.load(bias_ptr + matrix * columns + o_n, mask=m_n, other=0.0)[None, :]
    if GATHER:
        x = gelu(x)
    p_o = out_ptr + place[:, None] * columns + o_n[None, :]
    store_planes(p_o, out_plane, x, m_m[:, None] & m_n[None, :], STORE, STORED)


def most_tiles(slots: int, networks: int, rows: int) -> int:
    """Row tiles of ``rows`` that ``slots`` slots can need, however they spread over the networks."""
    first = min(slots, networks)  # each may need a tile for a single slot, and then one for every ``rows`` more
    return first + (slots - first) // rows


def grouped(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    totals: torch.Tensor,
    *,
    rows: int,
    precision: Precision,
    terms: int,
    config: Config,
    order: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    block: int = 0,
) -> None:
    """One linear layer of all networks.

    The first takes the fp32 stream ``a`` (E, rows, K) with its ``statistics`` (of blocks of ``block`` columns) and the
    ``order`` (E, rows * k) of slots, and ends with GELU; the second takes the operand planes (planes, E, rows * k, K)
    that the first left, and ends with the bias. ``weight`` (E * X, K, N), ``bias`` (E * X, N), ``totals`` (E, X) int32.
    ``out`` is (planes, E, rows * k, N) or fp32 (E, rows * k, N); rows behind an expert's totals are not written.
    """
    experts, networks = totals.shape
    _, width, columns = weight.shape
    slots = out.shape[-2]
    tiles = most_tiles(slots, networks, config.rows)
    stream = out.dim() == 3
    launch(
        grouped_kernel,
        experts * tiles * -(-columns // config.columns),
        config,
        a,
        statistics,
        order,
        totals,
        weight,
        bias,
        out,
        a.stride(0) if order is None else 0,
        out.stride(0),
        rows,
        tiles,
        networks,
        width,
        columns,
        SLOTS=slots // rows,
        EPS=EPSILON,
        GATHER=order is not None,
        IN_BLOCKS=1 if statistics is None else triton.next_power_of_2(-(-width // block)),
        IN_BLOCK=block,
        STORE=1 if stream else out.shape[0],
        TERMS=terms,
        ARITHMETIC=arithmetic(precision),
        STORED="fp32" if stream else arithmetic(precision),
        EVEN=width % config.inner == 0 and columns % config.columns == 0,
        BX=max(16, triton.next_power_of_2(networks)),
        BM=config.rows,
        BN=config.columns,
        BK=config.inner,
    )
