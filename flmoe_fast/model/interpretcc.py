"""The InterpretCC back-end: one vector per modality, switched on or off as a whole, then an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flmoe_fast.model.config import FLI2MoEConfig


class InterpretCC(nn.Module):
    """Gated fusion of M vectors.

    The gate of a modality is ``sigmoid((g(x) + G) / gumbel_temperature)`` with a Gumbel draw ``G`` per sample; a hard
    gate is 1 where that exceeds ``gate_threshold``, else 0, with the gradient of the soft one. The published code
    draws ``G`` in evaluation too, so that its outputs differ from call to call; here evaluation takes ``G = 0``, the
    most likely value, because a value function has to be a function.
    """

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        hidden, count = config.hidden, len(config.modalities)
        self.temperature, self.threshold = config.gumbel_temperature, config.gate_threshold
        self.hard = config.hard_gates
        self.modality_gates = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(count)
        )
        self.fusion_layer = nn.Sequential(nn.Linear(count * hidden, hidden), nn.ReLU(), nn.Dropout(config.dropout))
        self.classifier = nn.Sequential(
            nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, config.classes)
        )

    def forward(
        self,
        features: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        attention: list | None = None,
        balance: list | None = None,
        passes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """M features (B, 1, H) -> logits (B, C) and the gated vectors (B, M*H); nothing is attended or balanced."""
        latent = torch.cat([f[:, 0] * self.opening(m, f[:, 0]) for m, f in enumerate(features)], dim=-1)
        return self.classifier(self.fusion_layer(latent)), latent

    def opening(self, modality: int, x: Tensor) -> Tensor:
        """(B, H) -> (B, 1), how far the modality's gate is open."""
        score = self.modality_gates[modality](x)
        if self.training:
            score = score - torch.empty_like(score).exponential_().log()
        soft = (score / self.temperature).sigmoid()
        if not self.hard:
            return soft
        return (soft > self.threshold).to(soft.dtype) - soft.detach() + soft
