"""What a probe costs beside the engine's evaluations: the game, the noise check, the estimator; processor time.

    python -m bench.overheads [--shapes mimic] [--evaluations 968 7744] [--rounds 3]

The share of the engine is its time in evaluations of the game's own arithmetic over that of the whole call, of
``interactions`` on the 10 x 10 corner grid of two modalities; the noise check in float64 counts as overhead. A game is
made of another sample of a model that had one. One thread, so that processor time is time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch

from bench.cells import Table
from bench.shapes import SHAPES, Shape
from bench.timing import spread, write
from flmoe_fast import TokenGame, interactions
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.portable import TorchEngine

SIDE = 10
#: Games that are made for one time of making one.
GAMES = 7


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


def probing(shape: Shape, evaluations: int, method: str) -> dict:
    """Shares of a whole call of ``interactions``."""
    game, grid = make(shape, shape.model(), 0), shape.corners(SIDE)
    game(torch.ones(2, game.n, dtype=torch.bool))
    clock = Clock()
    with clock.watching(engine=(CpuEngine, "evaluate"), check=(TorchEngine, "evaluate_toggles")):
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
    for row in rows:
        if row["part"] == "game":
            lines.append([f"a game of a known model, {row['shape']}", "", f"{row['ms']['median']:.1f} ms", "", ""])
            continue
        what = f"`interactions`, {row['shape']}, " + ("default" if row["method"] == "auto" else row["method"])
        shares = [f"{row['shares'][part]:.1%}" for part in ("engine", "check")]
        lines.append([what, f"{row['evaluations']:,}", f"{row['seconds']:.2f} s", *shares])
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [making(SHAPES[name], options.rounds) for name in ("mimic", "mmimdb")]
    rows += [
        probing(SHAPES[name], evaluations, method)
        for name in options.shapes
        for evaluations in options.evaluations
        for method in ("auto", "grid")[: 2 if evaluations < 2000 else 1]
    ]
    for row in rows:
        print(row, flush=True)
    print("wrote", write("overheads", rows))


if __name__ == "__main__":
    main()
