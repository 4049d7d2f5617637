"""A program of its own that reads an AnnData file: a damaged one can keep the HDF5 library busy for ever, or crash it.

``python -P hdf5_process.py PATH LARGEST`` answers with a line of JSON and the arrays that it names, as npy. The line is
``{"names": [...], "layout": "dense" | "csr" | "csc", "shape": [...], "arrays": count}``, or ``{"error": "..."}``. It
imports nothing of the package, which would take seconds.
"""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np


def contents(path: str, largest: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Names of the rows and the arrays of X; none of them is larger than ``largest`` bytes."""
    import h5py

    with h5py.File(path) as file:
        index = file["obs"][file["obs"].attrs.get("_index", "_index")][()]
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in index]
        node = file["X"]
        if isinstance(node, h5py.Dataset):
            return {"names": names, "layout": "dense"}, [whole(node, largest)]
        layout = "csc" if "csc" in str(node.attrs.get("encoding-type", "csr")) else "csr"
        shape = [int(size) for size in node.attrs["shape"]]
        arrays = [whole(node[name], largest) for name in ("data", "indices", "indptr")]
        return {"names": names, "layout": layout, "shape": shape}, arrays


def whole(node: Any, largest: int) -> np.ndarray:
    """A data set of a file: one that says it is larger than any real one is not read."""
    if math.prod(node.shape) * max(node.dtype.itemsize, 8) > largest:
        raise ValueError(f"{node.name} of shape {node.shape}, more than {largest >> 30} GiB")
    return np.asarray(node[()])


def answer(path: str, largest: int, out: BinaryIO) -> None:
    """Write what the file has, or what is wrong with it."""
    try:
        head, arrays = contents(path, largest)
        if any(array.dtype.hasobject for array in arrays):
            raise ValueError("an X of strings")
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        head, arrays = {"error": str(error) or type(error).__name__}, []
    out.write(json.dumps({**head, "arrays": len(arrays)}).encode() + b"\n")
    pipe = SimpleNamespace(write=out.write)  # NumPy would seek in what it takes for a file
    for array in arrays:
        np.save(pipe, array, allow_pickle=False)


if __name__ == "__main__":
    answer(sys.argv[1], int(sys.argv[2]), sys.stdout.buffer)
