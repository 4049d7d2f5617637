"""The native CPU engine, level by level, against PyTorch: time, thread scaling, share of the GEMM rate, rounding noise.

    python -m bench.cpu [--shapes mmimdb enrico mimic digits] [--threads 1 2] [--rounds 5] [--no-compile] [--only ...]

Every candidate of a shape, at every number of threads, takes turns in one run; ratios are medians of the rounds'
ratios. A pair-sample is one sample of one pair's second difference: four evaluations where corners are evaluated pair
by pair, 1.21 on the 10 x 10 corner grid of one context that the engines evaluate. Noise is measured on a model trained
on handwritten digits of 256 tokens: the variance of the second differences' error against float64, over their variance
across contexts and pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch._inductor.config
import torch.nn.functional as F

from bench.baselines import BatchedSDPA
from bench.cells import Table, quartiles
from bench.shapes import SHAPES, Shape
from bench.timing import interleave, read, spread, write
from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame
from flmoe_fast.data.digits import two_view_digits
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.levels import levels
from flmoe_fast.engines.portable import TorchEngine
from flmoe_fast.engines.problem import Logits
from flmoe_fast.model.encoders import ProjectionEncoder
from flmoe_fast.probes.grid import CornerGrid

SIDE = 10
BATCH = 32
GEMM = 1536


def counted_flops(shape: Shape) -> float:
    """What one coalition needs that differs from every other coalition's, all experts: 22 L H^2 + 4 L^2 H each.

    A sparse first layer multiplies its share of 8 L H^2 by the networks that a token uses.
    """
    length, hidden = sum(shape.tokens), shape.hidden
    slots = {None: 1, "switch": 1}.get(shape.gate, 2)
    return (len(shape.tokens) + 2) * ((14.0 + 8.0 * slots) * length * hidden**2 + 4.0 * length**2 * hidden)


def gemm(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A large product, for the machine's rate."""
    a, b = (torch.randn(GEMM, GEMM).to(dtype) for _ in range(2))
    return lambda: a @ b


def autocast(model: BatchedSDPA) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The same batched forward under bfloat16 autocast."""

    def run(coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return model(coalitions)

    return run


def usable_levels() -> list[str]:
    """Native levels of this machine, best first."""
    return [name for name, (_, missing) in levels().items() if not missing]


def candidates(shape: Shape, compiled: bool) -> dict[str, tuple[int, float, Callable[[], object]]]:
    """Name to (coalitions a call evaluates, evaluations per pair-sample, call)."""
    game = shape.game(heads=("mixture",), backend="torch")
    reference = shape.game(heads=("mixture",), backend="reference", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    length = sum(shape.tokens)
    few = torch.rand(2, game.n, generator=generator) < 0.5
    many = torch.rand(min(256, max(16, 4096 // length)), game.n, generator=generator) < 0.5
    contexts = torch.rand(max(1, 128 // length), game.n, generator=generator) < 0.5
    batched = BatchedSDPA(game)
    corners = shape.corners(SIDE)
    share = corners.evaluations / len(corners.pairs)
    half = autocast(batched)
    runs = {
        "naive loop": (len(few), 4.0, lambda: reference(few)),
        "batched SDPA fp32": (len(many), 4.0, lambda: batched(many)),
        "batched SDPA bf16 autocast": (len(many), 4.0, lambda: half(many)),
    }
    if compiled:  # the mode that was the faster one on two threads
        program = torch.compile(batched, mode="max-autotune-no-cudagraphs", dynamic=False)
        runs["batched SDPA fp32, torch.compile"] = (len(many), 4.0, lambda: program(many))
    engines = {"torch engine fp32": TorchEngine(game.problem)}
    for level in usable_levels() if not CpuEngine.unfit(Request(torch.float32, game.device, game.problem)) else ():
        engines[f"native {level} {levels()[level][0]}"] = CpuEngine(game.problem, level=level)
    for name, engine in engines.items():
        count = len(contexts) * corners.evaluations
        runs[name] = (count, share, lambda e=engine: e.evaluate_toggles(contexts, corners.toggled))
    return runs


def timings(shape: Shape, threads: list[int], rounds: int, compiled: bool) -> list[dict]:
    """Rows of one shape."""
    runs = candidates(shape, compiled)
    gemms = {f"gemm {name}": gemm(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}

    def at(count: int, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(count)
            return call()

        return run

    everything = {(name, t): at(t, call) for t in threads for name, (_, _, call) in runs.items()}
    everything |= {(name, t): at(t, call) for t in threads for name, call in gemms.items()}
    with torch.no_grad():
        seconds = interleave(everything, rounds)
    rows = []
    for (name, t), times in seconds.items():
        row = {"shape": shape.name, "candidate": name, "threads": t}
        if name in gemms:
            rows.append(row | {"gflops": spread([2e-9 * GEMM**3 / s for s in times])})
            continue
        count, share, _ = runs[name]

        def ratio(other: str, other_threads: int = t, ours=times, count=count) -> dict[str, float]:
            theirs, each = seconds[other, other_threads], runs[other][0]
            return spread([(a / each) / (b / count) for a, b in zip(theirs, ours)])

        row |= {
            "tokens": list(shape.tokens),
            "hidden": shape.hidden,
            "experts": len(shape.tokens) + 2,
            "ms_per_coalition": spread([1e3 * s / count for s in times]),
            "ms_per_pair_sample": spread([1e3 * share * s / count for s in times]),
            "times_naive": ratio("naive loop"),
            "times_naive_per_pair_sample": {
                key: value * (4.0 / share if key != "rounds" else 1) for key, value in ratio("naive loop").items()
            },
            "times_batched_fp32": ratio("batched SDPA fp32"),
            "times_torch_engine": ratio("torch engine fp32"),
            "scaling_from_one_thread": ratio(name, 1) if 1 in threads else None,
        }
        if name.startswith("native"):
            # Products that the level's arithmetic needs for one counted product, at the rate of PyTorch's own GEMM.
            kind, products = ("bf16", 3) if "bf16x3" in name else ("fp32", 1)
            rate = [2.0 * GEMM**3 / s for s in seconds[f"gemm {kind}", t]]
            work = products * counted_flops(shape) * count
            row["share_of_gemm_rate"] = spread([work / s / r for s, r in zip(times, rate)])
        rows.append(row)
    return rows


def patches(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each half of a digit, enlarged to 16 x 8, as 128 tokens: the 5 x 5 pixels around every pixel."""
    large = [F.interpolate(half[:, None], size=(16, 8), mode="bilinear", align_corners=False) for half in inputs]
    return [F.unfold(half, 5, padding=2).transpose(1, 2).contiguous() for half in large]


