"""One sample of a model in a file: arrays named by modality, in ``.npz`` or ``.safetensors``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from flmoe_fast.checks import ArgumentError, finite
from flmoe_fast.files import read_arrays
from flmoe_fast.model.network import FLI2MoE

SUFFIXES = (".npz", ".safetensors")
KINDS = ("features", "inputs", "masks")


def save_sample(path: str | os.PathLike, **kinds: Mapping[str, torch.Tensor]) -> None:
    """Write a sample.

    Parameters
    ----------
    path
        Ending in ``.npz`` or ``.safetensors``.
    **kinds
        ``features`` or ``inputs``, and optionally ``masks``, each a tensor per modality name, without a batch axis.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ArgumentError("kinds", sorted(unknown), f"some of {KINDS}")
    arrays: dict[str, Any] = {
        f"{kind}.{modality}": np.ascontiguousarray(tensor.detach().cpu().numpy())
        for kind, tensors in kinds.items()
        for modality, tensor in tensors.items()
    }
    if _suffix(path) == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)


def load_sample(path: str | os.PathLike, model: FLI2MoE) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Read a sample for a model; nothing in the file is executed.

    Parameters
    ----------
    path
        A file with ``features.<modality>`` (T_m, H) for every modality, or ``inputs.<modality>`` for the model's own
        encoders: (T_m, F) for a projection, (F,) for a table. Optionally ``masks.<modality>`` (T_m,) for every
        modality, 1 for valid tokens. No array has a batch axis.
    model : FLI2MoE

    Returns
    -------
    features : list of M tensors (T_m, H)
    masks : list of M tensors (T_m,), or None

    Raises
    ------
    FileNotFoundError
        No such file.
    ArgumentError
        A damaged file, arrays that are missing, unknown, not numbers or not what the encoders take.
    """
    arrays = _read(path)
    names = model.config.modalities
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for key, array in arrays.items():
        kind, _, modality = key.partition(".")
        if kind not in KINDS or modality not in names:
            expected = f"features, inputs or masks, each with one of the modalities {', '.join(names)}"
            raise ArgumentError("sample", f"an array {key!r} in {path}", expected)
        if array.dtype.kind not in "fiub":
            raise ArgumentError(key, f"{array.dtype} in {path}", "numbers")
        found[kind][modality] = torch.tensor(array)
    for kind, tensors in found.items():
        missing = [name for name in names if name not in tensors]
        if tensors and missing:
            raise ArgumentError(f"{kind}.{missing[0]}", f"nothing in {path}", f"{kind} of every modality")
    features, inputs, masks = ([found[kind][name] for name in names if found[kind]] for kind in KINDS)
    if bool(features) == bool(inputs):
        got = f"both features and inputs in {path}" if features else f"neither features nor inputs in {path}"
        raise ArgumentError("sample", got, "either features.<modality> or inputs.<modality>")
    return features or _encoded(model, inputs, path), masks or None


@torch.no_grad()
def _encoded(model: FLI2MoE, inputs: list[torch.Tensor], path: str | os.PathLike) -> list[torch.Tensor]:
    if not model.encoders:
        raise ArgumentError("inputs", f"raw inputs in {path} for a model without encoders", "features.<modality>")
    parameter = next(model.parameters())
    features = []
    for name, raw in zip(model.config.modalities, inputs):
        raw = raw.to(parameter)
        finite(f"inputs.{name}", raw)
        try:
            features.append(model.encoders[name](raw[None])[0])
        except ArgumentError as problem:
            got = f"shape {tuple(raw.shape)} in {path}"
            raise ArgumentError(f"inputs.{name}", got, f"what its encoder takes ({problem})") from None
    return features


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    suffix = _suffix(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        return read_arrays(path)
    except (OSError, ValueError, MemoryError, safetensors.SafetensorError) as problem:
        raise ArgumentError("sample", f"{path} ({problem})", f"a readable {suffix} file of plain arrays") from problem


def _suffix(path: str | os.PathLike) -> str:
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ArgumentError("sample", str(path), "a name ending in .npz or .safetensors")
    return suffix
