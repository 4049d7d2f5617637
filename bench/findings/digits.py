"""Digits: are the maps of a mixture's experts more concentrated and more specific than a plain Transformer's?

Left and right halves of handwritten digits. The same network with and without interaction losses, with each regulariser
and ablation, and a dense Transformer of one expert's size, all trained alike on the same split. Three ways to measure
importance: attention times gradient, integrated gradients, and what is lost when a token alone leaves, which asks
nothing but the model's values. As a control for how much maps differ without any interaction loss there are four dense
Transformers trained from other weights.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import numpy as np
import torch

from bench.cells import Table, over_seeds
from bench.findings.tasks import Task
from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame, interactions, player_scores
from flmoe_fast.data.digits import CLASSES, MODALITIES, PIXELS, Digits, two_view_digits
from flmoe_fast.model.config import DENSE
from flmoe_fast.model.encoders import ProjectionEncoder
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit
from flmoe_fast.model.training.predict import predict
from flmoe_fast.pipeline.faithful.curves import faithfulness, paired_gaps
from flmoe_fast.pipeline.importance.patterns import Patterns, collect, map_measures, pair_patterns
from flmoe_fast.pipeline.importance.tokens import batch_importance, head_importance
from flmoe_fast.pipeline.routing import MIXTURE, experts_alone, routing_follows

HIDDEN, HEADS, LAYERS, EPOCHS, IMAGES, CONTEXTS = 32, 4, 1, 10, 30, 8
BASE, PLAIN, APART = "FL-I2MoE", "dense Transformer", "four dense Transformers"
NO_LOSS = "no interaction loss"
#: What of the configuration and of the training each variant changes.
VARIANTS: dict[str, tuple[dict, dict]] = {
    BASE: ({}, {}),
    NO_LOSS: ({}, {"ablation": "no interaction loss"}),
    PLAIN: ({"roles": (DENSE,)}, {}),
    APART: ({"roles": (DENSE,)}, {}),
    "rep-cos": ({}, {"regularizer": "rep-cos", "regularizer_weight": 0.1}),
    "rep-cka": ({}, {"regularizer": "rep-cka", "regularizer_weight": 0.1}),
    "rep-barlow": ({}, {"regularizer": "rep-barlow"}),
    "average routing": ({"routing": "average", "reweight_layers": 1}, {}),
    "synergy only": ({"roles": ("synergy",)}, {}),
    "synergy and redundancy only": ({"roles": ("synergy", "redundancy")}, {}),
    "zero vector": ({}, {"ablation": "zero vector"}),
}
METHODS = ("attnXgrad", "ig", "drop")


def tasks(seeds: Sequence[int]) -> list[Task]:
    """Every variant and seed."""
    return [
        Task("digits", f"{variant.replace(' ', '-')}-{seed}", {"variant": variant, "seed": seed, "images": IMAGES})
        for variant, seed in itertools.product(VARIANTS, seeds)
    ]


def run(variant: str, seed: int, images: int) -> dict:
    """Train one variant, and measure its maps on held-out images."""
    training, held_out = two_view_digits(seed)
    if variant == APART:
        return of_several([trained(training, variant, 100 * (seed + 1) + k) for k in range(4)], held_out, images)
    model = trained(training, variant, seed)
    found = predict(model, held_out.inputs, held_out.masks)
    names = model.config.expert_names
    alone = experts_alone(found.expert_logits.numpy(), found.weights.numpy(), held_out.labels.numpy(), names)
    labels = [str(label) for label in held_out.labels.tolist()]
    return {
        "accuracy": float((found.logits.argmax(-1) == held_out.labels).double().mean()),
        "alone": dict(zip(alone["model"], alone["accuracy"])),
        "follows": routing_follows(found.weights.numpy(), labels) if len(names) > 1 else None,
        **of_maps(model, held_out, seed, images),
    }


def trained(training: Digits, variant: str, seed: int) -> FLI2MoE:
    """A trained model that carries its mean tokens."""
    shape, options = VARIANTS[variant]
    config = FLI2MoEConfig(
        MODALITIES, HIDDEN, HEADS, LAYERS, CLASSES, reweight_hidden=HIDDEN, dropout=0.0, interaction_weight=0.1, **shape
    )
    torch.manual_seed(seed)
    model = FLI2MoE(config, {name: ProjectionEncoder(PIXELS, HIDDEN) for name in MODALITIES})
    data = Examples(training.inputs, training.masks, training.labels)
    fit(model, data, FitSettings(EPOCHS, 64, 3e-3, seed, **options), progress=False)
    with torch.no_grad():
        model.set_feature_means(model.encode(training.inputs), training.masks)
    return model


def of_maps(model: FLI2MoE, held_out: Digits, seed: int, images: int) -> dict:
    """Faithfulness, concentration and overlap of maps by every method, and of pairs."""
    names, several = model.config.expert_names, model.config.experts > 1
    features, masks = encoded(model, held_out, images)
    maps = {m: batch_importance(model, features, masks, method=m) for m in METHODS[:2]}
    by_head = None if several else head_importance(model, features, masks)
    parts: dict[str, list] = {method: [] for method in METHODS}
    curves, results = [], []
    for image in range(images):
        own = [f[image] for f in features], [m[image] for m in masks]
        game = TokenGame(model, own[0], masks=own[1], heads=("mixture", "experts"))
        for method in METHODS:
            if method == "drop":
                drops = {name: values.abs() for name, values in player_scores(game, "drop").items()}
                rows = [drops[MIXTURE], *([drops[name] for name in names] if several else [])]
            else:
                found = maps[method]
                inner = found.experts[image] if several else found.experts[image, :0]
                if method == "attnXgrad" and by_head is not None:
                    inner = by_head.experts[image]
                rows = [row[game.tokens] for row in (found.mixture[image], *inner)]
            parts[method].append(map_measures(torch.stack(rows).double().numpy()))
        main = TokenGame(model, own[0], masks=own[1], heads=(MIXTURE,))
        curves.append(faithfulness(main, maps["attnXgrad"].mixture[image][game.tokens], seed=1000 * seed + image))
        if several:
            results.append(interactions(game, contexts=CONTEXTS, seed=1000 * seed + image, progress=False))
    result: dict = {name: mean for name, (mean, _) in paired_gaps(curves).items()}
    for method, rows in parts.items():
        labels = (MIXTURE, *(f"part {k}" for k in range(len(rows[0]["gini"]) - 1)))
        result[method] = means(collect(rows, labels, [str(i) for i in range(images)], whole=MIXTURE))
    result["pairs"] = means(pair_patterns(results, names)) if several else None
    return result


def of_several(models: Sequence[FLI2MoE], held_out: Digits, images: int) -> dict:
    """How much separate models' maps differ."""
    rows: dict[str, list] = {method: [] for method in METHODS}
    stacks: dict[str, list] = {method: [] for method in METHODS}
    accuracy = [
        float((predict(m, held_out.inputs, held_out.masks).logits.argmax(-1) == held_out.labels).double().mean())
        for m in models
    ]
    for model in models:
        features, masks = encoded(model, held_out, images)
        for method in METHODS[:2]:
            stacks[method].append(batch_importance(model, features, masks, method=method).mixture)
        games = [TokenGame(model, [f[i] for f in features], heads=(MIXTURE,)) for i in range(images)]
        stacks["drop"].append(torch.stack([player_scores(game, "drop")[MIXTURE].abs() for game in games]))
    for method, stack in stacks.items():
        rows[method] = [map_measures(torch.stack([one[i] for one in stack]).double().numpy()) for i in range(images)]
    ids, names = [str(i) for i in range(images)], [f"model {k}" for k in range(len(models))]
    found = {method: means(collect(own, names, ids)) for method, own in rows.items()}
    return {"accuracy": statistics.fmean(accuracy), **found}


