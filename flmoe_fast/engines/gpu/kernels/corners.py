"""Corner reduction: from the values of a grid's corners to second differences and a redundancy gap of every pair.

For a pair (i, j) in one context the corners are the context itself, with i toggled, with j toggled, and with both.
Which of them is v11 depends on whether i and j are in the context. All of it is fp64: these are differences of nearly
equal numbers. Samples stay apart by context: standard errors come from differences of successive contexts, and the
rounding of single ones is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.arithmetic import launch
from flmoe_fast.engines.gpu.kernels.configs import Config


@triton.jit(do_not_specialize=["corners", "pairs", "outputs"])
def corners_kernel(
    values_ptr,  # [K, G, O] fp64
    present_ptr,  # [K, P, 2] int8: whether the pair's players are in the context
    single_ptr,  # [P, 2] int64: corner in which only the first (second) player is toggled
    second_ptr,  # [K, P, O] fp64
    gap_ptr,  # [K, P, O] fp64; an undefined ratio is 0
    defined_ptr,  # [K, P, O] int8: where the ratio is defined; not written for other kinds
    corners,  # G
    pairs,  # P
    outputs,  # O
    KIND: tl.constexpr,  # "max", "sum", "strict" or "ratio"
    LEAST: tl.constexpr,  # joint costs up to this define no ratio
    BLOCK: tl.constexpr,
):
    """Grid: K * blocks of BLOCK pairs and outputs, blocks fastest."""
    blocks = tl.cdiv(pairs * outputs, BLOCK)
    context = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = o < pairs * outputs
    pair = o // outputs
    output = o % outputs
    first = tl.load(single_ptr + pair * 2, mask=mask, other=0)
    other = tl.load(single_ptr + pair * 2 + 1, mask=mask, other=0)
    together = (corners - pairs + pair).to(tl.int64)
    nobody = together * 0
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

    at = context * pairs * outputs + o
    tl.store(second_ptr + at, both - only_first - only_other + neither, mask=mask)
    joint = both - neither
    total = only_first + only_other - both - neither
    if KIND == "sum":
        gap = total
    elif KIND == "ratio":
        defined = joint > LEAST
        gap = tl.minimum(tl.maximum(total / tl.where(defined, joint, 1.0), -1.0), 1.0)
        gap = tl.where(defined, gap, 0.0)
        tl.store(defined_ptr + at, defined.to(tl.int8), mask=mask)
    else:
        gap = joint - tl.maximum(tl.maximum(both - only_other, both - only_first), 0.0)
        if KIND == "strict":
            gap = tl.maximum(tl.minimum(gap, total), 0.0)
    tl.store(gap_ptr + at, gap, mask=mask)


def corners(
    values: torch.Tensor,
    present: torch.Tensor,
    single: torch.Tensor,
    second: torch.Tensor,
    gap: torch.Tensor,
    defined: torch.Tensor | None,
    *,
    kind: str,
    least: float,
    config: Config,
) -> None:
    """Reduce ``values`` (K, G, O) float64 of a grid's corners; see the kernel for every shape."""
    contexts, pairs, outputs = second.shape
    launch(
        corners_kernel,
        contexts * -(-pairs * outputs // config.rows),
        config,
        values,
        present,
        single,
        second,
        gap,
        defined,
        values.shape[1],
        pairs,
        outputs,
        KIND=kind,
        LEAST=least,
        BLOCK=config.rows,
    )
