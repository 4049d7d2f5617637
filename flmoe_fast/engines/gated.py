"""InterpretCC coalitions: every modality is one vector with two states, so everything up to the first sum is shared.

A gated vector enters the fusion layer by its own columns. With the gate and those columns applied to both states once
per sample, a coalition's fusion layer is a sum of M rows of a table of 2 M, and what is left is a small MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from flmoe_fast.engines.engine import Request, TokenEngine
from flmoe_fast.engines.problem import Logits, TokenProblem


class GatedEngine(TokenEngine):
    """Evaluates coalitions of a :class:`TokenProblem` whose experts are InterpretCC.

    Parameters
    ----------
    problem : TokenProblem
    dtype : torch.float32 or torch.float64
        Arithmetic of the experts. Gates are opened, and coalitions routed, in float64.
    device : torch.device
    memory : int
        Bytes that one chunk's activations may take.
    """

    name = "torch"

    def __init__(self, problem: TokenProblem, **options: Any):
        super().__init__(problem, **options)
        model, dtype = problem.model, self.dtype
        config = model.config
        self.count, self.temperature = len(config.modalities), config.temperature
        state = {k: v.detach().to(self.device, torch.float64) for k, v in model.state_dict().items()}

        def stack(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            """Input-major weights (E, in, out) and biases (E, 1, out) of a linear layer of all experts."""
            at = [f"interaction_experts.{e}.fusion_model.{name}." for e in range(config.experts)]
            return torch.stack([state[a + "weight"].mT for a in at]), torch.stack([state[a + "bias"][None] for a in at])

        both = torch.stack([problem.fills, problem.features], dim=1).to(self.device, torch.float64)  # (M, 2, H)
        fusion, fusion_bias = stack("fusion_layer.0")
        rows = []
        for m, (x, columns) in enumerate(zip(both, fusion.chunk(self.count, dim=1))):
            (first, first_bias), (second, second_bias) = (stack(f"modality_gates.{m}.{i}") for i in (0, 2))
            score = F.relu(x @ first + first_bias) @ second + second_bias  # (E, 2, 1)
            soft = (score / config.gumbel_temperature).sigmoid()
            rows.append(((soft > config.gate_threshold).double() if config.hard_gates else soft) * x @ columns)
        self.table = torch.stack(rows, dim=1).to(dtype)  # (E, M, 2, H)
        self.fusion_bias = fusion_bias.to(dtype)
        self.classifier = [tuple(part.to(dtype) for part in stack(f"classifier.{i}")) for i in (0, 2)]
        linears = range(0, 3 * config.reweight_layers, 3)
        self.routing = [
            (state[f"reweight.mlp.network.{i}.weight"].mT.clone(), state[f"reweight.mlp.network.{i}.bias"].clone())
            for i in linears
        ]
        self.inputs = both
        self.players = problem.players.to(self.device)
        per_coalition = config.experts * 4 * config.hidden + 8 * self.count * config.hidden
        self.chunk = max(1, self.memory // (per_coalition * self.table.element_size()))

    @classmethod
    def unfit(cls, request: Request) -> str:
        """Every fusion but InterpretCC."""
        fusion = None if request.problem is None else request.problem.model.config.fusion
        return "" if fusion in (None, "interpretcc") else f"fusion {fusion!r}"

    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        """Logits and routing of arbitrary coalitions ``(C, n)`` bool."""
        tokens = torch.ones(len(coalitions), self.count, dtype=torch.bool, device=self.device)
        tokens[:, self.players] = coalitions.to(self.device)
        parts = [self._run(part.long()) for part in tokens.split(self.chunk)]
        return Logits(*(torch.cat(kind) for kind in zip(*parts)))

    def _run(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert logits (C, E, K) and routing weights (C, E), float64, of token states (C, M)."""
        modality = torch.arange(self.count, device=self.device)
        hidden = F.relu(self.table[:, modality, state].sum(2) + self.fusion_bias)  # (E, C, H)
        (first, first_bias), (last, last_bias) = self.classifier
        logits = torch.baddbmm(last_bias, F.relu(torch.baddbmm(first_bias, hidden, first)), last)
        route = self.inputs[modality, state].flatten(1)
        for depth, (weight, bias) in enumerate(self.routing):
            route = (F.relu(route) if depth else route) @ weight + bias
        return logits.transpose(0, 1).double(), (route / self.temperature).softmax(-1)
