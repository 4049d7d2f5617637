"""All passes of a training step at once: every expert, the true features and every replacement, in one batch.

The same numbers as running expert after expert and pass after pass, to rounding, with three things done once:

* The passes of an expert draw each token from two versions, its own features and their replacement. So positions,
  the first LayerNorm and the first Q, K and V are computed on 2 L rows of an expert instead of (P + 1) L.
* Experts have the same shapes. Their weights are stacked and each product is one batched product.
* Without dropout, the last down-projection is applied to pooled rows: it is linear, and so is the mean over tokens.

With dropout the masks are other draws of the same law. On a CPU they are made of 16 random bits an element, in a
fraction of the time that a Bernoulli draw takes, which is otherwise a third of a step.

A sparse feed-forward block routes every expert's passes in one call, each pass by itself. Experts that are no
transformers run one after the other, each with all its passes in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flmoe_fast.model.blocks import MLP
from flmoe_fast.model.network import (
    FUSION_MODELS,
    EncoderLayer,
    FLI2MoE,
    FusionTransformer,
    InteractionExpert,
    sinusoid,
)
from flmoe_fast.model.sparse import SparseMLP


def can_batch(model: FLI2MoE) -> bool:
    """Whether every expert is one whose passes :func:`batched_passes` computes."""
    return all(type(e) is InteractionExpert and _known(e.fusion_model) for e in model.interaction_experts)


def _known(fusion: nn.Module) -> bool:
    if type(fusion) is not FusionTransformer:
        return type(fusion) in FUSION_MODELS.values()
    return all(type(layer) is EncoderLayer and type(layer.mlp) in (MLP, SparseMLP) for layer in fusion.network[:-1])


def batched_passes(
    model: FLI2MoE,
    features: Sequence[Tensor],
    replacements: Sequence[Sequence[Tensor]],
    replaced: Sequence[int],
    masks: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run every expert on the true features and, for every replaced modality, with that modality replaced.

    Parameters
    ----------
    model : FLI2MoE
        A model for which :func:`can_batch` holds; dropout acts in train mode.
    features : sequence of Tensor
        M encoded modalities (B, T_m, H).
    replacements : Sequence[sequence of Tensor]
        For each expert, P tensors (B, T_m, H) or (T_m, H), those of the modalities ``replaced``.
    replaced : sequence of int
        P modalities in increasing order.
    masks : sequence of Tensor, optional
        M masks (B, T_m) or ``None``.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        Logits (E, 1 + P, B, C), latents (E, 1 + P, B, M*H) and load-balancing losses (E, 1 + P), summed over layers and
        0 without sparse layers; pass 0 is the unperturbed one.
    """
    if model.config.fusion != "transformer":
        return _stacked_passes(model, features, replacements, replaced, masks)
    run = _Passes(model, features, masks)
    real = run.place(torch.cat(tuple(features), dim=1)[None])
    if not replaced:
        return run.forward(real, None, [])
    noise = []
    for own in replacements:
        of = dict(zip(replaced, own, strict=True))
        noise.append(torch.cat([of[m].expand_as(f) if m in of else f for m, f in enumerate(features)], dim=1))
    return run.forward(real, run.place(torch.stack(noise)), replaced)


