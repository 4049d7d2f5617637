"""What a probe costs beside the engine's evaluations: the game, the noise check, the estimator; processor time.

    python -m bench.overheads [--shapes mimic] [--evaluations 968 7744] [--rounds 5] [--only game short probe explain]

The share of the engine is its time in evaluations of the game's own arithmetic over that of the whole call, of
``interactions`` on the 10 x 10 corner grid of two modalities, and of ``explain``, which chooses these players itself;
the noise check in float64 counts as overhead. A game is made of another sample of a model that had one. A short probe
has 100 evaluations of a model of 8 + 8 tokens, the game included: the first of a process, which imports, sets up and
packs the model, and those that follow. One thread, so that processor time is time. Rows that are not measured again
stay in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench.cells import Table
from bench.shapes import SHAPES, Shape
from bench.timing import machine_line, read, spread, write
from flmoe_fast import TokenGame, explain, interactions
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.portable import TorchEngine

SIDE = 10
#: Games that are made for one time of making one.
GAMES = 7
#: Evaluations, pairs and widths of short probes, and how many of these are timed in a process.
SHORT, SHORT_PAIRS, WIDTHS, PROBES = 100, [(0, 8), (1, 9), (2, 10), (3, 11)], (32, 64), 15
#: What makes a row.
KEY = ("part", "shape", "method", "evaluations", "width")
#: What is measured, and watched.
PARTS = ("game", "short", "probe", "explain")
WATCHED = {"engine": (CpuEngine, "evaluate"), "check": (TorchEngine, "evaluate_toggles")}


class Clock:
    """Processor seconds of calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def watching(self, **methods: tuple[type, str]) -> Iterator[None]:
        """Time the outermost calls of some methods."""
        before = {name: getattr(kind, method) for name, (kind, method) in methods.items()}
        for name, (kind, method) in methods.items():
            self.seconds[name] = 0.0
            setattr(kind, method, self._timed(name, before[name]))
        try:
            yield
        finally:
            for name, (kind, method) in methods.items():
                setattr(kind, method, before[name])

    def _timed(self, name: str, function: Callable) -> Callable:
        def timed(*given: object, **named: object) -> object:
            begin = time.process_time()
            try:
                return function(*given, **named)
            finally:
                self.seconds[name] += time.process_time() - begin

        return timed


def make(shape: Shape, model: torch.nn.Module, seed: int) -> TokenGame:
    """The game of one of the shape's samples."""
    features, masks = shape.sample(seed)
    return TokenGame(model, features, masks=masks, fill="zero", players=[range(t) for t in shape.tokens], target=0)


def making(shape: Shape, rounds: int) -> dict:
    """Milliseconds in which a game of a known model is made."""
    model = shape.model()
    make(shape, model, 0)
    gc.collect()
    gc.freeze()
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        for seed in range(1, 1 + GAMES):
            make(shape, model, seed)
        seconds.append(1e3 * (time.process_time() - begin) / GAMES)
    return {"part": "game", "shape": shape.name, "ms": spread(seconds)}


def shortly(width: int) -> dict:
    """Milliseconds of short probes in a process that has imported the bench and nothing else."""
    shape = replace(SHAPES["digits"], hidden=width)
    model, seconds, clock = shape.model(), [], Clock()
    with clock.watching(**WATCHED):
        for _ in range(2 + PROBES):
            if len(seconds) == 2:  # the first one, and one that follows it
                clock.seconds = dict.fromkeys(clock.seconds, 0.0)
            begin = time.process_time()
            interactions(make(shape, model, 0), pairs=SHORT_PAIRS, budget=SHORT, progress=False)
            seconds.append(1e3 * (time.process_time() - begin))
    shares = {name: 1e3 * spent / sum(seconds[2:]) for name, spent in clock.seconds.items()}
    return {"first": seconds[0], "median": statistics.median(seconds[2:]), "shares": shares}


