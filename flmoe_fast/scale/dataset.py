"""A dataset of explanations: a directory of shards and an index.

- ``samples-000000-000007.parquet`` (or ``.safetensors``): what was found for some samples. A shard is written once, by
  one process, under another name, and renamed when it is complete: it is whole or it is not there.
- ``_index.csv``: one row a sample, with the shard that holds it. Derived from the shards, made anew when it is lost.
  Named so that readers of a whole folder of Parquet files pass over it.

A Parquet shard is one long table, a row for every sample, head and pair, with the columns of
:meth:`InteractionResult.to_dataframe`, for ``pandas.read_parquet``. A safetensors shard keeps every array of a result,
under ``<sample>/<array>``, and the rest as JSON in its metadata: nothing is lost, and :meth:`ExplanationSet.result`
gives the results back.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.environment import require
from flmoe_fast.files import StorageError, replacing
from flmoe_fast.probes.result import InteractionResult

if TYPE_CHECKING:
    import pandas

FORMATS = ("parquet", "safetensors")
KEY = "flmoe_fast"
VERSION = 1
#: What a medium without room says: no space, quota exceeded, file too large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ExplanationSet:
    """A directory of explanations, by sample number.

    Parameters
    ----------
    folder : path
        Made if it does not exist.
    format : "parquet" or "safetensors"
        Of the shards that are added; both are read. Parquet needs the extra ``parquet``.
    """

    def __init__(self, folder: str | os.PathLike, format: str = "parquet"):
        self.folder, self.format = Path(folder), one_of("format", format, FORMATS)
        if format == "parquet":
            require("pyarrow", "parquet")
        self.folder.mkdir(parents=True, exist_ok=True)

    def shards(self) -> list[Path]:
        """Complete shards, in the order of their names."""
        return sorted(p for p in self.folder.glob("samples-*") if p.suffix[1:] in FORMATS)

    def samples(self) -> dict[int, Path]:
        """Samples that are explained, and the shard of each."""
        return {sample: shard for shard in self.shards() for sample in self.samples_of(shard)}

    def samples_of(self, shard: Path) -> list[int]:
        """Samples that are in a shard."""
        return [int(sample) for sample in _facts(shard)]

    def add(self, results: Mapping[int, InteractionResult]) -> Path:
        """Write a shard with these samples.

        Raises
        ------
        ArgumentError
            Nothing to write, or a sample that is there already.
        StorageError
            The medium is full or cannot be written; nothing of this shard is left behind.
        """
        numbers = sorted(integer("results", sample, least=0) for sample in results)
        if not numbers:
            raise ArgumentError("results", "no results", "at least one")
        path = self.folder / f"samples-{numbers[0]:06d}-{numbers[-1]:06d}.{self.format}"
        if path.exists():
            raise ArgumentError("results", f"samples {numbers[0]} to {numbers[-1]}, which are in {path}", "new samples")
        try:
            with replacing(path) as file:
                (_write_parquet if self.format == "parquet" else _write_safetensors)(file, results)
        except OSError as problem:
            raise self._storage_error(path, problem) from problem
        return path

    def write_index(self) -> Path:
        """Write ``_index.csv`` from the shards that are there; for one process only."""
        import pandas

        rows = [
            {"sample": int(sample), "shard": shard.name, **facts}
            for shard in self.shards()
            for sample, facts in _facts(shard).items()
        ]
        columns = ["sample", "shard", "evaluations", "pairs", "seed", "backend", "gap_kind", "about"]
        frame = pandas.DataFrame(rows, columns=columns).sort_values("sample")
        path = self.folder / "_index.csv"
        try:
            with replacing(path, "w") as file:
                frame.to_csv(file, index=False)
        except OSError as problem:
            raise self._storage_error(path, problem) from problem
        return path

    def settle(self, settings: Mapping[str, Any] | None) -> None:
        """Remember what explanations are made with, or compare with what is remembered; for one process.

        Raises
        ------
        ArgumentError
            The folder has explanations, and they were made with other settings, or nothing says with which.
        """
        path = self.folder / "_settings.json"
        now = json.loads(json.dumps(None if settings is None else dict(settings)))
        if self.shards():
            kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            if kept != now:
                old, new = kept or {}, now or {}
                names = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
                got = f"another {', '.join(names) or 'choice'} than the explanations in {self.folder} have"
                raise ArgumentError("settings", got, f"{kept}, or another folder")
        elif now is not None:
            with replacing(path, "w") as file:
                json.dump(now, file)
        else:
            path.unlink(missing_ok=True)

    def frame(self) -> pandas.DataFrame:
        """All samples as one long table, a row for every sample, head and pair."""
        import pandas

        parts = []
        for shard in self.shards():
            if shard.suffix == ".parquet":
                parts.append(pandas.read_parquet(shard))
            else:
                found = _read_safetensors(shard)
                parts += [_table(sample, result) for sample, result in found.items()]
        if not parts:
            raise ArgumentError("folder", f"{self.folder}, which has no shards", "a dataset of explanations")
        return pandas.concat(parts, ignore_index=True).sort_values("sample", kind="stable", ignore_index=True)

    def result(self, sample: int) -> InteractionResult:
        """One sample's result, from a safetensors shard."""
        shard = self.samples().get(integer("sample", sample, least=0))
        if shard is None:
            raise ArgumentError("sample", sample, f"a sample that is in {self.folder}")
        if shard.suffix != ".safetensors":
            expected = "one of a safetensors shard; frame() reads the others"
            raise ArgumentError("sample", f"{sample}, which is in {shard.name}", expected)
        return _read_safetensors(shard, sample)[sample]

    def _storage_error(self, path: Path, problem: OSError) -> StorageError:
        full = problem.errno in FULL or "No space left" in str(problem) or "File too large" in str(problem)
        why = "the disk is full" if full else (problem.strerror or str(problem))
        return StorageError(
            problem.errno,
            f"{path.name} was not written to {self.folder}: {why}. {len(self.shards())} shards are complete; make room "
            "and run again to continue after them",
        )


