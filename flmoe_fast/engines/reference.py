"""The reference engine: one coalition at a time, through the model as it is written. Slow, and obviously right."""

from __future__ import annotations

import copy
from typing import Any

import torch

from flmoe_fast.engines.engine import TokenEngine
from flmoe_fast.engines.problem import Logits, TokenProblem


class ReferenceEngine(TokenEngine):
    """Replaces absent tokens by their fills and runs the whole model once per coalition.

    Nothing is shared, batched, dropped or reordered; positions, key masks and padding are those of the full input.
    """

    name = "reference"

    def __init__(self, problem: TokenProblem, *, dtype: torch.dtype = torch.float64, **options: Any):
        super().__init__(problem, dtype=dtype, **options)
        self.model = copy.deepcopy(problem.model).eval().to(device=self.device, dtype=dtype)

    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        """Logits and routing of coalitions ``(C, n)`` bool."""
        outputs = [self._forward(coalition) for coalition in coalitions]
        return Logits(
            torch.cat([o.expert_logits for o in outputs]).double(), torch.cat([o.weights for o in outputs]).double()
        )

    @torch.no_grad()
    def _forward(self, coalition: torch.Tensor):
        problem = self.problem
        features = problem.features.clone()
        absent = problem.valid[problem.players[~coalition.cpu()]]
        features[absent] = problem.fills[absent]
        mask = torch.zeros(len(features), dtype=torch.bool)
        mask[problem.valid] = True
        features = features.to(self.device, self.dtype).split(problem.padded_lengths)
        masks = mask.to(self.device).split(problem.padded_lengths)
        return self.model([f[None] for f in features], [m[None] for m in masks] if problem.masked else None)
