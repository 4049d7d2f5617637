"""``flmoe-fast explain``: explain samples of a trained run, one folder each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import safetensors
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.files import writing_to
from flmoe_fast.model.training.chance import chance_warning
from flmoe_fast.pipeline.records import is_done, made_by, record_sample
from flmoe_fast.runs.settings import RunSettings
from flmoe_fast.runs.study import Study


def explain_samples(settings: RunSettings, progress: bool = True) -> list[Path]:
    """Explain the chosen samples; those that are done already, by these settings and this model, are left as they are.

    A sample of other settings is explained anew, and its old record stays until the new one is complete. A warning says
    how many there are.

    Returns
    -------
    list of Path
        The samples' folders, ``samples/<part>-<row>``.
    """
    kept = settings.out / "samples"
    with writing_to(settings.out, "flmoe-fast explain", shared=True), writing_to(kept, "flmoe-fast explain"):
        return _explain(settings, kept, progress)


def _explain(settings: RunSettings, kept: Path, progress: bool) -> list[Path]:
    options = settings.explain
    study = Study(settings, progress)
    model = study.trained()
    if text := doubt(settings.out):
        warnings.warn(text, stacklevel=2)
    ids = study.splits.part(options.part).ids
    rows = chosen_rows(ids, options.samples, options.ids)
    now = explained_with(settings)
    folders = [kept / f"{options.part}-{row:06d}" for row in rows]
    old = {path.parent for path in kept.glob("*-*/record.npz") if made_by(path.parent) != now}
    if old:
        anew = len(old & set(folders))
        warnings.warn(
            f"samples in {kept} were explained with other settings or another model: {anew} of {len(old)} are "
            f"explained anew, each kept until its new record is complete; the others stay as they are",
            stacklevel=2,
        )
    for row, folder in tqdm(list(zip(rows, folders)), desc="explaining", unit="sample", disable=not progress):
        if folder not in old and is_done(folder):
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
            progress=progress,
        )
        dataclasses.replace(record, made_by=now).save(folder)
    return folders


def doubt(out: Path) -> str | None:
    """What the run's scores say against explaining its model; None where they say nothing."""
    path = out / "metrics.json"
    found = json.loads(path.read_text()).get("chance") if path.is_file() else None
    return chance_warning(found) if found else None


def explained_with(settings: RunSettings) -> dict:
    """What makes a sample's record what it is, as JSON types: the settings that matter, and the model."""
    options = {
        name: value for name, value in dataclasses.asdict(settings.explain).items() if name not in ("samples", "ids")
    }
    now = {**options, "percents": settings.faithfulness.percents, "model": model_digest(settings)}
    return json.loads(json.dumps(now))


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
