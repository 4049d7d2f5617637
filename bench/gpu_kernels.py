"""Milliseconds of every kernel of a chunk on the GPU at hand, and what share of the machine's rates that is.

    python -m bench.gpu_kernels [--shape mmimdb] [--precisions mixed fp16x2 fp16]

A chunk is a list of steps, one launch each; every step runs alone, a few times in a row. Its share of the matrix
product rate counts every product of one term; its share of the copy rate the scratch arrays that it writes, once. Rows
go to bench/results/gpu_kernels.jsonl after every engine and precision; what an earlier call on the same device measured
of the same shape is not measured again.
"""

from __future__ import annotations

import argparse

import torch

from bench import gpu
from bench.cells import Table, quartiles
from bench.timing import read, spread, write
from flmoe_fast.engines.gpu.chunk import launches
from flmoe_fast.engines.gpu.plan import Plan, outputs

ROUNDS, REPEATS = 5, 4


def kernel_rows(shape: str, label: str, plan: Plan, rates: tuple[float, float]) -> list[dict]:
    """A row for every step of the plan's first chunk, in order."""
    (_, part), words = plan.parts()[0], plan.words
    out = outputs(plan.chunk, part.coalitions)
    assert out.mixture is not None
    results = out.experts, out.weights, out.mixture
    products = gpu.PRODUCTS.get(plan.chunk.spec.precision)
    rows = []
    for step, run in launches(plan.chunk, words[: part.coalitions], part, plan.workspace, results):

        def repeated(step=step, run=run) -> None:
            for _ in range(REPEATS):
                step.launch(run)

        repeated()
        seconds = [gpu.seconds_of(repeated) / REPEATS for _ in range(ROUNDS)]
        written = sum(array.bytes for array in step.writes.values())
        row = {"shape": shape, "candidate": label, "kernel": step.kernel, "coalitions": part.coalitions}
        row |= {"ms": spread([1e3 * s for s in seconds]), "flops": step.flops, "bytes_written": written}
        if products and step.flops:
            row["share_of_matmul_rate"] = spread([products * step.flops / s / rates[0] for s in seconds])
        if written:
            row["share_of_copy_rate"] = spread([written / s / rates[1] for s in seconds])
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(gpu.SHAPES), default=gpu.MEASURED[0])
    parser.add_argument("--precisions", nargs="+", choices=tuple(gpu.PRECISIONS), default=["mixed", "fp16x2", "fp16"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "bench.gpu_kernels: torch finds no CUDA device\n")
    before = read("gpu_kernels")
    rows = before[1] if before and before[0]["machine"]["gpu"] == torch.cuda.get_device_name() else []
    if not rows:
        product, copied = gpu.machine_rates()
        rows = [{"machine_rates": True, "matmul_flops": product, "copy_bytes": copied}]
    rates = rows[0]["matmul_flops"], rows[0]["copy_bytes"]
    there = {(row["shape"], row["candidate"]) for row in rows[1:]}
    shape = gpu.SHAPES[options.shape]
    game = shape.game(heads=("mixture",), backend="torch", device=gpu.DEVICE)
    corners = shape.corners(gpu.SIDE)
    contexts = torch.rand(gpu.CONTEXTS, game.n, generator=torch.Generator().manual_seed(0)) < 0.5
    for label, engine in gpu.gpu_engines(game.problem).items():
        if engine.precision not in options.precisions or (options.shape, label) in there:
            continue
        plan = engine.plan(*engine.toggle_words(contexts, corners.toggled), group=corners.evaluations)
        found = kernel_rows(options.shape, label, plan, rates)
        whole = sum(row["ms"]["median"] for row in found)
        print(f"{label}: {whole:.2f} ms for a chunk of {found[0]['coalitions']} coalitions")
        for row in found:
            print(f"  {row['kernel']:14}{row['ms']['median']:8.3f} ms {row['ms']['median'] / whole:6.1%} {_rate(row)}")
        rows += found
        write("gpu_kernels", rows)


def _rate(row: dict) -> str:
    """Share of the matrix product rate, else of the copy rate."""
    for name, what in (("share_of_matmul_rate", "of products"), ("share_of_copy_rate", "of copies")):
        if name in row:
            return f"{row[name]['median']:.1%} {what}"
    return ""


def table(rows: list[dict]) -> Table:
    """Milliseconds of every kernel, and what takes most of a chunk."""
    lines = []
    for shape, label in dict.fromkeys((row["shape"], row["candidate"]) for row in rows[1:]):
        own = [row for row in rows[1:] if (row["shape"], row["candidate"]) == (shape, label)]
        whole = sum(row["ms"]["median"] for row in own)
        for row in own:
            share = f"{row['ms']['median'] / whole:.1%}"
            lines.append([shape, label, row["kernel"], quartiles(row["ms"], 3), share, _rate(row)])
    columns = ["shape", "", "kernel", "ms a chunk", "of the chunk", "of the machine's rate"]
    return columns, lines, "Every kernel of a chunk alone, in order; median and quartiles."


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"gpu_kernels": ("gpu_kernels", table)}


if __name__ == "__main__":
    main()
