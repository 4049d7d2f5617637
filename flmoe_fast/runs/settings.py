"""The one file that says what a run is: data, encoders, model, training, explanation, faithfulness."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.data.adni import read_adni
from flmoe_fast.data.enrico import read_enrico
from flmoe_fast.data.hdxor import hd_xor
from flmoe_fast.data.mimic import read_mimic
from flmoe_fast.data.mmhs150k import read_mmhs150k
from flmoe_fast.data.mmimdb import read_mmimdb
from flmoe_fast.data.mosi import read_mosi
from flmoe_fast.data.own import read_own
from flmoe_fast.engines.choose import BACKENDS
from flmoe_fast.files import replacing
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.training.fit import ABLATIONS
from flmoe_fast.model.training.losses import REGULARIZERS
from flmoe_fast.pipeline.faithful.curves import AOPC_MODES
from flmoe_fast.pipeline.faithful.masking import UNIVERSES
from flmoe_fast.pipeline.importance.tokens import METHODS as IMPORTANCE
from flmoe_fast.probes.gap import DEFAULT_GAP, GAPS
from flmoe_fast.probes.indices import ORDERS
from flmoe_fast.probes.interactions import METHODS

#: Data sets by their name in the file, and what reads them.
READERS: dict[str, Callable] = {
    "own": read_own,
    "mmimdb": read_mmimdb,
    "enrico": read_enrico,
    "mmhs150k": read_mmhs150k,
    "mimic": read_mimic,
    "mosi": read_mosi,
    "adni": read_adni,
}
#: Data that is made or bundled, which needs no path.
MADE = ("digits", "hdxor")
PARTS = ("train", "valid", "test")
TARGETS = ("predicted", "true")
#: Keys whose values, or each of whose values, are one of a few.
CHOICES = {
    "training.regularizer": REGULARIZERS,
    "training.ablation": ABLATIONS,
    "explain.part": PARTS,
    "explain.method": METHODS,
    "explain.also": tuple(ORDERS),
    "explain.gap": GAPS,
    "explain.importance": IMPORTANCE,
    "explain.fill": ("mean", "zero"),
    "explain.value": ("prob", "logit"),
    "explain.target": TARGETS,
    "explain.backend": BACKENDS,
    "explain.universe": UNIVERSES,
    "faithfulness.part": PARTS,
    "faithfulness.importance": IMPORTANCE,
    "faithfulness.fill": ("mean", "zero"),
    "faithfulness.target": TARGETS,
    "faithfulness.aopc": AOPC_MODES,
    "faithfulness.backend": BACKENDS,
}
_FROM_DATA = ("modalities", "classes", "task", "num_tokens")


@dataclass(frozen=True)
class TrainingSettings:
    """Options of :func:`flmoe_fast.model.training.fit.fit`.

    ``device`` is where the model is trained and explained; ``threads`` of PyTorch are the machine's if 0.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-4
    seed: int = 0
    regularizer: str | None = None
    regularizer_weight: float | None = None
    ablation: str | None = None
    select: str | None = None
    patience: int | None = None
    checkpoint_steps: int | None = None
    reference_layout: bool = False
    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True)
class ExplainSettings:
    """Which samples are explained, and options of :func:`flmoe_fast.explain`.

    ``method`` is how interactions are estimated (:func:`flmoe_fast.interactions`), ``also`` names other
    indices to take from the same evaluations.
    """

    part: str = "test"
    samples: int = 16
    ids: tuple[str, ...] = ()
    candidates: int = 10
    contexts: int | None = None
    budget: int | None = None
    method: str = "auto"
    also: tuple[str, ...] = ()
    seed: int = 0
    gap: str = DEFAULT_GAP
    importance: str = "attnXgrad"
    fill: str = "mean"
    value: str = "prob"
    target: str = "predicted"
    backend: str = "auto"
    most: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 10
    universe: str = "players"


@dataclass(frozen=True)
class FaithfulnessSettings:
    """Which samples are measured, and options of :func:`flmoe_fast.pipeline.faithful.curves.faithfulness`.

    ``against`` names folders of other runs on the same data, whose importance patterns are compared with this run's.
    """

    part: str = "valid"
    samples: int | None = None
    importance: tuple[str, ...] = ("attnXgrad",)
    percents: tuple[float, ...] = (5.0, 10.0, 15.0, 20.0, 25.0)
    repeats: int = 10
    seed: int = 42
    fill: str = "mean"
    target: str = "predicted"
    aopc: str = "mean"
    backend: str = "auto"
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSettings:
    """A whole run.

    Attributes
    ----------
    path : Path
        The file; relative paths in it are relative to its folder.
    out : Path
        Folder of everything that is written.
    data : dict
        ``kind`` (see :data:`READERS` and :data:`MADE`), ``path``, options of the reader, ``modalities`` (those to use,
        in order; of published data) and ``dtype`` and ``batch_size`` of cached features. HD-XOR is made where it has no
        path.
    encoders : dict from modality to options of a backbone
    model : dict
        Fields of :class:`FLI2MoEConfig`, and ``patches`` or ``groups`` of :func:`flmoe_fast.data.prepare.prepare`.
    """

    path: Path
    out: Path
    data: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    model: dict[str, Any]
    training: TrainingSettings = field(default_factory=TrainingSettings)
    explain: ExplainSettings = field(default_factory=ExplainSettings)
    faithfulness: FaithfulnessSettings = field(default_factory=FaithfulnessSettings)


