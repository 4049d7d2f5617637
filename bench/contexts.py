"""Time to draw and pack a million context coalitions of 516 players on one core: C++ against NumPy, the same bits.

    python -m bench.contexts [--contexts 1000000] [--rounds 5]

Writes bench/results/contexts.jsonl. Modes with a Latin hypercube sort every player's units, and are drawn for a
hundredth of the contexts.
"""

from __future__ import annotations

import argparse

import torch

from bench.cells import Table, quartiles
from bench.timing import interleave, spread, write
from flmoe_fast import coalitions
from flmoe_fast.coalitions import MODES
from flmoe_fast.native import extension

PLAYERS = 516


def main() -> None:
    """Compare, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    module, missing = extension()
    if module is None:
        parser.exit(1, f"{missing}\n")
    implementations = {"native": coalitions._Native(module), "numpy": coalitions._NumPy()}
    rows = []
    for mode in ("stratified", "iid", "lhs", "size"):
        contexts = options.contexts if mode in ("stratified", "iid") else options.contexts // 100
        for antithetic in (False, True):
            arguments = (PLAYERS, contexts // (1 + antithetic), 0, 0, MODES.index(mode), antithetic)
            draws = [each.sample(*arguments) for each in implementations.values()]
            if not all(map(torch.equal, *draws)):
                raise RuntimeError(f"{mode}: the implementations differ")
            del draws
            candidates = {
                name: lambda each=each, arguments=arguments: each.sample(*arguments)
                for name, each in implementations.items()
            }
            seconds = interleave(candidates, options.rounds)
            ratio = [slow / fast for slow, fast in zip(seconds["numpy"], seconds["native"])]
            row = {"mode": mode, "antithetic": antithetic, "players": PLAYERS, "contexts": contexts}
            row |= {f"{name}_seconds": spread(values) for name, values in seconds.items()}
            rows.append(row | {"numpy_over_native": spread(ratio)})
            print(
                f"{mode:10} {'antithetic' if antithetic else '':10} {contexts:8} contexts: "
                + ", ".join(f"{name} {row[f'{name}_seconds']['median']:.3f} s" for name in implementations)
                + f", {rows[-1]['numpy_over_native']['median']:.0f}x"
            )
    print("wrote", write("contexts", rows))


def table(rows: list[dict]) -> Table:
    """Seconds to draw and pack context coalitions, C++ against NumPy."""
    lines = [
        [
            row["mode"] + (", antithetic" if row["antithetic"] else ""),
            f"{row['contexts']:,}",
            quartiles(row["native_seconds"], 2),
            quartiles(row["numpy_seconds"], 2),
        ]
        for row in rows
    ]
    columns = ["mode", "contexts", "seconds, C++", "seconds, NumPy"]
    return columns, lines, f"{rows[0]['players']} players, one core; the same bits."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"contexts": ("contexts", table)}


if __name__ == "__main__":
    main()
