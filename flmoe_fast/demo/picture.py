"""The demonstration in one picture: pairs on the image, the matrix of pairs, importance per expert, masking."""

from __future__ import annotations

import os
from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.pipeline.explain import Explanation
from flmoe_fast.pipeline.faithful.masking import MaskingCurve
from flmoe_fast.pipeline.show.curves import masking_lines
from flmoe_fast.pipeline.show.look import styled
from flmoe_fast.pipeline.show.pair_view import pair_view
from flmoe_fast.pipeline.show.player_views import importance_rows
from flmoe_fast.pipeline.show.views import View


def draw(
    path: str | os.PathLike,
    explanation: Explanation,
    halves: tuple[Tensor, Tensor],
    title: str,
    curves: Mapping[str, MaskingCurve],
) -> None:
    """Write the picture as PNG.

    Parameters
    ----------
    path
    explanation : Explanation
        Of a model whose two modalities have one token per row of ``halves``.
    halves : two tensors (T, pixels) in [0, 1]
    title : str
        What the image shows.
    curves : name of a ranking to its masking curve
    """
    game = explanation.game
    assert isinstance(game, TokenGame)
    names = game.problem.model.config.modalities
    views = [
        View(f"{name} half", "image", tuple(f"row {row}" for row in range(len(half))), half.numpy(), (len(half), 1))
        for name, half in zip(names, halves)
    ]
    with styled():
        figure = Figure(figsize=(16, 5.4), dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=(1.05, 1.0, 1.15))[0]
        axes = pair_view(explanation.interactions, game.positions, views, axes=left.subplots())
        axes.set_title(title)
        axes = middle.subplots()
        explanation.interactions.plot(head=0, ax=axes)
        axes.set_title("Shapley interaction of every pair (mixture)")
        axes.set_xlabel("dot: the 95 % interval excludes zero", labelpad=7)
        axes.tick_params(length=0)
        above, below = right.subplots(2, 1, height_ratios=(1.0, 1.6))
        importance_rows(explanation.importance_dataframe(), game.groups, above)
        masking_lines(curves, "images", "of the probability", below)
        figure.savefig(path)
