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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.cells import Table, over_seeds
from bench.intershap import shares
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

#: Published local InterSHAP in per cent, the mean of the samples' shares, of an early-fusion network. (The published
#: figures of more modalities are global: effects are averaged before their sizes are taken.)
PUBLISHED = {(2, "uniqueness"): 3.4, (2, "synergy"): 85.8, (2, "redundancy"): 37.3}


def train(data: Splits, seed: int, options: argparse.Namespace, folder: Path | None = None) -> FLI2MoE:
    """A trained model that carries its mean tokens; with a folder, it goes on where it was stopped."""
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
        checkpoint=None if folder is None else folder / "training.pt",
        log=None if folder is None else folder / "training.csv",
        progress=False,
    )
    with torch.no_grad():
        some = [x[:2000] for x in data.train.inputs]
        model.set_feature_means(model.encode(some))
    return model


def ones(part: Part, groups: int) -> list[torch.Tensor]:
    """Key masks: every token is valid."""
    return [torch.ones(len(part), groups or x.shape[1]) for x in part.inputs]


def asked(model: FLI2MoE, groups: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The model as a function from inputs to probabilities."""

    def ask(inputs: list[torch.Tensor]) -> torch.Tensor:
        masks = [torch.ones(len(x), groups or x.shape[1]) for x in inputs]
        return predict(model, inputs, masks).logits.softmax(-1)

    return ask


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

    found_shares = shares(asked(model, options.groups), data, seed, options.probed // 2, options.donors)
    return {
        "accuracy": float(right.double().mean()),
        "expert_accuracy": dict(zip(names, alone.tolist())),
        "routing": dict(zip(names, found.weights.double().mean(0).tolist())),
        "modality_sii": mean(modality["sii"]),
        "modality_strict_gap": mean(modality["strict"]),
        "token_sii": mean(token["sii"]),
        "token_strict_gap": mean(token["strict"]),
        "inter_shap": found_shares["local"],
        "inter_shap_global": found_shares["global"],
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
            f"{row['inter_shap']:.1f} %",
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
                    str(PUBLISHED.get((count, setting.rstrip("0")), "")),
                    " / ".join(f"{value:.2f}" for value in routing),
                ]
            )
    columns = ["modalities", "data", "seeds", "accuracy, %", "SII of modalities", "strict gap", "SII of tokens x 1000"]
    columns += [
        "strict gap x 1000",
        "local InterSHAP, %",
        "published",
        "routing: uniqueness of each, synergy, redundancy",
    ]
    some = rows[0]
    note = (
        f"Mean ± spread over seeds, of {some['probed']} test samples each. A token is one of {some['groups']} groups "
        "of columns a modality; means over all cross-modal pairs. Local InterSHAP is the mean over samples of the "
        "share of interactions in the absolute effects; the published figures are those of another network."
    )
    return columns, lines, note


def routing_lines(rows: list[dict]) -> Table:
    """Whether the expert of the data's kind gets more weight than the others, and what it can alone."""
    lines = []
    for count in sorted({row["modalities"] for row in rows}):
        for setting, expert in (
            ("synergy", "synergy"),
            ("redundancy", "redundancy"),
            ("uniqueness0", "uniqueness: m0"),
        ):
            own = [row for row in rows if (row["modalities"], row["setting"]) == (count, setting)]
            other = [row for row in rows if row["modalities"] == count and row["setting"] != setting]
            if not own or not other:
                continue
            often = sum(max(row["routing"], key=row["routing"].__getitem__) == expert for row in own)
            lines.append(
                [
                    str(count),
                    setting.rstrip("0"),
                    over_seeds([row["routing"][expert] for row in own], 2),
                    over_seeds([row["routing"][expert] for row in other], 2),
                    f"{1 / len(own[0]['routing']):.2f}",
                    f"{often} of {len(own)}",
                    over_seeds([100 * row["expert_accuracy"][expert] for row in own], 1),
                    over_seeds([100 * max(row["expert_accuracy"].values()) for row in own], 1),
                    over_seeds([100 * row["accuracy"] for row in own], 1),
                ]
            )
    columns = ["modalities", "data", "weight of the expert of this kind", "its weight on other data", "equal weights"]
    columns += ["largest in", "it alone, %", "best expert alone, %", "mixture, %"]
    seeds = len({row["seed"] for row in rows})
    return columns, lines, f"Mean ± spread over {seeds} seeds; on other data over those of all kinds."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"hdxor": ("hdxor", table), "hdxor_routing": ("hdxor", routing_lines)}


if __name__ == "__main__":
    main()
