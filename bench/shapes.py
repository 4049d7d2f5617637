"""The shapes that are timed: published data sets' sequence lengths and widths, with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame
from flmoe_fast.probes.grid import CornerGrid


@dataclass(frozen=True)
class Shape:
    """Tokens per modality and model sizes."""

    name: str
    modalities: tuple[str, ...]
    tokens: tuple[int, ...]
    hidden: int
    heads: int
    layers: int
    classes: int
    task: str
    gate: str | None = None
    ffn_experts: int | None = None

    def model(self, seed: int = 0) -> FLI2MoE:
        """A float32 model with random weights, in eval mode."""
        torch.manual_seed(seed)
        config = FLI2MoEConfig(
            modalities=self.modalities,
            hidden=self.hidden,
            heads=self.heads,
            layers=self.layers,
            classes=self.classes,
            task=self.task,
            temperature=2.0,
            gate=self.gate,
            ffn_experts=self.ffn_experts,
        )
        model = FLI2MoE(config).eval()
        # Experts start as copies of each other; different weights keep any sharing between them honest.
        with torch.no_grad():
            for parameter in model.interaction_experts.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        return model

    def sample(self, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Random features (T_m, H) and masks of ones (T_m,)."""
        generator = torch.Generator().manual_seed(seed)
        features = [torch.randn(t, self.hidden, generator=generator) for t in self.tokens]
        return features, [torch.ones(t) for t in self.tokens]

    def game(self, **options) -> TokenGame:
        """The token game of the model and a sample; every token is a player."""
        features, masks = self.sample()
        players = [range(t) for t in self.tokens]
        return TokenGame(self.model(), features, masks=masks, fill="zero", players=players, target=0, **options)

    def corners(self, side: int) -> CornerGrid:
        """Corner grid of the first ``side`` tokens, or all there are, of the first two modalities."""
        rows, cols = (min(side, count) for count in self.tokens[:2])
        pairs = torch.cartesian_prod(torch.arange(rows), self.tokens[0] + torch.arange(cols))
        return CornerGrid.of(pairs, sum(self.tokens))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mmimdb", ("language", "img"), (320, 196), 256, 4, 2, 23, "multilabel"),
        Shape("enrico", ("screenshot", "wireframe"), (196, 196), 256, 4, 2, 20, "multiclass"),
        Shape("enrico-gshard", ("screenshot", "wireframe"), (196, 196), 256, 4, 2, 20, "multiclass", "gshard", 4),
        Shape("mimic", ("lab", "note", "code"), (64, 256, 128), 128, 4, 2, 2, "multiclass"),
        Shape("digits", ("left", "right"), (8, 8), 64, 4, 2, 10, "multiclass"),
    )
}
