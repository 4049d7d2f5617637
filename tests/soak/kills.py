"""Commands that are killed, interrupted or let down by the system at random points: going on ends as if nothing was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import tempfile
import textwrap
from pathlib import Path

import numpy as np

import flmoe_fast
from tests.commands import Commands, Ended

#: The package under test.
PACKAGE = Path(flmoe_fast.__file__).parent

STEPS = ("train", "explain", "faithfulness", "report")
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
    epochs = 2
    batch_size = 300
    lr = 1e-2
    select = "loss"
    checkpoint_steps = 1
    threads = 1
    [explain]
    samples = 4
    candidates = 4
    contexts = 8
    most = [1, 2]
    repeats = 3
    [faithfulness]
    part = "test"
    samples = 64
    repeats = 5
"""
#: Files of a run's folder that a step makes; a trial begins without them.
MADE = {"train": "*", "explain": "samples", "faithfulness": "faithfulness", "report": "report.html"}
#: Seconds of processor time that a command may take after Ctrl-C.
LATENCY = 1.0
#: Entries of JSON that say when and where something was made.
ELSEWHERE = ("seconds", "made_at", "path", "out")
#: Times that a command is broken in one trial.
BREAKS = 3


@dataclasses.dataclass(frozen=True)
class Break:
    """What happens to a command.

    ``kind`` is "kill" (at an ``event`` of :func:`tests.commands.die_at`, or after ``seconds``), "interrupt" (after
    ``seconds``), or a name of :data:`FAULTS`, whose ``event``-th call fails. ``planted`` is Python that is executed
    before, for a mistake that should be seen.
    """

    kind: str
    event: int | None = None
    seconds: float = 0.0
    planted: str = ""


#: Faults: what is planted, and what the one line that the command ends with says. A broken disk fails once, a full one
#: stays; where memory is missing for a file's content, the line is about the file.
FAULTS = {
    "full disk": ("plant(WRITE, {}, True)", "was not written: the disk is full"),
    "broken disk": ("plant(SYNC, {})", "was not written: Input/output error"),
    "no memory": ("plant(ALLOCATION, {}, large=1 << 16)", ""),
}


@dataclasses.dataclass
class Whole:
    """A run that nobody disturbed: its folder, and how its steps ended.

    The report is of a copy without samples, whose pictures would take longer than all other steps together.
    """

    folder: Path
    steps: dict[str, Ended]


def place(folder: Path, name: str) -> tuple[Path, Path]:
    """A step's settings, and the folder it writes to."""
    kind = "reported" if name == "report" else "run"
    return folder / f"{kind}.toml", folder / kind


def of_sources() -> str:
    """What tells one state of the package from another: a soak may go on after a change of what is computed."""
    seen = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        seen.update(path.read_bytes())
    return seen.hexdigest()[:12]


def undisturbed(commands: Commands, folder: Path, settings: str = SETTINGS, names: tuple[str, ...] = STEPS) -> Whole:
    """The run in ``folder``, which is made once, also where several processes ask for it."""
    kept = folder / "steps.json"
    if not kept.is_file():
        making = Path(tempfile.mkdtemp(dir=folder.parent))
        steps = {}
        for name in names:
            path, out = place(making, name)
            path.write_text(textwrap.dedent(settings).replace('out = "run"', f'out = "{out.name}"'))
            if name == "report":
                shutil.copytree(making / "run", out)
                shutil.rmtree(out / "samples")
            steps[name] = dataclasses.asdict(_finished(commands, name, path))
        (making / kept.name).write_text(json.dumps(steps))
        try:
            making.rename(folder)
        except OSError:  # somebody else was first
            shutil.rmtree(making)
    return Whole(folder, {name: Ended(**step) for name, step in json.loads(kept.read_text()).items()})


def _finished(commands: Commands, name: str, settings: Path) -> Ended:
    counting = "plant(WRITE, 0, large=1 << 16)" if commands.can_plant else ""
    ended = commands.run(name, settings, "--no-progress", before=counting)
    if ended.status:
        raise RuntimeError(f"{name} ended with {ended.status}: {ended.said.strip()[-500:]}")
    return ended


