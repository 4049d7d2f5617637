"""The two-view digits against scikit-learn's own images."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from flmoe_fast.checks import ArgumentError
from flmoe_fast.data.digits import two_view_digits


def rows(parts) -> list[tuple]:
    """Every image of the parts as its label and its 64 pixel values, put together again from the halves."""
    found = []
    for part in parts:
        whole = torch.cat(part.inputs, dim=2).flatten(1)
        found += [(label, *image) for label, image in zip(part.labels.tolist(), (16 * whole).tolist())]
    return found


def test_every_image_is_there_once_and_in_place():
    pixels, labels = load_digits(return_X_y=True)
    original = sorted((int(label), *image) for label, image in zip(labels, pixels.tolist()))
    assert sorted(rows(two_view_digits(0))) == original


def test_shapes_range_and_masks():
    training, held_out = two_view_digits(0)
    for part, count in ((training, 1437), (held_out, 360)):
        assert [tuple(half.shape) for half in part.inputs] == [(count, 8, 4)] * 2
        assert [mask.sum().item() for mask in part.masks] == [8 * count] * 2
        assert part.labels.shape == (count,) and part.labels.dtype == torch.int64
        for half in part.inputs:
            assert half.dtype == torch.float32 and (half.min(), half.max()) == (0.0, 1.0)
            assert half.untyped_storage().nbytes() == 4 * half.numel()  # no view of the whole data set


def test_split_keeps_the_share_of_every_class():
    training, held_out = two_view_digits(3)
    total = training.labels.bincount() + held_out.labels.bincount()
    assert ((held_out.labels.bincount() - 0.2 * total).abs() <= 1).all()


def test_seed_chooses_the_split():
    first, again, other = (two_view_digits(seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first.inputs[0], again.inputs[0]) and torch.equal(first.labels, again.labels)
    assert set(rows([first])) != set(rows([other]))


@pytest.mark.parametrize("seed", [-1, 1.0, "0"])
def test_bad_seed(seed):
    with pytest.raises(ArgumentError, match="seed"):
        two_view_digits(seed)
