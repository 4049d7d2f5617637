"""``flmoe-fast explain``: explain samples of a trained run, one folder each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.files import replacing
from flmoe_fast.pipeline.records import SampleRecord, is_done, record_sample
from flmoe_fast.runs.settings import RunSettings
from flmoe_fast.runs.study import Study


def explain_samples(settings: RunSettings, progress: bool = True) -> list[Path]:
    """Explain the chosen samples; those whose folder is complete are left as they are.

    Returns
    -------
    list of Path
        The samples' folders, ``samples/<part>-<row>``.
    """
    options = settings.explain
    study = Study(settings, progress)
    model = study.trained()
    rows = chosen_rows(study.splits.part(options.part).ids, options.samples, options.ids)
    kept = settings.out / "samples"
    kept.mkdir(parents=True, exist_ok=True)
    same = _unchanged(kept / "settings.json", settings)
    folders = []
    for row in tqdm(rows, desc="explaining", unit="sample", disable=not progress):
        folder = kept / f"{options.part}-{row:06d}"
        folders.append(folder)
        if same and is_done(folder):
            continue
        sample = study.sample(model, options.part, row)
        target = None
        if options.target == "true" and study.splits.task != "regression":
            target = list(sample.truth) if study.splits.task == "multilabel" else sample.truth[0]
        record, _ = record_sample(
            model,
            sample.features,
            masks=sample.masks,
            players=sample.players,
            id=sample.id,
            truth=sample.truth,
            views=sample.views,
            target=target or (0 if target == 0 else None),
            most=options.most,
            repeats=options.repeats,
            universe=options.universe,
            percents=settings.faithfulness.percents,
            seed=options.seed + row,
            candidates=options.candidates,
            contexts=options.contexts,
            budget=options.budget,
            method=options.method,
            also=options.also,
            gap=options.gap,
            importance=options.importance,
            fill=options.fill,
            value=options.value,
            backend=options.backend,
            progress=False,
        )
        record.save(folder)
    return folders


def read_records(settings: RunSettings) -> list[SampleRecord]:
    """The explained samples of a run's folder, in order."""
    folders = sorted(path for path in (settings.out / "samples").glob("*-*") if is_done(path))
    return [SampleRecord.load(folder) for folder in folders]


def chosen_rows(ids: Sequence[str], samples: int | None, wanted: Sequence[str] = ()) -> list[int]:
    """Rows of the wanted ids, or the first ``samples`` rows (all for None)."""
    if wanted:
        place = {name: row for row, name in enumerate(ids)}
        unknown = [name for name in wanted if name not in place]
        if unknown:
            raise ArgumentError("explain.ids", repr(unknown[0]), "ids of samples of the part")
        return [place[name] for name in wanted]
    count = len(ids) if samples is None else min(integer("samples", samples, least=1), len(ids))
    return list(range(count))


def model_digest(settings: RunSettings) -> str:
    """What tells the run's model from another one, 16 hexadecimal digits; the same for the same weights."""
    digest = hashlib.sha256()
    with safetensors.safe_open(settings.out / "model.safetensors", framework="np") as file:
        digest.update(file.metadata()["config"].encode())
        for key in sorted(file.keys()):
            digest.update(key.encode() + file.get_tensor(key).tobytes())
    return digest.hexdigest()[:16]


def _unchanged(path: Path, settings: RunSettings) -> bool:
    """Whether samples in the folder were explained by the same settings and the same model; remembers them."""
    options = {
        name: value for name, value in dataclasses.asdict(settings.explain).items() if name not in ("samples", "ids")
    }
    now = {**options, "percents": settings.faithfulness.percents, "model": model_digest(settings)}
    now = json.loads(json.dumps(now))
    if path.is_file() and json.loads(path.read_text()) == now:
        return True
    for old in path.parent.glob("*-*/record.npz"):
        old.unlink()
    with replacing(path, "w") as file:
        json.dump(now, file)
    return False
