"""Text and picture from bundled real data, with a planted rule of known kind: is the planted pair ranked first?

A picture is four real handwritten digits, one of them a 0 or a 1 and the others from 2 to 9; a text is six words of a
real wine's table, such as "alcohol:high", one of which is exchanged for "zero" or "one". Where the two stand is drawn
for every sample. The label is

synergy: whether word and digit say the same; neither alone says anything;
redundancy: what both say;
uniqueness: what the digit says, whatever the word;
random: a coin, the negative control.

In training the word is left out of a fifth of the samples and the digit out of another, with the label that they would
have had: so that a model has seen what it is like not to know, and of two that say the same has to use both. (Trained
without, a model takes one of the labels for granted where something is missing; then nothing is lost of that label's
probability, and in its samples no pair can be found.)

From raw strings and pixels through tiny encoders that are trained with the model, to the ranking of all 24 pairs of a
word and a digit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.cells import Table, over_seeds
from bench.findings.tasks import Task
from flmoe_fast import FLI2MoE, FLI2MoEConfig, explain
from flmoe_fast.model.config import DENSE
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit
from flmoe_fast.model.training.predict import predict

RULES = ("synergy", "redundancy", "uniqueness", "random")
WORDS, PATCHES, SIDE, HIDDEN, EPOCHS = 6, 4, 8, 32, 16
SAMPLES, PROBED, CONTEXTS = 3000, 60, 24
MODALITIES = ("words", "picture")
SAID = ("zero", "one")
#: How often nothing is left out of a training sample, the word, and the digit.
LEFT_OUT = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Raw:
    """N samples: strings, pictures (N, 16, 16) in [0, 1], labels (N,), and the places of the planted word and digit."""

    texts: list[str]
    pictures: np.ndarray
    labels: np.ndarray
    words: np.ndarray
    digits: np.ndarray


class WordEncoder(nn.Module):
    """An embedding of words by their number, (B, T) -> (B, T, H)."""

    def __init__(self, count: int):
        super().__init__()
        self.embedding = nn.Embedding(count, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Look the words up."""
        return self.embedding(x)


