"""What a modality of a sample looks like to a person, for pictures and pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flmoe_fast.checks import ArgumentError, one_of

VIEW_KINDS = ("text", "image", "table")


@dataclass(frozen=True)
class View:
    """What a modality of a sample looks like.

    Attributes
    ----------
    name : str
    kind : "text", "image" or "table"
    tokens : tuple of str
        What each token is called.
    image : uint8 (height, width, 3) or float (height, width), or None
        As the model sees it, for an image.
    grid : (rows, columns) or None
        How tokens divide the image, row by row.
    """

    name: str
    kind: str
    tokens: tuple[str, ...]
    image: np.ndarray | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, VIEW_KINDS)
        if self.kind == "image" and (self.image is None or self.grid is None):
            raise ArgumentError("image", None, "pixels and a grid for an image")
