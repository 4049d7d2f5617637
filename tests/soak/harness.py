"""Hours of what the tests do in seconds: ``python -m tests.soak --minutes 40 --out build/soak.json``.

Every part goes on from the seed where the result file says it stopped, so an hour can be made of pieces. It counts what
was done, keeps the worst that was seen, and writes down everything that is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
#: Parts by name: cases of one task, and how many tasks there are at most.
PARTS = {
    "engines": (10, None),
    "probes": (40, None),
    "files": (100, None),
    "kills": (4, 20),
    "sanitizers": (1, 2),
}


def task(part: str, number: int, folder: str) -> dict:
    """Run the ``number``-th task of a part; whatever it raises is what is wrong with it."""
    sys.path.insert(0, str(TESTS))
    import torch

    torch.set_num_threads(1)
    begin, count = time.perf_counter(), PARTS[part][0]
    try:
        if part in ("engines", "probes"):
            from tests.soak import engines, probes

            module = {"engines": engines, "probes": probes}[part]
            found: dict = {}
            for seed in range(number * count, (number + 1) * count):
                found = merged(found, module.run(seed))
        else:
            from tests.soak import files, kills, sanitizers

            module = {"files": files, "kills": kills, "sanitizers": sanitizers}[part]
            found = module.run(number, Path(folder) / part)
    except Exception as error:
        found = {"cases": 0, "wrong": [f"{part} {number}: {type(error).__name__}: {error}"]}
    return {**found, "seconds": time.perf_counter() - begin}


def merged(a: dict, b: dict) -> dict:
    """Counts added, the worst of both, lists joined."""
    found = dict(a)
    for name, value in b.items():
        if name not in found:
            found[name] = value
        elif name == "worst":
            found[name] = {k: max(found[name].get(k, 0.0), value.get(k, 0.0)) for k in {**found[name], **value}}
        elif isinstance(value, dict):
            found[name] = merged(found[name], value)
        elif isinstance(value, list) and name != "wrong":
            found[name] = [x + y for x, y in zip(found[name], value, strict=True)]
        else:
            found[name] = found[name] + value
    return found


class Soak:
    """The state of a soak: what every part has done, in a file."""

    def __init__(self, path: Path, parts: list[str]):
        self.path = path
        content = json.loads(path.read_text()) if path.is_file() else {}
        self.seconds, self.done = content.get("seconds", 0.0), content.get("parts", {})
        self.next = {part: self.done.get(part, {}).get("tasks", 0) for part in parts}

    def choose(self, running: set[str]) -> str | None:
        """The part that has had the least time, rather one that does not run; None where all are at their end."""
        open_parts = [p for p, number in self.next.items() if PARTS[p][1] is None or number < PARTS[p][1]]
        return min(open_parts, key=lambda p: (p in running, self.done.get(p, {}).get("seconds", 0.0)), default=None)

    def keep(self, part: str, found: dict, passed: float) -> None:
        """Add a task's findings and write the file."""
        self.done[part] = merged(self.done.get(part, {}), {**found, "tasks": 1})
        content = {"seconds": self.seconds + passed, "machine": platform.processor() or platform.machine(),
                   "parts": self.done}  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part_file = self.path.with_suffix(".part")
        part_file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        part_file.replace(self.path)


def main(argv: list[str] | None = None) -> int:
    """Soak for a while; exit status 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Long random checks, resumable.")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default=Path("build/soak.json"), help="results, and where to go on")
    parser.add_argument("--scratch", type=Path, default=Path("build/soak"), help="folder for files and logs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    options.scratch.mkdir(parents=True, exist_ok=True)
    soak, begin = Soak(options.out, options.parts), time.perf_counter()
    running: dict[Future, str] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        while True:
            late = time.perf_counter() - begin > 60 * options.minutes
            while not late and len(running) < options.jobs and (part := soak.choose(set(running.values()))):
                running[pool.submit(task, part, soak.next[part], str(options.scratch.resolve()))] = part
                soak.next[part] += 1
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part, found = running.pop(future), future.result()
                soak.keep(part, found, time.perf_counter() - begin)
                counts = ", ".join(f"{p} {s.get('cases', 0)}" for p, s in sorted(soak.done.items()))
                print(f"{(time.perf_counter() - begin) / 60:5.1f} min  {counts}", flush=True)
                for text in found["wrong"]:
                    print(f"WRONG {text}", flush=True)
    return int(any(found["wrong"] for found in soak.done.values()))
