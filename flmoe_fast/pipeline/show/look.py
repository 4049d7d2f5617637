"""The look that all pictures share: style, the colours of curves, how names are shortened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

#: One colour and one marker per curve or expert: told apart with any kind of colour vision, on light and dark ground,
#: and none that means an interaction.
CURVES = (
    ("#8a5fbf", "o"),
    ("#00a087", "s"),
    ("#c47a2c", "^"),
    ("#5b7083", "D"),
    ("#c96ba8", "v"),
    ("#7d8a1e", "P"),
    ("#3aa3c9", "X"),
    ("#7a4b2a", "*"),
)
#: The mixture, beside its experts.
WHOLE = ("0.45", "o")
STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "legend.frameon": False}
STYLE["text.parse_math"] = False  # names are shown letter by letter, dollars and all


def curves_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every expert, the same in every figure, whether the mixture is beside them or not."""
    experts = [name for name in names if name != "mixture"]
    return dict(zip(experts, CURVES * 3)) | {name: WHOLE for name in names if name == "mixture"}


def styled(more: Mapping[Any, Any] | None = None):
    """The style of all pictures as a context, with further matplotlib parameters."""
    return matplotlib.rc_context({**STYLE, **(more or {})})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches that belongs to no window."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def shortened(text: str, most: int = 20) -> str:
    """A name of at most ``most`` letters."""
    return text if len(text) <= most else text[: most - 1] + "…"
