"""Other packages' explainers with and without this package: the same model, coalitions and seeds in one run.

    python -m bench.explainers [--model out/demo/model.safetensors] [--rounds 5]

- captum: ``ShapleyValueSampling`` and ours on the model's forward function, and ours given the model, hence on the
  engine; one feature a token, at 1, 32 and 256 perturbations a forward pass. Attributions are compared; forward rows
  are counted.
- shapiq: KernelSHAP-IQ on the model called with all coalitions at once, and on the same game through our engine.

Writes bench/results/explainers.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import captum.attr
import numpy as np
import shapiq
import torch

from bench.cells import Table, times
from bench.timing import interleave, spread, write
from flmoe_fast import TokenGame, load_checkpoint
from flmoe_fast.data.digits import two_view_digits
from flmoe_fast.explainers.captum import ShapleyInteractions
from flmoe_fast.explainers.model_forward import ModelForward
from flmoe_fast.explainers.shapiq import ShapiqGame

SAMPLES = 10
BUDGET = 1024


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("out/demo/model.safetensors"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = load_checkpoint(options.model).eval()
    _, held_out = two_view_digits()
    with torch.no_grad():
        features = [part[:1] for part in model.encode(held_out.inputs)]
    masks = [part[:1] for part in held_out.masks]
    fills = tuple(mean.expand_as(part) for mean, part in zip(model.feature_means, features))
    game = TokenGame(model, features, masks=masks, heads=("mixture",))
    rows = [0, 0]

    def forward(which: int):
        @torch.no_grad()
        def call(*parts: torch.Tensor) -> torch.Tensor:
            rows[which] += len(parts[0])
            every = [mask.expand(len(parts[0]), -1) for mask in masks]
            return model(list(parts), every).logits.softmax(-1)

        return call

    tokens = [part.shape[1] for part in features]
    numbers = torch.arange(sum(tokens)).split(tokens)
    players = tuple(part[None, :, None] for part in numbers)
    found = []
    for perturbations in (1, 32, 256):
        arguments = {"baselines": fills, "target": game.target, "feature_mask": players, "n_samples": SAMPLES}
        arguments["perturbations_per_eval"] = perturbations
        last: dict[str, tuple] = {}

        def run(name: str, method, arguments=arguments, last=last) -> None:
            more = {"additional_forward_args": tuple(masks)} if name == "engine" else {}
            torch.manual_seed(0)
            last[name] = method.attribute(tuple(features), **arguments, **more)

        methods = {"captum": captum.attr.ShapleyValueSampling(forward(0)), "ours": ShapleyInteractions(forward(1))}
        methods["engine"] = ShapleyInteractions(ModelForward(model, value="prob"))
        rows[:] = [0, 0]
        seconds = interleave({n: (lambda n=n, m=m: run(n, m)) for n, m in methods.items()}, options.rounds)
        if not methods["engine"].path.startswith("engine"):
            raise SystemExit(methods["engine"].path)
        apart = {
            name: max(float((a - b).abs().max()) for a, b in zip(last["captum"], last[name]))
            for name in ("ours", "engine")
        }
        found.append(
            {
                "explainer": "captum ShapleyValueSampling",
                "perturbations_per_eval": perturbations,
                "times_faster": spread([a / b for a, b in zip(seconds["captum"], seconds["ours"])]),
                "times_faster_on_engine": spread([a / b for a, b in zip(seconds["captum"], seconds["engine"])]),
                "rows": rows[0] // (options.rounds + 1),
                "our_rows": rows[1] // (options.rounds + 1),
                "largest_difference": apart["ours"],
                "largest_difference_on_engine": apart["engine"],
            }
        )
        print(found[-1], flush=True)

    @torch.no_grad()
    def plain(coalitions: np.ndarray) -> np.ndarray:
        present = torch.from_numpy(np.atleast_2d(coalitions).astype(bool))
        parts = [
            torch.where(some[..., None], part, fill)
            for some, part, fill in zip(present.split(tokens, dim=1), features, fills)
        ]
        every = [mask.expand(len(present), -1) for mask in masks]
        return model(parts, every).logits.softmax(-1)[:, game.target].double().numpy()

    values = {}

    def estimate(name: str, value) -> None:
        approximator = shapiq.KernelSHAPIQ(n=game.n, max_order=2, index="SII", random_state=0)
        values[name] = approximator.approximate(BUDGET, value)

    ours = ShapiqGame(game, normalize=False)
    both = {"plain": lambda: estimate("plain", plain), "ours": lambda: estimate("ours", ours)}
    seconds = interleave(both, options.rounds)
    coalitions = np.random.default_rng(0).random((256, game.n)) < 0.5
    found.append(
        {
            "explainer": "shapiq KernelSHAP-IQ",
            "times_faster": spread([a / b for a, b in zip(seconds["plain"], seconds["ours"])]),
            "largest_difference": float(np.abs(plain(coalitions) - ours(coalitions)).max()),
        }
    )
    print(found[-1], flush=True)
    print("wrote", write("explainers", found))


def table(rows: list[dict]) -> Table:
    """captum and shapiq with and without this package."""
    lines = []
    for row in rows:
        what = row["explainer"]
        if "perturbations_per_eval" in row:
            what += f", {row['perturbations_per_eval']} perturbations a pass"
        lines.append([what, "its function, batched", times(row["times_faster"]), f"{row['largest_difference']:.0e}"])
        if "times_faster_on_engine" in row:
            apart = f"{row['largest_difference_on_engine']:.0e}"
            lines.append([what, "its model, on the engine", times(row["times_faster_on_engine"]), apart])
        else:
            lines[-1][1] = "its game, on the engine"
    columns = ["explainer", "given to this package", "times as fast", "largest difference"]
    note = "Medians and quartiles of ratios; the same model, coalitions and seeds in one run."
    return columns, lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"explainers": ("explainers", table)}


if __name__ == "__main__":
    main()
