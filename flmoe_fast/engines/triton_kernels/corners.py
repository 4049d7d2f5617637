"""Corner reduction: from the values of a grid's corners to second differences and redundancy gaps of every pair.

For a pair (i, j) in one context the corners are the context itself, with i toggled, with j toggled, and with both.
Which of them is v11 depends on whether i and j are in the context. All of it is fp64: these are differences of nearly
equal numbers. Beside the samples, running moments of the second difference are kept per pair and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.triton_kernels.arithmetic import launch
from flmoe_fast.engines.triton_kernels.configs import Config


@triton.jit(do_not_specialize=["contexts", "corners", "pairs", "outputs"])
def corners_kernel(
    values_ptr,  # [K, G, O] fp64
    present_ptr,  # [K, P, 2] int8: whether the pair's players are in the context
    single_ptr,  # [P, 2] int64: corner in which only the first (second) player is toggled
    second_ptr,  # [K, P, O] fp64
    gaps_ptr,  # [4, K, P, O] fp64; an undefined ratio is 0
    defined_ptr,  # [K, P, O] int8: where the ratio is defined
    moments_ptr,  # [2, P, O] fp64: mean of the second difference, and sum of squared deviations from it
    contexts,  # K
    corners,  # G
    pairs,  # P
    outputs,  # O
    LEAST: tl.constexpr,  # joint costs up to this define no ratio
    BLOCK: tl.constexpr,
):
    """Grid: blocks of BLOCK pairs and outputs; contexts one after the other."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < pairs * outputs
    pair = o // outputs
    output = o % outputs
    first = tl.load(single_ptr + pair * 2, mask=mask, other=0)
    other = tl.load(single_ptr + pair * 2 + 1, mask=mask, other=0)
    together = (corners - pairs + pair).to(tl.int64)
    nobody = together * 0
    size = nobody + contexts * pairs * outputs
    mean = tl.zeros((BLOCK,), dtype=tl.float64)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for context in range(0, contexts):
        p_in = present_ptr + (context * pairs + pair) * 2
        has_first = tl.load(p_in, mask=mask, other=0) != 0
        has_other = tl.load(p_in + 1, mask=mask, other=0) != 0
        # The corner in which both are present, only the first, only the other, and neither.
        v11 = tl.where(has_first, tl.where(has_other, nobody, other), tl.where(has_other, first, together))
        v10 = tl.where(has_first, tl.where(has_other, other, nobody), tl.where(has_other, together, first))
        v01 = tl.where(has_first, tl.where(has_other, first, together), tl.where(has_other, nobody, other))
        v00 = tl.where(has_first, tl.where(has_other, together, first), tl.where(has_other, other, nobody))
        p_v = values_ptr + context * corners * outputs + output
        both = tl.load(p_v + v11 * outputs, mask=mask, other=0.0)
        only_first = tl.load(p_v + v10 * outputs, mask=mask, other=0.0)
        only_other = tl.load(p_v + v01 * outputs, mask=mask, other=0.0)
        neither = tl.load(p_v + v00 * outputs, mask=mask, other=0.0)

        second = both - only_first - only_other + neither
        joint = both - neither
        total = only_first + only_other - both - neither
        worst = joint - tl.maximum(tl.maximum(both - only_other, both - only_first), 0.0)
        defined = joint > LEAST
        ratio = total / tl.where(defined, joint, 1.0)
        ratio = tl.where(defined, tl.minimum(tl.maximum(ratio, -1.0), 1.0), 0.0)
        at = context * pairs * outputs + o
        tl.store(second_ptr + at, second, mask=mask)
        tl.store(gaps_ptr + at, worst, mask=mask)
        tl.store(gaps_ptr + size + at, total, mask=mask)
        tl.store(gaps_ptr + 2 * size + at, tl.maximum(tl.minimum(worst, total), 0.0), mask=mask)
        tl.store(gaps_ptr + 3 * size + at, ratio, mask=mask)
        tl.store(defined_ptr + at, defined.to(tl.int8), mask=mask)
        step = second - mean
        mean += step / (context + 1)
        squares += step * (second - mean)
    tl.store(moments_ptr + o, mean, mask=mask)
    tl.store(moments_ptr + pairs * outputs + o, squares, mask=mask)


def corners(
    values: torch.Tensor,
    present: torch.Tensor,
    single: torch.Tensor,
    second: torch.Tensor,
    gaps: torch.Tensor,
    defined: torch.Tensor,
    moments: torch.Tensor,
    *,
    least: float,
    config: Config,
) -> None:
    """Reduce ``values`` (K, G, O) float64 of a grid's corners; see the kernel for every shape."""
    contexts, pairs, outputs = second.shape
    launch(
        corners_kernel,
        -(-pairs * outputs // config.rows) if contexts else 0,
        config,
        values,
        present,
        single,
        second,
        gaps,
        defined,
        moments,
        contexts,
        values.shape[1],
        pairs,
        outputs,
        LEAST=least,
        BLOCK=config.rows,
    )
