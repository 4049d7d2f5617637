"""Explain a data set with several processes; run again after an interruption to continue.

torchrun --nproc-per-node 2 examples/many_samples.py FOLDER
"""

from __future__ import annotations

import sys

import torch

import flmoe_fast

WEIGHT = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double() / 6
SAMPLES = torch.randn(16, 12, generator=torch.Generator().manual_seed(1)).double()


def explain(number: int, sample: torch.Tensor) -> flmoe_fast.InteractionResult:
    """Interactions of the first four with the last four features of a quadratic model's probability."""

    def value(present: torch.Tensor) -> torch.Tensor:
        features = present * sample
        return torch.sigmoid(torch.einsum("ci,ij,cj->c", features, WEIGHT, features))

    return flmoe_fast.interactions(
        value, n=12, rows=range(4), cols=range(8, 12), contexts=32, seed=number, progress=False
    )


if __name__ == "__main__":
    done = flmoe_fast.explain_many(SAMPLES, explain, sys.argv[1], chunk=4, format="safetensors", progress=False)
    print(done.frame().nlargest(3, "sii")[["sample", "i", "j", "sii", "sii_stderr"]])
