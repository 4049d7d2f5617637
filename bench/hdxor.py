"""HD-XOR end to end: train on data whose interactions are known, then ask the probes what they are.

    python -m bench.hdxor [--modalities 2 3] [--seeds 0 1 2] [--epochs 5] [--samples 20000] [--out out/hdxor]

For each setting, number of modalities and seed: test accuracy of the mixture and of every expert alone, mean routing
weights; the SII and the strict redundancy gap of the modalities, by enumeration; InterSHAP, the share of interaction in
what a model does, by its authors' definition; SII and strict gap of the tokens, on corner grids. Finished runs are kept
in the folder and not done again; a killed one goes on where it was. The table of all runs found there is written to
bench/results/hdxor.jsonl.

A token is a group of neighbouring columns, 8 a modality: a token per column, as in the published set-up, costs thirty
times as much (``--groups 0``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

from bench.cells import Table, over_seeds
from bench.timing import write
from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame, exact_interactions, interactions
from flmoe_fast.data.hdxor import hd_xor
from flmoe_fast.data.splits import Part, Splits
from flmoe_fast.files import replacing
from flmoe_fast.games.grouped import GroupedGame
from flmoe_fast.model.encoders import ColumnGroupEncoder, TabularTokenEncoder
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit
from flmoe_fast.model.training.predict import predict

#: Published InterSHAP shares in per cent (early-fusion network), and their spread where the paper gives one.
PUBLISHED = {
    (2, "uniqueness"): 0.2,
    (2, "synergy"): 98.0,
    (2, "redundancy"): 38.6,
    (3, "uniqueness"): 0.6,
    (3, "synergy"): 88.8,
    (3, "redundancy"): 51.9,
}


def train(data: Splits, seed: int, options: argparse.Namespace, folder: Path) -> FLI2MoE:
    """A trained model that carries its mean tokens."""
    config = FLI2MoEConfig(
        data.modalities,
        options.hidden,
        4,
        options.layers,
        2,
        reweight_hidden=options.hidden,
        dropout=0.0,
        interaction_weight=options.interaction_weight,
    )
    torch.manual_seed(seed)
    encoders = {}
    for name, values in zip(data.modalities, data.train.inputs):
        columns = values.shape[1]
        encoders[name] = (
            ColumnGroupEncoder(columns, options.groups, options.hidden)
            if options.groups
            else TabularTokenEncoder(columns, options.hidden)
        )
    model = FLI2MoE(config, encoders)
    fit(
        model,
        Examples(data.train.inputs, ones(data.train, options.groups), data.train.targets),
        FitSettings(options.epochs, 128, options.lr, seed, select="accuracy", checkpoint_steps=50),
        validation=Examples(data.valid.inputs, ones(data.valid, options.groups), data.valid.targets),
        checkpoint=folder / "training.pt",
        log=folder / "training.csv",
        progress=False,
    )
    with torch.no_grad():
        some = [x[:2000] for x in data.train.inputs]
        model.set_feature_means(model.encode(some))
    return model


def ones(part: Part, groups: int) -> list[torch.Tensor]:
    """Key masks: every token is valid."""
    return [torch.ones(len(part), groups or x.shape[1]) for x in part.inputs]


@torch.no_grad()
def inter_shap(model: FLI2MoE, part: Part, pool: Part, samples: int, donors: int, seed: int, groups: int) -> float:
    """Mean share of interactions in a sample's values, in per cent.

    Absent modalities are those of random other samples, the same for every coalition and sample (else the noise of
    their choice would look like interaction), and a coalition's value is the mean probability of the class predicted
    for the whole sample. Interactions are half of the SII; what is left of a modality's Shapley value without them is
    its main effect; the share is that of the absolute values.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(part.inputs)
    masks = [m[:1] for m in ones(part, groups)]
    probabilities = predict(model, part.inputs, ones(part, groups)).logits.softmax(-1)
    other = torch.randperm(len(pool), generator=generator)[:donors]
    absent = [x[other] for x in pool.inputs]
    donor_masks = [m.expand(len(other), -1) for m in masks]
    base = predict(model, absent, donor_masks).logits.softmax(-1).mean(0)
    coalitions = list(itertools.product((0, 1), repeat=count))
    shares = []
    for row in range(samples):
        best = int(probabilities[row].argmax())
        values = {}
        for present in coalitions:
            if not any(present):
                values[present] = float(base[best])
            elif all(present):
                values[present] = float(probabilities[row, best])
            else:
                mixed = [
                    x[row].expand(len(other), -1) if here else y for here, x, y in zip(present, part.inputs, absent)
                ]
                found = predict(model, mixed, donor_masks).logits.softmax(-1)
                values[present] = float(found[:, best].mean())
        shares.append(_share(values, count))
    return 100.0 * float(np.mean(shares))


