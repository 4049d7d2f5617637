"""Data that is ready for a model: tensors per modality, targets, and the three parts every study has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flmoe_fast.checks import ArgumentError

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Part:
    """Samples of one part.

    Attributes
    ----------
    inputs : list of M
        One per modality: a tensor with N rows, or cached features (:class:`~flmoe_fast.data.cache.CachedFeatures`).
    masks : list of M tensors (N, T_m), or None
    targets : Tensor (N,) int64 classes, (N, C) zeros and ones, or (N, C) numbers
    ids : tuple of N str
    """

    inputs: list
    masks: list[Tensor] | None
    targets: Tensor
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, values in (("inputs", self.inputs), ("masks", self.masks or []), ("ids", [self.ids])):
            for m, value in enumerate(values):
                if len(value) != len(self.targets):
                    raise ArgumentError(f"{name}[{m}]", f"{len(value)} samples", f"{len(self.targets)}, one a target")

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test part of a data set.

    Attributes
    ----------
    name : str
    modalities : tuple of M str
    task : "multiclass", "multilabel" or "regression"
    classes : tuple of C str
    train, valid, test : Part
    """

    name: str
    modalities: tuple[str, ...]
    task: str
    classes: tuple[str, ...]
    train: Part
    valid: Part
    test: Part

    def part(self, name: str) -> Part:
        """The part of that name."""
        if name not in PARTS:
            raise ArgumentError("part", repr(name), f"one of {', '.join(PARTS)}")
        return getattr(self, name)
