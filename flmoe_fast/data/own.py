"""Data of one's own: a CSV file with texts, paths of images and numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.data.errors import DataError, Problems, problem
from flmoe_fast.data.raw import RawData, by_part, missing, number, read_rows, usable_image
from flmoe_fast.data.splits import PARTS
from flmoe_fast.model.config import TASKS

SHARES = (0.7, 0.15, 0.15)


def read_own(
    path: str | os.PathLike,
    modalities: Mapping[str, Mapping[str, str | Sequence[str]]],
    *,
    target: str,
    task: str = "multiclass",
    split: str | None = None,
    id: str | None = None,
    separator: str = ";",
    seed: int = 0,
    broken: str = "raise",
) -> RawData:
    """Read a CSV file with a header, one sample a row.

    Parameters
    ----------
    path
        The file. Paths of images in it are relative to its folder.
    modalities : dict from name to one of ``{"text": column}``, ``{"image": column}``, ``{"table": [column, ...]}``
        In the order of the model.
    target : str
        Column with the class, the classes (``"multilabel"``, separated by ``separator``, possibly none) or the number.
        An empty class and ``nan``, which is what a table without one becomes, are no classes but broken rows.
    task : "multiclass", "multilabel" or "regression"
    split : str, optional
        Column with ``train``, ``valid`` or ``test``. Without it 70, 15 and 15 %, drawn by ``seed``; of classes the
        same share each.
    id : str, optional
        Column that names the samples; the line number by default.
    broken : "raise" or "drop"
        What to do with rows with an empty text, a missing image, or no number where one should be.

    Returns
    -------
    RawData
    """
    one_of("task", task, TASKS)
    for name, column in (("target", target), ("split", split), ("id", id), ("separator", separator)):
        if not isinstance(column, str) and (column is not None or name in ("target", "separator")):
            raise ArgumentError(name, repr(column), "a text" if name == "separator" else "the name of a column")
    path, problems = Path(path), Problems(broken)
    wanted = _columns(modalities)
    needed = [column for _, columns in wanted.values() for column in columns]
    rows = list(read_rows(path, [*needed, target, *([split] if split else []), *([id] if id else [])]))
    classes = _classes(rows, target, task, separator)
    ids, labels, places = [], [], []
    values: dict[str, list] = {name: [] for name in wanted}
    for line, row in rows:
        found = {name: _value(path, line, row, kind, columns, problems) for name, (kind, columns) in wanted.items()}
        label = _label(row[target], task, classes, separator)
        if label is None:
            problems.add(path, line, f"{target} {row[target]!r}", "a number" if task == "regression" else "a class")
        part = row[split] if split else None
        if part is not None and part not in PARTS:
            problems.add(path, line, f"{split} {part!r}", f"one of {', '.join(PARTS)}")
        elif label is not None and all(value is not None for value in found.values()):
            ids.append(row[id] if id else str(line))
            labels.append(label)
            places.append(part)
            for name, value in found.items():
                values[name].append(value)
    problems.settle()
    if not ids:
        raise DataError([problem(path, None, "no usable row", "at least one sample")])
    targets = torch.tensor(labels, dtype=torch.float32 if task == "regression" else torch.int64)
    parts = _drawn(labels, task, seed) if split is None else _given(places)
    tables = {name: np.array(values[name], dtype=np.float32) for name, (kind, _) in wanted.items() if kind == "table"}
    return RawData(
        path.stem,
        {name: kind for name, (kind, _) in wanted.items()},
        {**values, **tables},
        targets[:, None] if task == "regression" else targets,
        task,
        classes,
        tuple(ids),
        parts,
        {name: tuple(columns) for name, (kind, columns) in wanted.items() if kind == "table"},
    )


def _columns(modalities: Mapping) -> dict[str, tuple[str, list[str]]]:
    wanted, expected = {}, "{'text': column}, {'image': column} or {'table': [columns]}"
    if not isinstance(modalities, Mapping) or not modalities:
        raise ArgumentError("modalities", repr(modalities), f"by name {expected}")
    for name, source in modalities.items():
        kinds = [kind for kind in ("text", "image", "table") if isinstance(source, Mapping) and kind in source]
        if not kinds or len(source) != 1:
            raise ArgumentError(f"modalities[{name!r}]", repr(source), expected)
        columns = [source[kinds[0]]] if isinstance(source[kinds[0]], str) else source[kinds[0]]
        if not isinstance(columns, Sequence) or not columns or not all(isinstance(column, str) for column in columns):
            raise ArgumentError(f"modalities[{name!r}]", repr(source), expected)
        wanted[name] = (kinds[0], list(columns))
    return wanted


def _classes(rows: list, target: str, task: str, separator: str) -> tuple[str, ...]:
    if task == "regression":
        return (target,)
    texts = [row[target] for _, row in rows]
    named = [text for text in texts if not missing(text)]
    names = {t.strip() for text in named for t in (text.split(separator) if task == "multilabel" else [text])} - {""}
    return tuple(sorted(names, key=lambda name: (number(name) is None, number(name) or 0.0, name)))


def _label(text: str, task: str, classes: tuple[str, ...], separator: str) -> int | float | list[int] | None:
    if task == "regression":
        return number(text)
    if task == "multilabel":
        if text.strip() and missing(text):
            return None
        named = {name.strip() for name in text.split(separator)}
        return [int(name in named) for name in classes]
    return None if missing(text) else classes.index(text.strip())


def _value(path: Path, line: int, row: dict, kind: str, columns: list[str], problems: Problems) -> object:
    if kind == "table":
        numbers = [number(row[column]) for column in columns]
        wrong = [column for column, value in zip(columns, numbers) if value is None]
        if wrong:
            problems.add(path, line, f"{wrong[0]} {row[wrong[0]]!r}", "a number")
        return None if wrong else numbers
    text = row[columns[0]]
    if not text.strip():
        problems.add(path, line, f"no {columns[0]}", "a text" if kind == "text" else "the path of an image")
        return None
    if kind == "text":
        return text
    image = path.parent / text
    return image if usable_image(image, problems, path, line) else None


def _given(places: list) -> dict[str, np.ndarray]:
    return by_part({part: [row for row, place in enumerate(places) if place == part] for part in PARTS})


def _drawn(labels: list, task: str, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(integer("seed", seed, least=0))
    groups: dict[object, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(label if task == "multiclass" else None, []).append(row)
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    for rows in groups.values():
        order = random.permutation(rows).tolist()
        first = round(SHARES[0] * len(order))
        second = first + round(SHARES[1] * len(order))
        for part, some in zip(PARTS, (order[:first], order[first:second], order[second:])):
            parts[part] += some
    return by_part({part: sorted(rows) for part, rows in parts.items()})
