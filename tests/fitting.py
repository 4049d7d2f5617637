"""Training runs of tests, with data and settings as plain arguments."""

from __future__ import annotations

from typing import Any

from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit

#: What is given beside the settings.
BESIDE = ("validation", "checkpoint", "log", "callback")


def fitted(model, inputs, masks, targets, **options: Any) -> list[dict]:
    """The history of a run without a progress bar; options are settings, or what is given beside them."""
    beside = {name: options.pop(name) for name in BESIDE if name in options}
    return fit(model, Examples(inputs, masks, targets), FitSettings(**options), **beside, progress=False)
