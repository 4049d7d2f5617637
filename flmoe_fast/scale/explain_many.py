"""Explaining many samples with many processes, so that nothing finished is lost.

    torchrun --nproc-per-node 4 script.py

with, in the script,

    explain_many(samples, lambda number, sample: interactions(game_of(sample), seed=number), "explanations")

Every process takes its share of the samples that are not yet in the directory, writes what it finishes in shards of its
own, and the first one writes the index. A process that is killed loses the samples of its unfinished shard; run again,
with any number of processes, and only what is missing is computed. On SIGTERM, which is what ``torchrun`` sends to the
others when one process dies, a process finishes the sample it is at and writes its shard before it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.files import writing_to
from flmoe_fast.probes.result import InteractionResult
from flmoe_fast.scale.dataset import ExplanationSet
from flmoe_fast.scale.group import Group, join

DEFAULT_CHUNK = 8


def explain_many(
    samples: Sequence[Any],
    explain: Callable[[int, Any], InteractionResult],
    folder: str | os.PathLike,
    *,
    chunk: int = DEFAULT_CHUNK,
    format: str = "parquet",
    settings: Mapping[str, Any] | None = None,
    group: Group | None = None,
    progress: bool = True,
) -> ExplanationSet:
    """Explain every sample that is not in ``folder`` yet.

    Parameters
    ----------
    samples : sequence
        Anything with a length whose items can be had by number; an item is loaded by the process that explains it.
    explain : function (number, sample) -> InteractionResult
        Should depend on nothing else: then results do not depend on how many processes there are. Seed it by the
        number.
    folder : path
        Seen by all processes.
    chunk : int
        Samples of one shard.
    format : "parquet" or "safetensors"
        See :mod:`flmoe_fast.scale.dataset`.
    settings : mapping of JSON types, optional
        What ``explain`` does, such as its contexts, its method and the model's digest. Kept beside the shards: going on
        with other settings is refused, so that no folder mixes two.
    group : Group, optional
        The processes; those of ``torchrun`` by default, or this one alone.
    progress : bool

    Returns
    -------
    ExplanationSet
        Complete when every process returns.

    Raises
    ------
    ArgumentError
        The folder has explanations of other settings.
    BusyError
        Somebody else writes to the folder.
    StorageError
        The disk is full or cannot be written. Shards that are complete stay.
    """
    chunk = integer("chunk", chunk, least=1)
    if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
        raise ArgumentError("samples", type(samples).__name__, "a sequence, with a length and items by number")
    group = join() if group is None else group
    store = ExplanationSet(folder, format)
    first = group.rank == 0
    with writing_to(folder, "explain_many") if first else contextlib.nullcontext():
        mine = _share(store, len(samples), settings, group)
        _explain(samples, explain, store, mine, chunk, progress and first)
        group.wait()
        if first:
            store.write_index()
        group.wait()
    return store


def _share(store: ExplanationSet, count: int, settings: Mapping[str, Any] | None, group: Group) -> list[int]:
    """The missing samples that are this process's; every process raises what the first one finds wrong."""
    found: tuple[list[int], str] = [], ""
    if group.rank == 0:
        try:
            store.settle(settings)
            done = store.samples()
            found = [number for number in range(count) if number not in done], ""
        except ArgumentError as problem:
            if group.size == 1:
                raise
            found = [], str(problem)
    missing, refused = group.agree(found)
    if refused:
        raise ArgumentError("folder", f"what the first process refuses ({refused})", "a folder to go on in")
    return missing[group.rank :: group.size]


def _explain(
    samples: Sequence[Any],
    explain: Callable[[int, Any], InteractionResult],
    store: ExplanationSet,
    mine: list[int],
    chunk: int,
    progress: bool,
) -> None:
    with _Stop() as stop, tqdm(total=len(mine), unit="sample", disable=not progress) as bar:
        for start in range(0, len(mine), chunk):
            results: dict[int, InteractionResult] = {}
            try:
                for number in mine[start : start + chunk]:
                    results[number] = explain(number, samples[number])
                    bar.update()
                    if stop.asked:
                        break
            finally:  # what is finished is kept, also when a sample raises
                if results:
                    store.add(results)
            if stop.asked:
                raise SystemExit(128 + signal.SIGTERM)


class _Stop:
    """Notes a SIGTERM instead of ending at once, in the main thread of a process."""

    asked = False

    def __enter__(self) -> _Stop:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True