def digests(folder: Path) -> dict[str, str]:
    """What a run's folder has, without the time it took and the place it is at: file to digest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in ("training.pt", ".lock"):
            continue
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                content = b"".join(
                    key.encode() + (_timeless(str(archive[key])).encode() if key == "_json" else archive[key].tobytes())
                    for key in sorted(archive.files)
                )
        elif path.suffix in (".jsonl", ".json"):
            text = path.read_text()
            content = "\n".join(map(_timeless, text.splitlines() if path.suffix == ".jsonl" else [text])).encode()
        elif path.name == "training.csv":
            rows = [line.split(",") for line in path.read_text().splitlines()]
            kept = [n for n, title in enumerate(rows[0]) if title != "seconds"]
            content = "\n".join(",".join(row[n] for n in kept) for row in rows).encode()
        else:
            content = path.read_bytes()
            if path.suffix == ".safetensors":  # entries of its header are in no order
                end = 8 + int.from_bytes(content[:8], "little")
                content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def _timeless(text: str) -> str:
    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in ELSEWHERE}
        return [without(v) for v in value] if isinstance(value, list) else value

    try:
        return json.dumps(without(json.loads(text)))
    except ValueError:
        return text


def broken(commands: Commands, name: str, settings: Path, how: Break) -> tuple[Ended, list[str]]:
    """Run a step that something happens to; how it ended, and what is wrong with that."""
    before, send, wrong = how.planted, None, []
    if how.kind in FAULTS:
        before += "\n" + FAULTS[how.kind][0].format(how.event)
    elif how.event is not None:
        before += f"\ndie_at({how.event})"
    else:
        send = signal.SIGKILL if how.kind == "kill" else signal.SIGINT, how.seconds
    ended = commands.run(name, settings, "--no-progress", before=before, send=send)
    allowed = {"kill": (0, -signal.SIGKILL), "interrupt": (0, 130)}.get(how.kind, (0, 2))
    said = ended.said.strip().splitlines()
    if ended.status not in allowed:
        wrong.append(f"ended with {ended.status}: {ended.said.strip()[-300:]}")
    elif ended.status == 130 and ended.seconds > LATENCY:
        wrong.append(f"took {ended.seconds:.2f} s after Ctrl-C")
    elif ended.status == 2 and (FAULTS[how.kind][1] not in said[-1] or not said[-1].startswith("flmoe-fast: error: ")):
        wrong.append(f"said {said[-1]!r}")
    if ended.status != -signal.SIGKILL and (left := list(settings.parent.rglob("*.part"))):
        wrong.append(f"left {left[0].name}")
    return ended, [f"{how}: {text}" for text in wrong]


def trial(commands: Commands, whole: Whole, name: str, breaks: list[Break], own: Path) -> tuple[list[Ended], list[str]]:
    """Break a step as often as it is told, finish it in a folder ``own`` and compare it with the undisturbed one."""
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(whole.folder, own)
    settings, out = place(own, name)
    for path in list(out.glob(MADE[name])):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found, wrong = [], []
    for how in breaks:
        ended, problems = broken(commands, name, settings, how)
        found.append(ended)
        wrong += problems
        if ended.status == 0:
            break
    try:
        _finished(commands, name, settings)
        wanted, got = digests(place(whole.folder, name)[1]), digests(out)
        if name == "train":  # what the later steps make is not there
            wanted = {k: v for k, v in wanted.items() if not k.startswith(("samples", "faithfulness"))}
        wrong += [f"{k} is another" for k in sorted({*wanted, *got}) if wanted.get(k) != got.get(k)]
    except RuntimeError as problem:
        wrong.append(str(problem))
    if not wrong:
        shutil.rmtree(own)
    return found, [f"{name}, {breaks}: {text}" for text in wrong]


def drawn(rng: np.random.Generator, step: Ended, faults: bool) -> Break:
    """A break anywhere in a step that went as ``step`` did: half of them kills, some interrupts and some faults."""
    kind = str(rng.choice(["kill", "kill", "interrupt", *(FAULTS if faults else ["kill"])]))
    seconds = float(rng.uniform(0.0, 1.0)) * step.seconds
    if kind == "interrupt" or (kind == "kill" and rng.random() < 0.5):
        return Break(kind, seconds=seconds)
    most = step.calls["events" if kind == "kill" else FAULTS[kind][0].partition("(")[2].partition(",")[0]]
    return Break(kind, int(rng.integers(0 if kind == "kill" else 1, max(most, 2))))


def run(seed: int, folder: Path) -> dict:
    """One trial of every step."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    counts: dict = {"cases": 0, "breaks": {}, "trials": {}, "worst": {"seconds after Ctrl-C": 0.0}, "wrong": []}
    with Commands() as commands:
        whole = undisturbed(commands, folder / f"undisturbed-{of_sources()}")
        for name, step in whole.steps.items():
            breaks = [drawn(rng, step, commands.can_plant) for _ in range(BREAKS)]
            found, wrong = trial(commands, whole, name, breaks, folder / f"trial-{seed}-{name}")
            counts["cases"] += 1
            counts["wrong"] += wrong
            counts["trials"][name] = counts["trials"].get(name, 0) + 1
            for how, ended in zip(breaks, found, strict=False):
                if ended.status:
                    said = f"{name}: {how.kind}"
                    counts["breaks"][said] = counts["breaks"].get(said, 0) + 1
            after = [ended.seconds for ended in found if ended.status == 130]
            counts["worst"]["seconds after Ctrl-C"] = max([counts["worst"]["seconds after Ctrl-C"], *after])
    return counts
