"""What an NVIDIA GPU makes of the probes: the naive loop, batched PyTorch, the torch engine, Triton and CUDA engines.

    python -m bench.gpu times|compiled|sanitize [--shapes mmimdb enrico mimic]

All candidates of a shape take turns in one run. A candidate too slow for a whole explanation (10 x 10 pairs in 64
contexts) is timed on a part of it, and its row says how large; times of a whole explanation are then scaled. Fractions
are of this machine's own 16-bit matrix product rate, measured in the same run.

``times`` has everything but what ``torch.compile`` makes of PyTorch, which is ``compiled``: compiling takes most of a
run's time. Rows go to bench/results/gpu.jsonl as they come, and which of the two GPU engines was faster to
flmoe_fast/engines/gpu/fastest.json, which ``backend="auto"`` goes by. Shapes that an earlier call on the same device
measured to the end are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from bench.baselines import BatchedSDPA
from bench.cells import Table, markdown, quartiles
from bench.shapes import SHAPES, Shape
from bench.timing import read, spread, write
from flmoe_fast.engines.engine import Reduction, Request
from flmoe_fast.engines.gpu.cuda import FUSED_PRECISIONS, CudaEngine
from flmoe_fast.engines.gpu.fastest import FILE
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.gpu.plan import Plan
from flmoe_fast.engines.gpu.triton import TritonEngine
from flmoe_fast.engines.portable import TorchEngine
from flmoe_fast.engines.problem import Logits, TokenProblem
from flmoe_fast.games.heads import Heads
from flmoe_fast.probes.gap import GAPS, LEAST_JOINT_COST

DEVICE = "cuda"
SIDE, CONTEXTS = 10, 64
#: Shapes that are measured unless others are named.
MEASURED = ("mmimdb", "enrico", "mimic", "enrico-gshard")
#: Grid and contexts on which rounding is measured against float64.
NOISE_SIDE, NOISE_CONTEXTS = 4, 6
#: What torch.compile is tried with: of the first shape, and of the others.
COMPILED = (
    (("fp32", "default"), ("fp16", "default"), ("fp32", "max-autotune-no-cudagraphs")),
    (("fp32", "default"),),
)
#: Rounds of a shape, where its time suffices.
ROUNDS = 10
#: Products of one term in the arithmetic of a precision, for one counted product (attention has three in fp16x2).
PRODUCTS = {"fp16x2": 2, "mixed": 2, "fp16": 1, "bf16": 1}
MATRIX = 8192
#: Floats of the array whose copies are timed.
COPIED = 1 << 28


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def interleaved(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    limit: float,
    keep: Callable[[dict[str, list[float]]], None] = lambda found: None,
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one that does not count; no new round after ``limit``.

    ``keep`` is given what there is after every candidate of the first round, and after every other round.
    """
    found: dict[str, list[float]] = {}
    started = time.perf_counter()
    for index in range(rounds):
        if index and time.perf_counter() - started > limit:
            break
        for name, run in candidates.items():
            if not index:
                run()
                torch.cuda.synchronize()
            found.setdefault(name, []).append(seconds_of(run))
            if not index:
                keep(found)
        keep(found)
    return found


def machine_rates() -> tuple[float, float]:
    """16-bit matrix products in FLOP/s on random numbers, and bytes copied (read and written) a second."""
    a, b = (torch.randn(MATRIX, MATRIX, device=DEVICE, dtype=torch.float16) for _ in range(2))
    big = torch.randn(COPIED, device=DEVICE)
    other = torch.empty_like(big)
    runs = {"product": lambda: a @ b, "copy": lambda: other.copy_(big)}
    found = interleaved(runs, rounds=10, limit=5.0)
    product, copy = (statistics.median(found[name]) for name in runs)
    return 2.0 * MATRIX**3 / product, 2 * big.numel() * 4 / copy