@torch.no_grad()
def encoded(model: FLI2MoE, held_out: Digits, images: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features and masks of the first images."""
    return model.encode([half[:images] for half in held_out.inputs]), [mask[:images] for mask in held_out.masks]


def means(patterns: Patterns) -> dict[str, list[float]]:
    """Mean over samples and its standard error of every measure."""
    table = patterns.by_sample()
    return {name: [float(np.nanmean(v)), float(np.nanstd(v, ddof=1) / len(v) ** 0.5)] for name, v in table.items()
            if np.isfinite(v).any()}  # fmt: skip


def _cells(rows: list[dict], method: str, measure: str, digits: int = 3) -> str:
    found = [row[method][measure][0] for row in rows if row.get(method) and measure in row[method]]
    return over_seeds(found, digits) if found else ""


def _by_variant(rows: list[dict]) -> dict[str, list[dict]]:
    own = [row for row in rows if row["experiment"] == "digits"]
    return {v: cell for v in VARIANTS if (cell := [row for row in own if row["settings"]["variant"] == v])}


def specificity_lines(rows: list[dict]) -> Table:
    """Concentration of the model's map, and overlap of its parts' maps."""
    lines = []
    for variant, own in _by_variant(rows).items():
        if variant not in (BASE, NO_LOSS, PLAIN, APART):
            continue
        for method in METHODS:
            whole = "" if variant == APART else f" of {MIXTURE}"
            lines.append(
                [
                    variant,
                    method,
                    _cells(own, method, f"gini{whole}"),
                    _cells(own, method, f"top 25 %{whole}"),
                    _cells(own, method, "gini") if variant != APART else "",
                    _cells(own, method, "rank correlation", 2),
                    _cells(own, method, "overlap 25 %", 2),
                ]
            )
    columns = ["model", "importance", "Gini of the model's map", "share of the top 25 %", "Gini of its parts"]
    columns += ["rank correlation of parts", "overlap of their top 25 %"]
    own = [row for row in rows if row["experiment"] == "digits"]
    chance = own[0]["attnXgrad"]["chance, overlap 25 %"][0] if own else 0.0
    note = (
        f"Parts are experts, of the dense Transformer attention heads, or separate models. Unrelated maps overlap by "
        f"{chance:.2f}. {_counts(own)}"
    )
    return columns, lines, note


def pair_lines(rows: list[dict]) -> Table:
    """How much experts agree about which pairs matter."""
    lines = []
    for variant, own in _by_variant(rows).items():
        if not own[0].get("pairs"):
            continue
        names = (
            "gini",
            "rank correlation",
            "itself, rank correlation",
            "specificity",
            "overlap 5 %",
            "itself, overlap 5 %",
        )
        lines.append([variant, *(_cells(own, "pairs", name, 2) for name in names)])
    columns = [
        "model",
        "Gini",
        "rank correlation of experts",
        "of one with itself",
        "specificity",
        "overlap of top 5 %",
    ]
    columns += ["of one with itself"]
    own = [row for row in rows if row["experiment"] == "digits"]
    return columns, lines, f"Pairs by the size of their SII, all 64 of left and right tokens. {_counts(own)}"


def regulariser_lines(rows: list[dict]) -> Table:
    """Effect of regularisers and ablations on faithfulness and specificity."""
    found = _by_variant(rows)
    base = {row["settings"]["seed"]: row for row in found.get(BASE, [])}
    lines = []
    for variant, own in found.items():
        if variant == APART:
            continue
        cells = [over_seeds([100 * row["accuracy"] for row in own], 1)]
        for name in ("comprehensiveness", "sufficiency"):
            cells.append(over_seeds([100 * row[name] for row in own], 1))
            pairs = [(row, base.get(row["settings"]["seed"])) for row in own]
            change = [100 * (row[name] - other[name]) for row, other in pairs if other]
            cells.append("" if variant == BASE or not change else over_seeds(change, 1, "+"))
        cells += [_cells(own, "attnXgrad", "rank correlation", 2), _cells(own, "drop", "rank correlation", 2)]
        lines.append([variant, *cells])
    columns = ["variant", "accuracy, %", "comprehensiveness gap, %", "change", "sufficiency gap, %", "change"]
    columns += ["rank correlation of parts", "the same by drop"]
    own = [row for row in rows if row["experiment"] == "digits"]
    note = f"Changes are against {BASE} of the same seed. {_counts(own)}"
    return columns, lines, note


def routing_lines(rows: list[dict]) -> Table:
    """Experts alone against the mixture, and how much routing follows the class."""
    lines = []
    for variant, own in _by_variant(rows).items():
        if variant not in (BASE, NO_LOSS, "rep-cos", "average routing"):
            continue
        follows = [row["follows"] for row in own]
        experts = [name for name in own[0]["alone"] if name not in (MIXTURE, "plain average")]
        alone = " / ".join(f"{100 * statistics.fmean(row['alone'][name] for row in own):.0f}" for name in experts)
        lines.append(
            [
                variant,
                over_seeds([100 * row["alone"][MIXTURE] for row in own], 1),
                over_seeds([100 * row["alone"]["plain average"] for row in own], 1),
                alone,
                over_seeds([one["spread"] for one in follows], 3),
                over_seeds([100 * one["between"] for one in follows], 1),
                over_seeds([100 * one["chance"] for one in follows], 1),
            ]
        )
    columns = ["variant", "mixture, %", "plain average, %", "experts alone, %", "spread of the weights"]
    columns += ["of it between digits, %", "by chance, %"]
    own = [row for row in rows if row["experiment"] == "digits"]
    return columns, lines, f"Experts: uniqueness of left and right, synergy, redundancy. {_counts(own)}"


def _counts(rows: list[dict]) -> str:
    return f"Mean ± spread over {len({row['settings']['seed'] for row in rows})} seeds, {IMAGES} held-out images each."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {
    "findings_specificity": ("findings", specificity_lines),
    "findings_pairs": ("findings", pair_lines),
    "findings_regularisers": ("findings", regulariser_lines),
    "findings_routing": ("findings", routing_lines),
}
