"""Reading pickled arrays of published data sets without executing anything from the file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flmoe_fast.data.errors import DataError, problem
from flmoe_fast.data.raw import existing

# What a pickled numpy array names, under the module names of numpy 1 and 2.
_ARRAY_PARTS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding) if encoding == "latin1" else None,
}
for _module in ("numpy.core", "numpy._core"):
    _ARRAY_PARTS |= {
        (f"{_module}.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
        (f"{_module}.multiarray", "scalar"): np._core.multiarray.scalar,
        (f"{_module}.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    }


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds containers, numbers, strings and numpy arrays; anything else in the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_PARTS:
            return _ARRAY_PARTS[module, name]
        raise pickle.UnpicklingError(f"{module}.{name}, which is no array")


def read_pickle(path: str | os.PathLike) -> Any:
    """Content of a pickle of containers and numpy arrays.

    Raises
    ------
    DataError
        No such file, a damaged one, or one with objects of other kinds, of which none is executed.
    """
    path = existing(path)
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise DataError([problem(path, None, str(error) or type(error).__name__, "a pickle of arrays")]) from error


def read_matrix(path: str | os.PathLike) -> np.ndarray:
    """The (N, F) numbers of a file of ``torch.save`` that holds one tensor or array; NaNs become 0."""
    path = existing(path)
    allowed = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, *(type(np.dtype(t)) for t in "fdilqB")]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError([problem(path, None, first, "a file of torch.save with a matrix")]) from error
    found = np.asarray(found) if not isinstance(found, Mapping) else np.empty(0)
    if found.ndim != 2 or found.dtype.kind not in "fiub":
        raise DataError([problem(path, None, f"shape {found.shape}", "one matrix of numbers, a row per sample")])
    return np.nan_to_num(found.astype(np.float32), nan=0.0)