def second_differences(corners, contexts: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Second differences (K, P, O) float64 of the mixture's and every expert's logit."""
    values = Heads(("mixture", "experts"), "logit", 0).values(logits).cpu()
    v11, v10, v01, v00 = corners.corners(contexts, values.unflatten(0, (len(contexts), -1)))
    return v11 - v10 - v01 + v00


def noise_shares(shape: Shape, game, engines: dict[str, Callable]) -> dict[str, float]:
    """Rounding noise over variance of the mixture's second differences, per candidate, against float64."""
    corners = shape.corners(NOISE_SIDE)
    generator = torch.Generator().manual_seed(1)
    rates = torch.linspace(0.1, 0.9, NOISE_CONTEXTS)[:, None]
    contexts = torch.rand(NOISE_CONTEXTS, game.n, generator=generator) < rates
    exact = TorchEngine(game.problem, dtype=torch.float64, device=DEVICE)
    truth = second_differences(corners, contexts, exact.evaluate_toggles(contexts, corners.toggled))
    every = (contexts[:, None] ^ corners.toggled).flatten(0, 1)
    shares = {}
    for name, run in engines.items():
        found = second_differences(corners, contexts, run(every))[..., 0]
        shares[name] = float((found - truth[..., 0]).square().mean() / truth[..., 0].var(correction=0))
    return shares


def gpu_engines(problem: TokenProblem) -> dict[str, TritonEngine]:
    """Every GPU engine in every precision that it has for the problem."""
    made = {}
    for precision in PRECISIONS:
        made[f"triton {precision}"] = TritonEngine(problem, device=DEVICE, precision=precision)
        request = Request(torch.float32, torch.device(DEVICE), problem, precision=precision)
        if not CudaEngine.why_not(request):
            made[f"cuda {precision}"] = CudaEngine(problem, device=DEVICE, precision=precision)
    return made


def fastest(rows: list[dict], device: str) -> list[dict]:
    """Which engine was faster on each shape and precision that both have, as engines/fastest.json keeps it."""
    medians = {(row["shape"], row["candidate"]): row["ms_per_1000"]["median"] for row in rows if "candidate" in row}
    found = []
    for shape, precision in itertools.product(sorted({shape for shape, _ in medians}), FUSED_PRECISIONS):
        times = {name: medians.get((shape, f"{name} {precision}")) for name in ("triton", "cuda")}
        if None not in times.values():
            of = SHAPES[shape]
            key = {"device": device, "hidden": of.hidden, "heads": of.heads, "tokens": sum(of.tokens)}
            found.append({**key, "precision": precision, "fastest": min(times, key=times.get)})
    return found


def keep_fastest(found: list[dict], device: str) -> None:
    """Replace what engines/fastest.json says of a device."""
    others = [row for row in json.loads(FILE.read_text()) if row["device"] != device]
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in others + found) + "\n]\n")


@dataclass
class Field:
    """What takes turns on one shape.

    Attributes
    ----------
    runs : dict of (coalitions, function)
        What is timed, and on how many coalitions.
    ways : dict of function
        How a candidate evaluates any coalitions, to measure its rounding.
    plans, memory : dict
        Of the GPU engines, and the most bytes that each allocated.
    """

    shape: Shape
    contexts: torch.Tensor
    runs: dict[str, tuple[int, Callable[[], object]]] = field(default_factory=dict)
    ways: dict[str, Callable[[torch.Tensor], Logits]] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> int:
        """Coalitions of an explanation."""
        return CONTEXTS * self.shape.corners(SIDE).evaluations


def pytorch(made: Field, every: torch.Tensor, compiled: tuple[tuple[str, str], ...]) -> None:
    """Add the naive loop and batched PyTorch; ``compiled`` says which of them are compiled too, and how."""
    few, batch = every[:4].to(DEVICE), every[:256].to(DEVICE)
    reference = made.shape.game(heads=("mixture",), backend="reference", dtype=torch.float32, device=DEVICE).engine
    made.runs["naive loop"] = len(few), lambda: reference.evaluate(few)

    def batched(program) -> Callable[[torch.Tensor], Logits]:
        def run(coalitions: torch.Tensor) -> Logits:
            found = [program(part) for part in coalitions.to(DEVICE).split(256)]
            return Logits(torch.cat([f[0] for f in found]).double(), torch.cat([f[1] for f in found]).double())

        return run

    for dtype in (torch.float32, torch.float16):
        kind = str(dtype).removeprefix("torch.").replace("float", "fp")
        label = f"batched SDPA {kind}"
        plain = BatchedSDPA(made.shape.game(heads=("mixture",), backend="torch", device=DEVICE), dtype).to(DEVICE)
        made.runs[label] = len(batch), lambda p=plain: p(batch)
        made.ways[label] = batched(plain)
        for how in (how for of, how in compiled if of == kind):
            program = torch.compile(plain, mode=how, dynamic=False)
            made.runs[f"{label}, torch.compile {how}"] = len(batch), lambda p=program: p(batch)


