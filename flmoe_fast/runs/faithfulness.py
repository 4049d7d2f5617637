"""``flmoe-fast faithfulness``: drop curves, AOPC and importance patterns of a whole part of the data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import torch
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError
from flmoe_fast.files import replacing, writing_to
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.pipeline.faithful.curves import (
    Faithfulness,
    faithfulness,
    faithfulness_errors,
    faithfulness_table,
    paired_gaps,
    write_tables,
)
from flmoe_fast.pipeline.importance.patterns import Patterns, collect, compare_patterns, map_measures
from flmoe_fast.pipeline.importance.tokens import BY_HEAD, batch_importance, head_importance
from flmoe_fast.pipeline.records import plain_fields, rebuilt
from flmoe_fast.pipeline.routing import MIXTURE
from flmoe_fast.runs.explain import chosen_rows, model_digest
from flmoe_fast.runs.settings import RunSettings
from flmoe_fast.runs.study import Study

#: Samples whose curves are kept in one file.
BLOCK = 16
SUFFIXES = {"train": "_train", "valid": "_val", "test": "_test"}


def measure_faithfulness(settings: RunSettings, progress: bool = True) -> dict[str, pandas.DataFrame]:
    """Measure every wanted importance method, or go on where an earlier call was stopped.

    Writes, into ``faithfulness/<method>``, the curves of the samples in blocks, the two tables of
    :func:`write_tables`, ``errors.csv`` with standard errors over samples, ``gaps.json`` with the AOPC gaps and
    theirs, and how concentrated the maps are and how much experts agree: ``patterns.csv``, by sample
    ``patterns.npz``, and for each run of ``faithfulness.against`` ``against-<name>.csv``.

    Returns
    -------
    dict from method to the table of :func:`faithfulness_table`
    """
    own = settings.out / "faithfulness"
    who = "flmoe-fast faithfulness"
    with writing_to(settings.out, who, shared=True), writing_to(own, who):
        return _measured(settings, own, progress)


def _measured(settings: RunSettings, own: Path, progress: bool) -> dict[str, pandas.DataFrame]:
    options = settings.faithfulness
    study = Study(settings, progress)
    model = study.trained()
    rows = chosen_rows(study.splits.part(options.part).ids, options.samples)
    tables = {}
    for method in options.importance:
        folder = own / method
        samples, measures = _curves(study, model, rows, method, folder, settings, progress)
        ids = [study.splits.part(options.part).ids[row] for row in rows]
        patterns = collect(measures, map_names(model, method), ids, whole=map_names(model, method)[0])
        targets = study.splits.part(options.part).targets[rows]
        table = faithfulness_table(samples, targets, study.splits.task, mode=options.aopc)
        write_tables([table], folder, study.splits.name.replace(" ", "_"), suffix=SUFFIXES[options.part])
        with replacing(folder / "errors.csv", "w") as file:
            faithfulness_errors(samples).to_csv(file, index=False)
        gaps = {name: {"mean": mean, "stderr": error} for name, (mean, error) in paired_gaps(samples).items()}
        with replacing(folder / "gaps.json", "w") as file:
            json.dump({"samples": len(samples), "part": options.part, **gaps}, file)
        patterns.save(folder / "patterns.npz")
        with replacing(folder / "patterns.csv", "w") as file:
            patterns.to_dataframe().to_csv(file, index=False)
        for name, against in _against(settings, method).items():
            with replacing(folder / f"against-{name}.csv", "w") as file:
                compare_patterns(patterns, against).to_csv(file, index=False)
        tables[method] = table
    return tables


def map_names(model: FLI2MoE, method: str) -> tuple[str, ...]:
    """What the maps of a method are called: the whole first, then experts, or attention heads of a single expert."""
    config = model.config
    if config.experts > 1:
        return (MIXTURE, *config.expert_names)
    heads = tuple(f"head {h + 1}" for h in range(config.heads)) if method in BY_HEAD else ()
    return (*config.expert_names, *heads)


def read_patterns(out: Path) -> dict[str, Patterns]:
    """The importance patterns of a run's folder, by method."""
    return {path.parent.name: Patterns.load(path) for path in sorted((out / "faithfulness").glob("*/patterns.npz"))}


def compared(settings: RunSettings, patterns: dict[str, Patterns]) -> dict[str, pandas.DataFrame]:
    """Tables of :func:`compare_patterns` with the runs of ``faithfulness.against``, by run and method."""
    return {
        f"{name}, {method}": compare_patterns(own, against)
        for method, own in patterns.items()
        for name, against in _against(settings, method).items()
    }


def _against(settings: RunSettings, method: str) -> dict[str, Patterns]:
    """The patterns of other runs, by the names of their folders."""
    found = {}
    for folder in settings.faithfulness.against:
        path = settings.path.parent / folder / "faithfulness" / method / "patterns.npz"
        if not path.is_file():
            expected = "the folder of a run for which flmoe-fast faithfulness was called with this importance"
            raise ArgumentError("faithfulness.against", f"no {path}", expected)
        found[path.parents[2].name] = Patterns.load(path)
    return found


