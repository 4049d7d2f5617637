"""CMU-MOSI: seconds of video, speech and words, and how positive the speaker is (-3 to 3).

Layout: ``mosi_data.pkl``, a pickle with ``train``, ``valid`` and ``test``, each a dict of arrays ``vision``
(N, 50, 20), ``audio`` (N, 50, 5), ``text`` (N, 50, 300), ``labels`` (N, 1, 1) and ``id``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flmoe_fast.checks import one_of
from flmoe_fast.data.errors import DataError, Problems, problem
from flmoe_fast.data.pickles import read_pickle
from flmoe_fast.data.raw import RawData, by_part
from flmoe_fast.data.splits import PARTS

MODALITIES = ("vision", "audio", "text")


def read_mosi(root: str | os.PathLike, *, task: str = "regression", broken: str = "raise") -> RawData:
    """Read the data set. Numbers that are not finite (silence has some in ``audio``) become 0.

    Parameters
    ----------
    root
        Folder that holds ``mosi_data.pkl``, or the file.
    task : "regression" or "multiclass"
        The score itself, or whether it is positive.
    broken : "raise" or "drop"
        What to do with clips without a word, or a label that is no number. The published data have some.
    """
    one_of("task", task, ("regression", "multiclass"))
    path, problems = Path(root), Problems(broken)
    path = path / "mosi_data.pkl" if path.is_dir() else path
    content = read_pickle(path)
    values: dict[str, list[np.ndarray]] = {name: [] for name in MODALITIES}
    ids: list[str] = []
    labels: list[float] = []
    parts: dict[str, list[int]] = {}
    for part in PARTS:
        arrays: Any = content.get(part) if isinstance(content, dict) else None
        missing = [k for k in (*MODALITIES, "labels") if not isinstance(arrays, dict) or k not in arrays]
        if missing:
            raise DataError([problem(path, None, f"no {missing[0]} under {part}", "arrays of every modality")])
        found = {name: np.asarray(arrays[name], dtype=np.float32) for name in MODALITIES}
        scores = np.asarray(arrays["labels"], dtype=np.float64).reshape(len(found["text"]), -1)[:, 0]
        for name, array in found.items():
            if array.ndim != 3 or len(array) != len(scores):
                got = f"shape {array.shape} of {name} under {part}"
                raise DataError([problem(path, None, got, f"({len(scores)}, steps, features)")])
        parts[part] = []
        for row, score in enumerate(scores):
            if not np.isfinite(score):
                problems.add(path, None, f"label {score} of {part}[{row}]", "a number")
            elif not found["text"][row].any():
                problems.add(path, None, f"no word in {part}[{row}]", "a clip with words")
            else:
                parts[part].append(len(ids))
                ids.append(_clip(arrays.get("id"), part, row))
                labels.append(float(score))
                for name, array in found.items():
                    values[name].append(np.nan_to_num(array[row], nan=0.0, posinf=0.0, neginf=0.0))
    problems.settle()
    targets = torch.tensor(labels, dtype=torch.float32)
    return RawData(
        "mosi",
        dict.fromkeys(MODALITIES, "sequence"),
        {name: np.stack(rows) for name, rows in values.items()},
        targets[:, None] if task == "regression" else (targets > 0).long(),
        task,
        ("sentiment",) if task == "regression" else ("not positive", "positive"),
        tuple(ids),
        by_part(parts),
    )


def _clip(names: Any, part: str, row: int) -> str:
    if names is None:
        return f"{part}[{row}]"
    name = np.asarray(names[row]).ravel()
    return "".join(text.decode() if isinstance(text, bytes) else str(text) for text in name.tolist())