def _share(values: dict[tuple[int, ...], float], count: int) -> float:
    """InterSHAP of one sample from the values of all coalitions of its modalities."""
    rest = [c for c in values]
    matrix = np.zeros((count, count))

    def plus(coalition: tuple[int, ...], *players: int) -> float:
        return values[tuple(int(bool(z) or p in players) for p, z in enumerate(coalition))]

    for i in range(count):
        for c in rest:
            size = sum(c)
            if not c[i]:
                weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                matrix[i, i] += weight * (plus(c, i) - plus(c))
        for j in range(count):
            if i != j:
                for c in rest:
                    if not c[i] and not c[j]:
                        size = sum(c)
                        weight = math.factorial(size) * math.factorial(count - size - 2)
                        weight /= 2 * math.factorial(count - 1)
                        matrix[i, j] += weight * (plus(c, i, j) + plus(c) - plus(c, i) - plus(c, j))
    off = np.abs(matrix - np.diag(np.diag(matrix))).sum()
    own = np.abs(np.diag(matrix) - (matrix.sum(1) - np.diag(matrix))).sum()
    return float(off / (off + own))


@torch.no_grad()
def measure(model: FLI2MoE, data: Splits, seed: int, options: argparse.Namespace) -> dict:
    """Everything that is asked of one trained model."""
    test = data.test
    masks = ones(test, options.groups)
    found = predict(model, test.inputs, masks)
    right = found.logits.argmax(-1) == test.targets
    alone = (found.expert_logits.argmax(-1) == test.targets[:, None]).double().mean(0)
    modality = {"sii": [], "strict": []}
    token = {"sii": [], "strict": []}
    names = model.config.expert_names
    for row in range(options.probed):
        features = [f[0] for f in model.encode([x[row : row + 1] for x in test.inputs])]
        game = TokenGame(model, features, masks=[m[row] for m in masks], heads=("mixture",))
        exact = exact_interactions(GroupedGame(game), gap="strict", progress=False)
        modality["sii"].append(exact.column("sii").mean())
        modality["strict"].append(exact.column("gap").mean())
        if row < options.probed_tokens:
            estimate = interactions(game, contexts=options.contexts, seed=seed + row, gap="strict", progress=False)
            token["sii"].append(estimate.column("sii").mean())
            token["strict"].append(estimate.column("gap").mean())

    def mean(values: list[float]) -> dict[str, float]:
        return {"mean": float(np.mean(values)), "stderr": float(np.std(values, ddof=1) / math.sqrt(len(values)))}

    share = inter_shap(model, test, data.valid, options.probed // 2, options.donors, seed, options.groups)
    return {
        "accuracy": float(right.double().mean()),
        "expert_accuracy": dict(zip(names, alone.tolist())),
        "routing": dict(zip(names, found.weights.double().mean(0).tolist())),
        "modality_sii": mean(modality["sii"]),
        "modality_strict_gap": mean(modality["strict"]),
        "token_sii": mean(token["sii"]),
        "token_strict_gap": mean(token["strict"]),
        "inter_shap": share,
    }


def main() -> None:
    """Train and probe what is not there yet, print the table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modalities", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--settings", nargs="+", default=["synergy", "redundancy", "uniqueness0"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--interaction-weight", type=float, default=0.1)
    parser.add_argument("--probed", type=int, default=200, help="test samples whose modalities are probed")
    parser.add_argument("--probed-tokens", type=int, default=200, help="of these, samples whose tokens are")
    parser.add_argument("--contexts", type=int, default=32)
    parser.add_argument("--donors", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/hdxor"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for count, seed, setting in itertools.product(options.modalities, options.seeds, options.settings):
        folder = options.out / f"{count}-{setting}-{seed}"
        if (folder / "row.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        data = hd_xor(setting, count, samples=options.samples, seed=seed)
        model = train(data, seed, options, folder)
        row = {"modalities": count, "setting": setting, "seed": seed, **measure(model, data, seed, options)}
        row |= {"published_inter_shap": PUBLISHED.get((count, setting.rstrip("0123456789")))}
        keep = (
            "samples",
            "epochs",
            "groups",
            "hidden",
            "layers",
            "lr",
            "interaction_weight",
            "probed",
            "contexts",
            "donors",
        )
        row |= {name: getattr(options, name) for name in (*keep, "donors")}
        with replacing(folder / "row.json", "w") as file:
            json.dump(row, file)
        print(
            f"M {count} {setting:12} seed {seed}  accuracy {row['accuracy']:.3f}  modality SII "
            f"{row['modality_sii']['mean']:+.3f} strict {row['modality_strict_gap']['mean']:.3f}  token SII "
            f"{row['token_sii']['mean']:+.5f} strict {row['token_strict_gap']['mean']:.5f}  InterSHAP "
            f"{row['inter_shap']:.1f} % (published {row['published_inter_shap']})",
            flush=True,
        )
    rows = [json.loads(path.read_text()) for path in sorted(options.out.glob("*/row.json"))]
    print("wrote", write("hdxor", rows))


def table(rows: list[dict]) -> Table:
    """What the probes say about data whose interactions are known."""
    lines = []
    for count in sorted({row["modalities"] for row in rows}):
        for setting in ("synergy", "redundancy", "uniqueness0"):
            own = [row for row in rows if (row["modalities"], row["setting"]) == (count, setting)]
            if not own:
                continue
            routing = [statistics.fmean([row["routing"][name] for row in own]) for name in own[0]["routing"]]
            lines.append(
                [
                    str(count),
                    setting.rstrip("0"),
                    str(len(own)),
                    over_seeds([100 * row["accuracy"] for row in own], 1),
                    over_seeds([row["modality_sii"]["mean"] for row in own], 3, "+"),
                    over_seeds([row["modality_strict_gap"]["mean"] for row in own], 3),
                    over_seeds([1e3 * row["token_sii"]["mean"] for row in own], 1, "+"),
                    over_seeds([1e3 * row["token_strict_gap"]["mean"] for row in own], 1),
                    over_seeds([row["inter_shap"] for row in own], 1),
                    f"{own[0]['published_inter_shap']}",
                    " / ".join(f"{value:.2f}" for value in routing),
                ]
            )
    columns = ["modalities", "data", "seeds", "accuracy, %", "SII of modalities", "strict gap", "SII of tokens x 1000"]
    columns += ["strict gap x 1000", "InterSHAP, %", "published", "routing: uniqueness of each, synergy, redundancy"]
    some = rows[0]
    note = (
        f"Mean ± spread over seeds, of {some['probed']} test samples each. A token is one of {some['groups']} groups "
        "of columns a modality; means over all cross-modal pairs. InterSHAP is the share of interactions, which are "
        "half of the SII, in the absolute values of a sample; the published figures are those of another network."
    )
    return columns, lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"hdxor": ("hdxor", table)}


if __name__ == "__main__":
    main()