def keep_settings(settings: RunSettings) -> Path:
    """Write ``settings.json`` into the run's folder: every setting as it took effect, defaults included."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "settings.json"
    with replacing(path, "w") as file:
        json.dump(dataclasses.asdict(settings), file, indent=1, default=str)
    return path


def read_settings(path: str | os.PathLike) -> RunSettings:
    """Read a TOML file.

    Raises
    ------
    FileNotFoundError
        No such file.
    ArgumentError
        No TOML, or a section or a key that is unknown or of the wrong type; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ArgumentError("settings", f"{path}, tables in tables without end", "a TOML file") from error
    except ValueError as error:
        raise ArgumentError("settings", f"{path} ({error})", "a TOML file") from error
    known = ("out", "data", "encoders", "model", "training", "explain", "faithfulness")
    for name in content:
        if name not in known:
            raise ArgumentError(name, f"this entry in {path}", f"one of {', '.join(known)}")
    for name in ("data", "model"):
        if not isinstance(content.get(name), dict):
            raise ArgumentError(name, f"no section [{name}] in {path}", f"a section [{name}]")
    out = content.get("out", f"out/{path.stem}")
    if not isinstance(out, str):
        raise ArgumentError("out", repr(out), "a folder")
    return RunSettings(
        path,
        path.parent / out,
        _data(dict(content["data"]), path),
        _encoders(content.get("encoders", {}), path),
        _model(dict(content["model"])),
        _section(TrainingSettings, "training", content),
        _section(ExplainSettings, "explain", content),
        _section(FaithfulnessSettings, "faithfulness", content),
    )


def _data(data: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = data.get("kind")
    if kind not in (*READERS, *MADE):
        raise ArgumentError("data.kind", repr(kind), f"one of {', '.join((*READERS, *MADE))}")
    allowed: Collection[str]
    reader: Callable | None = READERS.get(kind)
    if reader is not None:
        if not isinstance(data.get("path"), str):
            raise ArgumentError("data.path", repr(data.get("path")), "the path of the data set")
        data["path"] = path.parent / data["path"]
        options = list(inspect.signature(reader).parameters)[1:]
        allowed = dict.fromkeys(["path", *options, "modalities", "dtype", "batch_size"])
        if kind != "own" and not isinstance(data.get("modalities", []), list):
            raise ArgumentError("data.modalities", repr(data["modalities"]), "a list of names")
    elif kind == "hdxor" and "path" in data:
        if not isinstance(data["path"], str):
            raise ArgumentError("data.path", repr(data["path"]), "a file of the published data")
        data["path"] = path.parent / data["path"]
        allowed = ("path",)
    elif kind == "hdxor":
        reader, allowed = hd_xor, (*inspect.signature(hd_xor).parameters, "path")
    else:
        allowed = ("seed",)
    for name in data:
        if name not in (*allowed, "kind"):
            raise ArgumentError(f"data.{name}", "this key", f"one of {', '.join(allowed)}")
    needed = (
        [] if reader is None else [p for p in inspect.signature(reader).parameters.values() if p.default is p.empty]
    )
    for name in (p.name for p in needed if p.name != "root"):
        if name not in data:
            raise ArgumentError(f"data.{name}", "nothing", f"this key, which data of the kind {kind!r} need")
    return data


def _encoders(encoders: object, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(encoders, Mapping):
        raise ArgumentError("encoders", type(encoders).__name__, "sections [encoders.<modality>]")
    allowed, found = ("name", "max_length", "device", "local_only"), {}
    for modality, options in encoders.items():
        if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
            raise ArgumentError(f"encoders.{modality}.name", "nothing", "a folder or a name on the model hub")
        for name in options:
            if name not in allowed:
                raise ArgumentError(f"encoders.{modality}.{name}", "this key", f"one of {', '.join(allowed)}")
        folder = path.parent / options["name"]
        if options["name"].count("/") > 1 and not folder.is_dir():
            raise ArgumentError(
                f"encoders.{modality}.name", f"{folder}, no such folder", "a folder or a name on the hub"
            )
        found[modality] = {**options, "name": str(folder) if folder.is_dir() else options["name"]}
    return found


def _model(model: dict[str, Any]) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(FLI2MoEConfig)} - set(_FROM_DATA)
    for name in model:
        if name not in fields | {"patches", "groups"}:
            raise ArgumentError(f"model.{name}", "this key", f"one of {', '.join(sorted(fields))}, patches, groups")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in model.items()}


def _section(kind: type, section: str, content: Mapping) -> Any:
    given = content.get(section, {})
    if not isinstance(given, Mapping):
        raise ArgumentError(section, type(given).__name__, f"a section [{section}]")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for name, value in given.items():
        if name not in fields:
            raise ArgumentError(f"{section}.{name}", "this key", f"one of {', '.join(fields)}")
        default = fields[name].default
        if isinstance(default, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif default is not None and type(value) is not type(default):
            raise ArgumentError(f"{section}.{name}", repr(value), f"a value like {default!r}")
        for choice in value if isinstance(value, tuple) else (value,):
            one_of(f"{section}.{name}", choice, CHOICES.get(f"{section}.{name}", (choice,)))
        values[name] = value
    return kind(**values)
