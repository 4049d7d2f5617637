"""Reading pickled arrays of published data sets without executing anything from the file.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program names; numpy's
callables among them make arrays out of forged pointers. So the program is run here, by a machine that knows containers,
numbers, strings and what numpy writes for an array, and in which a name stands for nothing but one of four parts.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from flmoe_fast.data.errors import DataError, problem
from flmoe_fast.data.raw import existing

#: Types whose every bit pattern is a value: booleans, numbers and fixed strings. The digits are the size of an item.
_SAFE_TYPE = re.compile(r"([<>|=]?)([biufSU])([0-9]{1,9})")
_BYTES_OF = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")


class Refused(Exception):
    """An instruction or a name that no pickle of arrays needs."""


class _Type:
    """Stands for ``numpy.dtype`` while a file is read."""

    def __init__(self, code: object = None, align: object = None, copy: object = None):
        self.code, self.order, self.size = code, "", None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or not 8 <= len(state) <= 9 or state[2:5] != (None, None, None):
            raise Refused("a structured dtype")
        self.order, self.size = state[1], state[5]

    def numpy(self) -> np.dtype:
        """The dtype; :class:`Refused` for any that is not plain numbers or fixed strings."""
        if not isinstance(self.code, str) or not isinstance(self.order, str):
            raise Refused(f"dtype {self.code!r:.40}")
        found = _SAFE_TYPE.fullmatch(self.code)
        if found is None:
            raise Refused(f"dtype {self.code!r:.40}")
        kind, size = found[2], int(found[3])
        if self.order not in ("", "<", ">", "|", "=") or (
            size not in _BYTES_OF[kind] if kind in _BYTES_OF else size < 1
        ):
            raise Refused(f"dtype {self.code!r:.40}")
        return np.dtype((self.order if self.order not in ("", "|") else found[1]) + kind + found[3])


class _Array:
    """Stands for an array or a scalar; it is made of what the file says in the end, and only if it is still there."""

    __hash__ = None  # type: ignore[assignment]  # no key of a dict, as arrays are none

    def __init__(self, *state: object):
        self.state: tuple = state

    def __setstate__(self, state: object) -> None:
        if self.state or not isinstance(state, tuple) or len(state) != 5:
            raise Refused("an array with another state than numpy writes")
        _, shape, of, fortran, raw = state
        self.state = raw, of, shape, "F" if fortran else "C"

    @property
    def size(self) -> int:
        """Bytes or items that it is made of."""
        if not self.state or not isinstance(self.state[0], (bytes, bytearray, str, list)):
            raise Refused("an array without its numbers")
        return len(self.state[0])

    def made(self) -> Any:
        """The array; a scalar where it has no shape."""
        raw, of, shape, order = self.state
        return _objects(raw, shape) if _is_object(of) else _numbers(raw, of, shape, order)


def _is_object(of: object) -> bool:
    return isinstance(of, _Type) and of.code in ("O", "O4", "O8")


def _shape(shape: object) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, tuple) else (shape,)
    if len(sizes) > 32 or not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
        raise Refused(f"an array of shape {shape!r:.60}")
    return sizes


def _numbers(raw: object, of: object, shape: object, order: object) -> Any:
    """A fresh array of bytes that are exactly as many as the shape needs; a scalar for the shape ()."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, (bytes, bytearray)) or not isinstance(of, _Type) or order not in ("C", "F"):
        raise Refused("an array with another state than numpy writes")
    kind, sizes = of.numpy(), _shape(shape)
    if len(raw) != math.prod(sizes) * kind.itemsize:
        raise Refused(f"{len(raw)} bytes for an array {sizes} of {kind}")
    found = np.frombuffer(raw, kind).reshape(sizes, order=order).copy()
    return found if sizes else found[()]


