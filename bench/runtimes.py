"""The CPU engine against inference runtimes, OpenVINO and ONNX Runtime, beside PyTorch, at fp32 and bf16.

    python -m bench.runtimes [--shapes mmimdb enrico mimic] [--threads 1 2] [--rounds 3] [--no-compile] [--only ...]

Every runtime has the batched model of :mod:`bench.baselines`, converted once for the batch it is given; what it answers
is compared with PyTorch before it is timed. Candidates of a shape take turns. Noise: see :mod:`bench.cpu`, on a model
trained to the end and on one that was stopped after an epoch, whose interactions are next to nothing. Rows of other
shapes stay in the file. A runtime that is not installed is left out, and the bench says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from bench.baselines import BatchedSDPA
from bench.cells import Table, quartiles
from bench.cpu import autocast, noise, usable_levels
from bench.shapes import SHAPES, Shape
from bench.timing import interleave, machine_line, read, spread, write
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.levels import levels

#: Coalitions (C, n) to expert logits (C, E, K) and routing (C, E).
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: Epochs of the two models whose noise is measured.
EPOCHS = (6, 1)
#: Largest difference of logits that is still the same model, relative to the largest one.
SAME = {"f32": 1e-3, "bf16": 0.2}
RUNTIMES = {"OpenVINO f32": "openvino", "OpenVINO bf16": "openvino", "ONNX Runtime fp32": "onnxruntime"}


def openvino(model: BatchedSDPA, example: torch.Tensor, precision: str) -> Forward:
    """OpenVINO's program for calls of that many coalitions, on as many threads as PyTorch has when it is called."""
    import openvino as ov

    program = ov.convert_model(model, example_input=example)
    program.reshape(list(example.shape))

    @functools.cache
    def compiled(threads: int) -> Any:
        asked = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        return ov.Core().compile_model(program, "CPU", asked)

    def run(coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = compiled(torch.get_num_threads())(coalitions.numpy())
        return torch.from_numpy(found[0].copy()), torch.from_numpy(found[1].copy())

    return run


def onnx_runtime(model: BatchedSDPA, example: torch.Tensor) -> Forward:
    """ONNX Runtime's session for calls of that many coalitions."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's about itself
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (example,), str(file), dynamo=False, input_names=["coalitions"])
        program = file.read_bytes()

    @functools.cache
    def session(threads: int) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        return ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])

    def run(coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, weights = session(torch.get_num_threads()).run(None, {"coalitions": coalitions.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(weights)

    return run


def multiplies_bf16() -> bool:
    """Whether the processor has products of bfloat16; where they are made of others a coalition takes a second."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def runtimes(model: BatchedSDPA, example: torch.Tensor) -> dict[str, Forward]:
    """Every runtime that is installed, by name; each gives the model's logits."""
    found: dict[str, Forward] = {}
    truth = model(example)[0]
    for name, package in RUNTIMES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: {package} is not installed: pip install 'flmoe-fast[bench]'", flush=True)
            continue
        precision = "bf16" if name.endswith("bf16") else "f32"
        ours = openvino(model, example, precision) if package == "openvino" else onnx_runtime(model, example)
        error = float((ours(example)[0] - truth).abs().max() / truth.abs().max())
        if not error <= SAME[precision]:
            raise RuntimeError(f"{name} differs from PyTorch by {error:.1e} of the largest logit")
        found[name] = ours
    return found


def candidates(shape: Shape, compiled: bool) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name to (coalitions a call evaluates, call)."""
    game = shape.game(heads=("mixture",), backend="torch")
    reference = shape.game(heads=("mixture",), backend="reference", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    length = sum(shape.tokens)
    few = torch.rand(1, game.n, generator=generator) < 0.5
    many = torch.rand(max(8, 2048 // length), game.n, generator=generator) < 0.5
    context = torch.rand(1, game.n, generator=generator) < 0.5
    batched, corners = BatchedSDPA(game), shape.corners(6)
    forwards: dict[str, Forward] = {
        "batched SDPA fp32": batched,
        "batched SDPA bf16 autocast": autocast(batched),
        **runtimes(batched, many),
    }
    if not multiplies_bf16():
        print("OpenVINO bf16 is not timed: the processor has no products of bfloat16", flush=True)
        forwards.pop("OpenVINO bf16", None)
    if compiled:
        program = torch.compile(batched, mode="max-autotune-no-cudagraphs", dynamic=False)
        forwards["batched SDPA fp32, torch.compile"] = program
    runs: dict[str, tuple[int, Callable[[], object]]] = {"naive loop": (len(few), lambda: reference(few))}
    runs |= {name: (len(many), functools.partial(forward, many)) for name, forward in forwards.items()}
    for level in usable_levels()[:1]:
        engine = CpuEngine(game.problem, level=level)
        call = functools.partial(engine.evaluate_toggles, context, corners.toggled)
        runs[f"native {level} {levels()[level][0]}"] = corners.evaluations, call
    return runs


def timings(shape: Shape, threads: list[int], rounds: int, compiled: bool) -> list[dict]:
    """Rows of one shape."""
    runs = candidates(shape, compiled)

    def at(count: int, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(count)
            return call()

        return run

    with torch.no_grad():
        seconds = interleave({(n, t): at(t, call) for t in threads for n, (_, call) in runs.items()}, rounds)
    rows = []
    for (name, t), times in seconds.items():
        each = [1e3 * s / runs[name][0] for s in times]
        ours = [1e3 * s / runs[last][0] for last in [list(runs)[-1]] for s in seconds[last, t]]
        about = {"part": "times", "shape": shape.name, "candidate": name, "threads": t, **machine_line()}
        rows.append(about | {"ms_per_coalition": spread(each), "times": spread([a / b for a, b in zip(each, ours)])})
    return rows


def noise_rows(epochs: int) -> list[dict]:
    """Noise share of every arithmetic on a model trained for so many epochs."""
    found = noise(epochs, samples=1, contexts=6, more=lambda batched, rows: runtimes(batched, rows))
    return [{"part": "noise", "epochs": epochs, **row, **machine_line()} for row in found]


def keep(rows: list[dict]) -> None:
    """Write rows into the file, instead of those of the same part and shape or model."""
    names = {(row["part"], row.get("shape"), row.get("epochs")) for row in rows}
    _, old = read("runtimes") or ({}, [])
    write("runtimes", [r for r in old if (r["part"], r.get("shape"), r.get("epochs")) not in names] + rows)


def table(rows: list[dict]) -> Table:
    """Times of every runtime, and what rounding is worth."""
    shares = {(row["candidate"], row["epochs"]): row for row in rows if row["part"] == "noise"}
    lines, note = [], "Medians and quartiles; ratios are those of the rounds."
    for row in (row for row in rows if row["part"] == "times"):
        noises = [shares.get((row["candidate"].removesuffix(", torch.compile"), epochs)) for epochs in EPOCHS]
        lines.append(
            [
                row["shape"],
                row["candidate"],
                str(row["threads"]),
                quartiles(row["ms_per_coalition"], 1),
                quartiles(row["times"], 1) + "x",
                *("" if found is None else f"{found['noise_share']:.1e}" for found in noises),
            ]
        )
    columns = ["shape", "", "threads", "ms per coalition", "over the engine's", "noise share", "stopped early"]
    accuracies = {row["epochs"]: row["accuracy"] for row in rows if row["part"] == "noise"}
    if accuracies:
        note += " Noise: digits of 256 tokens, held-out accuracy "
        note += " and ".join(f"{accuracies[epochs]:.1%}" for epochs in EPOCHS if epochs in accuracies) + "."
    return columns, lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"runtimes": ("runtimes", table)}


def main() -> None:
    """Measure, print, and write bench/results/runtimes.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["mmimdb", "enrico", "mimic"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the batched model")
    parser.add_argument("--only", nargs="+", choices=("times", "noise"), default=["times", "noise"])
    options = parser.parse_args()
    # Compiled code asks for the number of threads when it runs, not when it is compiled.
    torch._inductor.config.cpp.dynamic_threads = True
    found: list[dict] = []
    for epochs in EPOCHS if "noise" in options.only else ():
        found = noise_rows(epochs)
        keep(found)
        for row in found:
            print(f"{epochs} epochs, {row['candidate']:34} noise share {row['noise_share']:.1e}", flush=True)
    for name in options.shapes if "times" in options.only else ():
        found = timings(SHAPES[name], options.threads, options.rounds, not options.no_compile)
        keep(found)
        for row in found:
            print(name, row["candidate"], row["threads"], row["ms_per_coalition"], row["times"], flush=True)


if __name__ == "__main__":
    main()
