"""ADNI, as prepared for I2MoE: brain image, genome, clinic and biospecimens of subjects, and their diagnosis.

Layout: ``label.csv`` (``PTID``, ``DIAGNOSIS`` from 1 to 3), ``PTID_splits.json`` with lists ``training``,
``validation`` and ``testing``, ``image/ADNI_G.npy`` (a row of grey-matter voxels for each line ``<PTID>_..._<date>`` of
``image/ADNI_subj.txt``), ``genomic/genomic_merged.h5ad`` (needs the extra ``data``), and
``clinical/clinical_merged_mean.csv`` and ``biospecimen/biospecimen_merged_mean.csv`` with the subject first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.data.errors import DataError, Problems, problem
from flmoe_fast.data.raw import RawData, by_part, existing, number, read_json, read_rows
from flmoe_fast.environment import require

MODALITIES = ("image", "genomic", "clinical", "biospecimen")
DIAGNOSES = ("cognitively normal", "mild cognitive impairment", "dementia")
#: Clinical columns that give the diagnosis away, by how their names begin.
LEAKS = ("PTCOGBEG", "PTADDX", "PTADBEG")
#: Bytes of the largest matrix that is read; the published one has a tenth of it.
LARGEST = 4 << 30
#: The program that reads HDF5, the seconds that it has, and how many bytes give it another one.
READER = Path(__file__).with_name("hdf5_process.py")
SECONDS, BYTES_A_SECOND = 30.0, 5e6


def read_adni(root: str | os.PathLike, *, modalities: Sequence[str] = MODALITIES, broken: str = "raise") -> RawData:
    """Read the data set.

    Every modality is a table: of an image, the voxels of the latest scan. Genomic columns are scaled to [-1, 1] on the
    training subjects, their gaps filled with the most frequent value.

    Parameters
    ----------
    root
        Folder that holds ``label.csv``.
    modalities
        Which to read, in this order.
    broken : "raise" or "drop"
        What to do with subjects that lack one of the modalities. Of the published data many do.
    """
    if not modalities or set(modalities) - set(MODALITIES):
        raise ArgumentError("modalities", tuple(modalities), f"some of {', '.join(MODALITIES)}")
    root, problems = Path(root), Problems(broken)
    table = root / "label.csv"
    labels, lines = {}, {}
    for line, row in read_rows(table, ("PTID", "DIAGNOSIS")):
        value = number(row["DIAGNOSIS"])
        if value not in (1.0, 2.0, 3.0):
            problems.add(table, line, f"DIAGNOSIS {row['DIAGNOSIS']!r}", "1, 2 or 3")
            continue
        labels[row["PTID"]], lines[row["PTID"]] = int(value) - 1, line
    splits = read_json(root / "PTID_splits.json")
    readers = {"image": _scans, "genomic": _genome, "clinical": _clinic, "biospecimen": _specimens}
    found = {name: readers[name](root) for name in modalities}
    ids = []
    for subject in labels:
        lacking = [name for name in modalities if subject not in found[name][0]]
        if lacking:
            problems.add(table, lines[subject], f"{subject} without {', '.join(lacking)}", "every modality")
        else:
            ids.append(subject)
    problems.settle()
    place = {subject: n for n, subject in enumerate(ids)}
    parts = by_part(
        {
            part: [place[name] for name in dict.fromkeys(map(str, splits.get(key, []))) if name in place]
            for part, key in (("train", "training"), ("valid", "validation"), ("test", "testing"))
        }
    )
    values: dict[str, Sequence | np.ndarray] = {}
    for name in modalities:
        rows, matrix = found[name]
        kept = np.asarray(matrix[[rows[subject] for subject in ids]], dtype=np.float32)
        values[name] = _scaled(kept, parts["train"]) if name == "genomic" else kept
    return RawData(
        "adni",
        dict.fromkeys(modalities, "table"),
        values,
        torch.tensor([labels[subject] for subject in ids], dtype=torch.int64),
        "multiclass",
        DIAGNOSES,
        tuple(ids),
        parts,
    )


def _scans(root: Path) -> tuple[dict[str, int], np.ndarray]:
    listing = existing(root / "image" / "ADNI_subj.txt")
    matrix = np.load(existing(root / "image" / "ADNI_G.npy"), mmap_mode="r", allow_pickle=False)
    latest: dict[str, tuple[str, int]] = {}
    names = listing.read_text(encoding="utf-8").split()
    if len(names) != len(matrix):
        raise DataError([problem(listing, None, f"{len(names)} scans", f"{len(matrix)}, the rows of ADNI_G.npy")])
    for row, name in enumerate(names):
        pieces = name.split("_")
        if len(pieces) < 4:
            raise DataError([problem(listing, row + 1, repr(name), "site_S_number_..._date")])
        subject, date = "_".join(pieces[:3]), pieces[-1]
        latest[subject] = max(latest.get(subject, ("", -1)), (date, row))
    return {subject: row for subject, (_, row) in latest.items()}, matrix


def _genome(root: Path) -> tuple[dict[str, int], np.ndarray]:
    return read_genome(root / "genomic" / "genomic_merged.h5ad")


def read_genome(path: str | os.PathLike) -> tuple[dict[str, int], np.ndarray]:
    """Row of every subject, and the dense float64 matrix, of an AnnData file.

    Raises
    ------
    DataError
        No such file, or one without ``obs`` and ``X``, with indices beyond its shape, or larger than :data:`LARGEST`;
        or one that the HDF5 library crashes on, or does not come to an end with.
    """
    require("h5py", "data")
    path = existing(path)
    try:
        names, layout, shape, arrays = _contents(path)
        matrix = arrays[0] if layout == "dense" else _from_sparse(layout, shape, arrays)
        matrix = matrix.astype(np.float64)
    except (OSError, LookupError, ValueError, TypeError, MemoryError) as error:
        raise DataError([problem(path, None, str(error), "an AnnData file with obs and X")]) from error
    if len(matrix) != len(names):
        raise DataError([problem(path, None, f"{len(matrix)} rows of X", f"{len(names)}, as obs has")])
    return {name: row for row, name in enumerate(names)}, matrix


def _contents(path: Path) -> tuple[list[str], str, list[int], list[np.ndarray]]:
    """Names of the rows, layout ("dense", "csr", "csc"), shape and arrays of X, which another process reads."""
    command = [sys.executable, "-P", str(READER), os.fspath(path), str(LARGEST)]
    seconds = SECONDS + path.stat().st_size / BYTES_A_SECOND
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        patience = threading.Timer(seconds, process.kill)
        patience.start()
        try:
            head = json.loads(process.stdout.readline())
            pipe = SimpleNamespace(read=process.stdout.read)  # NumPy would seek in what it takes for a file
            arrays = [np.lib.format.read_array(pipe) for _ in range(head["arrays"])]
        except ValueError:
            head, arrays = {"error": "a file that the HDF5 library does not read to its end"}, []
        finally:
            late = not patience.is_alive()
            patience.cancel()
            process.kill()
    if late:
        raise OSError(f"a file with which the HDF5 library is not done after {seconds:.0f} s")
    if "error" in head:
        raise OSError(head["error"])
    return head["names"], head["layout"], head.get("shape", []), arrays


def _from_sparse(layout: str, shape: Sequence[int], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The dense matrix of compressed rows or columns, whose indices are checked: scipy writes where they point."""
    from scipy.sparse import csc_matrix, csr_matrix

    rows, columns = shape
    if min(rows, columns) < 0 or rows * columns * 8 > LARGEST:
        raise ValueError(f"a sparse X of shape {rows, columns}, more than {LARGEST >> 30} GiB")
    data, indices, starts = arrays
    if data.dtype.kind not in "fiub" or indices.dtype.kind not in "iu" or starts.dtype.kind not in "iu":
        raise ValueError("a sparse X whose data or indices are no numbers")
    matrix = (csc_matrix if layout == "csc" else csr_matrix)((data, indices, starts), shape=(rows, columns))
    matrix.check_format(full_check=True)
    return matrix.toarray()