def _objects(items: object, shape: object) -> np.ndarray:
    """An array of texts and numbers, which numpy writes as a list."""
    sizes = _shape(shape)
    plain = (str, bytes, int, float, bool, type(None))
    if not isinstance(items, list) or len(items) != math.prod(sizes) or not all(isinstance(i, plain) for i in items):
        raise Refused("an array of objects that are no texts or numbers")
    found = np.empty(len(items), object)
    found[:] = items
    return found.reshape(sizes)


def _scalar(of: object = None, raw: object = b"") -> _Array:
    return _Array(raw, of, (), "C")


def _frombuffer(raw: object, of: object, shape: object, order: object) -> _Array:
    return _Array(raw, of, shape, order)


def _encode(text: object, encoding: object = None) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("bytes in another encoding than latin1")
    return text.encode("latin1")


def _nothing() -> bytes:
    return b""


def _reconstruct(*_: object) -> _Array:
    return _Array()


#: What a pickled array names, and what stands for it here. None of it can reach numpy's constructors or an attribute.
_PARTS: dict[str, Callable] = {
    "ndarray": _reconstruct,
    "dtype": _Type,
    "_reconstruct": _reconstruct,
    "scalar": _scalar,
    "_frombuffer": _frombuffer,
}


def _part(name: str) -> Callable:
    module, _, own = name.replace(" ", ".").rpartition(".")
    if (module, own) == ("_codecs", "encode"):
        return _encode
    if (module, own) in (("__builtin__", "bytes"), ("builtins", "bytes")):
        return _nothing
    if module not in _MODULES or own not in _PARTS:
        raise Refused(f"{module}.{own}, which is no array")
    return _PARTS[own]


