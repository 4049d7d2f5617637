"""Games of two players whose every answer is known, and a model small enough for any test."""

from __future__ import annotations

import torch

from flmoe_fast import FLI2MoE, FLI2MoEConfig

#: Width of the small model's tokens.
H = 8
GAMES = {
    "and": lambda z: (z[:, 0] & z[:, 1]).double(),
    "or": lambda z: (z[:, 0] | z[:, 1]).double(),
    "additive": lambda z: (z[:, 0].double() + z[:, 1].double()) / 2,
    "xor": lambda z: (z[:, 0] ^ z[:, 1]).double(),
}
TRUTH = {  # SII, then the gaps
    "and": {"sii": 1, "sum": -1, "max": 0, "strict": 0},
    "or": {"sii": -1, "sum": 1, "max": 1, "strict": 1},
    "additive": {"sii": 0, "sum": 0, "max": 0.5, "strict": 0},
    "xor": {"sii": -2, "sum": 2, "max": 0, "strict": 0},
}


def small_model(modalities=("text", "image"), task="multiclass", **options) -> FLI2MoE:
    """Random float64 weights that move every expert away from its initialisation."""
    config = FLI2MoEConfig(modalities=modalities, hidden=H, heads=2, layers=2, classes=4, task=task, **options)
    model = FLI2MoE(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model
