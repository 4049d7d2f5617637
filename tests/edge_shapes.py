"""One table of awkward shapes, shared by every test that compares an engine with the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame


@dataclass(frozen=True)
class Edge:
    """A model and a sample. ``valid`` counts the valid tokens of each padded modality; None means no masks at all."""

    name: str
    tokens: tuple[int, ...]
    valid: tuple[int, ...] | None
    hidden: int = 24
    heads: int = 3
    layers: int = 2
    generation: str = "fl"
    task: str = "multiclass"
    reweight_layers: int = 2
    fusion: str = "transformer"
    gate: str | None = None
    ffn_experts: int | None = None
    capacity: str = "none"

    def model(self, scale: float = 0.3) -> FLI2MoE:
        """A float64 model whose experts all differ; ``scale`` moves its weights away from their initialisation."""
        generator = torch.Generator().manual_seed(7)
        config = FLI2MoEConfig(
            modalities=tuple(f"m{i}" for i in range(len(self.tokens))),
            hidden=self.hidden,
            heads=self.heads,
            layers=self.layers,
            classes=5,
            generation=self.generation,
            task=self.task,
            num_tokens=self.tokens if self.generation == "original" else None,
            reweight_hidden=12,
            reweight_layers=self.reweight_layers,
            temperature=0.7,
            fusion=self.fusion,
            gate=self.gate,
            ffn_experts=self.ffn_experts,
            capacity=self.capacity,
        )
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = FLI2MoE(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model

    def sample(self) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, list[torch.Tensor]]:
        """Features (T, H), masks (T,) or None, fills (H,); float64. Padding holds large garbage."""
        generator = torch.Generator().manual_seed(11)
        features = [torch.randn(t, self.hidden, generator=generator, dtype=torch.float64) for t in self.tokens]
        fills = [torch.randn(self.hidden, generator=generator, dtype=torch.float64) for _ in self.tokens]
        if self.valid is None:
            return features, None, fills
        masks = [(torch.arange(t) < v).long() for t, v in zip(self.tokens, self.valid)]
        for tokens, mask in zip(features, masks):
            tokens[mask == 0] = 1e6
        return features, masks, fills

    def game(self, model: FLI2MoE | None = None, **options) -> TokenGame:
        """The token game of the sample, in float64 unless told otherwise."""
        features, masks, fills = self.sample()
        return TokenGame(model or self.model(), features, masks=masks, **{"fill": fills, "target": 1, **options})

    def coalitions(self, n: int, count: int = 12) -> torch.Tensor:
        """Random coalitions of all sizes, the empty and the full one among them."""
        generator = torch.Generator().manual_seed(13)
        rates = torch.linspace(0, 1, count)[:, None]
        return torch.rand(count, n, generator=generator) < rates


EDGES = [
    Edge("plain", (4, 5), (4, 5)),
    Edge("no masks", (4, 5), None),
    Edge("padded", (6, 7), (3, 5)),
    Edge("one valid token each", (5, 3), (1, 1)),
    Edge("one token each", (1, 1), (1, 1)),
    Edge("absent modality", (4, 3, 6), (4, 0, 2)),
    Edge("three modalities", (3, 4, 2), (3, 2, 2)),
    Edge("four modalities", (2, 3, 1, 4), (2, 3, 1, 2)),
    Edge("one head of 256", (3, 2), (3, 2), hidden=256, heads=1, layers=1),
    Edge("one layer", (4, 3), (4, 2), layers=1),
    Edge("three layers", (4, 3), (4, 2), layers=3),
    Edge("one routing layer", (4, 3), (4, 2), reweight_layers=1),
    Edge("three routing layers", (4, 3), (4, 2), reweight_layers=3),
    Edge("multilabel", (4, 3), (4, 2), task="multilabel"),
    Edge("players past a word", (40, 31), (37, 29), hidden=8, heads=2),
    Edge("original", (4, 4), None, generation="original"),
    Edge("original, four modalities", (3, 3, 3, 3), None, generation="original"),
    Edge("original, one head, one layer", (4, 4, 4), None, generation="original", heads=1, layers=1),
]


def sparse(edge: Edge, gate: str, networks: int, capacity: str) -> Edge:
    """The same shape with sparse feed-forward blocks."""
    name = f"{edge.name}, {gate} of {networks}, capacity {capacity}"
    return replace(edge, name=name, gate=gate, ffn_experts=networks, capacity=capacity)


#: Every shape with a capacity that binds (each of many networks has room for very few tokens), and with one more gate.
SPARSE_EDGES = [sparse(edge, "switch", 12, "reference") for edge in EDGES]
SPARSE_EDGES += [sparse(edge, "gshard", 10, "reference") for edge in EDGES[::2]]
SPARSE_EDGES += [sparse(edge, "naive", 4, "none") for edge in EDGES[1::4]]
SPARSE_EDGES += [sparse(edge, "noisy", 3, "none") for edge in EDGES[3::4]]
SPARSE_EDGES += [
    replace(EDGES[2], name="gshard, no capacity", gate="gshard", ffn_experts=16),
    replace(EDGES[2], name="switch, no capacity", gate="switch", ffn_experts=16),
    replace(EDGES[2], name="gshard, capacity of none", gate="gshard", ffn_experts=60, capacity="reference"),
    replace(EDGES[2], name="gshard of 4, capacity", gate="gshard", ffn_experts=4, capacity="reference"),
]
BACKEND_EDGES = [
    Edge("MoE++", (4, 4), None, generation="original", fusion="moepp", ffn_experts=6, layers=2),
    Edge("MoE++, three modalities", (3, 3, 3), None, generation="original", fusion="moepp", ffn_experts=5, layers=1),
    Edge("InterpretCC", (1, 1), None, generation="original", fusion="interpretcc"),
    Edge("InterpretCC, four modalities", (1, 1, 1, 1), None, generation="original", fusion="interpretcc"),
]

#: Shapes that matter to tiles, blocks and stacks of the native engine, beside the table every engine is compared on.
CPU_EDGES = [
    Edge("head of 32, tokens past a tile", (20, 17), (18, 17), hidden=64, heads=2),
    Edge("head of 64, two tiles of rows", (40, 1), (33, 1), hidden=128, heads=2),
    Edge("head of 128", (5, 4), (5, 4), hidden=128, heads=1),
    Edge("head of 8, width not a multiple of 16", (6, 5), (6, 5), hidden=40, heads=5),
    Edge("head of 20", (6, 5), (6, 5), hidden=20, heads=1, layers=3),
    Edge("past a block of keys and of rows", (150, 90), (150, 87), hidden=32, heads=1),
    Edge("original, past a block", (130, 130), None, hidden=16, heads=2, generation="original"),
]
_OF_CPU = (
    "padded, switch of 12, capacity reference",
    "absent modality, switch of 12, capacity reference",
    "four modalities, noisy of 3, capacity none",
    "one token each, gshard of 10, capacity reference",
    "one layer, naive of 4, capacity none",
    "three layers, gshard of 10, capacity reference",
    "original, noisy of 3, capacity none",
)
#: Gates, capacities, and what matters to lists of rows: past a cell of networks, past a block of rows.
CPU_SPARSE_EDGES = [
    *(edge for edge in SPARSE_EDGES if edge.name in _OF_CPU),
    sparse(Edge("no room", (2, 2), (2, 2)), "gshard", 12, "reference"),
    sparse(Edge("networks past a cell", (3, 3), (3, 2), hidden=20, heads=1), "switch", 35, "none"),
    Edge("naive of 2, both used", (20, 17), (18, 17), hidden=64, heads=2, layers=1, gate="naive", ffn_experts=2),
    sparse(Edge("past a block of rows", (150, 90), (150, 87), hidden=32, heads=1, layers=1), "switch", 2, "none"),
]

#: For GPUs: every width and head width of the fused kernels, in a layer behind the first, whose scores and values have
#: tiles and swizzles of their own for every head width; tiles that are not full; and one layer alone.
FUSED_EDGES = [
    Edge("33 + 31 tokens, two heads of 32", (33, 31), (33, 30), hidden=64, heads=2),
    Edge("50 + 25 tokens, one head of 64", (50, 25), (50, 25), hidden=64, heads=1),
    Edge("20 + 35 tokens, four heads of 32", (20, 35), (20, 33), hidden=128, heads=4),
    Edge("45 + 30 tokens, two heads of 64", (45, 30), (45, 28), hidden=128, heads=2),
    Edge("30 + 45 tokens, one head of 128", (30, 45), (30, 45), hidden=128, heads=1),
    Edge("66 + 65 tokens, four heads of 64", (66, 65), (66, 64), hidden=256, heads=4),
    Edge("40 + 35 tokens, two heads of 128", (40, 35), (40, 35), hidden=256, heads=2),
    Edge("70 + 75 tokens, one head of 256", (70, 75), (70, 75), hidden=256, heads=1),
    Edge("70 + 75 tokens, one head of 256, one layer", (70, 75), (70, 75), hidden=256, heads=1, layers=1),
]
