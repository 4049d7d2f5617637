"""Linear layers of all experts, ``out = act(norm(a) @ w + bias) + residual``, with what comes before and after in one.

Before the product, a LayerNorm (its gain and shift are part of w and bias) that reads the fp32 stream and the
statistics its producer left. After it, bias, GELU or ReLU, the residual, the statistics of the next LayerNorm per block
of columns, storing as operand planes, and the sums over each modality's tokens. The last up-projection stores nothing
but those sums: the mean over tokens commutes with the down-projection that follows.

Not supported: transposed weights, inputs that are not contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch, multiply, narrow, present, store_planes
from flmoe_fast.engines.gpu.kernels.configs import Config
from flmoe_fast.engines.gpu.kernels.precision import Precision

#: LayerNorm's epsilon, as everywhere in the model.
EPSILON = 1e-5


@triton.jit
def normaliser(statistics_ptr, row, m_m, width, EPS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and one over the deviation of rows [BM] (int64), from what their producer left [rows, blocks, 2]."""
    o_b = tl.arange(0, BLOCKS)
    blocks = tl.cdiv(width, BLOCK)
    share = tl.minimum(tl.maximum(width - o_b * BLOCK, 0), BLOCK).to(tl.float32)  # [BLOCKS]
    p_s = statistics_ptr + (row[:, None] * blocks + o_b[None, :]) * 2
    m_s = m_m[:, None] & (o_b < blocks)[None, :]
    means = tl.load(p_s, mask=m_s, other=0.0)  # [BM, BLOCKS]
    squares = tl.load(p_s + 1, mask=m_s, other=0.0)
    mean = tl.sum(means * share[None, :], 1) / width
    apart = means - mean[:, None]
    squares += share[None, :] * apart * apart
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1) / width + EPS)