def read_tables(settings: RunSettings) -> dict[str, pandas.DataFrame]:
    """The tables of a run's folder by method: :func:`faithfulness_table` and standard errors beside it."""
    found = {}
    for path in sorted((settings.out / "faithfulness").glob("*/*_raw_*.csv")):
        table = pandas.read_csv(path)
        means = {name: name.removesuffix("_mean") for name in table.columns if name.endswith("_mean")}
        table = table[["K_percent", *means]].rename(columns=means)
        if (path.parent / "errors.csv").is_file():
            table = table.merge(pandas.read_csv(path.parent / "errors.csv"), on="K_percent")
        found[path.parent.name] = table
    return found


def _curves(
    study: Study,
    model: FLI2MoE,
    rows: list[int],
    method: str,
    folder: Path,
    settings: RunSettings,
    progress: bool,
) -> tuple[list[Faithfulness], list[dict[str, np.ndarray]]]:
    folder.mkdir(parents=True, exist_ok=True)
    about = _about(settings)
    samples: list[tuple[Faithfulness, dict[str, np.ndarray]]] = []
    with tqdm(total=len(rows), desc=f"faithfulness, {method}", unit="sample", disable=not progress) as bar:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            path = folder / f"block-{start // BLOCK:05d}.json"
            kept = _read_block(path, about, len(block))
            if kept is None:
                kept = _measure(study, model, block, method, settings, bar.update)
                with replacing(path, "w") as file:
                    json.dump({"settings": about, "samples": [_as_json(*sample) for sample in kept]}, file)
            else:
                bar.update(len(block))
            samples += kept
    return [curves for curves, _ in samples], [measures for _, measures in samples]


def _measure(
    study: Study,
    model: FLI2MoE,
    rows: list[int],
    method: str,
    settings: RunSettings,
    tick: Callable[[], object],
) -> list[tuple[Faithfulness, dict[str, np.ndarray]]]:
    """Drop curves of some samples, and the measures of their importance maps; ``tick`` is called after each."""
    options = settings.faithfulness
    chosen = [study.sample(model, options.part, row, views=False) for row in rows]
    targets = None
    if options.target == "true" and study.splits.task != "regression":
        targets = list(study.splits.part(options.part).targets[rows].unbind(0))
    features = [torch.stack(parts) for parts in zip(*(sample.features for sample in chosen))]
    masks = None
    if chosen[0].masks is not None:
        masks = [torch.stack(parts).to(features[0].device) for parts in zip(*(sample.masks for sample in chosen))]
    by_head = model.config.experts == 1 and method in BY_HEAD
    given = (model, features, masks)
    maps = (head_importance if by_head else batch_importance)(*given, targets=targets, method=method)
    parts = maps.experts if by_head or model.config.experts > 1 else maps.experts[:, :0]
    whole = torch.cat([maps.mixture[:, None], parts], dim=1).double().cpu().numpy()
    found = []
    for n, (row, sample) in enumerate(zip(rows, chosen)):
        target = None
        if targets is not None:
            target = list(sample.truth) if study.splits.task == "multilabel" else sample.truth[0]
        game = TokenGame(
            model,
            sample.features,
            masks=sample.masks,
            players=sample.players,
            fill=options.fill,
            target=target if target != [] else None,
            heads=("mixture",),
            backend=options.backend,
        )
        curves = faithfulness(
            game,
            maps.mixture[n][game.tokens],
            percents=options.percents,
            repeats=options.repeats,
            seed=options.seed + row,
        )
        found.append((curves, map_measures(whole[n][:, game.tokens], tops=options.percents)))
        tick()
    return found


def _about(settings: RunSettings) -> dict:
    options = dataclasses.asdict(settings.faithfulness)
    kept = {name: options[name] for name in ("part", "percents", "repeats", "seed", "fill", "target", "backend")}
    return json.loads(json.dumps({**kept, "measured": "curves and patterns", "model": model_digest(settings)}))


def _as_json(sample: Faithfulness, measures: dict[str, np.ndarray]) -> dict:
    arrays: dict = {}
    plain = plain_fields(sample, "", arrays)
    lists = [{name: value.tolist() for name, value in part.items()} for part in (arrays, measures)]
    return {"plain": plain, "arrays": lists[0], "patterns": lists[1]}


def _read_block(path: Path, about: dict, count: int) -> list[tuple[Faithfulness, dict[str, np.ndarray]]] | None:
    """The samples of a block, or None where it is missing, of another run, or not as long."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["settings"] != about or len(content["samples"]) != count:
        return None
    found = []
    for one in content["samples"]:
        arrays, measures = (
            {name: np.array(value) for name, value in one[part].items()} for part in ("arrays", "patterns")
        )
        found.append((rebuilt(Faithfulness, one["plain"], "", arrays), measures))
    return found