def _stacked_passes(
    model: FLI2MoE,
    features: Sequence[Tensor],
    replacements: Sequence[Sequence[Tensor]],
    replaced: Sequence[int],
    masks: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    count = 1 + len(replaced)
    masks = masks and [mask.repeat(count, 1) for mask in masks]
    logits, latents = [], []
    for expert, own in zip(model.interaction_experts, replacements, strict=True):
        of = dict(zip(replaced, own, strict=True))
        versions = [
            torch.cat([f, *(of[m].expand_as(f) if m == absent else f for absent in replaced)])
            for m, f in enumerate(features)
        ]
        found = [part.unflatten(0, (count, -1)) for part in expert(versions, masks, passes=count)]
        logits.append(found[0])
        latents.append(found[1])
    return torch.stack(logits), torch.stack(latents), features[0].new_zeros(len(logits), count)


def _keep_mask(x: Tensor, drop: float) -> tuple[Tensor, float]:
    """Zeros and ones of ``x``'s shape and dtype, and the probability of a one: 1 - ``drop`` to 16 bits."""
    keep = round((1.0 - drop) * 2**16)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (bits < keep - 2**15).to(x.dtype), keep / 2**16


def _dropout(x: Tensor, drop: float) -> Tensor:
    if not drop or x.device.type != "cpu":
        return functional.dropout(x, drop)
    mask, keep = _keep_mask(x, drop)
    return x * mask.div_(keep)


class _Passes:
    """Shapes and weights of one batch."""

    def __init__(self, model: FLI2MoE, features: Sequence[Tensor], masks: Sequence[Tensor] | None):
        self.config = model.config
        # Their parts are looked up by name.
        self.fusions: list[Any] = [expert.fusion_model for expert in model.interaction_experts]
        self.lengths = [feature.shape[1] for feature in features]
        self.masks = masks
        self.valid = None if masks is None else torch.cat([mask.bool() for mask in masks], dim=1)
        if self.valid is not None and bool(self.valid.all()):
            self.valid = None
        self.drop = model.config.dropout if model.training else 0.0

    def stack(self, *path: str | int) -> Tensor:
        """Parameter under ``path`` of every expert, (E, ...)."""
        found: list[Tensor] = []
        for part in self.fusions:
            for name in path:
                part = part[name] if isinstance(name, int) else getattr(part, name)
            found.append(part)
        return torch.stack(found)

    def place(self, x: Tensor) -> Tensor:
        """Add positions to (E or 1, B, L, H) and clear the padding."""
        if self.config.generation == "original":
            x = x + self.stack("pos_embed")
        else:
            x = x + sinusoid(x.shape[2], x.shape[3], dtype=x.dtype, device=x.device)
        return x if self.valid is None else x.masked_fill(~self.valid[:, :, None], 0.0)

    def forward(self, real: Tensor, noise: Tensor | None, replaced: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        count = len(self.fusions)
        real = real.expand(count, *real.shape[1:])
        versions = real[:, None] if noise is None else torch.stack((real, noise), dim=1)  # (E, 1 or 2, B, L, H)
        passes = [None, *replaced]
        x = self._assemble(versions, passes)
        balance = real.new_zeros(count, len(passes))
        pooled: Tensor | None = None
        for number in range(self.config.layers):
            first, last = number == 0, number == self.config.layers - 1
            qkv = self._qkv(versions if first else x, number)
            attended = self._attention(self._assemble(qkv, passes) if first else qkv, number)
            branch = _dropout(attended, self.drop)
            x = (x if self.config.generation == "fl" else attended) + branch
            if number in self.config.sparse_layers:
                out, losses = self._sparse(x, number)
                x, balance = x + out, balance + losses
                pooled = self._pool(x) if last else None
            elif last and not self.drop:
                pooled = self._pooled_feed_forward(x, number)
            else:
                x = x + self._feed_forward(x, number)
                pooled = self._pool(x) if last else None
        assert pooled is not None  # the last layer pools
        latents = pooled.flatten(3)  # (E, P + 1, B, M*H)
        weight = self.stack("network", self.config.layers, "fc", "weight")
        bias = self.stack("network", self.config.layers, "fc", "bias")
        return self._linear(latents, weight, bias), latents, balance

    def _assemble(self, versions: Tensor, passes: Sequence[int | None]) -> Tensor:
        """(E, 2, B, L, D) versions of all tokens -> (E, P + 1, B, L, D), each pass with its own replacement."""
        if versions.shape[1] == 1:
            return versions
        parts = []
        for m, part in enumerate(versions.split(self.lengths, dim=3)):
            which = torch.tensor([int(own == m) for own in passes], device=part.device)
            parts.append(part.index_select(1, which))
        return torch.cat(parts, dim=3)

    @staticmethod
    def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(E, ..., I) with weights (E, O, I) and biases (E, O) -> (E, ..., O)."""
        rows = x.reshape(len(x), -1, x.shape[-1])
        if bias is None:
            out = torch.bmm(rows, weight.transpose(1, 2))
        else:
            out = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2))
        return out.reshape(*x.shape[:-1], weight.shape[1])

    def _normed_linear(self, x: Tensor, norm: tuple, weight: Tensor, bias: Tensor | None) -> Tensor:
        """LayerNorm and a linear layer; the norm's gain and shift go into the layer."""
        gain, shift = self.stack(*norm, "weight"), self.stack(*norm, "bias")
        moved = torch.bmm(weight, shift[:, :, None])[:, :, 0]
        bias = moved if bias is None else moved + bias
        return self._linear(functional.layer_norm(x, x.shape[-1:], eps=1e-5), weight * gain[:, None, :], bias)

    def _qkv(self, x: Tensor, layer: int) -> Tensor:
        at = ("network", layer)
        weight = torch.cat((self.stack(*at, "attn", "q", "weight"), self.stack(*at, "attn", "kv", "weight")), dim=1)
        return self._normed_linear(x, (*at, "norm1"), weight, None)

    def _attention(self, qkv: Tensor, layer: int) -> Tensor:
        experts, passes, batch, length, width = qkv.shape
        heads, hidden = self.config.heads, width // 3
        parts = qkv.reshape(experts * passes * batch, length, 3, heads, hidden // heads)
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        mask = None
        if self.valid is not None:
            mask = self.valid.expand(experts * passes, batch, length).reshape(-1, 1, 1, length)
        if self.drop and qkv.device.type == "cpu":
            mixed = self._attend_dropping(query, key, value, mask)
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=self.drop)
        mixed = mixed.transpose(1, 2).reshape(experts, passes, batch, length, hidden)
        at = ("network", layer, "attn", "proj")
        return _dropout(self._linear(mixed, self.stack(*at, "weight"), self.stack(*at, "bias")), self.drop)

    def _attend_dropping(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with dropout, (N, h, L, d); the mask's scale goes to the values, which are fewer."""
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill_(~mask, float("-inf"))
        keep, share = _keep_mask(scores, self.drop)
        return (scores.softmax(-1) * keep) @ (value / share)

    def _hidden(self, x: Tensor, layer: int) -> Tensor:
        at = ("network", layer, "mlp", "network", 0)
        up = self._normed_linear(x, ("network", layer, "norm2"), self.stack(*at, "weight"), self.stack(*at, "bias"))
        return functional.gelu(up)

    def _down(self, x: Tensor, layer: int, biased: bool = True) -> Tensor:
        at = ("network", layer, "mlp", "network", 3)
        return self._linear(x, self.stack(*at, "weight"), self.stack(*at, "bias") if biased else None)

    def _feed_forward(self, x: Tensor, layer: int) -> Tensor:
        hidden = _dropout(self._hidden(x, layer), self.drop)
        return _dropout(self._down(hidden, layer), self.drop)

    def _sparse(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Output (E, P, B, L, D) of a sparse feed-forward block, and its load-balancing losses (E, P)."""
        outputs, balance = [], []
        for own, fusion in zip(x, self.fusions):
            block = fusion.network[layer]
            losses: list[Tensor] = []
            rows = block.norm2(own.flatten(0, 1))
            out = block.feed_forward(rows, self.lengths, losses, len(own))
            outputs.append(_dropout(out.view_as(own), self.drop))
            balance += losses
        return torch.stack(outputs), torch.stack(balance)

    def _pooled_feed_forward(self, x: Tensor, layer: int) -> Tensor:
        down = self._down(self._pool(self._hidden(x, layer)), layer, biased=False)
        bias = self.stack("network", layer, "mlp", "network", 3, "bias")[:, None, None, None]
        if self.masks is not None:
            # The mean of no tokens is zero, the bias included.
            some = torch.stack([mask.bool().any(1) for mask in self.masks], dim=1)[:, :, None]  # (B, M, 1)
            bias = torch.where(some, bias, 0.0)
        return self._pool(x) + down + bias

    def _pool(self, x: Tensor) -> Tensor:
        """(E, P, B, L, D) -> (E, P, B, M, D), the mean over the valid tokens of each modality."""
        if self.valid is None or self.masks is None:
            return torch.stack([part.mean(dim=3) for part in x.split(self.lengths, dim=3)], dim=3)
        means = []
        for part, mask in zip(x.split(self.lengths, dim=3), self.masks, strict=True):
            share = mask.to(x.dtype) / mask.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
            means.append((part.transpose(-2, -1) @ share[:, :, None])[..., 0])
        return torch.stack(means, dim=3)
