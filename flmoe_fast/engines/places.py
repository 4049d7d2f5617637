"""What attention makes of where tokens are: who may look at whom, rotations, and what is added to scores.

Positions that are added to the embeddings need nothing here. All others are tables over the tokens of one sample, so
that tokens can be left out and the others keep their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from flmoe_fast.engines.stack import mapped


@dataclass(frozen=True)
class Relative:
    """Scores of contents with relative positions, as disentangled attention adds them; P relative positions.

    Attributes
    ----------
    keys : Tensor (h, P, d)
        What queries are multiplied with.
    queries : Tensor (h, P, d)
        What keys are multiplied with, scaled as queries are.
    of_keys, of_queries : LongTensor (L, L)
        Which of them a query (row) and a key have between them.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    of_keys: torch.Tensor
    of_queries: torch.Tensor


@dataclass(frozen=True)
class Places:
    """The L tokens of a sample as one layer's attention with h heads sees them.

    Attributes
    ----------
    allowed : BoolTensor (L, L) or None
        Which query (row) may attend to which key; None: everybody to everybody.
    cos, sin : Tensor (L, r) or None
        By which the first r numbers of queries and keys are rotated, each with the one r / 2 behind it.
    bias : Tensor (h or 1, L, L) or None
        What is added to scores.
    relative : Relative or None
    """

    allowed: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    relative: Relative | None = None

    @property
    def masked_only(self) -> bool:
        """Whether tokens' places matter for nothing but who may look at whom."""
        return self.cos is None and not self.adds

    @property
    def adds(self) -> bool:
        """Whether something is added to scores."""
        return self.bias is not None or self.relative is not None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Places:
        """These with every tensor replaced by what ``change`` makes of it."""
        found: Places = mapped(self, change)
        return found

    def of(self, tokens: torch.Tensor) -> Places:
        """Those of some of the tokens (L',) alone."""
        allowed, bias = (None if p is None else p[..., tokens, :][..., tokens] for p in (self.allowed, self.bias))
        cos, sin = (None if part is None else part[tokens] for part in (self.cos, self.sin))
        relative = self.relative
        if relative is not None:
            near = [part[tokens][:, tokens] for part in (relative.of_keys, relative.of_queries)]
            relative = replace(relative, of_keys=near[0], of_queries=near[1])
        return Places(allowed, cos, sin, bias, relative)

    def rotated(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Queries or keys (C, h, S, d) of tokens (C or 1, S)."""
        if self.cos is None or self.sin is None:
            return x
        cos, sin = self.cos[tokens][:, None], self.sin[tokens][:, None]
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def added(self, q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores of queries (C, h, R, d) of tokens ``rows`` (C or 1, R) and keys (C, h, S, d)."""
        pairs = rows[:, :, None], tokens[:, None, :]
        total = None if self.bias is None else self.bias[:, *pairs].transpose(0, 1)
        if self.relative is None:
            return total
        near = self.relative
        heads = q.shape[:2]
        with_keys = (q @ near.keys.transpose(1, 2)).gather(3, near.of_keys[pairs][:, None].expand(*heads, -1, -1))
        at = near.of_queries[pairs].transpose(1, 2)[:, None].expand(*heads, -1, -1)
        with_queries = (k @ near.queries.transpose(1, 2)).gather(3, at).transpose(2, 3)
        both = with_keys + with_queries
        return both if total is None else both + total
