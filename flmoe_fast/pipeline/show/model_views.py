"""What a mixture's experts say: routing weights and logits over a data set, and of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from flmoe_fast.pipeline.show.look import CURVES, new_figure, shortened
from flmoe_fast.probes.pictures import literal


@literal
def routing_violins(weights: np.ndarray, expert_names: Sequence[str], axes: Axes | None = None) -> Axes:
    """Distribution of the routing weights (N, E) over samples, one violin an expert, with its mean."""
    axes = axes or new_figure(1.3 * len(expert_names) + 1.2, 3.4).subplots()
    columns = np.asarray(weights, float).T
    spots = range(len(expert_names))
    drawn = axes.violinplot(list(columns), positions=list(spots), showmeans=True)
    bodies: Any = drawn["bodies"]
    for body, (colour, _) in zip(bodies, CURVES * 3):
        body.set_facecolor(colour)
        body.set_alpha(0.6)
    for part in ("cmeans", "cmins", "cmaxes", "cbars"):
        drawn[part].set_color("0.5")
    for spot, column in zip(spots, columns):
        axes.annotate(f"{column.mean():.2f}", (spot, column.mean()), (6, 3), textcoords="offset points", fontsize=8)
    axes.set_xticks(list(spots), [name.replace(": ", ":\n") for name in expert_names])
    axes.set_ylabel("routing weight")
    axes.set_title(f"Routing weights of {len(weights)} samples")
    return axes


@literal
def logit_histogram(logits: np.ndarray, expert_names: Sequence[str], name: str, axes: Axes | None = None) -> Axes:
    """Distribution of every expert's logit (N, E) of one class, as outlines over shared bins."""
    axes = axes or new_figure(3.8, 3.2).subplots()
    edges = np.histogram_bin_edges(logits, 20).tolist()
    for column, (expert, (colour, _)) in zip(np.asarray(logits, float).T, zip(expert_names, CURVES * 3)):
        axes.hist(column, bins=edges, histtype="step", color=colour, linewidth=1.6, label=expert)
    axes.set_title(shortened(name), fontsize=9)
    axes.set_xlabel("logit")
    axes.set_ylabel("samples")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncol=2)
    return axes


@literal
def expert_bars(
    expert_logits: np.ndarray,
    weights: np.ndarray,
    expert_names: Sequence[str],
    classes: Sequence[str],
    most: int = 6,
    axes: Axes | None = None,
) -> Axes:
    """One sample: every expert's routing weight times its logits (E, C), and their sum, the mixture's.

    The ``most`` classes with the largest mixture logits are shown; names of experts carry their routing weight (E,).
    """
    parts = weights[:, None] * expert_logits
    mixed = parts.sum(0)
    shown = np.argsort(-mixed, kind="stable")[:most]
    axes = axes or new_figure(5.6, 3.4).subplots()
    spots = np.arange(len(shown))
    thick = 0.8 / (len(expert_names) + 1)
    bars = [(f"{name} ({weight:.2f})", part) for name, weight, part in zip(expert_names, weights, parts)]
    colours = [colour for colour, _ in (CURVES * 3)[: len(bars)]]
    for number, ((name, part), colour) in enumerate(zip([*bars, ("mixture (sum)", mixed)], [*colours, "0.35"])):
        offset = (number - len(bars) / 2) * thick
        axes.bar(spots + offset, part[shown], thick, color=colour, label=name)
    axes.set_xticks(spots, [shortened(classes[c], 12) for c in shown], rotation=30, ha="right", fontsize=8)
    axes.axhline(0.0, color="0.5", linewidth=0.6)
    axes.set_ylabel("routing weight x logit")
    axes.set_title("What every expert adds")
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncol=2)
    return axes
