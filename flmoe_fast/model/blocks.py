"""The parts that every transformer back-end is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """``sizes[0] -> ... -> sizes[-1]`` with an activation and a dropout after every linear layer but the last."""

    def __init__(self, sizes: Sequence[int], activation: type[nn.Module], dropout: float):
        super().__init__()
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes[:-1]):
            steps += [nn.Linear(before, after), activation(), nn.Dropout(dropout)]
        self.network = nn.Sequential(*steps, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Attention(nn.Module):
    """Multi-head self-attention with softmax(q k' / sqrt(d)) written out."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.kv = nn.Linear(hidden, 2 * hidden, bias=False)  # rows 0..H-1 make keys, rows H..2H-1 values
        self.proj = nn.Linear(hidden, hidden)
        self.attention_dropout = nn.Dropout(dropout)
        self.projection_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L, H) and a key mask (B, L) -> output (B, L, H) and the softmax (B, h, L, L) before dropout."""
        batch, length, hidden = x.shape
        key, value = self.kv(x).chunk(2, dim=-1)
        query, key, value = (
            part.reshape(batch, length, self.heads, hidden // self.heads).transpose(1, 2)
            for part in (self.q(x), key, value)
        )
        scores = query @ key.transpose(-2, -1) * (hidden // self.heads) ** -0.5
        if key_mask is not None:
            # Keys are hidden from every query; padded queries are computed too, but nothing ever reads them.
            scores = scores.masked_fill(~key_mask.bool()[:, None, None, :], float("-inf"))
        attention = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(x.dtype)
        mixed = self.attention_dropout(attention) @ value
        mixed = mixed.transpose(1, 2).reshape(batch, length, hidden)
        return self.projection_dropout(self.proj(mixed)), attention


class ClassificationHead(nn.Module):
    """One linear layer from the pooled representation to the logits."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.fc = nn.Linear(features, classes)

    def forward(self, latent: Tensor) -> Tensor:
        return self.fc(latent)
