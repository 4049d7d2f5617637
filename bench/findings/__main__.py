"""Measure what is said of FL-I2MoE, or go on where an earlier call was stopped.

    python -m bench.findings [--only shares digits ...] [--seeds 0 1 2] [--jobs 2] [--out out/findings]

Rows that are there are kept; all rows found are written to bench/results/findings.jsonl, of which
``python -m bench.tables`` makes docs/findings.md.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from bench.findings.tasks import Task, work
from bench.timing import write
from flmoe_fast.checks import one_of

EXPERIMENTS = ("planted", "digits", "shares")


def main() -> None:
    """Make the rows that are missing, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=list(EXPERIMENTS), help="these; of none, only collect what is there"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes, a thread each")
    parser.add_argument("--out", type=Path, default=Path("out/findings"))
    options = parser.parse_args()
    for name in options.only:
        one_of("--only", name, EXPERIMENTS)
    tasks = {name: importlib.import_module(f"bench.findings.{name}").tasks(options.seeds) for name in EXPERIMENTS}
    missing = [task for name in options.only for task in tasks[name] if task.row(options.out) is None]
    make(missing, options.jobs, options.out)
    rows = [row for name in EXPERIMENTS for task in tasks[name] if (row := task.row(options.out)) is not None]
    print("wrote", write("findings", rows))


def make(missing: list[Task], jobs: int, out: Path) -> None:
    """Make rows, in processes of their own where there are several jobs, saying which are done."""
    begun = time.monotonic()

    def done(number: int, task: Task) -> None:
        where = f"{number}/{len(missing)}, {time.monotonic() - begun:.0f} s"
        print(f"{where:>16}  {task.experiment}: {task.name}", flush=True)

    if jobs == 1:
        for number, task in enumerate(missing, 1):
            work(task, out)
            done(number, task)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(work, task, out): task for task in missing}
        for number, future in enumerate(as_completed(waiting), 1):
            future.result()
            done(number, waiting[future])


if __name__ == "__main__":
    main()
