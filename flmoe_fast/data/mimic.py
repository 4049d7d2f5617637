"""MIMIC-IV, as prepared for I2MoE and FL-I2MoE: laboratory values, notes and codes of patients, and mortality.

Layout: ``labels.csv`` (``subject_id``, ``one_year_mortality``), ``lab_x.pt`` and ``code_x.pt`` (matrices of
``torch.save`` with a row for each line of the labels), ``note_texts_last256tok.csv`` (``subject_id``, ``text``) and
``PTID_splits_mimic_processed.json`` with lists ``training``, ``validation`` and ``testing`` of subjects.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from flmoe_fast.data.errors import DataError, Problems, problem
from flmoe_fast.data.pickles import read_matrix
from flmoe_fast.data.raw import RawData, by_part, read_json, read_rows


def read_mimic(root: str | os.PathLike, *, broken: str = "raise") -> RawData:
    """Read the data set. NaNs of the matrices become 0.

    Parameters
    ----------
    root
        Folder with the files.
    broken : "raise" or "drop"
        What to do with patients without a label or a note.
    """
    root, problems = Path(root), Problems(broken)
    table = root / "labels.csv"
    listed = list(read_rows(table, ("subject_id", "one_year_mortality")))
    matrices = {name: read_matrix(root / f"{name}_x.pt") for name in ("lab", "code")}
    for name, matrix in matrices.items():
        if len(matrix) != len(listed):
            got = f"{len(matrix)} rows"
            raise DataError([problem(root / f"{name}_x.pt", None, got, f"{len(listed)}, as {table.name} has")])
    notes_file = root / "note_texts_last256tok.csv"
    notes = {row["subject_id"]: (line, row["text"]) for line, row in read_rows(notes_file, ("subject_id", "text"))}
    rows, ids, texts, labels = [], [], [], []
    for n, (line, row) in enumerate(listed):
        subject = row["subject_id"]
        at, text = notes.get(subject, (None, ""))
        if row["one_year_mortality"] not in ("0", "1"):
            problems.add(table, line, f"one_year_mortality {row['one_year_mortality']!r}", "0 or 1")
        elif not text.strip():
            problems.add(notes_file, at, f"no note of subject {subject}", "a text for every subject")
        else:
            rows.append(n)
            ids.append(subject)
            texts.append(text)
            labels.append(int(row["one_year_mortality"]))
    splits = read_json(root / "PTID_splits_mimic_processed.json")
    number = {name: n for n, name in enumerate(ids)}
    parts = {
        part: [number[name] for name in dict.fromkeys(map(str, splits.get(key, []))) if name in number]
        for part, key in (("train", "training"), ("valid", "validation"), ("test", "testing"))
    }
    problems.settle()
    kept = np.array(rows, dtype=np.int64)
    return RawData(
        "mimic",
        {"lab": "table", "note": "text", "code": "table"},
        {"lab": matrices["lab"][kept], "note": texts, "code": matrices["code"][kept]},
        torch.tensor(labels, dtype=torch.int64),
        "multiclass",
        ("survived", "died"),
        tuple(ids),
        by_part(parts),
    )