def trained_model(epochs: int) -> tuple[FLI2MoE, list[torch.Tensor], float]:
    """A model of digits with 256 tokens, held-out features (N, 128, 64), and held-out accuracy.

    Trained on what it classifies as a whole and by every expert alone; the passes with a modality masked, which are
    what makes experts differ, would take hours at this length.
    """
    training, held_out = two_view_digits()
    torch.manual_seed(0)
    config = FLI2MoEConfig(("left", "right"), 64, 4, 2, 10, reweight_hidden=64, dropout=0.0)
    model = FLI2MoE(config, {name: ProjectionEncoder(25, 64) for name in ("left", "right")})
    inputs, steps = patches(training.inputs), len(training.labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(training.labels))[: steps * BATCH].split(BATCH):
            features, labels = model.encode([x[index] for x in inputs]), training.labels[index]
            output = model(features, [torch.ones(x.shape[:2]) for x in features])
            alone = [F.cross_entropy(logits, labels) for logits in output.expert_logits.unbind(1)]
            loss = F.cross_entropy(output.logits, labels) + torch.stack(alone).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        model.set_feature_means(model.encode(inputs), [torch.ones(x.shape[:2]) for x in inputs])
        features = model.encode(patches(held_out.inputs))
        right = [
            model(part, [torch.ones(x.shape[:2]) for x in part]).logits.argmax(1) == labels
            for *part, labels in zip(*(x.split(BATCH) for x in (*features, held_out.labels)))
        ]
    return model, features, float(torch.cat(right).float().mean())


def noise(
    epochs: int,
    samples: int,
    contexts: int,
    more: Callable[[BatchedSDPA, torch.Tensor], dict[str, Callable]] | None = None,
) -> list[dict]:
    """Rows with the noise share of every arithmetic, and of ``more`` ways to run the batched model on coalitions."""
    torch.set_num_threads(2)
    model, features, accuracy = trained_model(epochs)
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    total = 0.0
    for index in range(samples):
        game = TokenGame(
            model, [f[index] for f in features], masks=[torch.ones(128)] * 2, heads=("mixture",), backend="torch"
        )
        exact = game.precise()
        middle = torch.arange(28, 100, 9)
        corners = CornerGrid.of(torch.cartesian_prod(middle, 128 + middle), game.n)
        drawn = torch.rand(contexts, game.n, generator=generator) < torch.rand(contexts, 1, generator=generator)
        every = (drawn[:, None] ^ corners.toggled).flatten(0, 1)

        def second(values: torch.Tensor, c: CornerGrid = corners, t: torch.Tensor = drawn) -> torch.Tensor:
            v11, v10, v01, v00 = c.corners(t, values.unflatten(0, (len(t), -1)))
            return v11 - v10 - v01 + v00

        truth = second(exact(every))
        total += float(truth.var(correction=0))
        batched = BatchedSDPA(game)
        half = autocast(batched)
        ways = {"batched SDPA fp32": batched, "batched SDPA bf16 autocast": half}
        ways |= {"torch engine fp32": TorchEngine(game.problem).evaluate}
        ways |= {f"native {x} {levels()[x][0]}": CpuEngine(game.problem, level=x).evaluate for x in usable_levels()}
        if more is not None:
            ways |= more(batched, every[:81])
        for name, way in ways.items():
            with torch.no_grad():
                parts = [way(part) for part in every.split(81)]
            parts = [p if isinstance(p, Logits) else Logits(p[0].double(), p[1].double()) for p in parts]
            found = Logits(torch.cat([p.experts for p in parts]), torch.cat([p.weights for p in parts]))
            error = float((second(game._heads.values(found)) - truth).square().mean())
            errors[name] = errors.get(name, 0.0) + error
    model_facts = {"model": "digits, 256 tokens", "accuracy": accuracy}
    model_facts |= {"samples": samples, "contexts": contexts}
    return [{"candidate": name, "noise_share": error / total, **model_facts} for name, error in errors.items()]


