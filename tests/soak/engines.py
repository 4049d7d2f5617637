"""Random models and samples on every engine of this machine, against the reference."""

from __future__ import annotations

import os

import numpy as np
import torch
from edge_shapes import Edge
from parity import ARITHMETIC, bound, flat, in_one_batch, toggles

from flmoe_fast.engines.problem import TokenProblem
from flmoe_fast.native import extension

#: How much more than the reference's own rounding in an arithmetic (see ``parity``) an engine may show. Over thousands
#: of small cases the reference is lucky in some; a wrong term is larger by many orders.
SLACK = 2.0
COALITIONS, CONTEXTS = 3, [1]
#: Further coalitions from which the reference's own rounding is known, and how often it is drawn.
MORE, DRAWS = 32, 4
GATES = ((None, None), (None, None), ("switch", 6), ("gshard", 5), ("naive", 3), ("noisy", 3))


def random_edge(seed: int) -> Edge:
    """A small model and sample: any number of modalities, padding, sparse blocks."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 3]))
    hidden = heads * int(rng.choice([4, 8, 10, 16]))
    original = bool(rng.random() < 0.25)
    modalities = int(rng.choice([2, 2, 3, 4]))
    tokens = [int(rng.integers(1, 7)) for _ in range(modalities)]
    if original:
        tokens = [tokens[0]] * modalities
    valid = None
    if not original and rng.random() < 0.8:
        valid = [int(rng.integers(0, t + 1)) for t in tokens]
        if not any(valid):
            valid[0] = tokens[0]
        if sum(v > 0 for v in valid) < 1 or sum(valid) < 2:
            valid = tokens
    gate, networks = GATES[int(rng.integers(len(GATES)))]
    return Edge(
        f"seed {seed}",
        tuple(tokens),
        None if valid is None else tuple(valid),
        hidden=hidden,
        heads=heads,
        layers=int(rng.choice([1, 2, 2, 3])),
        generation="original" if original else "fl",
        task=str(rng.choice(["multiclass", "multilabel"])),
        reweight_layers=int(rng.choice([1, 2, 2, 3])),
        gate=gate,
        ffn_experts=networks,
        capacity="reference" if gate in ("switch", "gshard") and rng.random() < 0.5 else "none",
    )


def engines() -> list[tuple[str, str, torch.dtype, str]]:
    """Name, backend, dtype and arithmetic of everything that can run on this machine's CPU."""
    found = [("torch float64", "torch", torch.float64, "fp32"), ("torch float32", "torch", torch.float32, "fp32")]
    module = extension()[0]
    levels = module.cpu_levels() if module is not None else []
    return found + [
        (f"cpu {name}", "cpu", torch.float32, arithmetic) for name, arithmetic, missing in levels if not missing
    ]


def allowed(problem: TokenProblem, arithmetic: str, coalitions: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error of any logit or weight that an engine of that arithmetic may show on these coalitions.

    ``exact`` (C, ...) is what the reference says in float64. The reference's own error on a coalition is one draw of
    many roundings, and may be lucky in all that matter, so it is drawn again with every feature off by at most one
    rounding of float32; over such draws it varies by a factor of up to four.
    """
    off = torch.rand(DRAWS, *problem.features.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off = (1 + 2.0**-24 * (2 * off - 1)).repeat_interleave(len(coalitions), 0)
    off[: len(coalitions)] = 1.0
    with ARITHMETIC[arithmetic][0]():
        found = in_one_batch(problem, coalitions.repeat(DRAWS, 1), torch.float32, off)
    return SLACK * bound(found, exact.repeat(DRAWS, 1), arithmetic)


def differences(edge: Edge) -> dict[str, tuple[float, float]]:
    """Largest difference from the reference of every engine, and what it may be."""
    model = edge.model()
    reference = edge.game(model, backend="reference", dtype=torch.float64)
    samples = edge.coalitions(reference.n, COALITIONS)
    asked = toggles(reference.n)
    corners = (samples[CONTEXTS][:, None] ^ asked).flatten(0, 1)
    every = torch.cat([samples, corners])
    exact = flat(reference.engine.evaluate(every))
    more = torch.cat([every, edge.coalitions(reference.n, MORE)])
    more_exact = in_one_batch(reference.problem, more, torch.float64)
    found, limits = {}, {}
    for name, backend, dtype, arithmetic in engines():
        if arithmetic not in limits:
            limits[arithmetic] = allowed(reference.problem, arithmetic, more, more_exact)
        os.environ["FLMOE_CPU_LEVEL"] = name.removeprefix("cpu ") if backend == "cpu" else ""
        engine = edge.game(model, backend=backend, dtype=dtype).engine
        values = torch.cat([flat(engine.evaluate(samples)), flat(engine.evaluate_toggles(samples[CONTEXTS], asked))])
        # float64 does in 29 more bits what "fp32" does.
        limit = limits[arithmetic] * (2.0**-29 if dtype == torch.float64 else 1.0)
        found[name] = (float((values - exact).abs().max()), limit)
    os.environ.pop("FLMOE_CPU_LEVEL", None)
    return found


def run(seed: int) -> dict:
    """One case: counts, the largest share of its limit that each engine's difference takes, and what is wrong."""
    edge = random_edge(seed)
    found = differences(edge)
    wrong = [f"{edge}: {name} differs by {error:.3e} of {limit:.3e}" for name, (error, limit) in found.items()
             if not error <= limit]  # fmt: skip
    worst = {name: error / limit for name, (error, limit) in found.items()}
    return {"cases": 1, "comparisons": len(found), "worst": worst, "wrong": wrong}
