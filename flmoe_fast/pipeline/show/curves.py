"""Curves: losses by epoch, faithfulness by share of tokens, masking by number of pairs, with what they spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flmoe_fast.checks import one_of
from flmoe_fast.pipeline.faithful.masking import MaskingCurve
from flmoe_fast.pipeline.show.look import CURVES, new_figure
from flmoe_fast.probes.pictures import literal

if TYPE_CHECKING:
    import pandas

#: How what the curves are compared with is drawn.
RANDOM: dict[str, Any] = {"markerfacecolor": "none", "linestyle": "--", "linewidth": 1.0}


@literal
def loss_lines(history: Sequence[Mapping], axes: Axes | None = None) -> Axes:
    """Total and task loss by epoch, and the validation part's task loss where every epoch has one.

    ``history`` is what :func:`flmoe_fast.model.training.fit` returned.
    """
    axes = axes or new_figure(4.8, 3.3).subplots()
    lines = {name.replace("_", " "): [record[name] for record in history] for name in ("loss", "task_loss")}
    if history and all("validation" in record for record in history):
        lines["validation task loss"] = [record["validation"]["loss"] for record in history]
    return _by_epoch(axes, history, lines, "Losses")


@literal
def interaction_loss_lines(history: Sequence[Mapping], expert_names: Sequence[str], axes: Axes | None = None) -> Axes:
    """The interaction loss of every expert by epoch."""
    axes = axes or new_figure(4.8, 3.3).subplots()
    lines = {name: [r["interaction_losses"][number] for r in history] for number, name in enumerate(expert_names)}
    return _by_epoch(axes, history, lines, "Interaction losses")


def _by_epoch(axes: Axes, history: Sequence[Mapping], lines: Mapping[str, Sequence[float]], title: str) -> Axes:
    epochs = [record["epoch"] for record in history]
    for (name, values), (colour, marker) in zip(lines.items(), CURVES * 3):
        axes.plot(epochs, values, color=colour, marker=marker, markersize=3, label=name)
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8)
    return axes


@literal
def masking_lines(
    curves: Mapping[str, MaskingCurve], what: str = "samples", unit: str = "of the value", axes: Axes | None = None
) -> Axes:
    """Mean drop against the number of masked pairs, with standard errors over samples; dashed: random tokens."""
    axes = axes or new_figure(5.2, 3.9).subplots()
    samples = 0
    for (name, curve), (colour, marker) in zip(curves.items(), CURVES):
        x = np.arange(len(curve.most))
        samples = curve.samples
        look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3}
        axes.errorbar(x, curve.top, curve.top_stderr, label=f"top pairs by {name}", **look)
        axes.errorbar(x, curve.random, curve.random_stderr, label=f"as many random ({name})", **look, **RANDOM)
        axes.set_xticks(x, [str(most) for most in curve.most])
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("pairs masked")
    axes.set_ylabel(f"drop {unit}")
    axes.set_title(f"Masking the top pairs: mean of {samples} {what} ± s.e.")
    return _below(axes)


@literal
def masking_accuracy(scores: Mapping[str, pandas.DataFrame], axes: Axes | None = None) -> Axes:
    """Accuracy by number of masked pairs, as :func:`masking_scores` gives it; dashed: random tokens ± their spread."""
    axes = axes or new_figure(5.2, 3.9).subplots()
    for (name, table), (colour, marker) in zip(scores.items(), CURVES):
        x = np.arange(len(table))
        look: dict[str, Any] = {"color": colour, "marker": marker}
        axes.plot(x, table["accuracy_top"], label=f"top pairs by {name}", **look)
        spread = table["accuracy_random_std"]
        axes.errorbar(
            x, table["accuracy_random"], spread, label=f"as many random ({name})", capsize=3, **look, **RANDOM
        )
        axes.set_xticks(x, [str(pairs) for pairs in table["pairs"]])
    axes.set_xlabel("pairs masked")
    axes.set_ylabel("accuracy")
    axes.set_title("Accuracy ± spread over draws")
    return _below(axes)


@literal
def faithfulness_lines(tables: Mapping[str, pandas.DataFrame], of: str, axes: Axes | None = None) -> Axes:
    """Comprehensiveness or sufficiency (``of``) by percentage: identified solid, random dashed, a colour a table.

    Error bars are standard errors over samples, where a table has them.
    """
    one_of("of", of, ("comprehensiveness", "sufficiency"))
    axes = axes or new_figure(5.2, 3.9).subplots()
    for (label, table), (colour, marker) in zip(tables.items(), CURVES * 3):
        for kind, name in (("identified", label), ("random", f"{label}, random")):
            spread = table.get(f"{of}_prob_stderr_{kind}")
            look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
            look |= RANDOM if kind == "random" else {}
            axes.errorbar(table["K_percent"], table[f"{of}_prob_mean_{kind}"], spread, label=name, capsize=3, **look)
    percents = sorted({percent for table in tables.values() for percent in table["K_percent"]})
    axes.set_xticks(percents, [f"{percent:g}" for percent in percents])
    better = "higher is better" if of == "comprehensiveness" else "lower is better"
    axes.set_title(f"{of.capitalize()} ({better})")
    axes.set_xlabel("tokens of each modality, %")
    axes.set_ylabel("drop of the probability")
    return _below(axes)


def _below(axes: Axes) -> Axes:
    """A grid, and the legend below."""
    axes.grid(axis="y", color="0.5", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncol=2, frameon=False, fontsize=8)
    return axes
