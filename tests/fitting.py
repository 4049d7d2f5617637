"""Training runs of tests, with data and settings as plain arguments."""

from __future__ import annotations

from typing import Any

from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit


def fitted(model, inputs, masks, targets, *, validation=None, checkpoint=None, log=None, **settings: Any) -> list[dict]:
    """The history of a run without a progress bar."""
    files = {"validation": validation, "checkpoint": checkpoint, "log": log}
    return fit(model, Examples(inputs, masks, targets), FitSettings(**settings), **files, progress=False)
