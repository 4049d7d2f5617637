"""What the finite check and the locks cost a probe: the same probe with and without them, in turns, in processor time.

    python -m bench.checks [--rounds 40]

Results go to bench/results/checks.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from bench.cells import Table
from bench.timing import spread, write
from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame, interactions
from flmoe_fast.engines import prepared
from flmoe_fast.games import game as games
from flmoe_fast.model.encoders import ProjectionEncoder

#: Processor seconds that one measurement takes at least; shorter probes are repeated.
LEAST = 0.5


@contextlib.contextmanager
def unchecked(*models: prepared.PreparedModel) -> Iterator[None]:
    """Values are not looked at, and nothing is locked."""
    held = [(games, "_wrong", lambda values: False), (prepared, "_lock", contextlib.nullcontext())]
    held += [(model, "_lock", contextlib.nullcontext()) for model in models]
    before = [getattr(owner, name) for owner, name, _ in held]
    try:
        for owner, name, value in held:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(held, before):
            setattr(owner, name, value)


def table_game() -> Callable[[], object]:
    """A game whose values are looked up, which leaves a check the most to slow down."""
    values = torch.from_numpy(np.random.default_rng(0).normal(size=2**16))
    powers = 1 << torch.arange(16)

    def value(coalitions: torch.Tensor) -> torch.Tensor:
        return values[(coalitions.long() * powers).sum(1)]

    return lambda: interactions(value, n=16, contexts=16, method="grid", progress=False)


def token_game(tokens: int, width: int) -> Callable[[], object]:
    """Twenty tokens by twenty of a mixture of transformers, on the engine that is chosen."""
    torch.manual_seed(0)
    config = FLI2MoEConfig(("a", "b"), width, 4, 2, 3, reweight_hidden=width)
    model = FLI2MoE(config, {name: ProjectionEncoder(width, width) for name in "ab"}).eval()
    game = TokenGame(model, [torch.randn(tokens, width) for _ in "ab"], fill="zero")
    pairs = {"rows": range(20), "cols": range(tokens, tokens + 20)}
    return lambda: interactions(game, **pairs, contexts=8, method="grid", progress=False)


CASES = {
    "120 pairs of a table of 16 players": lambda: table_game(),
    "400 pairs of 2 x 24 tokens, width 32": lambda: token_game(24, 32),
    "400 pairs of 2 x 48 tokens, width 64": lambda: token_game(48, 64),
}


def measured(probe: Callable[[], object], rounds: int) -> dict:
    """Processor seconds with and without, and the ratio within each round."""

    def once() -> float:
        begin = time.process_time()
        probe()
        return time.process_time() - begin

    probe()
    repeats = max(1, round(LEAST / max(once(), 1e-4)))
    models = [model for _, model in prepared._prepared.values()]
    with_checks, without = [], []
    for _ in range(rounds):
        spent = {True: 0.0, False: 0.0}
        for number in range(repeats):  # probe by probe, since a machine drifts; who is first takes turns too
            for checked in (number % 2 == 0, number % 2 == 1):
                with contextlib.nullcontext() if checked else unchecked(*models):
                    spent[checked] += once()
        with_checks.append(spent[True] / repeats)
        without.append(spent[False] / repeats)
    ratios = [a / b for a, b in zip(with_checks, without)]
    return {"with": spread(with_checks), "without": spread(without), "ratio": spread(ratios)}


def table(rows: list[dict]) -> Table:
    """What a probe takes, and what checks and locks add."""
    lines = []
    for row in rows:
        ratio = row["ratio"]
        low, middle, high = (100 * (ratio[name] - 1) for name in ("q1", "median", "q3"))
        lines.append(
            [row["case"], f"{1e3 * row['with']['median']:.1f} ms", f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"]
        )
    return ["probe", "processor time", "checks and locks add"], lines, "Median and quartiles of rounds in turns."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"checks": ("checks", table)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for case, make in CASES.items():
        rows.append({"case": case, **measured(make(), rounds)})
        print(rows[-1], flush=True)
    print(write("checks", rows))


if __name__ == "__main__":
    main()
