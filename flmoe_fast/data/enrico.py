"""ENRICO: screenshots and wireframes of apps, and their topic.

Layout: ``design_topics.csv`` (``screen_id``, ``topic``), ``screenshots/<id>.jpg`` and ``wireframes/<id>.png``.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch

from flmoe_fast.data.errors import Problems
from flmoe_fast.data.raw import RawData, by_part, missing, read_rows, usable_image

#: Screens whose published wireframes are damaged; they are left out before the split.
DAMAGED = frozenset({"50105", "50109"})
SPLIT_SEED = 42


def read_enrico(root: str | os.PathLike, *, broken: str = "raise") -> RawData:
    """Read the data set; 65, 15 and 20 % are for training, validation and test, in the published random order.

    Parameters
    ----------
    root
        Folder that holds ``design_topics.csv``.
    broken : "raise" or "drop"
        What to do with screens without a topic, a screenshot or a wireframe.
    """
    root, problems = Path(root), Problems(broken)
    table = root / "design_topics.csv"
    listed = [(line, row) for line, row in read_rows(table, ("screen_id", "topic"))]
    listed = [(line, row) for line, row in listed if row["screen_id"] not in DAMAGED]
    topics = sorted({row["topic"] for _, row in listed if not missing(row["topic"])})
    order = list(range(len(listed)))
    random.Random(SPLIT_SEED).shuffle(order)
    ends = int(len(order) * 0.65), int(len(order) * (0.65 + 0.15))
    ids: list[str] = []
    screens, wires, labels = [], [], []
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for place, index in enumerate(order):
        line, row = listed[index]
        screen = root / "screenshots" / f"{row['screen_id']}.jpg"
        wire = root / "wireframes" / f"{row['screen_id']}.png"
        if missing(row["topic"]):
            problems.add(table, line, "no topic", "a topic")
            continue
        both = [usable_image(image, problems, table, line) for image in (screen, wire)]
        if all(both):
            parts["train" if place < ends[0] else "valid" if place < ends[1] else "test"].append(len(ids))
            ids.append(row["screen_id"])
            screens.append(screen)
            wires.append(wire)
            labels.append(topics.index(row["topic"]))
    problems.settle()
    return RawData(
        "enrico",
        {"screenshot": "image", "wireframe": "image"},
        {"screenshot": screens, "wireframe": wires},
        torch.tensor(labels, dtype=torch.int64),
        "multiclass",
        tuple(topics),
        tuple(ids),
        by_part(parts),
    )
