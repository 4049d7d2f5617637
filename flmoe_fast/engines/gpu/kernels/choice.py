"""The gate of a sparse feed-forward block: which networks a token goes to, with what weight, and how many come to each.

The gate's product is in plain fp32 in every precision: rounding, which elsewhere moves a value a little, can here
change a choice. Equal logits go to the lower index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch
from flmoe_fast.engines.gpu.kernels.configs import Config
from flmoe_fast.engines.gpu.kernels.linear import EPSILON, normaliser

#: Most logits of a tile: rows times networks.
TILE = 4096


@triton.jit
def _largest(left, o_x, networks):
    """The largest of each row's logits [BM, BX], the first one that has it, and the logits without it."""
    value = tl.max(left, 1)
    # Never an index that does not exist, whatever a logit that is not a number compares like.
    at = tl.min(tl.where(left == value[:, None], o_x[None, :], networks - 1), 1)
    return value, at, tl.where(o_x[None, :] == at[:, None], float("-inf"), left)


@triton.jit(do_not_specialize=["coalitions", "length", "modalities", "networks"])
def choose_kernel(
    stream_ptr,  # [E, C * L, H] fp32
    statistics_ptr,  # [E, C * L, blocks, 2] fp32
    w_ptr,  # [E, H, X] fp32
    bias_ptr,  # [E, X] fp32
    segments_ptr,  # [M + 1] int32
    room_ptr,  # [M] int32: slots that a network takes of a coalition and modality
    chosen_ptr,  # [E, C * L, k] int32
    scores_ptr,  # [E, C * L, k] fp32
    counts_ptr,  # [E, X, C * M] int32: slots that find room
    coalitions,
    length,
    modalities,
    width,
    networks,
    EPS: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,  # k
    AMONG_ALL: tl.constexpr,  # scores are probabilities among all networks, not among the chosen ones
    BM: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: E * C * M, modalities fastest."""
    program = tl.program_id(0)
    block = program % (coalitions * modalities)
    expert = (program // (coalitions * modalities)).to(tl.int64)
    modality = block % modalities
    start = tl.load(segments_ptr + modality)
    stop = tl.load(segments_ptr + modality + 1)
    o_x = tl.arange(0, BX)
    o_k = tl.arange(0, BK)
    m_x = o_x < networks
    bias = tl.load(bias_ptr + expert * networks + o_x, mask=m_x, other=0.0)
    count = tl.zeros((BX,), dtype=tl.int32)
    for first in range(start, stop, BM):
        token = first + tl.arange(0, BM)
        m_m = token < stop
        row = (expert * coalitions + block // modalities) * length + token  # [BM] int64
        mean, scale = normaliser(statistics_ptr, row, m_m, width, EPS, IN_BLOCKS, IN_BLOCK)
        logits = tl.zeros((BM, BX), dtype=tl.float32)
        for k in range(0, width, BK):
            m_k = k + o_k < width
            p_a = stream_ptr + row[:, None] * width + k + o_k[None, :]
            a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
            a = (a - mean[:, None]) * scale[:, None]
            p_w = w_ptr + (expert * width + k + o_k)[:, None] * networks + o_x[None, :]
            w = tl.load(p_w, mask=m_k[:, None] & m_x[None, :], other=0.0)
            logits = tl.dot(a, w, logits, input_precision="ieee")
        logits = tl.where(m_x[None, :], logits + bias[None, :], float("-inf"))
        top = tl.max(logits, 1)
        if AMONG_ALL:
            total = tl.sum(tl.exp(logits - top[:, None]), 1)
        else:
            total = tl.zeros((BM,), dtype=tl.float32)
            left = logits
            for _ in range(SLOTS):
                value, at, left = _largest(left, o_x, networks)
                total += tl.exp(value - top)
        left = logits
        for slot in range(SLOTS):
            value, at, left = _largest(left, o_x, networks)
            tl.store(chosen_ptr + row * SLOTS + slot, at, mask=m_m)
            tl.store(scores_ptr + row * SLOTS + slot, tl.exp(value - top) / total, mask=m_m)
            count += tl.sum(((o_x[None, :] == at[:, None]) & m_m[:, None]).to(tl.int32), 0)
    count = tl.minimum(count, tl.load(room_ptr + modality))
    p_c = counts_ptr + (expert * networks + o_x) * (coalitions * modalities) + block
    tl.store(p_c, count, mask=m_x)


def choose(
    stream: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    segments: torch.Tensor,
    room: torch.Tensor,
    chosen: torch.Tensor,
    scores: torch.Tensor,
    counts: torch.Tensor,
    *,
    length: int,
    block: int,
    among_all: bool,
    config: Config,
) -> None:
    """Choices of every token of ``stream`` (E, C * L, H), whose ``statistics`` are of blocks of ``block`` columns.

    ``weight`` (E, H, X) and ``bias`` (E, X) fp32; ``room`` (M,) int32. Written are ``chosen`` (E, C * L, k) int32 and
    ``scores`` fp32 in falling order, and ``counts`` (E, X, C * M) int32 of slots that find room. Scores are a softmax
    over the chosen networks, or their probabilities ``among_all``.
    """
    experts, width, networks = weight.shape
    columns = max(16, triton.next_power_of_2(networks))
    launch(
        choose_kernel,
        experts * counts.shape[2],
        config,
        stream,
        statistics,
        weight,
        bias,
        segments,
        room,
        chosen,
        scores,
        counts,
        stream.shape[1] // length,
        length,
        len(segments) - 1,
        width,
        networks,
        EPS=EPSILON,
        IN_BLOCKS=triton.next_power_of_2(-(-width // block)),
        IN_BLOCK=block,
        SLOTS=chosen.shape[2],
        AMONG_ALL=among_all,
        BM=max(16, min(config.rows, TILE // columns)),
        BX=columns,
        BK=config.inner,
    )
