"""The classifier on pooled sums: the last down-projection, the mean and the classifier are one matrix per modality."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch
from flmoe_fast.engines.gpu.kernels.configs import Config


@triton.jit
def _pooled_product(
    total,
    pooled_ptr,
    w_ptr,
    expert,
    o_c,
    m_c,
    o_n,
    m_n,
    coalitions,
    tiles,
    groups,
    width,
    classes,
    BK: tl.constexpr,
):
    """``total`` [BC, BN] plus the product of sums [E, C, tiles, G, width] with weights [E, G, width, classes]."""
    o_k = tl.arange(0, BK)
    for group in range(0, groups):
        for k in range(0, width, BK):
            m_k = k + o_k < width
            a = tl.zeros((o_c.shape[0], BK), dtype=tl.float32)
            for tile in range(0, tiles):
                row = ((expert * coalitions + o_c) * tiles + tile) * groups + group  # [BC] int64
                p_a = pooled_ptr + row[:, None] * width + k + o_k[None, :]
                a += tl.load(p_a, mask=m_c[:, None] & m_k[None, :], other=0.0)
            row = (expert * groups + group) * width + k + o_k
            w = tl.load(w_ptr + row[:, None] * classes + o_n[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0)
            total = tl.dot(a, w, total, input_precision="ieee")
    return total


@triton.jit(
    do_not_specialize=["experts", "coalitions", "wide_tiles", "stream_tiles", "groups", "modalities", "classes"]
)
def head_kernel(
    wide_ptr,  # [E, C, wide tiles, G, F] fp32: sums of the last hidden activations over each modality's tokens
    stream_ptr,  # [E, C, stream tiles, M, H] fp32: sums of the residual stream
    w_wide_ptr,  # [E, G, F, K] fp32; G is M, or M times the networks of a sparse block
    w_stream_ptr,  # [E, M, H, K] fp32
    bias_ptr,  # [E, K] fp32
    out_ptr,  # [C, E, K] fp64
    experts,
    coalitions,
    wide_tiles,
    stream_tiles,
    groups,
    modalities,
    wide,
    hidden,
    classes,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: E * blocks of BC coalitions."""
    program = tl.program_id(0)
    blocks = tl.cdiv(coalitions, BC)
    expert = (program // blocks).to(tl.int64)
    o_c = (program % blocks) * BC + tl.arange(0, BC)
    o_n = tl.arange(0, BN)
    m_c = o_c < coalitions
    m_n = o_n < classes
    total = tl.zeros((BC, BN), dtype=tl.float32)
    total = _pooled_product(
        total, wide_ptr, w_wide_ptr, expert, o_c, m_c, o_n, m_n, coalitions, wide_tiles, groups, wide, classes, BK
    )
    total = _pooled_product(
        total,
        stream_ptr,
        w_stream_ptr,
        expert,
        o_c,
        m_c,
        o_n,
        m_n,
        coalitions,
        stream_tiles,
        modalities,
        hidden,
        classes,
        BK,
    )
    total += tl.load(bias_ptr + expert * classes + o_n, mask=m_n, other=0.0)[None, :]
    p_o = out_ptr + (o_c.to(tl.int64)[:, None] * experts + expert) * classes + o_n[None, :]
    tl.store(p_o, total.to(tl.float64), mask=m_c[:, None] & m_n[None, :])


def head(
    wide: torch.Tensor,
    stream: torch.Tensor,
    w_wide: torch.Tensor,
    w_stream: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    *,
    config: Config,
) -> None:
    """Expert logits ``out`` (C, E, K) float64 from sums ``wide`` (E, C, tiles, G, F) and ``stream`` (.., M, H)."""
    experts, coalitions, wide_tiles, groups, width = wide.shape
    launch(
        head_kernel,
        experts * -(-coalitions // config.rows),
        config,
        wide,
        stream,
        w_wide,
        w_stream,
        bias,
        out,
        experts,
        coalitions,
        wide_tiles,
        stream.shape[2],
        groups,
        stream.shape[3],
        width,
        stream.shape[4],
        bias.shape[1],
        BC=config.rows,
        BN=max(16, triton.next_power_of_2(bias.shape[1])),
        BK=config.inner,
    )
