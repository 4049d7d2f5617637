"""Every kind of model of transformers that people run: which path it takes, why, how exact and how fast.

    python -m bench.zoo [--rounds 3] [--only NAME ...] [--missing] [--seconds 300]

Every model's line is written as soon as it is measured: ``--missing`` goes on with those that have none, ``--seconds``
ends before the next model when so much time is over.

Models come from tiny configurations with random weights (tests/zoo.py). Values are compared with the model's own, one
masked input at a time, in float64 throughout; times are in float32, of one corner grid after another: one coalition at
a time, in batches of 32, and as ``accelerate`` has it. At these sizes they say what a call costs besides arithmetic.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cells import Table
from bench.cells import times as in_times
from bench.timing import interleave, read, spread, write
from flmoe_fast import accelerate
from flmoe_fast.adapt.remember import forget
from flmoe_fast.games.game import Game
from flmoe_fast.probes.grid import CornerGrid

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # modules there know each other by their bare names

from decoders import AllDouble
from zoo import CASES, Case

#: Pairs across of a corner grid, contexts a call, and how many of their coalitions are taken one at a time.
SIDE, CONTEXTS, ALONE = 3, 4, 8


def row(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """A model's line of the table."""
    model, inputs = case.make(), case.inputs()
    found: dict[str, Any] = {"model": name, "group": case.group}
    try:
        with AllDouble():
            game, reason = on_engine(model, inputs, case)
            slow = accelerate(model).game(inputs, case.players(inputs), path="module", batch=1, **case.options)
            z = torch.rand(16, game.n) < torch.linspace(0, 1, 16)[:, None]
            values, truth = game(z), slow(z)
        single = {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}
        times = timed(case.make().float(), single, case, rounds)
    except Exception as problem:
        return found | {"path": "crash", "reason": f"{type(problem).__name__}: {problem}"[:200]}
    error = float((values - truth).abs().max() / truth.abs().max())
    return found | {"path": "batches" if reason else game.backend, "reason": reason, "error": error, **times}


def on_engine(model: nn.Module, inputs: Mapping[str, torch.Tensor], case: Case) -> tuple[Game, str]:
    """The game on an engine, or in batches and why."""
    players = case.players(inputs)
    try:
        return accelerate(model).game(inputs, players, path="engine", **case.options), ""
    except Exception:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            game = accelerate(model).game(inputs, players, **case.options)
    [said] = [str(w.message) for w in caught if "slow path" in str(w.message)]
    return game, said.partition("because ")[2].removeprefix("model: got ")


def timed(model: nn.Module, inputs: Mapping[str, torch.Tensor], case: Case, rounds: int) -> dict[str, Any]:
    """What is taken, and how many times as fast it is as one coalition at a time, and as batches of 32."""
    fast = accelerate(model)
    games: dict[str, Game] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, path, batch in (("alone", "module", 1), ("batched", "module", 32), ("ours", "auto", 32)):
            games[name] = fast.game(inputs, case.players(inputs), path=path, batch=batch, **case.options)
    taken = "batches" if games["ours"].backend == games["batched"].backend else games["ours"].backend
    seconds = interleave({name: caller(game, name == "alone") for name, game in games.items()}, rounds)
    share = CONTEXTS * grid_of(games["ours"].n).evaluations / ALONE
    found: dict[str, Any] = {"taken": taken}
    for name, scale in (("alone", share), ("batched", 1.0)):
        found[f"times_{name}"] = spread([scale * b / a for a, b in zip(seconds["ours"], seconds[name])])
    return found


def grid_of(n: int) -> CornerGrid:
    """Pairs of the first players with the last."""
    side = min(SIDE, n // 2)
    return CornerGrid.of(torch.cartesian_prod(torch.arange(side), torch.arange(n - side, n)), n)


def caller(game: Game, alone: bool) -> Callable[[], torch.Tensor]:
    """Evaluates the grid in contexts that it has not seen before."""
    generator, grid = torch.Generator().manual_seed(0), grid_of(game.n)

    def call() -> torch.Tensor:
        contexts = torch.rand(CONTEXTS, game.n, generator=generator) < 0.5
        z = (contexts[:, None] ^ grid.toggled).flatten(0, 1)
        forget(game)  # a larger one would not come upon the same coalitions again
        return game(z[:ALONE] if alone else z)

    return call


def table(rows: list[dict]) -> Table:
    """Kinds of models: path, error, speed and reason."""
    lines = []
    for row in sorted(rows, key=lambda row: row["group"]):
        if row["path"] == "crash":
            lines.append([row["group"], row["model"], "**crash**", "", "", "", row["reason"]])
            continue
        faster = row["taken"] == "batches" and row["path"] != "batches"
        path = row["path"] + (" (batches are faster here)" if faster else "")
        own = "1" if row["taken"] == "batches" else in_times(row["times_batched"])
        alone = in_times(row["times_alone"])
        lines.append([row["group"], row["model"], path, f"{row['error']:.0e}", alone, own, row["reason"]])
    columns = ["", "model", "path", "error", "speed against one at a time", "against batches of 32", "why no engine"]
    note = (
        "Tiny configurations with random weights. Error: the largest difference to the model's own masked forward "
        "passes relative to the largest value, in float64 throughout. Speed: float32, corner grids of three by three "
        "pairs, medians and quartiles, candidates in turns; 1 where the batches themselves are taken."
    )
    return columns, lines, note


TABLES = {"zoo": ("zoo", table)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    found = read("zoo") if options.missing or options.only else None
    rows = {row["model"]: row for row in (found[1] if found else []) if row["model"] in CASES}
    started = time.monotonic()
    for name, case in CASES.items():
        wanted = name in options.only if options.only else not (options.missing and name in rows)
        if not wanted or time.monotonic() - started > options.seconds:
            continue
        torch.manual_seed(0)
        rows[name] = row(name, case, options.rounds)
        print(rows[name], flush=True)
        write("zoo", [rows[known] for known in CASES if known in rows])


if __name__ == "__main__":
    main()
