"""Digits: how faithful importance maps are, and what masking pairs costs, for an FL-I2MoE and a dense Transformer.

    python -m bench.digits [--seeds 0 1 2] [--images 120] [--contexts 24]

Both are trained in the same way on the same split. For every way to measure importance: AOPC of comprehensiveness and
sufficiency, identified and random, and their gaps. For the pairs ranked by SII and by strict gap: the drop of the
predicted class's probability and the accuracy with the top pairs masked, and with as many random tokens. The spread is
that over seeds, each with a split, initial weights and draws of its own. Writes bench/results/digits.jsonl.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch
from tqdm.auto import tqdm

from bench.cells import Table, over_seeds
from bench.timing import write
from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame, interactions
from flmoe_fast.data.digits import CLASSES, MODALITIES, PIXELS, Digits, two_view_digits
from flmoe_fast.model.config import DENSE
from flmoe_fast.model.encoders import ProjectionEncoder
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit
from flmoe_fast.model.training.predict import predict
from flmoe_fast.pipeline.faithful.curves import faithfulness, faithfulness_table, paired_gaps
from flmoe_fast.pipeline.faithful.masking import mask_pairs, masking_curve, masking_scores
from flmoe_fast.pipeline.importance.tokens import METHODS, batch_importance

HIDDEN = 64
GAP = "strict"
MODELS = {"FL-I2MoE": None, "dense Transformer": (DENSE,)}


def train(training: Digits, roles: tuple[str, ...] | None, seed: int, epochs: int) -> FLI2MoE:
    """A trained model that carries its mean tokens."""
    config = FLI2MoEConfig(
        MODALITIES, HIDDEN, 4, 2, CLASSES, reweight_hidden=HIDDEN, dropout=0.0, interaction_weight=0.1, roles=roles
    )
    torch.manual_seed(seed)
    model = FLI2MoE(config, {name: ProjectionEncoder(PIXELS, HIDDEN) for name in MODALITIES})
    settling = max(1, round(0.2 * epochs))
    for count, rate in ((epochs - settling, 2e-3), (settling, 5e-4)):
        if count:
            data = Examples(training.inputs, training.masks, training.labels)
            fit(model, data, FitSettings(count, lr=rate, seed=seed), progress=False)
    with torch.no_grad():
        model.set_feature_means(model.encode(training.inputs), training.masks)
    return model


def measure(model: FLI2MoE, held_out: Digits, seed: int, options: argparse.Namespace) -> dict:
    """Faithfulness of every method and masking of both rankings for one model."""
    accuracy = (predict(model, held_out.inputs, held_out.masks).logits.argmax(-1) == held_out.labels).double().mean()
    images = range(min(options.images, len(held_out.labels)))
    with torch.no_grad():
        features = model.encode([half[: len(images)] for half in held_out.inputs])
    masks = [mask[: len(images)] for mask in held_out.masks]
    maps = {method: batch_importance(model, features, masks, method=method).mixture for method in METHODS}
    curves = {method: [] for method in METHODS}
    masked = {"SII": [], f"{GAP} gap": []}
    for image in tqdm(images, desc="images", leave=False):
        own = [f[image] for f in features], [m[image] for m in masks]
        game = TokenGame(model, own[0], masks=own[1], heads=("mixture",))
        for method in METHODS:
            curves[method].append(faithfulness(game, maps[method][image][game.tokens], seed=1000 * seed + image))
        found = interactions(game, contexts=options.contexts, seed=1000 * seed + image, gap=GAP, progress=False)
        for samples, by in zip(masked.values(), ("sii", "gap")):
            ranked = found.pairs[found.order(by)]
            samples.append(mask_pairs(game, ranked, most=options.most, repeats=10, seed=1000 * seed + image))
    labels = held_out.labels[: len(images)]
    result = {"accuracy": float(accuracy), "images": len(images), "faithfulness": {}, "masking": {}}
    for method, samples in curves.items():
        by_mode = {mode: faithfulness_table(samples, labels, mode=mode).iloc[0] for mode in ("mean", "auc")}
        result["faithfulness"][method] = {
            **{
                f"{mode} {name} {which}": float(row[f"aopc_{name}_prob_{which}"])
                for mode, row in by_mode.items()
                for name in ("comprehensiveness", "sufficiency")
                for which in ("identified", "random", "gap")
            },
            **{f"stderr {name} gap": error for name, (_, error) in paired_gaps(samples).items()},
        }
    for name, samples in masked.items():
        curve, scores = masking_curve(samples), masking_scores(samples, labels, "multiclass")
        result["masking"][name] = {
            "pairs": list(curve.most),
            **{part: getattr(curve, part).tolist() for part in ("tokens", "top", "random", "difference", "share")},
            "difference_stderr": curve.difference_stderr.tolist(),
            **{
                column: scores[column].tolist()
                for column in ("accuracy_top", "accuracy_random", "macro_f1_top", "macro_f1_random")
            },
        }
    return result


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--most", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for seed, (name, roles) in itertools.product(options.seeds, MODELS.items()):
        training, held_out = two_view_digits(seed)
        model = train(training, roles, seed, options.epochs)
        rows.append({"model": name, "seed": seed, **measure(model, held_out, seed, options)})
        print(f"{name:18} seed {seed}  accuracy {rows[-1]['accuracy']:.3f}", flush=True)
    for name, method in itertools.product(MODELS, METHODS):
        own = [row["faithfulness"][method] for row in rows if row["model"] == name]
        parts = [f"{name:18} {method:10}"]
        for kind in ("comprehensiveness", "sufficiency"):
            values = [100 * run[f"mean {kind} gap"] for run in own]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            parts.append(f"{kind} gap {np.mean(values):6.2f} ± {spread:.2f}")
        print("  ".join(parts))
    for name, ranking in itertools.product(MODELS, ("SII", f"{GAP} gap")):
        own = [row["masking"][ranking] for row in rows if row["model"] == name]
        for b, most in enumerate(options.most):
            values = [100 * run["difference"][b] for run in own]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            print(f"{name:18} {ranking:10} {most} pairs: top minus random {np.mean(values):6.2f} ± {spread:.2f}")
    print("wrote", write("digits", rows))


def faithfulness_lines(rows: list[dict]) -> Table:
    """Faithfulness beside a dense Transformer."""
    lines = []
    for model, own in _by_model(rows).items():
        for method in own[0]["faithfulness"]:
            cells = [over_seeds([100 * row["accuracy"] for row in own], 1)]
            for kind in ("comprehensiveness", "sufficiency"):
                for which in ("identified", "random", "gap"):
                    cells.append(
                        over_seeds([100 * row["faithfulness"][method][f"mean {kind} {which}"] for row in own], 1)
                    )
            lines.append([model, method, *cells])
    columns = [
        "model",
        "importance",
        "accuracy, %",
        "comprehensiveness",
        "random",
        "gap",
        "sufficiency",
        "random",
        "gap",
    ]
    note = f"AOPC over 5 to 25 % of the tokens, in %; {_counts(rows)}"
    return columns, lines, note


def masking_lines(rows: list[dict]) -> Table:
    """Masking of the top pairs beside a dense Transformer."""
    lines = []
    for model, own in _by_model(rows).items():
        for ranking in own[0]["masking"]:
            parts = [row["masking"][ranking] for row in own]
            budgets = range(len(parts[0]["pairs"]))
            cells = [over_seeds([100 * part["difference"][b] for part in parts], 1, "+") for b in budgets]
            lines.append([model, ranking, *cells])
    columns = ["model", "pairs ranked by", *(f"{most} masked" for most in rows[0]["masking"]["SII"]["pairs"])]
    note = f"The probability lost with the top pairs minus that with random tokens, in %; {_counts(rows)}"
    return columns, lines, note


def _by_model(rows: list[dict]) -> dict[str, list[dict]]:
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: [row for row in rows if row["model"] == model] for model in models}


def _counts(rows: list[dict]) -> str:
    seeds = len({row["seed"] for row in rows})
    return f"mean ± spread over {seeds} seeds, {rows[0]['images']} held-out images each."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"digits": ("digits", faithfulness_lines), "digits_masking": ("digits", masking_lines)}


if __name__ == "__main__":
    main()