def ours(made: Field, problem: TokenProblem) -> None:
    """Add the torch engine and every GPU engine in every precision."""
    corners, contexts = made.shape.corners(SIDE), made.contexts
    engine = TorchEngine(problem, device=DEVICE, memory=1 << 32)
    part = max(1, 512 // corners.evaluations)
    made.runs["torch engine fp32"] = (
        part * corners.evaluations,
        lambda: engine.evaluate_toggles(contexts[:part], corners.toggled),
    )
    made.ways["torch engine fp32"] = engine.evaluate
    for label, each in gpu_engines(problem).items():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        plan = each.plan(*each.toggle_words(contexts, corners.toggled), group=corners.evaluations)
        plan.run()
        made.plans[label], made.memory[label] = plan, torch.cuda.max_memory_allocated() - held
        made.runs[label], made.ways[label] = (made.whole, plan.run), each.evaluate


def rows_of(
    made: Field, seconds: dict[str, list[float]], noise: dict[str, float], rates: tuple[float, float]
) -> list[dict]:
    """Rows of what was timed so far; none before there is a PyTorch to compare with."""
    per_thousand = {name: [1e6 * s / made.runs[name][0] for s in times] for name, times in seconds.items()}

    def fastest(start: str) -> str:
        return min((n for n in per_thousand if n.startswith(start)), key=lambda n: statistics.median(per_thousand[n]))

    def times(other: str, name: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(per_thousand[other], per_thousand[name])])

    if not any(name.startswith("batched SDPA fp32") for name in per_thousand):
        return []
    rows = []
    for name, values in per_thousand.items():
        row = {
            "shape": made.shape.name,
            "tokens": list(made.shape.tokens),
            "hidden": made.shape.hidden,
            "experts": len(made.shape.tokens) + 2,
            "candidate": name,
            "coalitions_timed": made.runs[name][0],
            "scaled": made.runs[name][0] < made.whole,
            "ms_per_1000": spread(values),
            "ms_per_explanation": spread([v * made.whole / 1e3 for v in values]),
            "noise_share": noise.get(name.split(", torch.compile")[0]),
            "times_naive": times("naive loop", name),
            "times_fastest_pytorch": times(fastest("batched"), name),
            "times_pytorch_fp32": times(fastest("batched SDPA fp32"), name),
        }
        if name in made.plans:
            row |= plan_row(made.plans[name], made.memory[name], [v * made.whole / 1e6 for v in values], rates)
        rows.append(row)
    return rows


def plan_row(plan: Plan, memory: int, seconds: list[float], rates: tuple[float, float]) -> dict:
    """What a row says of a GPU engine's plan that ran in ``seconds``."""
    row = {
        "launches": plan.launches,
        "chunks": len(plan.parts()),
        "launches_per_chunk": plan.launches // len(plan.parts()),
        "peak_bytes": memory,
        "flops": plan.flops(),
        "configurations": plan.chunk.spec.arch,
    }
    products = PRODUCTS.get(plan.chunk.spec.precision)
    if products:
        row["share_of_matmul_rate"] = spread([products * plan.flops() / s / rates[0] for s in seconds])
    return row


