"""InterSHAP on HD-XOR: the published network and FL-I2MoE on the same data, and the rule of the data itself.

The plain network is that of the paper: the modalities side by side, two hidden layers of a half and a quarter of their
width, Adam with weight decay, no early stopping. So tool and model are told apart: where the plain network gives the
published figure, a figure of another model is that model's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bench.cells import Table, over_seeds
from bench.findings.tasks import Task
from bench.hdxor import asked, ones, train
from bench.intershap import shares
from flmoe_fast.data.hdxor import hd_xor, synergy_bits
from flmoe_fast.data.splits import Splits
from flmoe_fast.model.training.predict import predict
from flmoe_fast.pipeline.interaction_share import interaction_share

#: Published InterSHAP in per cent with its spread, by modalities and data: global (table 3), local of two (table 2).
PUBLISHED = {
    (2, "uniqueness"): (0.2, 0.1),
    (2, "synergy"): (98.0, 0.5),
    (2, "redundancy"): (38.6, 0.5),
    (3, "uniqueness"): (0.6, 0.2),
    (3, "synergy"): (88.8, 0.5),
    (3, "redundancy"): (51.9, 0.3),
    (4, "synergy"): (64.1, 0.8),
}
PUBLISHED_LOCAL = {(2, "uniqueness"): (3.4, 5.2), (2, "synergy"): (85.8, 12.1), (2, "redundancy"): (37.3, 25.0)}
#: Of the plain network, whose training loss is below 0.01 by then (published: 200), and of FL-I2MoE.
PLAIN_EPOCHS, EPOCHS = 60, 2
#: Tokens of a modality in FL-I2MoE, each of neighbouring columns.
GROUPS = 8
SETTINGS = ("synergy", "redundancy", "uniqueness0")
PLAIN, MIXTURE, RULE = "plain network", "FL-I2MoE", "rule of the data"
#: The plain network of three modalities again, with what might explain why its figure is not the published one: trained
#: for as long as published, and on vectors of the lengths that the paper's appendix names.
LONG, APPENDIX = "plain network, 200 epochs", "plain network, vectors of 110, 90 and 100"
APPENDIX_LENGTHS = (110, 90, 100)


def tasks(seeds: Sequence[int]) -> list[Task]:
    """The plain network and the rule for two, three and four modalities, FL-I2MoE for two and three."""
    cells = [(m, s) for m in (2, 3) for s in SETTINGS] + [(4, "synergy")]
    found = []
    for model, seed, (count, setting) in itertools.product((RULE, PLAIN, MIXTURE), seeds, cells):
        if model != PLAIN and (setting != "synergy" or (model == MIXTURE and count > 3)):
            continue
        epochs = {PLAIN: PLAIN_EPOCHS, MIXTURE: EPOCHS}.get(model, 0)
        settings = {"model": model, "modalities": count, "setting": setting, "seed": seed, "epochs": epochs}
        found.append(Task("shares", f"{count}-{setting}-{model.split()[0]}-{seed}", settings))
    for name, model, epochs in (("long", LONG, 200), ("appendix", APPENDIX, PLAIN_EPOCHS)):
        settings = {"model": model, "modalities": 3, "setting": "synergy", "seed": seeds[0], "epochs": epochs}
        found.append(Task("shares", f"3-synergy-{name}-{seeds[0]}", settings))
    return found


def run(model: str, modalities: int, setting: str, seed: int, epochs: int) -> dict:
    """Train one model, and measure what it does."""
    data = hd_xor(setting, modalities, seed=seed, dimensions=APPENDIX_LENGTHS if model == APPENDIX else None)
    if model == RULE:
        return rule(data, modalities, seed)
    if model in (PLAIN, LONG, APPENDIX):
        network = plain_network(data, seed, epochs)
        right = network(torch.cat(data.test.inputs, 1)).argmax(1) == data.test.targets

        def ask(inputs: list[Tensor]) -> Tensor:
            return network(torch.cat(inputs, 1)).softmax(1)

        return {"accuracy": float(right.double().mean()), **shares(ask, data, seed, 500, 200)}
    options = argparse.Namespace(epochs=epochs, groups=GROUPS, hidden=32, layers=1, lr=2e-3, interaction_weight=0.1)
    mixture = train(data, seed, options)
    found = predict(mixture, data.test.inputs, ones(data.test, GROUPS))
    right = found.logits.argmax(-1) == data.test.targets
    return {"accuracy": float(right.double().mean()), **shares(asked(mixture, GROUPS), data, seed, 100, 64)}


def plain_network(data: Splits, seed: int, epochs: int) -> nn.Module:
    """The published early-fusion network, trained as published."""
    inputs, targets = torch.cat(data.train.inputs, 1), data.train.targets
    width = inputs.shape[1]
    torch.manual_seed(seed)
    layers = [nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width // 4), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(width // 4, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-4)
    for _ in range(epochs):
        for index in torch.randperm(len(inputs)).split(400):
            loss = nn.functional.cross_entropy(network(inputs[index]), targets[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return network.requires_grad_(False).eval()


def rule(data: Splits, count: int, seed: int) -> dict:
    """The label's own rule in place of a model: what InterSHAP a perfect model of the bits would have."""
    bits = synergy_bits(count, 20_000, np.random.default_rng(seed))
    patterns, often = np.unique(bits, axis=0, return_counts=True)
    weight = often / often.sum()
    label = patterns.sum(1) == 1
    values = np.empty((2**count, len(patterns)))
    for code in range(2**count):
        present = (code >> np.arange(count) & 1).astype(bool)
        mixed = np.where(present, patterns[:, None], patterns[None])  # (sample, donor, bit)
        one = ((mixed.sum(-1) == 1) * weight).sum(1)
        values[code] = np.where(label, one, 1 - one)
    rows = np.repeat(np.arange(len(patterns)), often)
    found = interaction_share(torch.from_numpy(values[:, rows]), count)
    alone = max(float(np.mean(data.train.targets.numpy() == guess)) for guess in (0, 1))
    of_one = [
        label[patterns[:, 0] == b] @ weight[patterns[:, 0] == b] / weight[patterns[:, 0] == b].sum() for b in (0, 1)
    ]
    return {
        "accuracy": 1.0,
        "majority": alone,
        "label_given_a_bit": [float(share) for share in of_one],
        "global": 100 * found.overall,
        "local": 100 * found.local,
    }


