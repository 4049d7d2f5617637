"""What every process of a torchrun in test_scale.py does: python scale_worker.py FOLDER [NUMBER OF A FATAL SAMPLE]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from flmoe_fast import InteractionResult, interactions
from flmoe_fast.scale.explain_many import explain_many
from flmoe_fast.scale.group import SharedGame, join

N, SAMPLES = 7, 10


def game_of(number: int):
    """A game of seven players with two outputs, different for every sample."""
    values = torch.randn(2**N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    return lambda z: values[(z.long() << torch.arange(N)).sum(1)]


def explain_one(number: int, sample: int) -> InteractionResult:
    return interactions(game_of(sample), n=N, contexts=4, seed=number, gap="strict", also=("SV",), progress=False)


def main() -> None:
    folder, fatal = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1

    def explain(number: int, sample: int) -> InteractionResult:
        if number == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return explain_one(number, sample)

    if fatal < 0:
        group = join()
        game = SharedGame(game_of(100), group, N)
        for options in ({"contexts": 9}, {"budget": 300}, {"budget": 90, "method": "surrogate"}):
            found = interactions(game, gap="strict", progress=False, **options)
            name = "-".join(map(str, options.values()))
            found.save(folder / f"shared-{name}-{group.rank}.npz")
    explain_many(range(SAMPLES), explain, folder / "many", chunk=2, format="safetensors", progress=False)


if __name__ == "__main__":
    main()
