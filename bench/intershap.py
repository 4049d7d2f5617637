"""InterSHAP of any model on data whose modalities are vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flmoe_fast.data.splits import Splits
from flmoe_fast.pipeline.interaction_share import interaction_share


@torch.no_grad()
def shares(ask: Callable[[list[Tensor]], Tensor], data: Splits, seed: int, samples: int, donors: int) -> dict:
    """Global and local InterSHAP of a model's probabilities; absent modalities are those of random validation samples.

    Donors are the same for all samples and coalitions, or the noise of their choice would look like interaction.
    """
    generator = torch.Generator().manual_seed(seed)
    pool, count = data.valid.inputs, len(data.modalities)
    chosen = torch.randperm(len(data.valid), generator=generator)[:donors]
    test = [x[:samples] for x in data.test.inputs]
    full = ask(test)
    best = full.argmax(1)
    nothing = ask([x[:3000] for x in pool]).mean(0)[best]
    values = torch.empty(2**count, len(best), dtype=torch.float64)
    values[0], values[-1] = nothing, full.gather(1, best[:, None])[:, 0]
    for code in range(1, 2**count - 1):
        for row in range(len(best)):
            mixed = [
                x[row].expand(len(chosen), -1) if code >> m & 1 else p[chosen]
                for m, (x, p) in enumerate(zip(test, pool))
            ]
            values[code, row] = ask(mixed)[:, best[row]].mean()
    found = interaction_share(values, count)
    error = float(np.nanstd(found.by_sample, ddof=1) / math.sqrt(len(best)))
    return {"global": 100 * found.overall, "local": 100 * found.local, "local_stderr": 100 * error}
