"""From a data set as read to tensors and encoders that a model can be trained with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from flmoe_fast.checks import ArgumentError
from flmoe_fast.data.cache import CachedFeatures, cache_features
from flmoe_fast.data.raw import RawData
from flmoe_fast.data.splits import PARTS, Part, Splits
from flmoe_fast.model.backbones import TextBackbone, VisionBackbone
from flmoe_fast.model.encoders import (
    ColumnGroupEncoder,
    PatchEncoder,
    ProjectionEncoder,
    SequenceEncoder,
    TabularTokenEncoder,
)


class Prepared(NamedTuple):
    """Data and encoders for one model.

    Attributes
    ----------
    splits : Splits
        Inputs, masks and targets.
    encoders : dict[str, nn.Module]
        A trainable encoder for each modality, newly initialised.
    tokens : tuple of int
        Padded tokens of each modality.
    """

    splits: Splits
    encoders: dict[str, nn.Module]
    tokens: tuple[int, ...]


def prepare(
    raw: RawData,
    hidden: int,
    *,
    backbones: Mapping[str, TextBackbone | VisionBackbone] | None = None,
    cache: str | os.PathLike | None = None,
    patches: int | None = None,
    groups: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    progress: bool = True,
) -> Prepared:
    """Encode texts and images by their backbones, standardise tables, and choose encoders.

    Parameters
    ----------
    raw : RawData
    hidden : int
        Token width H of the model.
    backbones : dict from modality to backbone, for every text and image
    cache
        Folder of the features, needed for texts and images.
    patches : int, optional
        Tokens of every modality, for the original generation: tables are cut into patches and sequences read by a GRU.
        Texts and images have more; they cannot be patched.
    groups : int, optional
        Tokens of a table, of neighbouring columns; by default a token each.
    batch_size, dtype, progress
        See :func:`~flmoe_fast.data.cache.cache_features`.

    Returns
    -------
    Prepared
        Masks are given for token sequences, and left out with ``patches``. A text is padded to the longest of the data
        set, so that a token's position does not depend on the batch. Tables are standardised by the training part;
        columns that are constant there become 0.

    Raises
    ------
    ArgumentError
        A text or image without a backbone of its kind or without a cache, or with ``patches``.
    """
    backbones = backbones or {}
    columns: dict[str, CachedFeatures | torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    encoders: dict[str, nn.Module] = {}
    for name, kind in raw.kinds.items():
        values = raw.values[name]
        if kind in ("text", "image"):
            backbone = backbones.get(name)
            if backbone is None or backbone.kind != kind:
                got = "none" if backbone is None else f"one of {backbone.kind}"
                raise ArgumentError(f"backbones[{name!r}]", got, f"a backbone for this {kind}")
            if cache is None:
                raise ArgumentError("cache", None, f"a folder for the features of {name}")
            if patches is not None:
                raise ArgumentError("patches", patches, f"None, because {name} is a sequence of tokens")
            listed = cast(Sequence, values)  # only tables and sequences of numbers come as arrays
            features = cache_features(cache, backbone, listed, batch_size=batch_size, dtype=dtype, progress=progress)
            columns[name], masks[name] = features, features.masks
            encoders[name] = ProjectionEncoder(features.width, hidden)
            continue
        array = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        if kind == "table":
            array = _standardised(array, raw.parts["train"])
            width = array.shape[1]
            if patches is not None:
                encoders[name] = PatchEncoder(width, patches, hidden)
            elif groups is not None:
                encoders[name] = ColumnGroupEncoder(width, groups, hidden)
            else:
                encoders[name] = TabularTokenEncoder(width, hidden)
            masks[name] = torch.ones(len(array), patches or groups or width, dtype=torch.bool)
        elif patches is not None:
            encoders[name] = SequenceEncoder(array.shape[2], patches, hidden)
            masks[name] = torch.ones(len(array), patches, dtype=torch.bool)
        else:
            encoders[name] = ProjectionEncoder(array.shape[2], hidden)
            masks[name] = array.ne(0).any(-1)  # sequences are padded with zero steps
        columns[name] = array
    parts = {part: _part(raw, raw.parts[part], columns, None if patches else masks) for part in PARTS}
    splits = Splits(raw.name, raw.modalities, raw.task, raw.classes, **parts)
    return Prepared(splits, encoders, tuple(masks[name].shape[1] for name in raw.modalities))


def _standardised(array: torch.Tensor, train: np.ndarray) -> torch.Tensor:
    some = (array[torch.from_numpy(train)] if len(train) else array).double()
    mean, spread = some.mean(0), some.std(0, correction=0)
    return torch.where(spread > 0, (array - mean) / spread.clamp(min=1e-12), 0.0).float()


def _part(raw: RawData, rows: np.ndarray, columns: Mapping, masks: Mapping | None) -> Part:
    index = torch.from_numpy(rows)
    inputs = [c.subset(index) if isinstance(c, CachedFeatures) else c[index] for c in columns.values()]
    kept = None if masks is None else [mask[index] for mask in masks.values()]
    return Part(inputs, kept, raw.targets[index], tuple(raw.ids[row] for row in rows))
