"""Explaining many samples with many processes, so that nothing finished is lost.

    torchrun --nproc-per-node 4 script.py

or the same script started any number of times, on any machines that see the folder, with, in it,

    explain_many(
        samples, lambda number, sample: interactions(game_of(sample), seed=number), "explanations", rank=2, size=4
    )

A process claims one sample after the other, leaves out what others have claimed or finished, and writes what it
finishes in shards of its own; who finishes last writes the index. Nobody waits for anybody, so a slow process costs
nothing but its own samples. One that is killed loses the samples of its unfinished shard, which the others or a later
run take up. On SIGTERM, which is what ``torchrun`` sends to the others when one process dies, a process finishes the
sample it is at and writes its shard before it ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.files import writing_to
from flmoe_fast.probes.result import InteractionResult
from flmoe_fast.scale.claims import Claims
from flmoe_fast.scale.dataset import ExplanationSet

DEFAULT_CHUNK = 8
#: Claims on samples, inside the folder.
CLAIMS = ".claims"


def explain_many(
    samples: Sequence[Any],
    explain: Callable[[int, Any], InteractionResult],
    folder: str | os.PathLike,
    *,
    chunk: int = DEFAULT_CHUNK,
    format: str = "parquet",
    settings: Mapping[str, Any] | None = None,
    rank: int | None = None,
    size: int | None = None,
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
    rank, size : int, optional
        Which of how many processes this is: where it begins to look for work, and whether there are others. By default
        what ``torchrun`` has said (``RANK`` and ``WORLD_SIZE``), or this one alone.
    progress : bool

    Returns
    -------
    ExplanationSet
        Complete when the last process returns: one returns when nothing is left that nobody has claimed.

    Raises
    ------
    ArgumentError
        The folder has explanations of other settings.
    BusyError
        Somebody else writes to the folder, who does not share it.
    StorageError
        The disk is full or cannot be written. Shards that are complete stay.
    """
    chunk = integer("chunk", chunk, least=1)
    if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
        raise ArgumentError("samples", type(samples).__name__, "a sequence, with a length and items by number")
    rank, size = _place(rank, size)
    store = ExplanationSet(folder, format)
    with writing_to(folder, "explain_many", shared=size > 1):
        store.settle(settings)
        begin = rank * len(samples) // size
        order = [*range(begin, len(samples)), *range(begin)]
        work = _Work(store, Claims(store.folder / CLAIMS, rank, size), chunk)
        try:
            work.through(order, samples, explain, progress and rank == 0)
        finally:
            work.claims.drop()
        if len(work.finished()) >= len(samples):
            store.write_index()
    return store


def _place(rank: int | None, size: int | None) -> tuple[int, int]:
    """Which of how many processes this is."""
    if (rank is None) != (size is None):
        raise ArgumentError("rank", f"{rank} with size {size}", "both, or none of them")
    if rank is None or size is None:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    size = integer("size", size, least=1)
    return integer("rank", rank, least=0, most=size - 1), size


class _Work:
    """One process's way through the samples."""

    def __init__(self, store: ExplanationSet, claims: Claims, chunk: int):
        self.store, self.claims, self.chunk = store, claims, chunk
        self._known: dict[str, set[int]] = {}
        self._results: dict[int, InteractionResult] = {}

    def finished(self) -> set[int]:
        """Samples that are in a shard, of this process or another."""
        for shard in self.store.shards():
            if shard.name not in self._known:
                self._known[shard.name] = set(self.store.samples_of(shard))
        return set().union(*self._known.values())

    def through(
        self,
        order: Sequence[int],
        samples: Sequence[Any],
        explain: Callable[[int, Any], InteractionResult],
        progress: bool,
    ) -> None:
        """Explain what nobody has explained or claimed."""
        with _Stop() as stop, tqdm(total=len(order), unit="sample", disable=not progress) as bar:
            done = self.finished()
            try:
                for number in order:
                    bar.update()
                    # Finished before it was claimed, or between the last look and the claim.
                    if number in done or not self.claims.take(number):
                        continue
                    if self.claims.size > 1:
                        done = self.finished()
                    if number in done:
                        self.claims.settle([number])
                        continue
                    self._results[number] = explain(number, samples[number])
                    if len(self._results) == self.chunk:
                        self._write()
                    if stop.asked:
                        break
            finally:  # what is finished is kept, also when a sample raises
                self._write()
            if stop.asked:
                raise SystemExit(128 + signal.SIGTERM)

    def _write(self) -> None:
        results, self._results = self._results, {}
        if results:
            self.store.add(results)
        self.claims.settle(results)


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