def share_lines(rows: list[dict]) -> Table:
    """InterSHAP of the rule, the plain network and FL-I2MoE beside the published figures."""
    own = [row for row in rows if row["experiment"] == "shares"]
    lines = []
    for count, setting in dict.fromkeys((r["settings"]["modalities"], r["settings"]["setting"]) for r in own):
        kind = setting.rstrip("0")
        for model in (RULE, PLAIN, LONG, APPENDIX, MIXTURE):
            cell = [
                row
                for row in own
                if (row["settings"]["modalities"], row["settings"]["setting"], row["settings"]["model"])
                == (count, setting, model)
            ]
            if not cell:
                continue
            said = [
                "" if model == MIXTURE or found is None else f"{found[0]} ± {found[1]}"
                for found in (PUBLISHED.get((count, kind)), PUBLISHED_LOCAL.get((count, kind)))
            ]
            if model == RULE:
                said = ["99.7", "96.9"] if count == 2 else ["", ""]
            accuracy = "" if model == RULE else over_seeds([100 * row["accuracy"] for row in cell], 1)
            measured = [over_seeds([row[name] for row in cell], 1) for name in ("global", "local")]
            lines.append(
                [str(count), kind, model, str(len(cell)), accuracy, measured[0], said[0], measured[1], said[1]]
            )
    columns = ["modalities", "data", "model", "seeds", "accuracy, %", "global InterSHAP, %", "published", "local, %"]
    columns.append("published")
    return columns, lines, "Mean ± spread over seeds, of data and weights."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"findings_shares": ("findings", share_lines)}