def _summary(result: InteractionResult) -> dict[str, Any]:
    """A sample's row of the index."""
    return {
        "evaluations": result.evaluations,
        "pairs": len(result.pairs),
        "seed": result.seed,
        "backend": result.backend,
        "gap_kind": result.gap_kind,
        "about": json.dumps(result.about),
    }


def _table(sample: int, result: InteractionResult) -> pandas.DataFrame:
    frame = result.to_dataframe()
    frame.insert(0, "sample", sample)
    return frame


def _write_parquet(file: IO, results: Mapping[int, InteractionResult]) -> None:
    import pandas
    import pyarrow
    import pyarrow.parquet

    frame = pandas.concat([_table(sample, results[sample]) for sample in sorted(results)], ignore_index=True)
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    facts = {str(sample): _summary(results[sample]) for sample in sorted(results)}
    mine = json.dumps({"version": VERSION, "samples": facts}).encode()
    pyarrow.parquet.write_table(table.replace_schema_metadata({**table.schema.metadata, KEY.encode(): mine}), file)


def _write_safetensors(file: IO, results: Mapping[int, InteractionResult]) -> None:
    arrays: dict[str, np.ndarray] = {}
    rest: dict[str, Any] = {}
    for sample in sorted(results):
        parts, rest[str(sample)] = results[sample].parts()
        arrays |= {f"{sample}/{name}": np.ascontiguousarray(array) for name, array in parts.items()}
    facts = {str(sample): _summary(results[sample]) for sample in sorted(results)}
    text = json.dumps({"version": VERSION, "samples": facts, "rest": rest})
    file.write(safetensors.numpy.save(arrays, metadata={KEY: text}))


def _metadata(shard: Path) -> dict[str, Any]:
    expected = "a shard of a dataset of explanations"
    try:
        if shard.suffix == ".parquet":
            found = require("pyarrow.parquet", "parquet").read_schema(shard).metadata[KEY.encode()]
        else:
            with safetensors.safe_open(shard, "numpy") as file:
                found = file.metadata()[KEY]
        facts = json.loads(found)
        if facts["version"] != VERSION:
            raise ArgumentError("folder", f"{shard}, version {facts['version']}", f"{expected}, version {VERSION}")
        return facts
    except ArgumentError:
        raise
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as problem:
        raise ArgumentError("folder", f"{shard} ({problem})", expected) from problem


def _facts(shard: Path) -> dict[str, dict[str, Any]]:
    return _metadata(shard)["samples"]


def _read_safetensors(shard: Path, only: int | None = None) -> dict[int, InteractionResult]:
    rest = _metadata(shard)["rest"]
    with safetensors.safe_open(shard, "numpy") as file:
        names = list(file.keys())
        found = {}
        for sample, facts in rest.items():
            if only is not None and int(sample) != only:
                continue
            prefix = f"{sample}/"
            arrays = {name[len(prefix) :]: file.get_tensor(name) for name in names if name.startswith(prefix)}
            found[int(sample)] = InteractionResult.from_parts(arrays, facts)
    return found
