"""``flmoe-fast report``: one HTML page about a run, made of what its folder holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas

from flmoe_fast.checks import ArgumentError
from flmoe_fast.environment import environment
from flmoe_fast.files import writing_to
from flmoe_fast.model.training.chance import chance_warning
from flmoe_fast.pipeline.faithful.curves import COLUMNS
from flmoe_fast.pipeline.faithful.masking import masking_curve, masking_scores
from flmoe_fast.pipeline.faithful.occurrence import frequent_tokens, occurrences, where
from flmoe_fast.pipeline.importance.patterns import Patterns
from flmoe_fast.pipeline.records import RANKINGS, SampleRecord, read_records
from flmoe_fast.pipeline.show.curves import (
    faithfulness_lines,
    interaction_loss_lines,
    loss_lines,
    masking_accuracy,
    masking_lines,
)
from flmoe_fast.pipeline.show.data_views import occurrence_bars, place_map
from flmoe_fast.pipeline.show.html import Page, inked
from flmoe_fast.pipeline.show.look import new_figure
from flmoe_fast.pipeline.show.model_views import expert_bars, logit_histogram
from flmoe_fast.pipeline.show.pair_view import pair_view
from flmoe_fast.pipeline.show.player_views import beeswarm, importance_rows, waterfall
from flmoe_fast.pipeline.summary import player_points, summarize
from flmoe_fast.probes.colours import unit_of
from flmoe_fast.probes.result import InteractionResult
from flmoe_fast.runs.explain import explained_with
from flmoe_fast.runs.faithfulness import compared, read_patterns, read_tables
from flmoe_fast.runs.page_patterns import patterns_section, routing_figures
from flmoe_fast.runs.settings import RunSettings
from flmoe_fast.runs.terms import explain_terms

#: Rows of a sample's table of pairs.
PAIRS = 50
#: Classes whose logits are drawn.
CLASSES = 8


@dataclasses.dataclass(frozen=True)
class RunContents:
    """What a report is made of; every part but the names may be missing.

    Attributes
    ----------
    title : str
    experts : tuple of E str
    classes : tuple of C str
    task : str
    history : list of dict
        Of :func:`flmoe_fast.model.training.fit.fit`.
    metrics : dict
    predictions : dict of arrays ``expert_logits``, ``weights``, ``logits``, ``targets``
    tables : dict from importance method to a table of faithfulness
    patterns : dict from importance method to Patterns
    compared : dict from the name of another run and a method to a table of :func:`compare_patterns`
    records : list of SampleRecord
    made_by : dict
        What the run's settings and model would make records with now; the page names those that were made otherwise.
    """

    title: str
    experts: tuple[str, ...]
    classes: tuple[str, ...]
    task: str
    history: list[dict] = dataclasses.field(default_factory=list)
    metrics: dict = dataclasses.field(default_factory=dict)
    predictions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tables: dict[str, pandas.DataFrame] = dataclasses.field(default_factory=dict)
    patterns: dict[str, Patterns] = dataclasses.field(default_factory=dict)
    compared: dict[str, pandas.DataFrame] = dataclasses.field(default_factory=dict)
    records: list[SampleRecord] = dataclasses.field(default_factory=list)
    made_by: dict = dataclasses.field(default_factory=dict)


def report_run(settings: RunSettings) -> Path:
    """Make ``report.html`` in the run's folder from what is there.

    Raises
    ------
    ArgumentError
        A folder with nothing to report.
    BusyError
        Somebody trains the run's model right now.
    """
    out = settings.out
    if not (out / "study.json").is_file():
        raise ArgumentError("out", f"no {out / 'study.json'}", "a trained run: flmoe-fast train comes first")
    with writing_to(out, "flmoe-fast report", shared=True):  # while it reads too: nobody trains meanwhile
        return _report(settings)


def _report(settings: RunSettings) -> Path:
    out = settings.out
    about = json.loads((out / "study.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").is_file() else {}
    predictions = {}
    if (out / "predictions.npz").is_file():
        with np.load(out / "predictions.npz", allow_pickle=False) as archive:
            predictions = {key: archive[key] for key in archive.files}
    contents = RunContents(
        about["name"],
        tuple(about["experts"]),
        tuple(about["classes"]),
        about["task"],
        _lines(out / "training.jsonl"),
        metrics,
        predictions,
        read_tables(settings),
        patterns := read_patterns(settings.out),
        compared(settings, patterns),
        read_records(out),
        explained_with(settings) if (out / "model.safetensors").is_file() else {},
    )
    path = out / "report.html"
    build_page(contents).save(path)
    return path


def build_page(contents: RunContents) -> Page:
    """The page of a run."""
    machine = environment()
    page = Page(f"Explanation of {contents.title}", f"FL-I2MoE; torch {machine['torch']}, {machine['cpu']}")
    with inked():
        _model(page, contents)
        _faithful(page, contents)
        patterns_section(page, contents.patterns, contents.records, contents.compared)
        _masked(page, contents)
        _occurrence(page, contents)
        if contents.records:
            page.section("Samples")
            explain_terms(page, "Shapley interaction (SII)", "Redundancy gap", "Standard error (s.e.)")
        for record in contents.records:
            _sample(page, contents, record)
    return page


def _model(page: Page, contents: RunContents) -> None:
    if not (contents.metrics or contents.history or contents.predictions):
        return
    page.section("Model")
    rows = []
    for part in ("valid", "test"):
        for name, value in contents.metrics.get(part, {}).items():
            rows.append({"part": part, "score": name.replace("_", " "), "value": value})
        for expert, value in contents.metrics.get(f"{part}_experts", {}).items():
            rows.append({"part": part, "score": f"accuracy of {expert} alone", "value": value})
    found = ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in contents.metrics.get("test", {}).items()
    )
    if found:
        page.text(f"Test part: {found}.")
    if text := chance_warning(contents.metrics["chance"]) if contents.metrics.get("chance") else None:
        page.text(f"Take care: {text}.")
    if rows:
        page.table("Scores", pandas.DataFrame(rows))
    explain_terms(page, "Expert")
    if contents.history:
        explain_terms(page, "Interaction loss")
        flat = [
            {
                **{k: v for k, v in record.items() if k != "seconds" and not isinstance(v, (list, dict))},
                **{f"interaction loss, {n}": v for n, v in zip(contents.experts, record["interaction_losses"])},
                **{f"validation {k}": v for k, v in record.get("validation", {}).items()},
            }
            for record in contents.history
        ]
        text = "Losses by epoch: the total and the task's, and the interaction loss of every expert."
        curves = (loss_lines(contents.history), interaction_loss_lines(contents.history, contents.experts))
        page.figure(curves, text, pandas.DataFrame(flat))
    if contents.predictions:
        routing_figures(page, contents.predictions, contents.experts, contents.classes, contents.task)
        explain_terms(page, "Logit")
        logits = contents.predictions["expert_logits"]
        spread = [
            {"class": c, "expert": e, "mean": logits[:, j, i].mean(), "standard deviation": logits[:, j, i].std()}
            for i, c in enumerate(contents.classes)
            for j, e in enumerate(contents.experts)
        ]
        pictures = [logit_histogram(logits[:, :, i], contents.experts, c) for i, c in enumerate(contents.classes)]
        more = f"; the first {CLASSES} of {len(pictures)} classes" if len(pictures) > CLASSES else ""
        text = f"Logits of every expert for every class, test part{more}."
        page.figure(pictures[:CLASSES], text, pandas.DataFrame(spread))


def _faithful(page: Page, contents: RunContents) -> None:
    if not contents.tables:
        return
    page.section("Faithfulness")
    explain_terms(page, "Comprehensiveness", "Sufficiency", "AOPC")
    rows = [
        {
            "importance": method,
            "AOPC comprehensiveness gap": table["aopc_comprehensiveness_prob_gap"].iloc[0],
            "AOPC sufficiency gap": table["aopc_sufficiency_prob_gap"].iloc[0],
        }
        for method, table in contents.tables.items()
    ]
    page.table("Gaps, identified against random (more is better)", pandas.DataFrame(rows))
    whole = pandas.concat(
        [
            table[[c for c in COLUMNS if c in table]].assign(importance=method)
            for method, table in contents.tables.items()
        ]
    )
    text = "Drop of the target's probability by share of tokens, ± s.e. over samples; dashed: random tokens."
    pictures = [faithfulness_lines(contents.tables, of) for of in ("comprehensiveness", "sufficiency")]
    page.figure(pictures, text, whole[["importance", *[c for c in COLUMNS if c in whole]]])


def _masked(page: Page, contents: RunContents) -> None:
    curves, scores, tables = {}, {}, []
    for name in RANKINGS:
        samples = [(record, record.masked[name]) for record in contents.records if name in record.masked]
        budgets = {found.most for _, found in samples}
        if len(samples) < 2 or len(budgets) != 1:
            continue
        label = name if name == "SII" else f"{samples[0][0].interactions.gap_kind} gap"
        curves[label] = masking_curve([found for _, found in samples])
        tables.append(curves[label].to_dataframe().assign(ranking=label))
        if contents.task != "regression":
            scores[label] = masking_scores(
                [found for _, found in samples], _targets([r for r, _ in samples], contents), contents.task
            )
    if not curves:
        return
    page.section("Masking pairs")
    page.text(
        "The tokens of each sample's top pairs are replaced, and, as a control, as many random tokens of each "
        "modality. The difference says what the pairs matter beyond their number."
    )
    table = pandas.concat(tables)
    text = "Drop of the value, and accuracy, by number of masked pairs; dashed: random tokens."
    unit = f"of the value, in {_unit(contents)}"
    pictures = [masking_lines(curves, unit=unit), *([masking_accuracy(scores)] if scores else [])]
    page.figure(pictures, text, table[["ranking", *table.columns.drop("ranking")]])
    for label, score_table in scores.items():
        page.table(f"Scores, {label}", score_table)


def _unit(contents: RunContents) -> str:
    return unit_of(contents.records[0].interactions.about)


def _targets(records: list[SampleRecord], contents: RunContents):
    import torch

    if contents.task == "multilabel":
        return torch.tensor([[int(c in r.truth) for c in range(len(contents.classes))] for r in records])
    return torch.tensor([record.truth[0] for record in records])


def _occurrence(page: Page, contents: RunContents) -> None:
    if not contents.records:
        return
    page.section("Synergy and redundancy over the data set")
    by_class = occurrences(contents.records, contents.classes)
    by_modalities = occurrences(contents.records, contents.classes, by="modalities")
    first = by_class["head"].iloc[0]
    shown = by_class[by_class["head"] == first].reset_index(drop=True)
    pairs = int(by_modalities[by_modalities["head"] == first]["pairs"].sum())
    explain_terms(page, "Shapley interaction (SII)", "Redundancy gap")
    page.text(f"{len(contents.records)} explained samples, {pairs} probed pairs; pairs were chosen by importance.")
    page.table("Means over samples, by head", summarize(contents.records).reset_index())
    text = f"Share of probed pairs with a sure interaction, by explained class ({first})."
    page.figure(occurrence_bars(shown), text, by_class)
    page.table("By pair of modalities and expert", by_modalities)
    maps = where(contents.records)
    if maps:
        rows = [
            {"modality": name, "row": r, "column": c, "mean synergy": up[r, c], "mean substitution": down[r, c]}
            for name, (up, down) in maps.items()
            for r, c in np.ndindex(up.shape)
        ]
        pictures = [
            place_map(values, name, kind, _unit(contents))
            for name, both in maps.items()
            for values, kind in zip(both, ("synergy", "substitution"))
        ]
        page.figure(pictures, "Where interactions occur in the images.", pandas.DataFrame(rows))
    words = frequent_tokens(contents.records)
    if len(words):
        page.table("Tokens of texts and tables that are most often in probed pairs", words)
    points = player_points(contents.records)
    if len(points):
        explain_terms(page, "Shapley value")
        text = "Shapley values of tokens; in brackets how many samples a token was probed in."
        page.figure(beeswarm(points, unit=_unit(contents)), text, points)


def _sample(page: Page, contents: RunContents, record: SampleRecord) -> None:
    named = ", ".join(contents.classes[c] for c in record.target)
    if contents.task == "regression":
        truth = ", ".join(f"{value:.3g}" for value in record.truth)
    else:
        truth = ", ".join(contents.classes[int(c)] for c in record.truth) or "none"
    page.heading(f"Sample {record.id}: {named}")
    if record.made_by != contents.made_by:
        page.text("Explained with other settings, or another model, than the run has now.")
    result = record.interactions
    page.text(
        f"True: {truth}. Value of {named} with all tokens {record.full:.4f}, with none {record.empty:.4f}. "
        f"{result.evaluations:,} evaluations ({result.about['method']}); "
        f"rounding {float(np.nanmax(result.noise_share, initial=0.0)):.1e} of the variance."
        + (f" Files: samples/{record.folder}." if record.folder else ""),
        soft=True,
    )
    for m, view in enumerate(record.views):
        if view.kind == "text":
            strongest = result.order("abs_sii")[:12]
            ends = {record.places[p] for pair in result.pairs[strongest] for p in pair}
            page.tokens(view.tokens, [position for owner, position in ends if owner == m])
    heads = [head for head in (result.heads or ("value",)) if not head.startswith("weighted")]
    for of, name in (("sii", "Shapley interaction"), ("gap", f"{result.gap_kind.capitalize()} redundancy gap")):
        page.choice(f"{name} in", {head: _pairs_of(record, name, of, head) for head in heads})
    for name, order in result.also:
        members = "pairs" if order == 2 else "tokens"
        page.table(f"{name} of {members}", _without_numbers(_named_index(result, name, order))[:PAIRS])
    _players(page, record)
    logits = pandas.DataFrame(record.expert_logits.T, columns=record.experts)
    logits.insert(0, "class", contents.classes)
    logits["mixture"] = record.weights @ record.expert_logits
    page.figure(
        expert_bars(record.expert_logits, record.weights, record.experts, contents.classes),
        "Every expert's logits times its routing weight (in brackets), and their sum, the mixture.",
        logits,
    )


def _pairs_of(record: SampleRecord, name: str, of: str, head: str) -> tuple[list, str, pandas.DataFrame]:
    """Both pictures of a sample's pairs for one head, what they show, and their numbers."""
    result = record.interactions
    column = head if result.heads else None
    axes = pair_view(result, record.places, record.views, head=column, of=of)
    axes.set_title(f"{name}, {head}")
    rows, columns = (len(set(side.tolist())) for side in result.pairs.T)
    matrix = new_figure(3.0 + 0.32 * columns, 1.8 + 0.26 * rows).subplots()
    result.plot(head=column, of=of, ax=matrix)
    table = result.top(PAIRS, "abs_sii" if of == "sii" else "gap", column)
    text = f"{name} of token pairs of sample {record.id}, {head}; a dot marks intervals that exclude zero."
    return [axes, matrix], text, _without_numbers(table)


