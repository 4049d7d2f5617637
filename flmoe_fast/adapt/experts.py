"""The experts of transformers' own mixture models, as an ``experts_implementation`` of transformers.

    from flmoe_fast.adapt.experts import register
    model.set_experts_implementation(register())

Tokens are sorted by expert. Large groups are taken expert by expert, from the first projection to the weighted sum,
while their activations are in the cache; small ones, training and ``torch.compile`` go through grouped products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F

from flmoe_fast.adapt.grouped import grouped_linear, large_groups
from flmoe_fast.environment import require

NAME = "flmoe_fast"


class Experts(Protocol):
    """What an experts module of transformers has, beside its first projection."""

    down_proj: torch.Tensor
    down_proj_bias: torch.Tensor
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]

    def _apply_gate(self, wide: torch.Tensor) -> torch.Tensor: ...

    def parameters(self) -> Iterator[torch.Tensor]: ...


def register(name: str = NAME) -> str:
    """Make the experts known to transformers under ``name``, and return it.

    Raises
    ------
    MissingExtra
        transformers is not installed, or too old to have experts interfaces (it needs 5.0).
    """
    require("transformers.integrations.moe", "transformers").ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    return name


def experts_forward(
    self: Experts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What an experts module of transformers computes.

    Parameters
    ----------
    self : nn.Module
        With ``gate_up_proj`` (E, 2I, H) or ``up_proj`` (E, I, H) and ``down_proj`` (E, H, I) (transposed where
        ``is_transposed``), biases where ``has_bias``.
    hidden_states : Tensor (S, H)
    top_k_index : int64 Tensor (S, K)
        An index of E or more belongs to no expert here and adds nothing.
    top_k_weights : Tensor (S, K)

    Returns
    -------
    Tensor (S, H)
        In the dtype of ``hidden_states``.
    """
    chosen = top_k_index.reshape(-1)
    sorted_ids, order = chosen.sort(stable=True)
    token = order // top_k_index.shape[-1]
    experts = len(self.down_proj)
    ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=chosen.device), right=True)
    # Only where nothing is traced or differentiated may host code look at the numbers of tokens.
    watched = torch.compiler.is_compiling() or (torch.is_grad_enabled() and _learns(self, hidden_states, top_k_weights))
    if watched or hidden_states.device.type != "cpu" or not large_groups(len(chosen), experts):
        return _grouped(self, hidden_states, sorted_ids, order, token, top_k_weights, ends)
    return _one_by_one(self, hidden_states, token, top_k_weights.reshape(-1)[order], ends)


def _one_by_one(
    self: Experts, hidden_states: torch.Tensor, token: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    up, up_bias, down, down_bias = _parameters(self)
    out = torch.zeros(hidden_states.shape, dtype=up.dtype, device=up.device)
    bounds = [0, *ends.tolist()]
    largest = max(end - start for start, end in zip(bounds, bounds[1:]))
    # One set of buffers for all experts: fresh pages cost more than an elementwise pass over them.
    buffers = [out.new_empty(largest, width) for width in (len(up[0]), up.shape[2], down.shape[2])]
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if end == start:
            continue
        rows = token[start:end]
        given, wide, result = (buffer[: end - start] for buffer in buffers)
        torch.index_select(hidden_states.to(up.dtype), 0, rows, out=given)
        torch.mm(given, up[expert], out=wide)
        if up_bias is not None:
            wide += up_bias[expert]
        torch.mm(_activated(self, wide), down[expert], out=result)
        if down_bias is not None:
            result += down_bias[expert]
        if self.has_post_expert_norm:
            result = self.post_expert_norm(result)
        result *= weights[start:end, None]
        out.index_add_(0, rows, result)
    return out.to(hidden_states.dtype)


def _grouped(
    self: Experts,
    hidden_states: torch.Tensor,
    sorted_ids: torch.Tensor,
    order: torch.Tensor,
    token: torch.Tensor,
    top_k_weights: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    up, up_bias, down, down_bias = _parameters(self)
    expert = sorted_ids.clamp(max=len(down) - 1)
    wide = grouped_linear(hidden_states[token].to(up.dtype), up, ends)
    if up_bias is not None:
        wide = wide + up_bias[expert]
    result = grouped_linear(_activated(self, wide).contiguous(), down, ends)
    if down_bias is not None:
        result = result + down_bias[expert]
    if self.has_post_expert_norm:
        result = self.post_expert_norm(result)
    if up_bias is not None or self.has_post_expert_norm:
        result = result.masked_fill((sorted_ids >= len(down))[:, None], 0.0)
    # Gather, weigh and add in one pass, in the order of the slots: atomic additions would have no order.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    slots, weights = back.view(top_k_weights.shape), top_k_weights.to(result.dtype)
    return F.embedding_bag(slots, result, mode="sum", per_sample_weights=weights).to(hidden_states.dtype)


def _parameters(
    self: Experts,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Matrices input-major, (E, H, 2I or I) and (E, I, H), and their biases."""
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, name), self.down_proj
    if not self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not self.has_bias:
        return up, None, down, None
    return up, getattr(self, f"{name}_bias"), down, self.down_proj_bias


def _activated(self: Experts, wide: torch.Tensor) -> torch.Tensor:
    return self._apply_gate(wide) if self.has_gate else self.act_fn(wide)


def _learns(self: Experts, *tensors: torch.Tensor) -> bool:
    return any(t.requires_grad for t in (*tensors, *self.parameters()))