class GlyphEncoder(nn.Module):
    """A small network for every 8 x 8 patch of a picture, (B, 16, 16) -> (B, 4, H)."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(SIDE * SIDE, 48), nn.ReLU(), nn.Linear(48, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Cut into patches, row by row, and encode each."""
        patches = x.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)
        return self.network(patches.reshape(len(x), PATCHES, SIDE * SIDE))


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Every rule and seed."""
    return [
        Task("planted", f"{rule}-{seed}", {"rule": rule, "seed": seed, "samples": SAMPLES, "epochs": EPOCHS})
        for seed, rule in itertools.product(seeds, RULES)
    ]


def run(rule: str, seed: int, samples: int, epochs: int) -> dict:
    """Train on raw samples of one rule, and rank the pairs of held-out ones."""
    training, held_out = made(rule, samples, seed, parts=True), made(rule, 600, seed, held_out=True)
    vocabulary = {word: number for number, word in enumerate(sorted({w for t in training.texts for w in t.split()}))}
    model = fitted(training, vocabulary, seed, epochs)
    inputs = encoded(held_out, vocabulary)
    found = predict(model, inputs, ones(held_out))
    right = found.logits.argmax(-1).numpy() == held_out.labels
    ranks: dict[str, list[int]] = {"sii": [], "gap": [], "player": []}
    for row in range(PROBED):
        features = [f[0] for f in model.encode([x[row : row + 1] for x in inputs])]
        result = explain(
            model,
            [f.detach() for f in features],
            candidates=(WORDS, PATCHES),
            contexts=CONTEXTS,
            importance="drop",
            heads=("mixture",),
            gap="strict",
            seed=1000 * seed + row,
            progress=False,
        )
        wanted = [int(held_out.words[row]), WORDS + int(held_out.digits[row])]
        pairs = result.interactions.pairs.tolist()
        for by in ("sii", "gap"):
            order = [pairs[p] for p in result.interactions.order(by)]
            ranks[by].append(1 + order.index(wanted))
        drops = next(iter(result.importance.values())).argsort(descending=True).tolist()
        ranks["player"].append(1 + drops.index(wanted[1]))
    return {
        "accuracy": float(right.mean()),
        "probed": PROBED,
        "pairs": WORDS * PATCHES,
        **{f"first_by_{by}": float(np.mean(np.array(own) == 1)) for by, own in ranks.items()},
        **{f"rank_by_{by}": float(np.mean(own)) for by, own in ranks.items()},
    }


def made(rule: str, count: int, seed: int, *, held_out: bool = False, parts: bool = False) -> Raw:
    """Raw samples; training and held-out ones share no picture of a digit and no wine. ``parts``: some lack a part."""
    from sklearn.datasets import load_digits, load_wine

    random = np.random.default_rng(2 * seed + held_out)
    images, numbers = load_digits(return_X_y=True)
    images = images.reshape(-1, SIDE, SIDE) / 16.0
    wine = load_wine()
    mine = np.arange(len(images)) % 5 == 0 if held_out else np.arange(len(images)) % 5 != 0
    places = {d: np.flatnonzero(mine & (numbers == d)) for d in range(10)}
    rows = np.flatnonzero((np.arange(len(wine.data)) % 5 == 0) == held_out)
    thirds = np.quantile(wine.data, [1 / 3, 2 / 3], axis=0)
    levels = (wine.data[..., None] > thirds.T[None]).sum(-1)
    columns = [name.split("/")[0] for name in wine.feature_names]
    texts, pictures, labels = [], np.empty((count, 2 * SIDE, 2 * SIDE)), np.empty(count, int)
    words, digits = random.integers(0, WORDS, count), random.integers(0, PATCHES, count)
    for n in range(count):
        shown, said = random.integers(0, 2, 2)
        label = {"synergy": int(shown == said), "random": random.integers(0, 2)}.get(rule, shown)
        if rule == "redundancy":
            said = shown
        missing = random.choice(3, p=LEFT_OUT) if parts else 0
        own = rows[random.integers(0, len(rows))]
        chosen = random.permutation(len(columns))[:WORDS]
        text = [f"{columns[c]}:{('low', 'middle', 'high')[levels[own, c]]}" for c in chosen]
        glyphs = random.integers(2, 10, PATCHES)
        if missing != 1:
            text[words[n]] = SAID[said]
        if missing != 2:
            glyphs[digits[n]] = shown
        drawn = [images[random.choice(places[g])] for g in glyphs]
        pictures[n] = np.block([drawn[:2], drawn[2:]])
        texts.append(" ".join(text))
        labels[n] = label
    return Raw(texts, pictures, labels, words, digits)


def encoded(raw: Raw, vocabulary: dict[str, int]) -> list[Tensor]:
    """Numbers of words and pixels. A word that training did not have is the first one it had."""
    words = torch.tensor([[vocabulary.get(word, 0) for word in text.split()] for text in raw.texts])
    return [words, torch.tensor(raw.pictures, dtype=torch.float32)]


def ones(raw: Raw) -> list[Tensor]:
    """Key masks: every token is valid."""
    return [torch.ones(len(raw.texts), count) for count in (WORDS, PATCHES)]


def fitted(training: Raw, vocabulary: dict[str, int], seed: int, epochs: int) -> FLI2MoE:
    """A plain Transformer with its encoders, which carries its mean tokens."""
    config = FLI2MoEConfig(
        MODALITIES, HIDDEN, 4, 1, 2, dropout=0.0, ffn_multiple=4, roles=(DENSE,), reweight_hidden=HIDDEN
    )
    torch.manual_seed(seed)
    model = FLI2MoE(config, {"words": WordEncoder(len(vocabulary)), "picture": GlyphEncoder()})
    inputs = encoded(training, vocabulary)
    data = Examples(inputs, ones(training), torch.tensor(training.labels))
    for count, rate in ((epochs - epochs // 4, 3e-3), (epochs // 4, 5e-4)):
        fit(model, data, FitSettings(count, 64, rate, seed), progress=False)
    with torch.no_grad():
        model.set_feature_means(model.encode(inputs))
    return model


def planted_lines(rows: list[dict]) -> Table:
    """How often the planted pair, or the planted digit, is first."""
    own = [row for row in rows if row["experiment"] == "planted"]
    lines = []
    for rule in dict.fromkeys(row["settings"]["rule"] for row in own):
        cell = [row for row in own if row["settings"]["rule"] == rule]
        firsts = [over_seeds([100 * row[f"first_by_{by}"] for row in cell], 0) for by in ("sii", "gap", "player")]
        ranks = [over_seeds([row[f"rank_by_{by}"] for row in cell], 1) for by in ("sii", "gap")]
        lines.append([rule, str(len(cell)), over_seeds([100 * row["accuracy"] for row in cell], 1), *firsts, *ranks])
    columns = ["rule", "seeds", "accuracy, %", "pair first by SII, %", "by strict gap, %", "digit first by drop, %"]
    columns += ["mean rank by SII", "by strict gap"]
    pairs = own[0]["pairs"] if own else 1
    note = (
        f"Mean ± spread over seeds, of data and weights; {PROBED} held-out samples each. By chance {100 / pairs:.0f} % "
        f"of pairs are first (mean rank {(pairs + 1) / 2:.1f}), and {100 / (WORDS + PATCHES):.0f} % of players."
    )
    return columns, lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"findings_planted": ("findings", planted_lines)}
