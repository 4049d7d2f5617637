"""What people have without this package, as strong as plain PyTorch makes it.

``BatchedSDPA`` evaluates a batch of coalitions with one forward per expert: fused attention
(scaled_dot_product_attention), no mask where there is no padding, no stored attention maps. It can run in any dtype,
under autocast, and through torch.compile. Nothing is shared between coalitions, as in any batched forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flmoe_fast import TokenGame
from flmoe_fast.model.network import sinusoid


class BatchedSDPA(nn.Module):
    """Batched forward of the game's model; call with coalitions ``(C, n)`` for expert logits and routing."""

    def __init__(self, game: TokenGame, dtype: torch.dtype = torch.float32):
        super().__init__()
        problem = game.problem
        assert problem.length == len(problem.features), "the baseline is timed without padding"
        self.model = problem.model.to(dtype)
        self.lengths = list(problem.padded_lengths)
        self.register_buffer("features", problem.features.to(dtype))
        self.register_buffer("fills", problem.fills.to(dtype))
        self.register_buffer("players", problem.players)
        self.register_buffer("positions", sinusoid(problem.length, problem.features.shape[1], dtype=dtype))

    @torch.no_grad()
    def forward(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coalitions (C, n) bool to expert logits (C, E, K) and weights (C, E)."""
        present = torch.ones(coalitions.shape[0], self.features.shape[0], dtype=torch.bool, device=self.features.device)
        present[:, self.players] = coalitions
        tokens = torch.where(present[..., None], self.features, self.fills)  # (C, L, H)
        logits = torch.stack([self._expert(e.fusion_model, tokens) for e in self.model.interaction_experts], 1)
        means = [F.normalize(part.mean(1), dim=-1) for part in tokens.split(self.lengths, dim=1)]
        routing = self.model.reweight
        return logits, (routing.mlp(torch.cat(means, -1)) / routing.temperature).softmax(-1)

    def _expert(self, fusion: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        x = tokens + self.positions
        *layers, head = fusion.network
        for layer in layers:
            rows = layer.norm1(x)
            q, (k, v) = layer.attn.q(rows), layer.attn.kv(rows).chunk(2, -1)
            q, k, v = (part.unflatten(-1, (layer.attn.heads, -1)).transpose(1, 2) for part in (q, k, v))
            x = x + layer.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.norm2(x), self.lengths, None, 1)
        return head(torch.cat([part.mean(1) for part in x.split(self.lengths, dim=1)], -1))
