"""From expert logits and routing weights to the values of a game: one column per output head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_fast.engines.problem import Logits


@dataclass(frozen=True)
class Heads:
    """Which numbers of a forward pass are the game's values.

    Heads come in the order mixture, experts 0..E-1, weighted experts 0..E-1, as far as they were asked for. The value
    of a weighted expert is its routing weight times its own value; for logits these sum to the mixture.

    Attributes
    ----------
    groups : subset of ("mixture", "experts", "weighted"), in this order
    value : "prob" or "logit"
    target : int for one class, or BoolTensor (K,) marking the classes of a multilabel target
    """

    groups: tuple[str, ...]
    value: str
    target: int | torch.Tensor

    def names(self, expert_names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the O heads."""
        named = {
            "mixture": ("mixture",),
            "experts": expert_names,
            "weighted": tuple(f"weighted {name}" for name in expert_names),
        }
        return tuple(name for group in self.groups for name in named[group])

    def values(self, logits: Logits) -> torch.Tensor:
        """Values (C, O) float64."""
        columns = []
        for group in self.groups:
            if group == "mixture":
                columns.append(self._score(logits.mixed()[:, None]))
            elif group == "experts":
                columns.append(self._score(logits.experts))
            else:
                columns.append(logits.weights * self._score(logits.experts))
        return torch.cat(columns, dim=1)

    def _score(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., K) logits to (...) values of the target."""
        if isinstance(self.target, int):
            return (logits.softmax(-1) if self.value == "prob" else logits)[..., self.target]
        scores = logits.sigmoid() if self.value == "prob" else logits
        return scores[..., self.target.to(scores.device)].mean(-1)


def predicted_target(mixture: torch.Tensor, task: str) -> int | torch.Tensor:
    """The target a model itself predicts from mixture logits (K,).

    The largest logit; for multilabel models all classes with probability at least one half, or the largest if none.
    """
    if task != "multilabel":
        return int(mixture.argmax())
    positive = mixture.sigmoid() >= 0.5
    if not bool(positive.any()):
        positive[mixture.argmax()] = True
    return positive.cpu()
