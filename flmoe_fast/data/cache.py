"""Features of frozen backbones, computed once and kept on the disk.

A cache is a folder of ``part-<n>.safetensors`` files with the valid tokens of some samples one after another
(``features``), how many each has (``lengths``) and what the tokens are called (JSON in the metadata), and of
``index.json`` once all parts are there. Parts appear complete or not at all, so a killed run goes on after the last
one. Reading maps the files into memory; rows that are not asked for are never read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.data.errors import DataError, problem
from flmoe_fast.files import replacing
from flmoe_fast.model.backbones import Encoded, TextBackbone, VisionBackbone, open_image

#: Samples of a part.
PART = 256
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def cache_features(
    folder: str | os.PathLike,
    backbone: TextBackbone | VisionBackbone,
    values: Sequence,
    *,
    batch_size: int = 32,
    dtype: str = "float32",
    progress: bool = True,
) -> CachedFeatures:
    """Encode N texts or images, as far as that has not been done.

    Parameters
    ----------
    folder
        Where caches are kept; this one gets a folder of its own, named after the backbone and the values, so that
        another backbone, other texts or changed images never meet an old cache.
    backbone : TextBackbone or VisionBackbone
    values : N strings, paths of images or PIL images
    batch_size : int
    dtype : "float32" or "float16"
        How features are stored.
    progress : bool

    Raises
    ------
    DataError
        An image that cannot be read.
    """
    batch_size = integer("batch_size", batch_size, least=1)
    one_of("dtype", dtype, tuple(DTYPES))
    if not len(values):
        raise ArgumentError("values", "nothing", "at least one text or image")
    own = Path(folder) / f"{backbone.kind}-{_fingerprint(backbone, values, dtype)}"
    own.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(values), PART)
    todo = [start for start in starts if not (own / _part(start)).exists()]
    done = sum(min(PART, len(values) - start) for start in starts if start not in todo)
    shown = {"desc": f"encoding {backbone.kind}", "unit": "sample", "disable": not progress or not todo}
    with tqdm(total=len(values), initial=done, **shown) as bar:
        for start in todo:
            some = values[start : start + PART]
            _write_part(own / _part(start), backbone, some, batch_size, DTYPES[dtype], bar.update)
    if not (own / "index.json").exists():
        with replacing(own / "index.json", "w") as file:
            json.dump({"samples": len(values), "width": backbone.width}, file)
    return CachedFeatures(own)


def _part(start: int) -> str:
    return f"part-{start // PART:05d}.safetensors"


def _write_part(
    path: Path, backbone, values: Sequence, batch_size: int, dtype: torch.dtype, tick: Callable[[int], object]
) -> None:
    """Encode some values, and tell ``tick`` how many after each batch."""
    features, lengths, names = [], [], []
    for start in range(0, len(values), batch_size):
        found = encode(backbone, values[start : start + batch_size])
        for tokens, mask, named in zip(found.features, found.mask, found.names):
            features.append(tokens[mask].to(dtype))
            lengths.append(int(mask.sum()))
            names.append([name for name, kept in zip(named, mask.tolist()) if kept])
        tick(len(found.features))
    # The names of image patches are always the same; one list stands for all.
    names = names[:1] if backbone.kind == "image" else names
    tensors = {"features": torch.cat(features), "lengths": torch.tensor(lengths)}
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, {"names": json.dumps(names)}))


def encode(backbone: TextBackbone | VisionBackbone, values: Sequence) -> Encoded:
    """Encode texts, or images given as such or by their paths."""
    if backbone.kind == "text":
        return backbone(list(values))
    images = []
    for value in values:
        try:
            images.append(value if hasattr(value, "convert") else open_image(value))
        except ArgumentError as error:
            raise DataError([problem(value, None, str(error), "an image file")]) from error
    return cast(VisionBackbone, backbone)(images)


def _fingerprint(backbone, values: Sequence, dtype: str) -> str:
    digest = hashlib.sha256(f"{backbone.fingerprint} {dtype} {len(values)}".encode())
    for value in values:
        if isinstance(value, str) and backbone.kind == "text":
            digest.update(hashlib.sha256(value.encode()).digest())
        elif hasattr(value, "tobytes"):
            digest.update(hashlib.sha256(value.tobytes()).digest())
        else:
            path = Path(value)
            if not path.is_file():
                raise DataError([problem(path, None, "no such file", "an image file")])
            about = path.stat()
            digest.update(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class CachedFeatures:
    """Padded features of cached samples; indexed like a tensor by row numbers.

    Parameters
    ----------
    folder
        Written by :func:`cache_features`.
    rows : sequence of int, optional
        The samples this view shows; all by default.
    length : int, optional
        Tokens to pad to; those of the longest sample of the whole cache by default.

    Attributes
    ----------
    length, width : int
        T and F of what indexing gives, (rows, T, F) float32.
    """

    def __init__(self, folder: str | os.PathLike, rows: Sequence[int] | None = None, length: int | None = None):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "index.json").read_text())
            self.width, self._samples = int(about["width"]), int(about["samples"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError([problem(self.folder / "index.json", None, str(error), "a complete cache")]) from error
        self._lengths = torch.cat([self._open(start)[1] for start in range(0, self._samples, PART)])
        within = [part.cumsum(0) - part for part in self._lengths.split(PART)]
        self._starts = torch.cat(within)
        longest = int(self._lengths.max())
        self.length = longest if length is None else integer("length", length, least=longest)
        self.rows = torch.arange(self._samples) if rows is None else torch.as_tensor(rows, dtype=torch.long)
        if len(self.rows) and not 0 <= int(self.rows.min()) <= int(self.rows.max()) < self._samples:
            raise ArgumentError("rows", f"{int(self.rows.min())} to {int(self.rows.max())}", f"below {self._samples}")

    def subset(self, rows: Sequence[int] | Tensor) -> CachedFeatures:
        """A view of some of these samples, padded alike."""
        chosen = self.rows[torch.as_tensor(rows, dtype=torch.long)]
        view = object.__new__(CachedFeatures)
        view.__dict__ = {**self.__dict__, "rows": chosen}
        return view

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def masks(self) -> Tensor:
        """(N, T) bool, true for tokens."""
        return torch.arange(self.length) < self._lengths[self.rows][:, None]

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Tensor:
        """(n, T, F) float32, zero at padding."""
        rows = self.rows[index if isinstance(index, slice) else torch.as_tensor(index, dtype=torch.long)]
        found = torch.zeros(len(rows), self.length, self.width)
        for out, row in zip(found, rows.tolist()):
            start, count = int(self._starts[row]), int(self._lengths[row])
            out[:count] = self._open(row // PART * PART)[0][start : start + count].float()
        return found

    def names(self, index: int) -> list[str]:
        """Names of the tokens of one sample, without padding."""
        row = int(self.rows[index])
        named = self._open(row // PART * PART)[2]
        return named[row % PART if len(named) > 1 else 0]

    def _open(self, start: int):
        return _opened(self.folder / _part(start))


@functools.lru_cache(maxsize=4096)
def _opened(path: Path):
    """Mapped features (a slice to read from), lengths and names of a part."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["names"])
            return file.get_slice("features"), file.get_tensor("lengths"), names
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            [problem(path, None, str(error), "a part of a cache; delete it to have it made again")]
        ) from error
