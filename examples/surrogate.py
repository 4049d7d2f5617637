"""Which estimator for which game: the same probe by grid, by surrogate, and by evidence, beside the truth."""

from __future__ import annotations

import torch

import flmoe_fast


def committee(present: torch.Tensor) -> torch.Tensor:
    """A probability of ten players: two experts who need each other, a chorus in which any voice will do."""
    experts = (present[:, 0] & present[:, 1]).double()
    chorus = present[:, 2:6].double().mean(1).sqrt()
    return torch.sigmoid(3 * experts + 2 * chorus + present[:, 6:].double().sum(1) - 4)


pairs = [(0, 1), (2, 3), (0, 2), (6, 7)]
truth = flmoe_fast.exact_interactions(committee, n=10, pairs=pairs, progress=False)
for method in ("grid", "surrogate", "auto"):
    found = flmoe_fast.interactions(committee, n=10, pairs=pairs, budget=256, method=method, progress=False)
    error = ((found.sii - truth.sii) ** 2).sum() / (truth.sii**2).sum()
    print(f"{method:10} error {error:.4f}, {found.evaluations} evaluations", found.about)
    for pair, value, stderr, exact in zip(found.pairs.tolist(), found.sii, found.sii_stderr, truth.sii):
        print(f"    {pair}: {value:+.4f} +- {stderr:.4f}   exact {exact:+.4f}")
