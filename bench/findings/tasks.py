"""Experiments as tasks that can be stopped: each makes one row, and a row that is there is not made again."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flmoe_fast.files import replacing


@dataclass(frozen=True)
class Task:
    """One row of an experiment.

    Attributes
    ----------
    experiment : str
        The module of this package whose function ``run(**settings)`` makes the row.
    name : str
        Of the row's file.
    settings : dict of JSON types
        A row of other settings is made anew.
    """

    experiment: str
    name: str
    settings: dict[str, Any]

    def path(self, out: Path) -> Path:
        """Where the row is kept."""
        return out / self.experiment / f"{self.name}.json"

    def row(self, out: Path) -> dict | None:
        """The row, if it is there."""
        path = self.path(out)
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return found if found["settings"] == self.settings else None


def work(task: Task, out: Path) -> dict:
    """Make a task's row, on one thread, and keep it."""
    torch.set_num_threads(1)
    made = importlib.import_module(f"bench.findings.{task.experiment}").run(**task.settings)
    row = {"experiment": task.experiment, "settings": task.settings, **made}
    path = task.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w") as file:
        json.dump(row, file)
    return row