def main() -> None:
    """Measure, print, and write bench/results/cpu-noise.jsonl and cpu-engine.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the batched baseline")
    parser.add_argument("--only", choices=("times", "noise"), help="one of the two result files")
    parser.add_argument("--epochs", type=int, default=6, help="training epochs of the noise model")
    options = parser.parse_args()
    # Compiled code asks for the number of threads when it runs, not when it is compiled.
    torch._inductor.config.cpp.dynamic_threads = True
    if options.only != "times":
        rows = noise(options.epochs, samples=2, contexts=8)
        for row in rows:
            share = row["noise_share"]
            print(f"{row['candidate']:34} noise share {share:.1e}  (accuracy {row['accuracy']:.3f})", flush=True)
        print("wrote", write("cpu-noise", rows))
    if options.only == "noise":
        return
    rows = []
    for name in options.shapes:
        found = timings(SHAPES[name], options.threads, options.rounds, not options.no_compile)
        rows += found
        for row in found:
            label = f"{name:8} {row['candidate']:34} {row['threads']} threads"
            if "gflops" in row:
                print(f"{label} {row['gflops']['median']:9.0f} GFLOP/s", flush=True)
                continue
            per, share = row["ms_per_coalition"], row.get("share_of_gemm_rate")
            others = {"naive": "times_naive", "SDPA": "times_batched_fp32", "torch engine": "times_torch_engine"}
            ratios = "".join(f"  x{row[key]['median']:.1f} {other}" for other, key in others.items())
            rate = f"  {share['median']:.0%} of GEMM" if share else ""
            print(f"{label} {per['median']:9.3f} ms [{per['q1']:.3f}, {per['q3']:.3f}]{ratios}{rate}", flush=True)
    print("wrote", write("cpu-engine", rows))


def speed_table(rows: list[dict]) -> Table:
    """Speed on the CPU, and what rounding is worth, of every candidate."""
    _, rounding = read("cpu-noise") or ({}, [])
    noise = {row["candidate"]: row["noise_share"] for row in rounding}
    rows = [row for row in rows if "ms_per_coalition" in row]
    most = max(row["threads"] for row in rows)
    lines = [
        [
            row["shape"],
            row["candidate"],
            quartiles(row["ms_per_coalition"], 2),
            f"{row['times_naive']['median']:.1f}x",
            f"{row['times_naive_per_pair_sample']['median']:.1f}x",
            f"{row['times_batched_fp32']['median']:.1f}x",
            f"{row['scaling_from_one_thread']['median']:.2f}x" if row["scaling_from_one_thread"] else "",
            f"{row['share_of_gemm_rate']['median']:.0%}" if "share_of_gemm_rate" in row else "",
            f"{noise[row['candidate']]:.1e}" if row["candidate"] in noise else "",
        ]
        for row in rows
        if row["threads"] == most
    ]
    columns = ["shape", "", "ms per coalition", "against naive", "the same per pair-sample", "against batched fp32"]
    columns += [f"{most} threads against 1", "share of GEMM rate", "noise share"]
    note = "Medians and quartiles. Products are counted as in the arithmetic used, against PyTorch's own GEMM."
    if rounding:
        note += f" Noise: {rounding[0]['model']}, held-out accuracy {rounding[0]['accuracy']:.1%}."
    return columns, lines, note


def noise_table(rows: list[dict]) -> Table:
    """Rounding noise of every arithmetic of the CPU."""
    lines = [[row["candidate"], f"{row['noise_share']:.1e}"] for row in rows]
    some = rows[0]
    note = (
        f"A model trained on {some['model']}, held-out accuracy {some['accuracy']:.1%}; {some['samples']} samples, "
        f"{some['contexts']} contexts each."
    )
    return ["arithmetic", "noise share"], lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"cpu": ("cpu-engine", speed_table), "noise": ("cpu-noise", noise_table)}


if __name__ == "__main__":
    main()