class _Name:
    """A part that the program has named; it can be called by the machine, and by nothing else."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, name: str):
        self.part = _part(name)


_TOO_MUCH = "arrays of more bytes than the file has"


class _Machine:
    """Runs a pickle; ``left`` is how many bytes of texts it may still encode."""

    def __init__(self, left: int):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left = left

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, items: list[Any]) -> None:
        """Add keys and values in turns to the dict on the stack."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise Refused("items of something that is no dict")
        for key, value in zip(items[::2], items[1::2]):
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("items of something that is no list")
        self.stack[-1].extend(items)

    def call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or type(arguments) is not tuple:
            raise Refused("a call of something that is no part of an array")
        if name.part is _encode and arguments and isinstance(arguments[0], str):
            self.left -= len(arguments[0])
            if self.left < 0:
                raise Refused(_TOO_MUCH)
        self.stack.append(name.part(*arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in (_Array, _Type):
            raise Refused("attributes of something that is no array")
        target.__setstate__(state)

    def tuple(self, count: int) -> None:
        at = len(self.stack) - count
        if at < (self.marks[-1] if self.marks else 0):
            raise Refused("a tuple of more than there is")
        items = tuple(self.stack[at:])
        del self.stack[at:]
        self.stack.append(items)

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _memoize(machine: _Machine, at: int | None) -> None:
    machine.memo[len(machine.memo) if at is None else at] = machine.stack[-1]


def _named(machine: _Machine, _: object) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Refused("a name that is no text")
    machine.stack.append(_Name(f"{module}.{name}"))


_PUSHED = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
).split()
_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_PUSHED, _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, at: _push(machine, machine.memo[at])),
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "EMPTY_TUPLE": lambda machine, _: _push(machine, ()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: _push(machine, machine.stack[-1]),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple(1),
    "TUPLE2": lambda machine, _: machine.tuple(2),
    "TUPLE3": lambda machine, _: machine.tuple(3),
    "LIST": lambda machine, _: _push(machine, machine.since_mark()),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.put([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.put(machine.since_mark()),
    "GLOBAL": lambda machine, name: _push(machine, _Name(name)),
    "STACK_GLOBAL": _named,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}


def _dict_from(machine: _Machine, _: object) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    machine.put(items)


_STEPS["DICT"] = _dict_from


class _Bounded:
    """A file that never makes room for more bytes than it has."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size))


def _plain(found: Any, left: int) -> Any:
    """``found`` with arrays, of no more than ``left`` bytes together, in place of what stands for them."""
    seen: dict[int, Any] = {}
    alive = []  # what was replaced; its id must not be given to another object

    def of(value: Any) -> Any:
        nonlocal left
        if isinstance(value, (_Name, _Type)):
            raise Refused("a part of an array by itself")
        if not isinstance(value, (dict, list, tuple, _Array)) or id(value) in seen:
            return seen.get(id(value), value)
        seen[id(value)] = value
        if isinstance(value, dict):
            for key in value:
                value[key] = of(value[key])
        elif isinstance(value, list):
            value[:] = map(of, value)
        else:
            alive.append(value)
            if isinstance(value, _Array):
                left -= value.size
                if left < 0:
                    raise Refused(_TOO_MUCH)
                seen[id(value)] = value.made()
            else:
                seen[id(value)] = tuple(map(of, value))
        return seen[id(value)]

    return of(found)


def read_pickle(path: str | os.PathLike) -> Any:
    """Content of a pickle of containers and numpy arrays.

    Parameters
    ----------
    path
        Written by any protocol of Python 2 or 3 without buffers of their own.

    Returns
    -------
    object
        Dicts, lists, tuples, numbers and strings, and arrays of booleans, numbers, fixed strings, or texts and numbers.

    Raises
    ------
    DataError
        No such file, a damaged one, or one with objects of other kinds, of which none is made.
    """
    path = existing(path)
    size = path.stat().st_size
    machine = _Machine(size)
    try:
        with open(path, "rb") as file:
            for step, argument, _ in pickletools.genops(cast(IO[bytes], _Bounded(file, size))):
                run = _STEPS.get(step.name)
                if run is None:
                    raise Refused(f"the instruction {step.name}")
                run(machine, argument)
        return _plain(machine.stack.pop(), size)
    except (Refused, ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise DataError([problem(path, None, str(error) or type(error).__name__, "a pickle of arrays")]) from error


#: What torch.load raises for files that are not as it wrote them.
_DAMAGED = (
    *(Refused, pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, MemoryError, ImportError, AssertionError),
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
)


def read_matrix(path: str | os.PathLike) -> np.ndarray:
    """The (N, F) numbers, float32, of a file of ``torch.save`` that holds one tensor or array; NaNs become 0.

    Raises
    ------
    DataError
        No such file, a damaged one, one with other objects, or one that would unpack to more than its size.
    """
    path = existing(path)
    expected = "a file of torch.save with a matrix"
    standing: list = [_Type, _Array, *((part, f"{m}.{name}") for m in _MODULES for name, part in _PARTS.items())]
    try:
        _refuse_compressed(path)
        with torch.serialization.safe_globals(standing):
            found = torch.load(path, map_location="cpu", weights_only=True)
        matrix = _matrix(found)
    except _DAMAGED as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError([problem(path, None, first, expected)]) from error
    return np.nan_to_num(matrix.astype(np.float32), nan=0.0)


def _refuse_compressed(path: Path) -> None:
    """``torch.save`` stores its parts as they are; a compressed part can be a thousand times the file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.file_size > part.compress_size for part in archive.infolist()):
                raise Refused("a compressed archive")


def _matrix(found: object) -> np.ndarray:
    if isinstance(found, _Array) and found.size:
        found = found.made()
    elif isinstance(found, torch.Tensor):
        if found.layout is not torch.strided or found.device.type != "cpu":
            raise Refused(f"a tensor of layout {found.layout} on {found.device}")
        if found.numel() * found.element_size() > found.untyped_storage().nbytes():
            raise Refused(f"shape {tuple(found.shape)} with fewer numbers than that")
        found = found.detach().numpy()
    if not isinstance(found, np.ndarray):
        raise Refused("a dict" if isinstance(found, Mapping) else type(found).__name__)
    if found.ndim != 2 or found.dtype.kind not in "fiub":
        raise Refused(f"shape {found.shape} of {found.dtype}")
    return found
