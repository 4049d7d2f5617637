"""Grouped matrix products: rows sorted by expert, one weight matrix an expert.

``grouped_linear`` is one opaque operator with a gradient, so that it passes through ``torch.compile`` without a break.
PyTorch's own ``grouped_mm`` does the work where it can and where groups are small; where it cannot (float64, rows that
are not multiples of 16 bytes) or where groups are large enough for a plain product each, they are taken one by one.
Unlike ``grouped_mm``, rows behind the last group come out as zeros rather than as whatever was in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Rows a group, on average, from which one matrix product after another is no slower than a grouped one.
LARGE_GROUP = 32


def large_groups(rows: int, experts: int) -> bool:
    """Whether groups are large enough to be worth a product each."""
    return rows >= LARGE_GROUP * experts


@torch.library.custom_op("flmoe_fast::grouped_linear", mutates_args=())
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Product of every row with the matrix of its group.

    Parameters
    ----------
    x : Tensor (S, X)
        The rows of group 0 first, then those of group 1, ...
    weight : Tensor (E, X, Y)
        Any strides, of the same dtype.
    ends : integer Tensor (E,)
        Where each group ends; rows from ``ends[-1]`` on belong to nobody.

    Returns
    -------
    Tensor (S, Y)
        Zeros for the rows of nobody.
    """
    if _library_takes(x, weight):
        out = F.grouped_mm(x, weight, offs=ends.to(torch.int32))
        nobody = torch.arange(len(x), device=x.device) >= ends[-1]
        return out.masked_fill_(nobody[:, None], 0.0)
    out = x.new_zeros(len(x), weight.shape[2])
    start = 0
    for matrix, end in zip(weight, ends.tolist()):
        if end > start:
            torch.mm(x[start:end], matrix, out=out[start:end])
        start = end
    return out


@grouped_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("flmoe_fast::grouped_outer", mutates_args=())
def grouped_outer(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Gradient of the weights: ``x[group].T @ y[group]`` for each of E groups, (E, X, Y)."""
    out = x.new_zeros(len(ends), x.shape[1], y.shape[1])
    start = 0
    for group, end in zip(out, ends.tolist()):
        if end > start:
            torch.mm(x[start:end].T, y[start:end], out=group)
        start = end
    return out


@grouped_outer.register_fake
def _(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _keep(ctx, inputs, output) -> None:
    x, weight, ctx.ends = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx, gradient: torch.Tensor):
    x, weight = ctx.saved_tensors
    of_x, of_weight, _ = ctx.needs_input_grad
    gradient = gradient.contiguous()
    return (
        grouped_linear(gradient, weight.transpose(1, 2), ctx.ends) if of_x else None,
        grouped_outer(x, gradient, ctx.ends) if of_weight else None,
        None,
    )


grouped_linear.register_autograd(_gradient, setup_context=_keep)


def _library_takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if not hasattr(F, "grouped_mm") or not len(x) or not x.is_contiguous():
        return False
    if x.device.type == "cpu":
        if large_groups(len(x), len(weight)) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
    elif x.dtype != torch.bfloat16:
        return False
    return all(t.data_ptr() % 16 == 0 and _whole_rows(t) for t in (x, weight))


def _whole_rows(tensor: torch.Tensor) -> bool:
    """Whether a matrix, or every matrix of a batch, has one unit stride and another of whole 16 bytes."""
    small, large = sorted(tensor.stride()[-2:])
    whole = [large, *tensor.stride()[:-2]]
    return small == 1 and all(step * tensor.element_size() % 16 == 0 for step in whole)
