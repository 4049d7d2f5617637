"""The MoE++ back-end as published, which is attention only.

Its layers compute a mixture of experts and then return something else: every layer is given the stack's input, the
block's output is replaced by the attention residual taken twice, ``x + dropout(a) + dropout(a)``, and only the last
layer's output is used. So none of the mixtures and no layer but the last has an influence on any output or loss. Their
parameters exist here, unused, because checkpoints hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flmoe_fast.model.blocks import Attention, ClassificationHead
from flmoe_fast.model.config import FLI2MoEConfig

#: Width of the networks of a mixture, whatever H is.
NETWORK_WIDTH = 64


class ConstantExpert(nn.Module):
    """Parameters of an expert that mixes its input with a learned vector."""

    def __init__(self, hidden: int):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(hidden))
        self.wg = nn.Linear(hidden, 2, bias=False)


class UnusedMixture(nn.Module):
    """Parameters of a layer's mixture, under the published names: ``moe.gate.*`` and ``moe.experts.experts.*``."""

    def __init__(self, hidden: int, count: int):
        super().__init__()
        gate = nn.Module()
        gate.wg = nn.Sequential(
            nn.Linear(hidden, 8 * count, bias=False), nn.Tanh(), nn.Linear(8 * count, count, bias=False)
        )
        gate.gate_map = nn.Linear(count, count, bias=False)
        networks: list[nn.Module] = []
        for _ in range(count - 4):
            network = nn.Module()
            network.up_proj = nn.Linear(hidden, 2 * NETWORK_WIDTH, bias=False)
            network.down_proj = nn.Linear(NETWORK_WIDTH, hidden, bias=False)
            networks.append(network)
        networks += [ConstantExpert(hidden), ConstantExpert(hidden), nn.Identity(), nn.Identity()]  # copy, zero
        self.moe = nn.Module()
        self.moe.gate = gate
        self.moe.experts = nn.Module()
        self.moe.experts.experts = nn.ModuleList(networks)


class MoEPlusPlusLayer(nn.Module):
    """``x + dropout(a) + dropout(a)`` with ``a = attn(norm1(x))``."""

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, eps=1e-5)
        self.norm2 = nn.LayerNorm(config.hidden, eps=1e-5)
        self.dropout1 = nn.Dropout(config.dropout)
        self.attn = Attention(config.hidden, config.heads, config.dropout)
        self.mlp = UnusedMixture(config.hidden, config.ffn_experts or 0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, H) -> (B, L, H) and the attention (B, h, L, L)."""
        attended, attention = self.attn(self.norm1(x), None)
        return x + self.dropout1(attended) + self.dropout1(attended), attention


class MoEPlusPlus(nn.Module):
    """Joint attention over the patches of all modalities, pooled per modality and classified."""

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, sum(config.num_tokens or ()), config.hidden))
        self.layers = nn.ModuleList(MoEPlusPlusLayer(config) for _ in range(config.layers))
        self.classification_head = ClassificationHead(len(config.modalities) * config.hidden, config.classes)

    def forward(
        self,
        features: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        attention: list | None = None,
        balance: list | None = None,
        passes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """M features (B, T_m, H) -> logits (B, C) and the pooled latent (B, M*H); only the last layer is run."""
        x, softmax = self.layers[-1](torch.cat(tuple(features), dim=1) + self.pos_embed)
        if attention is not None:
            attention.append(softmax)
        latent = torch.cat([part.mean(dim=1) for part in x.split([f.shape[1] for f in features], dim=1)], dim=-1)
        return self.classification_head(latent), latent