def _players(page: Page, record: SampleRecord) -> None:
    """What single tokens of a sample do: Shapley values where they were asked for, and importance."""
    result = record.interactions
    values = result.also.get(("SV", 1))
    if values is not None:
        explain_terms(page, "Shapley value")
        names = [result.player_names[player] for player in values.members[:, 0]]
        value, error = (part.reshape(len(names), -1)[:, 0] for part in (values.values, values.stderr))
        unit = unit_of(result.about)
        axes = waterfall(names, value, record.empty, record.full, errors=error, unit=unit)
        text = "From the value with no token to the value with all, by Shapley values of the probed tokens ± s.e."
        page.figure(axes, text, _without_numbers(_named_index(result, "SV", 1)))
    explain_terms(page, "Importance")
    frame = record.importance.assign(name=list(result.player_names))
    page.figure(importance_rows(frame, record.groups), "Importance of the tokens, by expert.", frame)


def _named_index(result: InteractionResult, name: str, order: int) -> pandas.DataFrame:
    """The table of a further index with the players' names."""
    table = result.index(name, order)
    for place, side in enumerate(side for side in "ij" if side in table):
        table.insert(place, f"name_{side}", [result.player_names[int(p)] for p in table[side]])
    return table


def _without_numbers(table: pandas.DataFrame) -> pandas.DataFrame:
    """A table of players that have names."""
    return table[[c for c in table.columns if c not in ("i", "j", "head")]]


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