def short(width: int, rounds: int) -> dict:
    """What a short probe takes, each round in a process of its own."""
    ask = f"import json, torch, bench.overheads as b; torch.set_num_threads(1); print(json.dumps(b.shortly({width})))"
    found = [
        json.loads(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    ]
    shares = {name: statistics.median(one["shares"][name] for one in found) for name in WATCHED}
    about = {"part": "short", "shape": "digits", "width": width, "evaluations": SHORT, "shares": shares}
    return about | {"first": spread([f["first"] for f in found]), "ms": spread([f["median"] for f in found])}


def explaining(shape: Shape, contexts: int = 6) -> dict:
    """Shares of a whole call of ``explain`` that probes in so many contexts."""
    model = shape.model()
    features, masks = shape.sample(0)
    make(shape, model, 0)(torch.ones(2, sum(shape.tokens), dtype=torch.bool))
    clock = Clock()
    with clock.watching(**WATCHED):
        begin = time.process_time()
        found = explain(model, features, masks=masks, fill="zero", contexts=contexts, target=0, progress=False)
        total = time.process_time() - begin
    shares = {name: seconds / total for name, seconds in clock.seconds.items()}
    about = {"part": "explain", "shape": shape.name, "evaluations": found.interactions.evaluations}
    return about | {"checks": found.interactions.check_evaluations, "seconds": total, "shares": shares}


def probing(shape: Shape, evaluations: int, method: str) -> dict:
    """Shares of a whole call of ``interactions``."""
    game, grid = make(shape, shape.model(), 0), shape.corners(SIDE)
    game(torch.ones(2, game.n, dtype=torch.bool))
    clock = Clock()
    with clock.watching(**WATCHED):
        begin = time.process_time()
        found = interactions(
            game, pairs=grid.pairs, contexts=evaluations // grid.evaluations, method=method, progress=False
        )
        total = time.process_time() - begin
    about = {"part": "probe", "shape": shape.name, "method": method, "evaluations": found.evaluations}
    shares = {name: seconds / total for name, seconds in clock.seconds.items()}
    return about | {"checks": found.check_evaluations, "seconds": total, "shares": shares}


def table(rows: list[dict]) -> Table:
    """What whole calls take, and the parts of it."""
    lines = []
    for row in sorted(rows, key=lambda row: PARTS.index(row["part"])):
        if row["part"] == "game":
            lines.append([f"a game of a known model, {row['shape']}", "", f"{row['ms']['median']:.1f} ms", "", ""])
            continue
        shares = [f"{row['shares'][part]:.1%}" for part in ("engine", "check")]
        evaluations = f"{row['evaluations']:,}"
        if row["part"] == "short":
            what = f"game and `interactions`, 16 tokens of width {row['width']}"
            lines.append([f"{what}, first call", evaluations, f"{row['first']['median']:.0f} ms", "", ""])
            lines.append([f"{what}, later calls", evaluations, f"{row['ms']['median']:.0f} ms", *shares])
            continue
        what = f"`interactions`, {row['shape']}, " + (
            "default" if row.get("method") == "auto" else row.get("method", "")
        )
        what = f"`explain`, {row['shape']}" if row["part"] == "explain" else what
        lines.append([what, evaluations, f"{row['seconds']:.2f} s", *shares])
    columns = ["call", "evaluations", "processor time", "engine", "noise check"]
    return columns, lines, "One thread; the engine's level is the best of the machine without matrix units, avx512."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"overheads": ("overheads", table)}


def main() -> None:
    """Measure, print, and write bench/results/overheads.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["mimic"])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[968, 7744])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in measured(options):
        print(row, flush=True)
        keep({**row, **machine_line()})


def measured(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of what was asked for."""
    if "game" in options.only:
        yield from (making(SHAPES[name], options.rounds) for name in ("mimic", "mmimdb"))
    if "short" in options.only:
        yield from (short(width, options.rounds) for width in WIDTHS)
    for name in options.shapes:
        for evaluations in options.evaluations if "probe" in options.only else ():
            for method in ("auto", "grid")[: 2 if evaluations < 2000 else 1]:
                yield probing(SHAPES[name], evaluations, method)
        if "explain" in options.only:
            yield explaining(SHAPES[name])


def keep(row: dict) -> None:
    """Write a row into the file, instead of one of the same."""
    _, old = read("overheads") or ({}, [])
    same = [row.get(part) for part in KEY]
    write("overheads", [other for other in old if [other.get(part) for part in KEY] != same] + [row])


if __name__ == "__main__":
    main()
