"""Trainable encoders from raw inputs or cached backbone features to tokens of width H."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flmoe_fast.checks import integer, shape


class ProjectionEncoder(nn.Module):
    """One linear layer per token, for patches or for the cached output of a frozen backbone.

    Args:
        in_features: width F of the input tokens (768 for RoBERTa-base and for CLIP ViT-B/16).
        hidden: token width H of the model.
    """

    def __init__(self, in_features: int, hidden: int):
        super().__init__()
        in_features = integer("in_features", in_features, least=1)
        self.proj = nn.Linear(in_features, integer("hidden", hidden, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, F) -> (B, T, H)."""
        shape("x", x, (None, None, self.proj.in_features), "(B, T, F)")
        return self.proj(x)


class TabularTokenEncoder(nn.Module):
    """One token per column of a table: ``token_f = x_f * feature_emb[f] + bias[f]``.

    Args:
        features: number F of columns, hence of tokens.
        hidden: token width H of the model.
    """

    def __init__(self, features: int, hidden: int):
        super().__init__()
        size = integer("features", features, least=1), integer("hidden", hidden, least=1)
        self.feature_emb = nn.Parameter(0.02 * torch.randn(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, F, H)."""
        shape("x", x, (None, len(self.feature_emb)), "(B, F)")
        return x[:, :, None] * self.feature_emb + self.bias
