"""Attention of every coalition, by online softmax over blocks of keys, in base 2 (log2 e is part of Q).

In the first layer a token has two possible rows, so a query's sums over keys fall into two parts: keys whose presence
is the same in all coalitions of a context, summed once per context for both states of every query (numerator, maximum,
denominator), and the keys that vary, a few on a corner grid, which each coalition adds to the sums of its context in
their own state. Every term of a denominator is positive, so nothing cancels, and no score can spread too far. With all
keys varying it is plain attention under a coalition's mask. In later layers all keys are the coalition's own.

``stage`` says which: "context", "first" or "later".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch, multiply, narrow, present, store_planes
from flmoe_fast.engines.gpu.kernels.configs import Config
from flmoe_fast.engines.gpu.kernels.linear import arithmetic
from flmoe_fast.engines.gpu.kernels.precision import Precision

#: Attention weights are kept 2^8 times too large: their small terms then stay clear of fp16's subnormal numbers.
SHIFT = 8.0


@triton.jit(
    do_not_specialize=["batches", "rows", "queries", "keys", "length", "words", "contexts", "group", "offset", "heads"],
    do_not_specialize_on_alignment=["words_ptr"],
)
def attention_kernel(
    qkv_ptr,  # [planes, E, rows, 3 H]; rows are C * L, or 2 * L (state, token) in the first layer
    words_ptr,  # [C, words] int64: presence of tokens
    keys_ptr,  # [keys] int32: which tokens are keys, in the first layer
    numerators_ptr,  # [E, contexts, h, 2 L, d] fp32
    scalars_ptr,  # [E, contexts, h, 2 L, 2] fp32: maximum and denominator
    out_ptr,  # [planes, E, C * L, H]
    plane,
    out_plane,
    batches,  # coalitions, or contexts
    rows,  # of qkv, per expert
    queries,  # per batch: L, or 2 L for a context
    keys,
    length,  # L
    words,
    contexts,
    group,  # coalitions per context
    offset,  # place of the first coalition within its context
    heads,
    depth,  # d
    STAGE: tl.constexpr,
    PLANES: tl.constexpr,
    Q_TERMS: tl.constexpr,
    K_TERMS: tl.constexpr,
    P_TERMS: tl.constexpr,
    V_TERMS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    SHIFTED: tl.constexpr,
    WHOLE: tl.constexpr,  # d is BD
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: E * batches * h * query tiles, query tiles fastest."""
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, BM)
    tile = program % tiles
    program = program // tiles
    head = program % heads
    program = program // heads
    batch = program % batches
    expert = (program // batches).to(tl.int64)

    o_m = tile * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = o_m < queries
    if WHOLE:
        m_q = m_m[:, None]
    else:
        m_q = m_m[:, None] & (o_d < depth)[None, :]
    stride = 3 * heads * depth
    base = qkv_ptr + expert * rows * stride + head * depth
    hidden = heads * depth
    if STAGE == "context":
        # Any coalition of the context shows the states of the keys that do not vary.
        member = tl.maximum(batch * group - offset, 0)
        q_row = o_m
        context = batch
    elif STAGE == "first":
        member = batch
        q_row = present(words_ptr, batch, words, o_m, m_m) * length + o_m
        context = (batch + offset) // group
    else:
        member = batch
        base += batch.to(tl.int64) * length * stride
        q_row = o_m
        context = batch

    p_q = base + q_row[:, None] * stride + o_d[None, :]  # [BM, BD]
    q = tl.load(p_q, mask=m_q, other=0.0)
    if Q_TERMS == 2:
        q_low = tl.load(p_q + plane, mask=m_q, other=0.0)

    # Sums of the context: where they are read, and where they are written.
    o_s = ((expert * contexts + context) * heads + head) * (2 * length) + q_row
    if STAGE == "first":
        top = tl.load(scalars_ptr + o_s * 2, mask=m_m, other=0.0)
        below = tl.load(scalars_ptr + o_s * 2 + 1, mask=m_m, other=1.0)
        above = tl.load(numerators_ptr + o_s[:, None] * depth + o_d[None, :], mask=m_q, other=0.0)
    else:
        # Finite, so that a difference of two of them is a number; any score is larger.
        top = tl.full((BM,), -1e30, dtype=tl.float32)
        below = tl.zeros((BM,), dtype=tl.float32)
        above = tl.zeros((BM, BD), dtype=tl.float32)

    for start in range(0, keys, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < keys
        if STAGE == "later":
            k_row = o_n
        else:
            token = tl.load(keys_ptr + o_n, mask=m_n, other=0)
            k_row = present(words_ptr, member, words, token, m_n) * length + token
        if WHOLE:
            m_k = m_n[:, None]
        else:
            m_k = m_n[:, None] & (o_d < depth)[None, :]
        p_k = base + hidden + k_row[:, None] * stride + o_d[None, :]  # [BN, BD]
        k = tl.load(p_k, mask=m_k, other=0.0)
        score = tl.zeros((BM, BN), dtype=tl.float32)
        if Q_TERMS == 2:
            score = multiply(q_low, tl.trans(k), score, ARITHMETIC)
        if K_TERMS == 2:
            k_low = tl.load(p_k + plane, mask=m_k, other=0.0)
            score = multiply(q, tl.trans(k_low), score, ARITHMETIC)
        score = multiply(q, tl.trans(k), score, ARITHMETIC)
        score = tl.where(m_n[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.math.exp2(score - higher[:, None] + SHIFTED)  # [BM, BN]
        fade = tl.math.exp2(top - higher)
        below = below * fade + tl.sum(weight, 1)
        above = above * fade[:, None]
        p_v = p_k + hidden
        v = tl.load(p_v, mask=m_k, other=0.0)
        w_high = narrow(weight, ARITHMETIC)
        if P_TERMS == 2:
            above = multiply(narrow(weight - w_high.to(tl.float32), ARITHMETIC), v, above, ARITHMETIC)
        if V_TERMS == 2:
            v_low = tl.load(p_v + plane, mask=m_k, other=0.0)
            above = multiply(w_high, v_low, above, ARITHMETIC)
        above = multiply(w_high, v, above, ARITHMETIC)
        top = higher

    if STAGE == "context":
        tl.store(scalars_ptr + o_s * 2, top, mask=m_m)
        tl.store(scalars_ptr + o_s * 2 + 1, below, mask=m_m)
        tl.store(numerators_ptr + o_s[:, None] * depth + o_d[None, :], above, mask=m_q)
    else:
        row = (expert * batches + batch) * length + o_m
        p_o = out_ptr + row[:, None] * hidden + head * depth + o_d[None, :]
        store_planes(p_o, out_plane, above / below[:, None], m_q, PLANES, ARITHMETIC)


def attention(
    stage: str,
    qkv: torch.Tensor,
    *,
    length: int,
    heads: int,
    batches: int,
    precision: Precision,
    config: Config,
    out: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    sums: tuple[torch.Tensor, torch.Tensor] | None = None,
    group: int = 1,
    offset: int = 0,
) -> None:
    """One stage of attention of all experts and heads.

    ``qkv`` (planes, E, rows, 3 H); ``out`` (planes, E, C * L, H) unless the stage is "context"; ``keys`` (keys,) int32
    and ``words`` (C, words) int64 unless it is "later"; ``sums`` numerators (E, contexts, h, 2 L, d) and scalars
    (E, contexts, h, 2 L, 2), written by "context" and read by "first". Coalition c belongs to context
    ``(c + offset) // group``.
    """
    _, experts, rows, wide = qkv.shape
    depth = wide // (3 * heads)
    queries = 2 * length if stage == "context" else length
    numerators, scalars = sums or (None, None)
    q_terms, k_terms, p_terms, v_terms = precision.attention
    launch(
        attention_kernel,
        experts * batches * heads * -(-queries // config.rows),
        config,
        qkv,
        words,
        keys,
        numerators,
        scalars,
        out,
        qkv.stride(0),
        0 if out is None else out.stride(0),
        batches,
        rows,
        queries,
        length if keys is None else len(keys),
        length,
        0 if words is None else words.shape[1],
        1 if numerators is None else numerators.shape[1],
        group,
        offset,
        heads,
        depth,
        STAGE=stage,
        PLANES=precision.planes,
        Q_TERMS=q_terms,
        K_TERMS=k_terms,
        P_TERMS=p_terms,
        V_TERMS=v_terms,
        ARITHMETIC=arithmetic(precision),
        SHIFTED=SHIFT,
        WHOLE=depth == padded_depth(depth),
        BM=config.rows,
        BN=config.columns,
        BD=padded_depth(depth),
    )


def padded_depth(depth: int) -> int:
    """Columns of a head's tile: a power of two, and at least the 16 that a product needs."""
    return max(16, triton.next_power_of_2(depth))
