"""Files that are there completely or not at all, folders with one writer, and archives of plain arrays."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import struct
import time
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]

#: What a killed process leaves of a file it was writing, as a pattern.
UNFINISHED = ".*.part"
#: The file in a folder that says who writes to it.
LOCK = ".lock"
#: Seconds to wait for one who only looks whether nobody else is there.
PATIENCE = 1.0
#: Bytes that the arrays of one archive may have together.
LARGEST_ARCHIVE = 1 << 30
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}


class StorageError(OSError):
    """A file could not be written. What had its name before is as it was, and nothing else is left behind."""


class BusyError(OSError):
    """Somebody else writes to a folder."""


class _Raw(io.FileIO):
    """Remembers what the system said, which libraries that write into a file pass on in other words, or not at all."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as problem:
            self.problem = problem
            raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """A file to write in the ``with`` block, which takes the name ``path`` when the block has ended without an error.

    Until then an older file of that name stays as it was, also when the process is killed. The bytes are on the disk
    before the name is, and the name is before the block is left.

    Raises
    ------
    StorageError
        The system could not write the file; the message names it.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    raw = None
    try:
        raw = _Raw(str(part), "x")
        file: IO = io.BufferedWriter(raw)
        if "b" not in mode:
            file = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except Exception as error:
        problem = (raw.problem if raw is not None else None) or error
        if not isinstance(problem, OSError) or (problem is error and problem.filename not in (None, str(part))):
            raise
        raise StorageError(problem.errno, f"{path} was not written: {_why(problem)}") from error
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing_to(folder: str | os.PathLike, who: str, *, shared: bool = False) -> Iterator[None]:
    """Be the only one who writes to a folder, or one of those who share it.

    The lock goes when the process does. Whoever finds nobody else there first removes what killed ones left unfinished,
    in all folders below. Where the system has no locks nothing is done.

    Parameters
    ----------
    folder
        Made if it does not exist.
    who : str
        What others are told.
    shared : bool
        Others who share it too may write at the same time.

    Raises
    ------
    BusyError
        The folder is somebody else's; the message says whose.
    StorageError
        The lock's file could not be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if _locked(file, fcntl.LOCK_EX):
            for left in folder.rglob(UNFINISHED):
                left.unlink(missing_ok=True)
            if shared:
                fcntl.flock(file, fcntl.LOCK_SH)
        elif not shared or not _locked(file, fcntl.LOCK_SH, PATIENCE):
            file.seek(0)
            raise BusyError(f"{folder} is being written by {file.read().strip() or 'another process'}")
        try:
            file.truncate(0)
            os.write(file.fileno(), f"{who}, process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as problem:
            raise StorageError(problem.errno, f"{folder / LOCK} was not written: {_why(problem)}") from problem
        yield


def _locked(file: IO, kind: int, patience: float = 0.0) -> bool:
    """Whether a lock was had, within so many seconds."""
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)


def _why(problem: OSError) -> str:
    return _FULL.get(problem.errno or 0) or problem.strerror or str(problem)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by name; nothing in it is executed.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        No such archive, one that is damaged, that names an array twice, or that unpacks to more than
        :data:`LARGEST_ARCHIVE`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if len({part.filename for part in parts}) < len(parts):
                raise ValueError("two arrays of the same name")
            if (size := sum(part.file_size for part in parts)) > LARGEST_ARCHIVE:
                raise ValueError(f"{size} bytes of arrays, more than {LARGEST_ARCHIVE}")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("a part that is no array")
        return found
    except (FileNotFoundError, IsADirectoryError):
        raise
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"an array that does not fit ({type(error).__name__})") from error
    except _DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from error


#: What zipfile and numpy raise for files that are not as they wrote them.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, NotImplementedError),
    *(OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError),
)
