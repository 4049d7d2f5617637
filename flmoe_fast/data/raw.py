"""A data set as it was read: strings, paths of images and numbers, before any encoder."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.data.errors import DataError, Problems, problem
from flmoe_fast.data.splits import PARTS
from flmoe_fast.model.backbones import open_image

KINDS = ("text", "image", "table", "sequence")


@dataclass(frozen=True)
class RawData:
    """Samples of a data set.

    Attributes
    ----------
    name : str
    kinds : dict from modality to "text", "image", "table" or "sequence"
    values : dict from modality to N values
        Strings, paths, or a float32 array (N, F) for a table and (N, S, F) for a sequence.
    targets : Tensor (N,) int64 classes, (N, C) zeros and ones, or (N, 1) numbers
    task : "multiclass", "multilabel" or "regression"
    classes : tuple of C str
    ids : tuple of N str
    parts : dict from "train", "valid", "test" to int64 row numbers
    columns : dict from modality to F str
        Names of the columns of tables, where they are known.
    """

    name: str
    kinds: dict[str, str]
    values: dict[str, Sequence | np.ndarray]
    targets: torch.Tensor
    task: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    parts: dict[str, np.ndarray]
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for modality, values in self.values.items():
            if len(values) != len(self.ids):
                raise ArgumentError(f"values[{modality!r}]", f"{len(values)} values", f"{len(self.ids)}, one a sample")
        if set(self.parts) != set(PARTS):
            raise ArgumentError("parts", sorted(self.parts), f"exactly {', '.join(PARTS)}")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(self.kinds)

    def only(self, modalities: Sequence[str]) -> RawData:
        """The same samples with some of the modalities, in the given order."""
        wanted = tuple(modalities)
        if len(wanted) < 2 or len(set(wanted)) < len(wanted) or set(wanted) - set(self.kinds):
            raise ArgumentError("modalities", wanted, f"at least two of {', '.join(self.kinds)}, each once")
        return replace(
            self,
            kinds={name: self.kinds[name] for name in wanted},
            values={name: self.values[name] for name in wanted},
            columns={name: names for name, names in self.columns.items() if name in wanted},
        )


def read_json(path: str | os.PathLike) -> Any:
    """Content of a JSON file; errors name the file and the line."""
    path = existing(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError([problem(path, error.lineno, error.msg, "JSON")]) from error
    except RecursionError as error:
        raise DataError([problem(path, None, "lists in lists without end", "JSON of a data set")]) from error
    except ValueError as error:
        raise DataError([problem(path, None, str(error), "JSON in UTF-8")]) from error


def read_rows(path: str | os.PathLike, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of every row of a CSV file that must have ``columns``.

    A row with too few or too many fields raises :class:`DataError`.
    """
    path = existing(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, None)
            if header is None:
                raise DataError([problem(path, 1, "an empty file", f"a header with {', '.join(columns)}")])
            missing = [column for column in columns if column not in header]
            if missing:
                expected = f"a header with {', '.join(columns)}"
                raise DataError([problem(path, 1, f"no column {missing[0]!r} in {header}", expected)])
            twice = [name for name in columns or header if header.count(name) > 1]
            if twice:
                raise DataError([problem(path, 1, f"two columns {twice[0]!r}", "one column of each name")])
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError([problem(path, reader.line_num, f"{len(row)} fields", f"{len(header)}, as above")])
                yield reader.line_num, dict(zip(header, row))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError([problem(path, reader.line_num, str(error), "a row of UTF-8 CSV")]) from error


def existing(path: str | os.PathLike) -> Path:
    """``path``, or :class:`DataError` where there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise DataError([problem(path, None, "no such file", "a file of the data set")])
    return path


def usable_image(path: Path, problems: Problems, source: Path, line: int | None) -> bool:
    """Whether an image file is there and not empty; noted where it is not.

    Where broken samples are to be dropped it is decoded too, since nothing can be dropped later.
    """
    what = "no image"
    if path.is_file():
        if path.stat().st_size == 0:
            what = "an empty image"
        elif problems.broken == "raise" or not (what := _unreadable(path)):
            return True
    problems.add(source, line, f"{what} {path}", "an image file")
    return False


def _unreadable(path: Path) -> str:
    try:
        open_image(path)
    except ArgumentError as error:
        return f"no readable image ({error})"
    return ""


def number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def missing(text: str) -> bool:
    """Whether a field says that there is no value: nothing, or ``nan``."""
    return text.strip().lower() in ("", "nan")


def by_part(assigned: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Row numbers of every part as arrays."""
    return {name: np.array(assigned[name], dtype=np.int64) for name in PARTS}
