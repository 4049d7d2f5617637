"""The arithmetics that the matrix products can run in. Needs no triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """How the operands of the matrix products are rounded; sums, norms, softmax and the residual stream are fp32.

    Attributes
    ----------
    name : str
    operand : torch.dtype
        What weights are stored in, and every plane of an activation.
    planes : int
        Terms that an activation is stored as.
    linear : tuple of int
        Terms of an activation that enter the product with a weight: of normalised rows, of what attention gives, and of
        the hidden activations of a feed-forward block.
    attention : tuple of int
        Terms of q, k, attention weights and v that enter the products of attention. Of two operands with two terms the
        product of the two small ones is left out.
    bits : int
        Binary digits of an activation as it enters a product, for error bounds.
    """

    name: str
    operand: torch.dtype
    planes: int
    linear: tuple[int, int, int]
    attention: tuple[int, int, int, int]
    bits: int


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp16x2", torch.float16, 2, (2, 2, 2), (2, 2, 2, 2), 22),
        # Queries and attention weights hardly matter, see docs/precision.md: a third less to multiply in attention.
        Precision("mixed", torch.float16, 2, (2, 2, 2), (1, 2, 1, 2), 11),
        Precision("fp16", torch.float16, 1, (1, 1, 1), (1, 1, 1, 1), 11),
        Precision("tf32", torch.float32, 1, (1, 1, 1), (1, 1, 1, 1), 11),
        Precision("fp32", torch.float32, 1, (1, 1, 1), (1, 1, 1, 1), 24),
        Precision("bf16", torch.bfloat16, 1, (1, 1, 1), (1, 1, 1, 1), 8),
    )
}
