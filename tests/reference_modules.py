"""Modules with the structure and state dict of the published code, written for tests from its specification.

Two generations: ``fl`` (token sequences, key masks, sinusoid, pre-norm residual blocks) and ``original`` (patches,
learned positions, the attention output added to itself). Unlike :mod:`flmoe_fast.model.network`, a layer passes on a
list with one tensor a modality, and the attention is computed head by head.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class Perceptron(nn.Module):
    def __init__(self, sizes: list[int], activation: nn.Module, dropout: float = 0.5):
        super().__init__()
        modules: list[nn.Module] = []
        for a, b in zip(sizes[:-2], sizes[1:-1]):
            modules += [nn.Linear(a, b), activation, nn.Dropout(dropout)]
        self.network = nn.Sequential(*modules, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x):
        return self.network(x)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x, valid):
        d = x.shape[-1] // self.num_heads
        queries = self.q(x)
        keys, values = self.kv(x)[..., : x.shape[-1]], self.kv(x)[..., x.shape[-1] :]
        parts = []
        for h in range(self.num_heads):
            at = slice(h * d, (h + 1) * d)
            scores = torch.einsum("bid,bjd->bij", queries[..., at], keys[..., at]) / d**0.5
            scores = torch.where(valid[:, None, :], scores, torch.full_like(scores, -torch.inf))
            parts.append(self.attn_drop(scores.softmax(-1)) @ values[..., at])
        return self.proj_drop(self.proj(torch.cat(parts, -1)))


class Router(nn.Module):
    """Where tokens (N, H) go in evaluation: numbers (N, k), -1 for dropped, and scores (N, k)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.gate, self.count, self.top_k = nn.Linear(width, count), count, 2

    def fill(self, index, room):
        used = [0] * self.count
        kept = index.clone()
        for n, row in enumerate(index.tolist()):
            for slot, network in enumerate(row):
                used[network] += 1
                if used[network] > room:
                    kept[n, slot] = -1
        return kept


class NaiveGate(Router):
    def forward(self, x):
        best = self.gate(x).topk(self.top_k, dim=1)
        return best.indices, best.values.softmax(1)


class GShardGate(NaiveGate):
    random_routing = False

    def forward(self, x):
        index, scores = super().forward(x)
        return self.fill(index, math.ceil(2.4 * len(x)) * 2 // self.count), scores


class SwitchGate(Router):
    def forward(self, x):
        best = self.gate(x).softmax(1).max(1, keepdim=True)
        return self.fill(best.indices, math.ceil(2.4 * len(x) / self.count)), best.values


class Stacked(nn.Module):
    def __init__(self, count: int, before: int, after: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(count, after, before) / 4),
            nn.Parameter(torch.randn(count, after)),
        )


class Networks(nn.Module):
    def __init__(self, count: int, width: int):
        super().__init__()
        self.htoh4, self.h4toh = Stacked(count, width, 2 * width), Stacked(count, 2 * width, width)


class SparsePerceptron(nn.Module):
    """A router and small networks; the router is listed twice, as in the published modules."""

    def __init__(self, width: int, count: int, gate: type[Router]):
        super().__init__()
        self.gate = gate(width, count)
        self.experts = Networks(count, width)
        self.all_gates = nn.ModuleDict({"0": self.gate})

    def forward(self, x):
        tokens = x.flatten(0, 1)
        index, scores = self.gate(tokens)
        up, down, rows = self.experts.htoh4, self.experts.h4toh, []
        for token, networks, weights in zip(tokens, index.tolist(), scores):
            total = torch.zeros_like(token)
            for e, weight in zip(networks, weights):
                if e >= 0:
                    wide = nn.functional.gelu(up.weight[e] @ token + up.bias[e])
                    total = total + weight * (down.weight[e] @ wide + down.bias[e])
            rows.append(total)
        return torch.stack(rows).view_as(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, residual: bool, sparse: tuple[type[Router], int] | None = None):
        super().__init__()
        self.residual = residual
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = Perceptron([width, 2 * width, width], nn.GELU())
        if sparse is not None:
            self.mlp = SparsePerceptron(width, sparse[1], sparse[0])
        self.dropout1, self.dropout2 = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x, masks=None):
        sizes = [part.shape[1] for part in x]
        joined = torch.cat(x, 1)
        valid = joined.new_ones(joined.shape[:2]).bool() if masks is None else torch.cat(masks, 1).bool()
        attended = self.attn(self.norm1(joined), valid)
        joined = (joined if self.residual else attended) + self.dropout1(attended)
        return [part + self.dropout2(self.mlp(self.norm2(part))) for part in joined.split(sizes, 1)]


