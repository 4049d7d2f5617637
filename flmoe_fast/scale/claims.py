"""Who explains which sample, when several processes share a folder: locks on files, and nobody waits for anybody.

A process claims a sample before it explains it and gives the claim back when the sample is in a shard. A claim goes
with its process, however that ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: shares are fixed there
    fcntl = None  # type: ignore[assignment]


class Claims:
    """The samples that one of ``size`` processes has in hand.

    Parameters
    ----------
    folder : Path
        Where all of them look; made if it does not exist.
    rank, size : int
        Which of them this is, for systems without locks.
    """

    def __init__(self, folder: Path, rank: int, size: int):
        self.folder, self.rank, self.size = folder, rank, size
        self._held: dict[int, tuple[Path, IO]] = {}
        if size > 1:
            folder.mkdir(parents=True, exist_ok=True)

    def take(self, number: int) -> bool:
        """Whether a sample is this process's now. It may be finished: look after this."""
        if self.size == 1:
            return True
        if fcntl is None:
            return number % self.size == self.rank
        path = self.folder / f"{number:06d}"
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._held[number] = (path, file)
        return True

    def settle(self, finished: Iterable[int]) -> None:
        """Give samples back that are finished."""
        for number in set(finished) & set(self._held):
            path, file = self._held.pop(number)
            path.unlink(missing_ok=True)  # who has opened it meanwhile finds the sample finished
            file.close()

    def drop(self) -> None:
        """Give everything back that is still in hand."""
        for _, file in self._held.values():
            file.close()
        self._held.clear()
