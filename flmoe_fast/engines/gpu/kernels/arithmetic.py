"""What several kernels need: products in a given arithmetic, operands in planes, and presence bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.engines.gpu.kernels.configs import Config


def launch(kernel, programs: int, config: Config, first: torch.Tensor, *args, **constants) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of its first argument; nothing where there are none."""
    if programs:
        with torch.cuda.device_of(first):
            kernel[(programs,)](first, *args, **constants, num_warps=config.warps, num_stages=config.stages)


@triton.jit
def multiply(a, b, total, ARITHMETIC: tl.constexpr):
    """``total + a @ b`` of stored operands; what a product is rounded to is stated, never left to a default."""
    if ARITHMETIC == "tf32":
        return tl.dot(a, b, total, input_precision="tf32")
    elif ARITHMETIC == "fp32":
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def narrow(x, ARITHMETIC: tl.constexpr):
    """The leading term of fp32 numbers, as stored."""
    if ARITHMETIC == "fp16":
        return x.to(tl.float16)
    elif ARITHMETIC == "bf16":
        return x.to(tl.bfloat16)
    else:
        return x


@triton.jit
def store_planes(pointer, plane, x, mask, PLANES: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Store fp32 numbers as one or two terms."""
    high = narrow(x, ARITHMETIC)
    tl.store(pointer, high, mask=mask)
    if PLANES == 2:
        tl.store(pointer + plane, narrow(x - high.to(tl.float32), ARITHMETIC), mask=mask)


@triton.jit
def present(words_ptr, row, words, token, mask):
    """Presence bit (0 or 1) of tokens in the coalition ``row`` of int64 words (C, words)."""
    word = tl.load(words_ptr + row * words + (token >> 6), mask=mask, other=0)
    # An arithmetic shift of a signed word is right too: only the lowest bit is kept.
    return ((word >> (token & 63).to(tl.int64)) & 1).to(tl.int32)
