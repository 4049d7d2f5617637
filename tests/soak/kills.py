"""Runs killed at random moments: going on ends with the numbers of an unbroken run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "explain", "faithfulness", "report")
SETTINGS = """
    out = "run"
    [data]
    kind = "digits"
    [model]
    hidden = 8
    heads = 2
    layers = 1
    reweight_hidden = 8
    dropout = 0.2
    [training]
    epochs = 3
    batch_size = 256
    lr = 1e-2
    select = "loss"
    checkpoint_steps = 1
    threads = 1
    [explain]
    samples = 6
    candidates = 4
    contexts = 8
    most = [1, 2]
    repeats = 3
    [faithfulness]
    part = "test"
    samples = 64
    repeats = 5
"""
#: Kills of one trial before it may end.
KILLS = 3


def command(name: str, settings: Path) -> list[str]:
    """The command line of a step."""
    return [sys.executable, "-m", "flmoe_fast.cli", name, str(settings), "--no-progress"]


def environment() -> dict[str, str]:
    """This process's, with the package of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def finish(name: str, settings: Path) -> float:
    """Run a step to its end; seconds it took."""
    begin = time.perf_counter()
    done = subprocess.run(command(name, settings), capture_output=True, text=True, cwd=ROOT, env=environment())
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - begin


def unbroken(folder: Path) -> tuple[Path, dict[str, float]]:
    """A run that nobody disturbed, made once, and how long its steps took."""
    settings = folder / "unbroken" / "run.toml"
    times = folder / "unbroken" / "times.json"
    if not times.is_file():
        shutil.rmtree(settings.parent, ignore_errors=True)
        settings.parent.mkdir(parents=True)
        settings.write_text(textwrap.dedent(SETTINGS))
        times.write_text(json.dumps({name: finish(name, settings) for name in COMMANDS}))
    return settings, json.loads(times.read_text())


def digests(out: Path) -> dict[str, str]:
    """What a run has found, without what it took: file to digest."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or path.name == "training.pt" or "report.html" in name:
            continue
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                content = b"".join(
                    key.encode() + (_timeless(str(archive[key])).encode() if key == "_json" else archive[key].tobytes())
                    for key in sorted(archive.files)
                )
        elif path.suffix in (".jsonl", ".json"):
            content = "\n".join(map(_timeless, path.read_text().splitlines())).encode()
        elif path.name == "training.csv":
            rows = [line.split(",") for line in path.read_text().splitlines()]
            kept = [n for n, title in enumerate(rows[0]) if title != "seconds"]
            content = "\n".join(",".join(row[n] for n in kept) for row in rows).encode()
        else:
            content = path.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _timeless(text: str) -> str:
    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in ("seconds", "made_at")}
        return [without(v) for v in value] if isinstance(value, list) else value

    try:
        return json.dumps(without(json.loads(text)))
    except ValueError:
        return text


def run(seed: int, folder: Path, name: str | None = None) -> dict:
    """One trial of one step: killed up to three times, finished, and compared with the unbroken run."""
    name = name or COMMANDS[seed % len(COMMANDS)]
    rng = np.random.default_rng(seed)
    whole, times = unbroken(folder)
    own = folder / f"trial-{seed}"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(whole.parent, own)
    out, made = (
        own / "run",
        {"train": "*", "explain": "samples", "faithfulness": "faithfulness", "report": "report.html"},
    )
    for path in list(out.glob(made[name])):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(name, own / "run.toml"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            process.communicate(timeout=float(rng.uniform(0.3, 1.0)) * times[name])
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
    wrong = []
    try:
        finish(name, own / "run.toml")
        expected, found = digests(whole.parent / "run"), digests(out)
        if name == "train":  # what the later steps made is not there
            expected = {
                k: v for k, v in expected.items() if k in found or not k.startswith(("samples", "faithfulness"))
            }
        wrong = [f"{name}, seed {seed}: {k} is another" for k in sorted({*expected, *found})
                 if expected.get(k) != found.get(k)]  # fmt: skip
    except RuntimeError as error:
        wrong = [f"{name}, seed {seed}: {error}"]
    if not wrong:
        shutil.rmtree(own)
    return {"cases": 1, "kills": {name: killed}, "trials": {name: 1}, "wrong": wrong}