@triton.jit
def product(
    a_ptr,
    a_plane,
    row,  # [BM] int64
    m_m,
    mean,  # [BM], read where NORMALISE
    scale,
    w_ptr,  # [K, N]
    o_n,
    m_n,
    width,
    columns,
    NORMALISE: tl.constexpr,
    TERMS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Product [BM, BN] of rows of ``a`` with one matrix."""
    o_k = tl.arange(0, BK)
    p_a = a_ptr + row[:, None] * width + o_k[None, :]  # [BM, BK]
    p_w = w_ptr + o_k[:, None] * columns + o_n[None, :]  # [BK, BN]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, width, BK):
        if EVEN:
            m_a = m_m[:, None]
            w = tl.load(p_w)
        else:
            m_k = k + o_k < width
            m_a = m_m[:, None] & m_k[None, :]
            w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        a = tl.load(p_a, mask=m_a, other=0.0)
        if NORMALISE:
            a = (a - mean[:, None]) * scale[:, None]
            high = narrow(a, ARITHMETIC)
            total = multiply(high, w, total, ARITHMETIC)
            if TERMS == 2:
                total = multiply(narrow(a - high.to(tl.float32), ARITHMETIC), w, total, ARITHMETIC)
        else:
            total = multiply(a, w, total, ARITHMETIC)
            if TERMS == 2:
                low = tl.load(p_a + a_plane, mask=m_a, other=0.0)
                total = multiply(low, w, total, ARITHMETIC)
        p_a += BK
        p_w += BK * columns
    return total


@triton.jit
def gelu(x):
    """Exact GELU."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit(
    do_not_specialize=["rows", "tiles", "coalitions", "length", "words", "modalities"],
    do_not_specialize_on_alignment=["words_ptr"],
)
def linear_kernel(
    a_ptr,  # [planes, E, rows, K], or the fp32 stream [E, rows, K] where NORMALISE
    statistics_ptr,  # [E, rows, blocks of the producer, 2] fp32: mean and sum of squared deviations
    w_ptr,  # [E, K, N]
    bias_ptr,  # [E, N] fp32
    residual_ptr,  # [E, rows, N] fp32, or [E, 2, L, N] fp32 where RESIDUAL is "states"
    words_ptr,  # [C, words] int64: presence of tokens
    segments_ptr,  # [M + 1] int32: where each modality's tokens start
    out_ptr,  # [planes, E, rows, N], or fp32 [E, rows, N]
    out_statistics_ptr,  # [E, rows, blocks, 2] fp32
    pooled_ptr,  # [E, C, tiles, M, N] fp32
    a_plane,
    out_plane,
    rows,  # C * L
    tiles,  # row tiles of one expert, or of one coalition where POOL
    coalitions,
    length,  # L
    words,
    modalities,  # M
    width,  # K
    columns,  # N
    EPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    IN_BLOCKS: tl.constexpr,  # blocks of the producer's statistics, rounded up to a power of two
    IN_BLOCK: tl.constexpr,  # columns of one of them
    ACTIVATION: tl.constexpr,  # "none", "gelu" or "relu"
    RESIDUAL: tl.constexpr,  # "none", "stream" or "states"
    STORE: tl.constexpr,  # planes to store, 0 for nothing
    STATISTICS: tl.constexpr,
    POOL: tl.constexpr,
    TERMS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    STORED: tl.constexpr,  # arithmetic of what is stored; "fp32" for the stream
    EVEN: tl.constexpr,  # K and N are whole blocks
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: E * row tiles * column blocks, column blocks fastest. Where POOL, a tile never spans two coalitions."""
    program = tl.program_id(0)
    blocks = tl.cdiv(columns, BN)
    block = program % blocks
    tile = program // blocks
    if POOL:
        all_tiles = tiles * coalitions
    else:
        all_tiles = tiles
    expert = (tile // all_tiles).to(tl.int64)
    tile = tile % all_tiles
    o_m = tl.arange(0, BM)
    if POOL:
        coalition = tile // tiles
        token = (tile % tiles) * BM + o_m
        m_m = token < length
        first = coalition.to(tl.int64) * length + (tile % tiles) * BM
    else:
        first = tile.to(tl.int64) * BM
        m_m = o_m < rows - first
    base = expert * rows + first  # row of the tile among all experts' rows, int64
    o_n = block * BN + tl.arange(0, BN)
    m_n = o_n < columns

    mean = tl.zeros((BM,), dtype=tl.float32)
    scale = mean
    if NORMALISE:
        mean, scale = normaliser(statistics_ptr, base + o_m, m_m, width, EPS, IN_BLOCKS, IN_BLOCK)
    total = product(
        a_ptr,
        a_plane,
        base + o_m,
        m_m,
        mean,
        scale,
        w_ptr + expert * width * columns,
        o_n,
        m_n,
        width,
        columns,
        NORMALISE,
        TERMS,
        ARITHMETIC,
        EVEN,
        BM,
        BN,
        BK,
    )
    x = total + tl.load(bias_ptr + expert * columns + o_n, mask=m_n, other=0.0)[None, :]
    if ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    m_x = m_m[:, None] & m_n[None, :]
    o_x = base * columns + o_m[:, None] * columns + o_n[None, :]
    if RESIDUAL == "stream":
        x += tl.load(residual_ptr + o_x, mask=m_x, other=0.0)
    elif RESIDUAL == "states":
        row = first + o_m
        of = row // length
        at = (row - of * length).to(tl.int32)
        state = present(words_ptr, of, words, at, m_m)
        source = (expert * 2 + state) * length + at
        x += tl.load(residual_ptr + source[:, None] * columns + o_n[None, :], mask=m_x, other=0.0)
    if STORE:
        store_planes(out_ptr + o_x, out_plane, x, m_x, STORE, STORED)
    if STATISTICS:
        count = tl.minimum(columns - block * BN, BN).to(tl.float32)
        mean_x = tl.sum(tl.where(m_n[None, :], x, 0.0), 1) / count
        apart_x = tl.where(m_n[None, :], x - mean_x[:, None], 0.0)
        p_o = out_statistics_ptr + (base * blocks + o_m * blocks + block) * 2
        tl.store(p_o, mean_x, mask=m_m)
        tl.store(p_o + 1, tl.sum(apart_x * apart_x, 1), mask=m_m)
    if POOL:
        into = ((expert * coalitions + coalition) * tiles + tile % tiles) * modalities
        for modality in range(0, modalities):
            start = tl.load(segments_ptr + modality)
            stop = tl.load(segments_ptr + modality + 1)
            inside = (token >= start) & (token < stop)
            sums = tl.sum(tl.where(inside[:, None], x, 0.0), 0)
            tl.store(pooled_ptr + (into + modality) * columns + o_n, sums, mask=m_n)


def linear(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor | None,
    *,
    rows: int,
    precision: Precision,
    terms: int,
    config: Config,
    statistics: torch.Tensor | None = None,
    block: int = 0,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    length: int = 1,
    out_statistics: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> None:
    """One linear layer of all experts.

    ``a`` is (planes, E, rows, K), or with ``statistics`` (of blocks of ``block`` columns) the fp32 stream (E, rows, K);
    ``weight`` (E, K, N); ``bias`` (E, N); ``out`` (planes, E, rows, N) or fp32 (E, rows, N), or None. ``residual`` is
    (E, rows, N), or with ``words`` the two states (E, 2, L, N) of every token. ``pooled`` (E, C, tiles, M, N) takes the
    sums over the tokens of ``segments`` (M + 1,). Of ``a``, ``terms`` terms enter the product.
    """
    experts, width, columns = weight.shape
    coalitions = rows // length
    tiles = -(-(length if pooled is not None else rows) // config.rows)
    programs = experts * tiles * (coalitions if pooled is not None else 1) * -(-columns // config.columns)
    whole = width % config.inner == 0 and columns % config.columns == 0
    stream = out is not None and out.dim() == 3
    launch(
        linear_kernel,
        programs if rows else 0,
        config,
        a,
        statistics,
        weight,
        bias,
        residual,
        words,
        segments,
        out,
        out_statistics,
        pooled,
        a.stride(0) if statistics is None else 0,
        0 if out is None else out.stride(0),
        rows,
        tiles,
        coalitions,
        length,
        0 if words is None else words.shape[1],
        0 if segments is None else len(segments) - 1,
        width,
        columns,
        EPS=EPSILON,
        NORMALISE=statistics is not None,
        IN_BLOCKS=1 if statistics is None else triton.next_power_of_2(-(-width // block)),
        IN_BLOCK=block,
        ACTIVATION=activation,
        RESIDUAL="none" if residual is None else "stream" if words is None else "states",
        STORE=0 if out is None else 1 if stream else out.shape[0],
        STATISTICS=out_statistics is not None,
        POOL=pooled is not None,
        TERMS=terms,
        ARITHMETIC=arithmetic(precision),
        STORED="fp32" if stream else arithmetic(precision),
        EVEN=whole,
        BM=config.rows,
        BN=config.columns,
        BK=config.inner,
    )


def arithmetic(precision: Precision) -> str:
    """What the kernels call the arithmetic of one term."""
    return "fp16" if precision.operand == torch.float16 else precision.name
