"""Real handwritten digits as two modalities: the left and the right half of every image.

Neither half tells all digits apart, so a model has to combine them. The 1,797 images of 8 x 8 pixels come with
scikit-learn (from the UCI "Optical Recognition of Handwritten Digits" data); nothing is downloaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flmoe_fast.checks import integer

MODALITIES = ("left", "right")
CLASSES = 10
#: Tokens of each half, one per row of the image, and pixels of each token.
TOKENS, PIXELS = 8, 4
HELD_OUT = 0.2


class Digits(NamedTuple):
    """One part of the data.

    Attributes
    ----------
    inputs : list of Tensor
        One (N, 8, 4) tensor per modality: row strips of 4 pixels, in [0, 1].
    labels : Tensor
        (N,) int64, the digits.
    """

    inputs: list[Tensor]
    labels: Tensor

    @property
    def masks(self) -> list[Tensor]:
        """One (N, 8) key mask per modality; every token is valid."""
        return [torch.ones(half.shape[:2]) for half in self.inputs]


def two_view_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """Training and held-out digits, split 80 to 20 with the same share of every class.

    Parameters
    ----------
    seed : int
        Chooses the split, >= 0.

    Returns
    -------
    (Digits, Digits)
        1,437 training and 360 held-out images, each part in a random order.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16.0, dtype=torch.float32).unflatten(1, (TOKENS, 2 * PIXELS))
    labels = torch.tensor(labels, dtype=torch.int64)
    seed = integer("seed", seed, least=0, most=2**32 - 1)
    parts = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=seed, stratify=labels)
    # Contiguous copies, so that no part keeps the whole data set alive or is saved with it.
    training, held_out = (
        Digits([half.contiguous() for half in images[index].split(PIXELS, dim=2)], labels[index])
        for index in map(torch.tensor, parts)
    )
    return training, held_out