def measure(
    shape: Shape,
    rounds: int,
    rates: tuple[float, float],
    limit: float,
    compiled: tuple[tuple[str, str], ...] = (),
    keep: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """Rows of one shape: of PyTorch and the engines, or of PyTorch and what it compiles to where that is asked for.

    ``keep`` is given the rows that there are after every candidate of the first round, and after every round.
    """
    game = shape.game(heads=("mixture",), backend="torch", device=DEVICE)
    game.problem.model.to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    contexts = torch.rand(CONTEXTS, game.n, generator=generator) < torch.rand(CONTEXTS, 1, generator=generator)
    made = Field(shape, contexts)
    pytorch(made, (contexts[:, None] ^ shape.corners(SIDE).toggled).flatten(0, 1), compiled)
    if not compiled:
        ours(made, game.problem)
    with torch.no_grad():
        noise = noise_shares(shape, game, made.ways)
        seconds = interleaved(
            {name: run for name, (_, run) in made.runs.items()},
            rounds,
            limit,
            lambda found: keep(rows_of(made, found, noise, rates)),
        )
    return rows_of(made, seconds, noise, rates)


#: Width, heads and layers of a model for every width that has fused kernels.
FUSED = ((64, 2, 3), (128, 4, 2), (256, 2, 2))


def sanitize() -> None:
    """One small chunk in every precision, of dense and of sparse blocks, to be run under compute-sanitizer."""
    dense = SHAPES["digits"]
    fused = [
        replace(dense, name=f"digits-fused-{hidden}", hidden=hidden, heads=heads, layers=layers)
        for hidden, heads, layers in FUSED
    ]
    for shape in (dense, *fused, replace(dense, name="digits-gshard", layers=3, gate="gshard", ffn_experts=4)):
        game = shape.game(heads=("mixture",), backend="torch", device=DEVICE)
        game.problem.model.set_capacity("reference")
        corners = shape.corners(2)
        contexts = torch.rand(2, game.n, generator=torch.Generator().manual_seed(0)) < 0.5
        for name, made in gpu_engines(game.problem).items():
            logits = made.evaluate_toggles(contexts, corners.toggled)
            values = Heads(("mixture",), "prob", 0).values(logits).unflatten(0, (2, -1))
            for kind in GAPS:
                made.reduce_corners(values, contexts, Reduction(corners.pairs, corners.single, kind, LEAST_JOINT_COST))
            torch.cuda.synchronize()
            print(shape.name, name, "done", flush=True)


class Results:
    """Rows of bench/results/gpu.jsonl: what an earlier call on this device left, and what is measured now."""

    def __init__(self) -> None:
        self.device = torch.cuda.get_device_name()
        before = read("gpu")
        self.rows = before[1] if before and before[0]["machine"]["gpu"] == self.device else []

    def rates(self) -> tuple[float, float]:
        """The machine's rates, measured once."""
        known = [row for row in self.rows if "machine_rates" in row]
        if not known:
            product, copied = machine_rates()
            known = [{"machine_rates": True, "matmul_flops": product, "copy_bytes": copied}]
            self.rows = known + self.rows
        return known[0]["matmul_flops"], known[0]["copy_bytes"]

    def whole(self, shape: str, compiled: bool) -> bool:
        """Whether a shape was measured to its end."""
        found = [row for row in self.rows if row.get("shape") == shape and _is_compiled(row) == compiled]
        return bool(found) and all(row.get("complete", False) for row in found)

    def keep(self, shape: str, compiled: bool, rows: list[dict]) -> None:
        """Write a shape's rows in place of those before, and which engine was faster."""
        rows = [row for row in rows if _is_compiled(row) == compiled]
        others = [row for row in self.rows if row.get("shape") != shape or _is_compiled(row) != compiled]
        self.rows = others + rows
        write("gpu", self.rows)
        keep_fastest(fastest(self.rows, self.device), self.device)


def _is_compiled(row: dict) -> bool:
    return "torch.compile" in row.get("candidate", "")


def main() -> None:
    """Measure, and write bench/results/gpu.jsonl after every candidate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("times", "compiled", "sanitize"))
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(MEASURED))
    parser.add_argument("--seconds", type=float, default=20.0, help="no new round of a shape after that long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "bench.gpu: torch finds no CUDA device\n")
    if options.mode == "sanitize":
        sanitize()
        return
    results, compiling = Results(), options.mode == "compiled"
    rates = results.rates()
    for index, name in enumerate(options.shapes):
        # Which tokens a network serves depends on the data: nothing for a compiler that fixes shapes.
        compiled = COMPILED[min(index, 1)] if compiling else ()
        if results.whole(name, compiling) or compiling and SHAPES[name].gate:
            continue
        keep = partial(results.keep, name, compiling)
        rows = measure(SHAPES[name], ROUNDS, rates, options.seconds, compiled, keep)
        keep([{**row, "complete": True} for row in rows])
        print(f"{name}: measured", flush=True)
    columns, lines, note = table(results.rows)
    print(markdown(columns, lines), note, sep="\n\n")


def table(rows: list[dict]) -> Table:
    """Milliseconds of an explanation on a GPU, per candidate."""
    [machine] = [row for row in rows if "machine_rates" in row]
    lines = [
        [
            row["shape"],
            row["candidate"],
            quartiles(row["ms_per_1000"], 2),
            f"{row['ms_per_explanation']['median']:,.0f}{' (scaled)' if row['scaled'] else ''}",
            f"{row['times_naive']['median']:,.0f}x",
            f"{row['times_pytorch_fp32']['median']:.1f}x",
            "" if row["noise_share"] is None else f"{row['noise_share']:.1e}",
            f"{row['share_of_matmul_rate']['median']:.0%}" if "share_of_matmul_rate" in row else "",
        ]
        for row in rows
        if "candidate" in row
    ]
    columns = ["shape", "", "ms per 1,000 coalitions", "ms per explanation", "against naive"]
    columns += ["against best fp32 PyTorch", "noise share", "of matmul rate"]
    product, copy = machine["matmul_flops"] / 1e12, machine["copy_bytes"] / 1e12
    note = (
        "An explanation is 10 x 10 pairs in 64 contexts (7,744 coalitions); (scaled) from a part of it. "
        f"Matrix products in fp16 run at {product:.0f} TFLOP/s there, copies at {copy:.1f} TB/s."
    )
    return columns, lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"gpu": ("gpu", table)}


if __name__ == "__main__":
    main()
