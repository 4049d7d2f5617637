"""Times of the pipeline: a training step, and the faithfulness of a sample.

    python -m bench.pipeline [--shapes digits mmimdb] [--rounds 5] [--threads 2]

Training: forward and backward of all (M + 1)(M + 2) passes, in one batch against one by one, with and without dropout.
Faithfulness: the drop curves of one sample (1 + 2 K (1 + R) variants, K = 5, R = 10), in one coalition batch through
the engine, against a loop that runs the model once per variant on copies of the features, and against the same variants
in batches of 32. Importance maps are timed on their own. Candidates take turns in one run. Writes
bench/results/pipeline.jsonl.
"""

from __future__ import annotations

import argparse

import torch

from bench.cells import Table, quartiles
from bench.shapes import SHAPES, Shape
from bench.timing import interleave, spread, write
from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame
from flmoe_fast.model.training.forward import training_forward
from flmoe_fast.pipeline.faithful.curves import DEFAULT_PERCENTS, faithfulness, selected_tokens
from flmoe_fast.pipeline.importance.tokens import METHODS, batch_importance

BATCH = {"digits": 32, "mmimdb": 2, "enrico": 2, "mimic": 4}
REPEATS = 10
LOOP_BATCH = 32


def training_model(shape: Shape, dropout: float) -> FLI2MoE:
    """A model in train mode with different experts."""
    fields = shape.model().config.to_dict() | {"dropout": dropout}
    model = FLI2MoE(FLI2MoEConfig.from_dict(fields))
    model.load_state_dict(shape.model().state_dict())
    return model.train()


def training_rows(shape: Shape, rounds: int) -> list[dict]:
    """Milliseconds of a training step."""
    count = BATCH[shape.name]
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(count, t, shape.hidden, generator=generator) for t in shape.tokens]
    masks = [torch.ones(count, t) for t in shape.tokens]
    if shape.task == "multilabel":
        targets = torch.randint(2, (count, shape.classes), generator=generator)
    else:
        targets = torch.randint(shape.classes, (count,), generator=generator)
    rows = []
    for dropout in (0.0, 0.5):
        model = training_model(shape, dropout)

        def step(passes: str, model: FLI2MoE = model) -> None:
            model.zero_grad(set_to_none=True)
            training_forward(model, features, masks, targets, passes=passes).loss.backward()

        runs = {passes: lambda passes=passes: step(passes) for passes in ("sequential", "batched")}
        seconds = interleave(runs, rounds)
        for name, values in seconds.items():
            times = [a / b for a, b in zip(seconds["sequential"], values)]
            about = {"shape": shape.name, "what": "training step", "candidate": name, "dropout": dropout}
            ms = spread([1e3 * value for value in values])
            rows.append({**about, "samples": count, "ms": ms, "times_sequential": spread(times)})
    return rows


