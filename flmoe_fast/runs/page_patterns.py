"""Sections of a report about what tells experts apart: routing, experts alone, concentration and specificity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas

from flmoe_fast.pipeline.importance.overlap import RANKS
from flmoe_fast.pipeline.importance.patterns import Patterns, pair_patterns
from flmoe_fast.pipeline.records import SampleRecord
from flmoe_fast.pipeline.routing import experts_alone, routing_follows, routing_table
from flmoe_fast.pipeline.show.html import Page
from flmoe_fast.pipeline.show.model_views import routing_violins
from flmoe_fast.pipeline.show.pattern_views import alone_bars, concentration_lines, overlap_matrix
from flmoe_fast.runs.terms import explain_terms


def routing_figures(
    page: Page, predictions: Mapping[str, np.ndarray], experts: Sequence[str], classes: Sequence[str], task: str
) -> None:
    """Distribution of the routing weights, whether they follow the class, and every expert alone."""
    weights, targets = predictions["weights"], predictions["targets"]
    explain_terms(page, "Routing weight")
    text = "How much the mixture listens to every expert, test part."
    page.figure(routing_violins(weights, experts), text, routing_table(weights, experts))
    labels = [classes[int(c)] for c in targets] if task == "multiclass" and targets.ndim == 1 else []
    if len(experts) > 1 and 2 <= len(set(labels)) < len(labels):
        found = routing_follows(weights, labels)
        explain_terms(page, "Following")
        page.text(
            f"Of the variation of routing weights {100 * found['between']:.1f} % lies between classes; "
            f"{100 * found['chance']:.1f} % by chance (p = {found['p']:.3f}). Weights vary by {found['spread']:.3f} "
            "from sample to sample."
        )
        page.table("Routing weights by class", routing_table(weights, experts, labels))
    alone = experts_alone(predictions["expert_logits"], weights, targets, experts, task)
    text = "Every expert alone against the mixture, test part; the s.e. is of the difference to the mixture, paired."
    page.figure(alone_bars({"test part": alone}), text, alone)


def patterns_section(
    page: Page,
    patterns: Mapping[str, Patterns],
    records: Sequence[SampleRecord],
    compared: Mapping[str, pandas.DataFrame],
) -> None:
    """How concentrated experts' importance is, and how much they agree about tokens and about pairs."""
    pairs = _of_pairs(records)
    if not patterns and pairs is None:
        return
    page.section("Concentration and specificity")
    explain_terms(page, "Concentration", "Specificity")
    for method, found in patterns.items():
        table = found.to_dataframe()
        pictures = [concentration_lines(table)]
        if len(found.parts) > 1:
            pictures.append(overlap_matrix(found.matrix(), found.names, "Rank correlation of maps"))
        text = f"Importance of tokens by {method}: means of {len(found.ids)} samples."
        page.figure(pictures, text, table)
    for name, table in compared.items():
        page.table(f"Against {name}, paired", table)
    if pairs is not None:
        text = (
            "Which expert ranks which pairs, by the size of the Shapley interaction, over the explained samples; on "
            "the diagonal an expert with itself, estimated anew."
        )
        axes = overlap_matrix(pairs.matrix(), pairs.names, "Rank correlation of pairs")
        page.figure(axes, text, pairs.to_dataframe())


def _of_pairs(records: Sequence[SampleRecord]) -> Patterns | None:
    """Patterns of the experts' pairs; None where there is no expert, or no two pairs to rank."""
    if not records:
        return None
    first = records[0]
    experts = [name for name in first.experts if name in (first.interactions.heads or ())]
    if len(experts) < 2 or any(len(record.interactions.pairs) < 2 for record in records):
        return None
    results = [record.interactions for record in records]
    return pair_patterns(results, experts, [record.id for record in records])


def specificity_line(method: str, found: Patterns) -> str:
    """What a run's maps say, for the terminal."""
    means = found.to_dataframe()
    whole = means[means["map"] == ""].set_index("measure")
    parts = [f"{method:10}"]
    if found.whole is not None:
        gini = whole.loc[f"gini of {found.whole}"]
        parts.append(f"Gini of {found.whole} {gini['mean']:.3f} ± {gini['stderr']:.3f}")
    if len(found.parts) > 1:
        ranks = whole.loc[RANKS]
        parts.append(f"Gini of its {len(found.parts)} parts {whole.loc['gini', 'mean']:.3f}")
        parts.append(f"rank correlation of parts {ranks['mean']:+.3f} ± {ranks['stderr']:.3f}")
    return "  ".join(parts)
