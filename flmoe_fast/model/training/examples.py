"""Samples that a model is trained on, or judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_fast.checks import ArgumentError
from flmoe_fast.model.network import FLI2MoE


@dataclass(frozen=True)
class Examples:
    """N samples with targets.

    Attributes
    ----------
    inputs : sequence of M, or dict by modality
        N rows each: the encoders' inputs where the model has encoders, otherwise features (N, T_m, H). A tensor, or
        anything with a length that gives a tensor of rows for a tensor of row numbers, such as cached features on the
        disk.
    masks : M masks (N, T_m), in order or by modality, or None
    targets : Tensor
        (N,) integer classes, (N, C) zeros and ones for ``"multilabel"``, or (N, C) numbers for ``"regression"``.
    """

    inputs: Sequence | Mapping
    masks: Sequence | Mapping | None
    targets: Tensor


class Rows:
    """Inputs and masks in the order of a model's modalities, by row.

    Parameters
    ----------
    model : FLI2MoE
    inputs, masks
        See :class:`Examples`.

    Raises
    ------
    ArgumentError
        Inputs or masks of other modalities, or of different numbers of samples.
    """

    def __init__(self, model: FLI2MoE, inputs: Sequence | Mapping, masks: Sequence | Mapping | None):
        self.model = model
        self.inputs = _per_modality(model, "inputs", inputs)
        self.masks = None if masks is None else _per_modality(model, "masks", masks)
        count = len(self.inputs[0])
        for name, values in (("inputs", self.inputs), ("masks", self.masks or [])):
            for m, value in enumerate(values):
                if len(value) != count or count == 0:
                    expected = f"as many as inputs[0] ({count}), and at least one"
                    raise ArgumentError(f"{name}[{m}]", f"{len(value)} samples", expected)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batch(self, index: Tensor, device: torch.device) -> tuple[list[Tensor], list[Tensor] | None]:
        """Encoded features and masks of the rows ``index``, on ``device``."""
        rows = [(v[index.to(v.device)] if isinstance(v, Tensor) else v[index]).to(device) for v in self.inputs]
        masks = None if self.masks is None else [mask[index.to(mask.device)].to(device) for mask in self.masks]
        return (self.model.encode(rows) if self.model.encoders else rows), masks


def _per_modality(model: FLI2MoE, name: str, values: Sequence | Mapping) -> list[Any]:
    names = model.config.modalities
    if isinstance(values, Mapping):
        if set(values) != set(names):
            raise ArgumentError(name, f"keys {sorted(map(str, values))}", f"exactly the keys {names}")
        values = [values[modality] for modality in names]
    if not isinstance(values, (list, tuple)) or len(values) != len(names):
        size = f" of {len(values)}" if hasattr(values, "__len__") else ""
        raise ArgumentError(name, type(values).__name__ + size, f"a list of {len(names)} tensors, for {names}")
    for m, value in enumerate(values):
        rows = value.dim() > 0 if isinstance(value, Tensor) else hasattr(value, "__len__")
        if not rows or not hasattr(value, "__getitem__"):
            raise ArgumentError(f"{name}[{m}]", type(value).__name__, "a tensor with one row per sample")
    return list(values)