def variants(game: TokenGame, importance: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Coalitions of the drop curves, one by one."""
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.tensor(players) for _, players in game.groups]
    found = [torch.ones(game.n, dtype=torch.bool)]
    for percent in DEFAULT_PERCENTS:
        best = [group[selected_tokens(importance[group], percent)] for group in groups]
        for repeat in range(1 + REPEATS):
            chosen = best
            if repeat:
                chosen = [g[torch.randperm(len(g), generator=generator)[: len(b)]] for g, b in zip(groups, best)]
            for kept in (True, False):
                coalition = torch.full((game.n,), kept)
                coalition[torch.cat(chosen)] = not kept
                found.append(coalition)
    return found


@torch.no_grad()
def loop(model: FLI2MoE, game: TokenGame, coalitions: list[torch.Tensor], size: int) -> torch.Tensor:
    """Probability of the target for every variant, from copies of the features with tokens filled one by one."""
    problem = game.problem
    features = problem.features.float()
    fills = problem.fills.float()
    lengths = list(problem.padded_lengths)
    values = []
    for start in range(0, len(coalitions), size):
        some = coalitions[start : start + size]
        batch = features.repeat(len(some), 1, 1)
        for row, coalition in zip(batch, some):
            for player in (~coalition).nonzero()[:, 0].tolist():
                row[problem.valid[problem.players[player]]] = fills[problem.valid[problem.players[player]]]
        masks = [torch.ones(len(some), length) for length in lengths]
        logits = model([part.contiguous() for part in batch.split(lengths, dim=1)], masks).logits
        if model.config.task == "multilabel":
            values.append(logits.sigmoid()[:, list(game.target)].mean(1))
        else:
            values.append(logits.softmax(-1)[:, game.target])
    return torch.cat(values)


def faithfulness_rows(shape: Shape, rounds: int) -> list[dict]:
    """Seconds of one sample's curves."""
    model = shape.model()
    features, masks = shape.sample()
    many = [f[None] for f in features], [m[None] for m in masks]
    options = {"masks": masks, "fill": "zero", "heads": ("mixture",)}
    game = TokenGame(model, features, **options)
    importance = batch_importance(model, *many).mixture[0][game.tokens]
    coalitions = variants(game, importance, 0)
    small = 20 if shape.name == "digits" else 4
    # The loop over all variants would take minutes at the large shape; each of its turns runs some, scaled up.
    some = len(coalitions) if shape.name == "digits" else 8
    expected = game(torch.stack(coalitions[:small]))[:, 0]
    assert torch.allclose(loop(model, game, coalitions[:small], 1).double(), expected, atol=1e-5)
    runs = {
        "loop, one variant at a time": lambda: loop(model, game, coalitions[:some], 1),
        f"loop, batches of {LOOP_BATCH}": lambda: loop(model, game, coalitions[: max(some, LOOP_BATCH)], LOOP_BATCH),
        "one coalition batch (engine made anew)": lambda: faithfulness(
            TokenGame(model, features, **options), importance, repeats=REPEATS
        ),
        **{f"importance map, {m}": lambda m=m: batch_importance(model, *many, method=m) for m in METHODS},
    }
    seconds = interleave(runs, rounds)
    scale = {"loop, one variant at a time": some, f"loop, batches of {LOOP_BATCH}": max(some, LOOP_BATCH)}
    whole = {
        name: [value * len(coalitions) / min(scale.get(name, len(coalitions)), len(coalitions)) for value in values]
        for name, values in seconds.items()
    }
    rows = []
    for name, values in whole.items():
        times = [a / b for a, b in zip(whole["loop, one variant at a time"], values)]
        about = {"shape": shape.name, "what": "faithfulness of a sample", "candidate": name}
        about |= {"variants": len(coalitions), "backend": game.backend}
        row = {**about, "ms": spread([1e3 * value for value in values])}
        rows.append(row if name.startswith("importance") else {**row, "times_loop": spread(times)})
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(BATCH), default=["digits", "mmimdb"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.shapes:
        for row in training_rows(SHAPES[name], options.rounds) + faithfulness_rows(SHAPES[name], options.rounds):
            rows.append({**row, "threads": torch.get_num_threads()})
            ratio = row.get("times_sequential") or row.get("times_loop")
            drop = f"dropout {row['dropout']}, " if "dropout" in row else ""
            text = f"x{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})" if ratio else ""
            print(
                f"{name:8} {row['what']:25} {drop + row['candidate']:45} {row['ms']['median']:10.1f} ms  {text}",
                flush=True,
            )
    print("wrote", write("pipeline", rows))


def table(rows: list[dict]) -> Table:
    """Times of a training step and of a sample's faithfulness."""
    lines = []
    for row in rows:
        ratio = row.get("times_sequential") or row.get("times_loop")
        what = row["what"] + (f", dropout {row['dropout']}" if "dropout" in row else "")
        times = f"{ratio['median']:.1f}x" if ratio else ""
        lines.append([row["shape"], what, row["candidate"], quartiles(row["ms"], 1), times])
    columns = ["shape", "", "", "ms", "times as fast"]
    return columns, lines, "Medians and quartiles; one run, candidates in turns."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"pipeline": ("pipeline", table)}


if __name__ == "__main__":
    main()
