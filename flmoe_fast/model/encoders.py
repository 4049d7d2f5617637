"""Trainable encoders from raw inputs or cached backbone features to tokens of width H."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from flmoe_fast.checks import integer, shape


class ProjectionEncoder(nn.Module):
    """One linear layer per token, for patches or for the cached output of a frozen backbone.

    Parameters
    ----------
    in_features : int
        Width F of the input tokens (768 for RoBERTa-base and for CLIP ViT-B/16).
    hidden : int
        Token width H of the model.
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

    Parameters
    ----------
    features : int
        Number F of columns, hence of tokens.
    hidden : int
        Token width H of the model.
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


class ColumnGroupEncoder(nn.Module):
    """One token per group of neighbouring columns: the sum of the tokens :class:`TabularTokenEncoder` makes of them.

    For tables with hundreds of columns, where a token each would be dear. Unlike in patches that share a projection,
    every column keeps an embedding of its own.

    Parameters
    ----------
    features : int
        Number F of columns.
    groups : int
        Number T of tokens, at most F; groups differ by at most one column.
    hidden : int
        Token width H of the model.
    """

    def __init__(self, features: int, groups: int, hidden: int):
        super().__init__()
        self.features = integer("features", features, least=1)
        groups = integer("groups", groups, least=1, most=self.features)
        hidden = integer("hidden", hidden, least=1)
        self.feature_emb = nn.Parameter(0.02 * torch.randn(self.features, hidden))
        self.bias = nn.Parameter(torch.zeros(groups, hidden))
        edges = [group * self.features // groups for group in range(groups + 1)]
        self.sizes = [after - before for before, after in itertools.pairwise(edges)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, T, H)."""
        shape("x", x, (None, self.features), "(B, F)")
        parts = zip(x.split(self.sizes, dim=1), self.feature_emb.split(self.sizes), strict=True)
        return torch.stack([columns @ embedding for columns, embedding in parts], dim=1) + self.bias


class PatchEncoder(nn.Module):
    """A vector cut into patches, one linear layer for all: the tokens of the original I2MoE.

    The vector is filled with zeros on the right to ``patches`` pieces of ceil(F / patches) numbers.

    Parameters
    ----------
    features : int
        Length F of the vector, at least ``patches``.
    patches : int
        Number P of tokens.
    hidden : int
        Token width H of the model.
    """

    def __init__(self, features: int, patches: int, hidden: int):
        super().__init__()
        self.patches = integer("patches", patches, least=1)
        self.features = integer("features", features, least=self.patches)
        self.projection = nn.Linear(-(-self.features // self.patches), integer("hidden", hidden, least=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, P, H)."""
        shape("x", x, (None, self.features), "(B, F)")
        size = self.projection.in_features
        padded = nn.functional.pad(x, (0, self.patches * size - self.features))
        return self.projection(padded.reshape(len(x), self.patches, size))


class VectorEncoder(nn.Module):
    """A vector as a single token, by one linear layer or a small network.

    Parameters
    ----------
    features : int
        Length F of the vector.
    hidden : int
        Token width H of the model.
    layers : int
        Linear layers; between them ReLU, and all but the last H wide.
    """

    def __init__(self, features: int, hidden: int, layers: int = 1):
        super().__init__()
        self.features = integer("features", features, least=1)
        hidden, layers = integer("hidden", hidden, least=1), integer("layers", layers, least=1)
        steps: list[nn.Module] = [nn.Linear(self.features, hidden)]
        for _ in range(layers - 1):
            steps += [nn.ReLU(), nn.Linear(hidden, hidden)]
        self.network = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, 1, H)."""
        shape("x", x, (None, self.features), "(B, F)")
        return self.network(x)[:, None]


class SequenceEncoder(nn.Module):
    """A sequence of vectors as patches of the last state of a GRU, as the original I2MoE reads video and speech.

    Parameters
    ----------
    features : int
        Width F of a step.
    patches : int
        Number P of tokens.
    hidden : int
        Token width H of the model.
    state : int
        Width of the recurrent state, at least ``patches``.
    """

    def __init__(self, features: int, patches: int, hidden: int, state: int = 256):
        super().__init__()
        self.gru = nn.GRU(integer("features", features, least=1), integer("state", state, least=1), batch_first=True)
        self.patches = PatchEncoder(state, patches, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, F) -> (B, P, H)."""
        shape("x", x, (None, None, self.gru.input_size), "(B, S, F)")
        return self.patches(self.gru(x)[1][0])
