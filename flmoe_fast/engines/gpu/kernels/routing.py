"""Routing: mean features of each modality, normalised; the softmax that ends the routing network, and the mixture.

The mean features of a coalition are affine in its presence bits, so they are one product of bits with what each token
adds. The network's hidden layers run through :mod:`flmoe_fast.engines.gpu.kernels.linear` in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch, present
from flmoe_fast.engines.gpu.kernels.configs import Config


@triton.jit(do_not_specialize=["coalitions", "words", "modalities"], do_not_specialize_on_alignment=["words_ptr"])
def mean_features_kernel(
    words_ptr,  # [C, words] int64: presence of tokens
    segments_ptr,  # [M + 1] int32
    absent_ptr,  # [M, H] fp32: mean features with every token absent
    step_ptr,  # [L, H] fp32: what a token's presence adds to its modality's mean
    out_ptr,  # [C, M, H] fp32
    coalitions,
    words,
    modalities,
    hidden,
    NORMALISE: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Grid: blocks of BC coalitions * M, modalities fastest."""
    program = tl.program_id(0)
    modality = program % modalities
    o_c = (program // modalities) * BC + tl.arange(0, BC)
    o_h = tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    m_c = o_c < coalitions
    m_h = o_h < hidden
    start = tl.load(segments_ptr + modality)
    stop = tl.load(segments_ptr + modality + 1)
    mean = tl.zeros((BC, BH), dtype=tl.float32)
    for first in range(start, stop, BT):
        token = first + o_t
        m_t = token < stop
        bits = present(words_ptr, o_c[:, None], words, token[None, :], m_c[:, None] & m_t[None, :])  # [BC, BT]
        step = tl.load(step_ptr + token[:, None] * hidden + o_h[None, :], mask=m_t[:, None] & m_h[None, :], other=0.0)
        mean = tl.dot(bits.to(tl.float32), step, mean, input_precision="ieee")
    mean += tl.load(absent_ptr + modality * hidden + o_h, mask=m_h, other=0.0)[None, :]
    if NORMALISE:
        norm = tl.sqrt(tl.sum(mean * mean, 1))
        mean = mean / tl.maximum(norm, 1e-12)[:, None]
    p_o = out_ptr + (o_c.to(tl.int64)[:, None] * modalities + modality) * hidden + o_h[None, :]
    tl.store(p_o, mean, mask=m_c[:, None] & m_h[None, :])


def mean_features(
    words: torch.Tensor,
    segments: torch.Tensor,
    absent: torch.Tensor,
    step: torch.Tensor,
    out: torch.Tensor,
    *,
    normalise: bool,
    config: Config,
) -> None:
    """Mean features ``out`` (C, M, H) fp32 of every coalition ``words`` (C, words), unit vectors if ``normalise``."""
    coalitions, modalities, hidden = out.shape
    launch(
        mean_features_kernel,
        -(-coalitions // config.rows) * modalities,
        config,
        words,
        segments,
        absent,
        step,
        out,
        coalitions,
        words.shape[1],
        modalities,
        hidden,
        NORMALISE=normalise,
        BC=config.rows,
        BT=config.inner,
        BH=max(16, triton.next_power_of_2(hidden)),
    )


@triton.jit(do_not_specialize=["coalitions", "experts", "classes"])
def gate_kernel(
    a_ptr,  # [C, width] fp32
    w_ptr,  # [width, E] fp32
    bias_ptr,  # [E] fp32
    logits_ptr,  # [C, E, K] fp64
    out_ptr,  # [C, E] fp64
    mixture_ptr,  # [C, K] fp64
    coalitions,
    width,
    experts,
    classes,  # K
    sharpness,  # 1 / temperature
    BC: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: blocks of BC coalitions."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_e = tl.arange(0, BE)
    o_k = tl.arange(0, BK)
    m_c = o_c < coalitions
    m_e = o_e < experts
    total = tl.zeros((BC, BE), dtype=tl.float32)
    for k in range(0, width, BK):
        m_k = k + o_k < width
        a = tl.load(
            a_ptr + o_c.to(tl.int64)[:, None] * width + k + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0.0
        )
        w = tl.load(w_ptr + (k + o_k)[:, None] * experts + o_e[None, :], mask=m_k[:, None] & m_e[None, :], other=0.0)
        total = tl.dot(a, w, total, input_precision="ieee")
    score = (total + tl.load(bias_ptr + o_e, mask=m_e, other=0.0)[None, :]) * sharpness
    score = tl.where(m_e[None, :], score, float("-inf")).to(tl.float64)
    part = tl.exp(score - tl.max(score, 1)[:, None])
    gate = part / tl.sum(part, 1)[:, None]
    tl.store(out_ptr + o_c[:, None] * experts + o_e[None, :], gate, mask=m_c[:, None] & m_e[None, :])
    o_n = tl.arange(0, BN)
    m_n = m_c[:, None] & (o_n < classes)[None, :]
    mixture = tl.zeros((BC, BN), dtype=tl.float64)
    for expert in range(0, experts):
        weight = tl.sum(tl.where((o_e == expert)[None, :], gate, 0.0), 1)
        p_l = logits_ptr + (o_c.to(tl.int64)[:, None] * experts + expert) * classes + o_n[None, :]
        mixture += weight[:, None] * tl.load(p_l, mask=m_n, other=0.0)
    tl.store(mixture_ptr + o_c.to(tl.int64)[:, None] * classes + o_n[None, :], mixture, mask=m_n)


def gate(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    logits: torch.Tensor,
    out: torch.Tensor,
    mixture: torch.Tensor,
    *,
    temperature: float,
    config: Config,
) -> None:
    """Routing weights ``out`` (C, E) float64: softmax of ``(a @ weight + bias) / temperature``; a (C, width) fp32.

    With them, the ``mixture`` (C, K) of the experts' ``logits`` (C, E, K), both float64.
    """
    coalitions, width = a.shape
    launch(
        gate_kernel,
        -(-coalitions // config.rows),
        config,
        a,
        weight,
        bias,
        logits,
        out,
        mixture,
        coalitions,
        width,
        out.shape[1],
        mixture.shape[1],
        1.0 / temperature,
        BC=config.rows,
        BE=max(16, triton.next_power_of_2(out.shape[1])),
        BN=triton.next_power_of_2(mixture.shape[1]),
        BK=config.inner,
    )
