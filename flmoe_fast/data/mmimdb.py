"""MM-IMDb: plots and posters of films, and their genres.

Layout: ``dataset/<id>.json`` with ``plot`` (list of texts, of which the first is used) and ``genres``, beside
``dataset/<id>.jpeg``; ``split.json`` with lists ``train``, ``dev`` and ``test`` of ids is read on request.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from flmoe_fast.checks import one_of
from flmoe_fast.data.errors import DataError, Problems, problem
from flmoe_fast.data.raw import RawData, by_part, read_json, usable_image

#: Genres in the order of the labels.
GENRES = (
    "drama comedy romance thriller crime action adventure horror documentary mystery sci-fi music fantasy family "
    "biography war history animation musical western sport short film-noir"
).split()
#: Samples of the published data and the ends of its training and validation part, in the order of the ids.
PUBLISHED_SIZE, PUBLISHED_ENDS = 25_959, (15_552, 18_160)


def read_mmimdb(root: str | os.PathLike, *, split: str = "contiguous", broken: str = "raise") -> RawData:
    """Read the data set.

    Parameters
    ----------
    root
        Folder that holds ``dataset``.
    split : "contiguous" or "official"
        Ranges of the sorted ids (15,552 / 2,608 / 7,799 of the published data, the same shares of other sizes), as
        FL-I2MoE uses, or those of ``split.json``.
    broken : "raise" or "drop"
        What to do with films without a plot, a poster or readable JSON.
    """
    one_of("split", split, ("contiguous", "official"))
    folder, problems = Path(root) / "dataset", Problems(broken)
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError([problem(folder, None, "no .json file", "one for each film")])
    ids, plots, posters, labels = [], [], [], []
    for file in files:
        try:
            film = read_json(file)
        except DataError as error:
            problems.found += error.problems
            continue
        plot = film.get("plot") if isinstance(film, dict) else None
        genres = film.get("genres") if isinstance(film, dict) else None
        if not isinstance(plot, list) or not plot or not isinstance(plot[0], str) or not plot[0].strip():
            problems.add(file, None, "no plot", "a list of texts under plot")
        elif not isinstance(genres, list) or not all(isinstance(genre, str) for genre in genres):
            problems.add(file, None, "no genres", "a list of names under genres")
        elif usable_image(file.with_suffix(".jpeg"), problems, file, None):
            ids.append(file.stem)
            plots.append(plot[0])
            posters.append(file.with_suffix(".jpeg"))
            named = {genre.lower() for genre in genres}
            labels.append([int(genre in named) for genre in GENRES])
    problems.settle()
    parts = _contiguous(files, ids) if split == "contiguous" else _official(Path(root), ids, problems)
    return RawData(
        "mmimdb",
        {"language": "text", "img": "image"},
        {"language": plots, "img": posters},
        torch.tensor(labels, dtype=torch.int64).reshape(len(ids), len(GENRES)),
        "multilabel",
        tuple(GENRES),
        tuple(ids),
        parts,
    )


def _contiguous(files: list[Path], ids: list[str]) -> dict[str, np.ndarray]:
    # By the place among all files, so that leaving out a broken one moves no other film to another part.
    total = len(files)
    first, second = PUBLISHED_ENDS if total == PUBLISHED_SIZE else (round(0.599 * total), 0)
    second = second or first + round(0.1 * total)
    place = {file.stem: n for n, file in enumerate(files)}
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for row, name in enumerate(ids):
        parts["train" if place[name] < first else "valid" if place[name] < second else "test"].append(row)
    return by_part(parts)


def _official(root: Path, ids: list[str], problems: Problems) -> dict[str, np.ndarray]:
    listed = read_json(root / "split.json")
    row = {name: n for n, name in enumerate(ids)}
    parts = {}
    for part, key in (("train", "train"), ("valid", "dev"), ("test", "test")):
        names = [str(name) for name in listed.get(key, [])] if isinstance(listed, dict) else []
        for name in names:
            if name not in row and problems.broken == "raise":
                problems.add(root / "split.json", None, f"the film {name} under {key}", "a film of the data set")
        parts[part] = [row[name] for name in names if name in row]
    problems.settle()
    return by_part(parts)
