"""Milliseconds of every kernel of a chunk on the GPU at hand, and what share of the machine's rates that is.

    python -m bench.gpu_kernels [--shape mmimdb] [--precisions mixed fp16x2 fp16]

A chunk is a list of steps, one launch each; every step runs alone, a few times in a row. Its share of the matrix
product rate counts every product of one term; its share of the copy rate the scratch arrays that it writes, once. Rows
go to bench/results/gpu_kernels.jsonl after every engine and precision.
"""

from __future__ import annotations

import argparse

import torch

from bench import gpu
from bench.timing import spread, write
from flmoe_fast.engines.gpu.chunk import launches
from flmoe_fast.engines.gpu.plan import Plan, outputs

ROUNDS, REPEATS = 5, 4


def kernel_rows(label: str, plan: Plan, rates: tuple[float, float]) -> list[dict]:
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
        row = {"candidate": label, "kernel": step.kernel, "coalitions": part.coalitions}
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
    shape, rates = gpu.SHAPES[options.shape], gpu.machine_rates()
    game = shape.game(heads=("mixture",), backend="torch", device=gpu.DEVICE)
    corners = shape.corners(gpu.SIDE)
    contexts = torch.rand(gpu.CONTEXTS, game.n, generator=torch.Generator().manual_seed(0)) < 0.5
    rows: list[dict] = [{"machine_rates": True, "matmul_flops": rates[0], "copy_bytes": rates[1]}]
    for label, engine in gpu.gpu_engines(game.problem).items():
        if engine.precision not in options.precisions:
            continue
        plan = engine.plan(*engine.toggle_words(contexts, corners.toggled), group=corners.evaluations)
        found = kernel_rows(label, plan, rates)
        whole = sum(row["ms"]["median"] for row in found)
        print(f"{label}: {whole:.2f} ms for a chunk of {found[0]['coalitions']} coalitions")
        for row in found:
            share = row.get("share_of_matmul_rate") or row.get("share_of_copy_rate")
            rate = "" if share is None else f"{share['median']:6.1%}"
            print(f"  {row['kernel']:14}{row['ms']['median']:8.3f} ms {row['ms']['median'] / whole:6.1%} {rate}")
        rows += found
        write("gpu_kernels", rows)


if __name__ == "__main__":
    main()