def _clinic(root: Path) -> tuple[dict[str, int], np.ndarray]:
    return _numbers(root / "clinical" / "clinical_merged_mean.csv", LEAKS)


def _specimens(root: Path) -> tuple[dict[str, int], np.ndarray]:
    return _numbers(root / "biospecimen" / "biospecimen_merged_mean.csv", ())


def _numbers(path: Path, left_out: tuple[str, ...]) -> tuple[dict[str, int], np.ndarray]:
    """Subjects of the first column and the numbers of the others."""
    rows: list[list[float | None]] = []
    place: dict[str, int] = {}
    for line, row in read_rows(path, ()):
        (_, subject), *fields = row.items()
        values = [number(text) for name, text in fields if not name.startswith(left_out or ("\0",))]
        if None in values:
            raise DataError([problem(path, line, f"{subject} with a field that is no number", "finite numbers")])
        place[subject] = len(rows)
        rows.append(values)
    return place, np.array(rows, dtype=np.float64).reshape(len(rows), -1)


def _scaled(matrix: np.ndarray, train: np.ndarray) -> np.ndarray:
    matrix = matrix.copy()
    for column in matrix.T:
        gaps = np.isnan(column)
        if gaps.any():
            seen, counts = np.unique(column[~gaps], return_counts=True)
            column[gaps] = seen[counts.argmax()] if len(seen) else 0.0
    some = matrix[train] if len(train) else matrix
    low, high = some.min(0), some.max(0)
    return 2.0 * (matrix - low) / np.where(high > low, high - low, 1.0) - 1.0