class Output(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x)


class Fusion(nn.Module):
    def __init__(self, modalities, width, heads, layers, classes, patches, sparse):
        super().__init__()
        residual = patches is None
        self.pos_embed = None if residual else nn.Parameter(torch.randn(1, patches * modalities, width))
        blocks = [Block(width, heads, residual, None if layer % 2 else sparse) for layer in range(layers)]
        self.network = nn.Sequential(*blocks, Output(modalities * width, classes))

    def forward(self, inputs, masks=None):
        sizes = [part.shape[1] for part in inputs]
        x = torch.cat(inputs, 1)
        length, width = x.shape[1:]
        if self.pos_embed is None:
            position = torch.arange(length, dtype=x.dtype)[:, None]
            rate = 10000.0 ** (torch.arange(0, width, 2, dtype=x.dtype) / width)
            encoding = torch.empty(length, width, dtype=x.dtype)
            encoding[:, 0::2], encoding[:, 1::2] = (position / rate).sin(), (position / rate).cos()
            x = x + encoding
        else:
            x = x + self.pos_embed
        if masks is not None:
            x = x * torch.cat(masks, 1)[..., None].to(x)
        parts = list(x.split(sizes, 1))
        for block in self.network[:-1]:
            parts = block(parts, masks)
        if masks is None:
            pooled = [part.mean(1) for part in parts]
        else:
            weights = [mask[..., None].to(x) for mask in masks]
            pooled = [(p * w).sum(1) / w.sum(1).clamp(min=1) for p, w in zip(parts, weights)]
        return self.network[-1](torch.cat(pooled, 1))


class Expert(nn.Module):
    def __init__(self, fusion: Fusion):
        super().__init__()
        self.fusion_model = fusion

    def forward(self, inputs, masks=None):
        return self.fusion_model(inputs, masks)


class Weights(nn.Module):
    def __init__(self, modalities: int, width: int, layers: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        sizes = [modalities * width, *[10] * (layers - 1), modalities + 2]
        self.mlp = Perceptron(sizes, nn.ReLU())

    def forward(self, inputs, masks=None):
        if masks is None:
            means = [part.mean(1) for part in inputs]
        else:
            weights = [mask[..., None].to(inputs[0]) for mask in masks]
            means = [(p * w).sum(1) / w.sum(1).clamp(min=1) for p, w in zip(inputs, weights)]
            means = [mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-12) for mean in means]
        return (self.mlp(torch.cat(means, 1)) / self.temperature).softmax(1)


class InteractionMoE(nn.Module):
    """An ensemble in the published layout.

    ``patches`` makes it the original generation; ``sparse`` is a gate and a number of networks for layers 0, 2, ...
    """

    def __init__(
        self,
        modalities: int = 2,
        width: int = 12,
        heads: int = 3,
        layers: int = 2,
        classes: int = 4,
        routing_layers: int = 2,
        temperature: float = 0.7,
        patches: int | None = None,
        sparse: tuple[type[Router], int] | None = None,
    ):
        super().__init__()
        fusion = Fusion(modalities, width, heads, layers, classes, patches, sparse)
        self.reweight = Weights(modalities, width, routing_layers, temperature)
        self.interaction_experts = nn.ModuleList(Expert(copy.deepcopy(fusion)) for _ in range(modalities + 2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.3 * torch.randn_like(parameter)

    def inference(self, inputs, masks=None):
        logits = [expert(inputs, masks) for expert in self.interaction_experts]
        weights = self.reweight(inputs, masks)
        return logits, weights, (torch.stack(logits, 1) * weights[..., None]).sum(1)
