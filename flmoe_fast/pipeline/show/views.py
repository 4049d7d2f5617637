"""What a modality of a sample looks like to a person, for pictures and pages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flmoe_fast.checks import ArgumentError, one_of

VIEW_KINDS = ("text", "image", "table")
#: What tokenizers add around a text, which no reader wrote.
ADDED = re.compile(r"\s*(\[(CLS|SEP|PAD|MASK)\]|</?s>|<pad>|<mask>|<\|[a-z]*text\|>)\s*")


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


def player_labels(views: Sequence[View], places: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """What players are called: words, patches by row and column, columns of a table.

    A word that is there twice is followed by its position, and what is in two modalities by the modality's name.

    Parameters
    ----------
    views : M views
    places : (modality, position) of every player, as ``game.positions``
    """
    labels = []
    for m, position in places:
        view = views[m]
        token = view.tokens[position].strip() or "·"
        if view.kind == "image":
            token = f"{view.name} {token}" if view.grid is None else _patch(view, position)
        labels.append(token)
    owners: dict[str, set[int]] = {}
    for label, (m, _) in zip(labels, places):
        owners.setdefault(label, set()).add(m)
    labels = [
        f"{label} ({views[m].name})" if len(owners[label]) > 1 else label for label, (m, _) in zip(labels, places)
    ]
    often = Counter(labels)
    return tuple(f"{label} #{position}" if often[label] > 1 else label for label, (_, position) in zip(labels, places))


def _patch(view: View, position: int) -> str:
    rows, columns = view.grid or (1, 1)
    row, column = divmod(position, columns)
    return f"{view.name} {position + 1}" if 1 in (rows, columns) else f"{view.name} {row + 1},{column + 1}"


def spaced(tokens: Sequence[str]) -> list[str]:
    """The tokens of a text as a person writes them: with spaces between words, without what a tokenizer added.

    Tokens that carry their own spaces are left as they are; pieces of words (``##ing``) and punctuation follow without
    one. What is left out becomes an empty string, so that places stay.
    """
    own = any(token != token.strip() for token in tokens if not ADDED.fullmatch(token))
    shown: list[str] = []
    for token in tokens:
        if ADDED.fullmatch(token):
            shown.append("")
        elif own:
            shown.append(token)
        else:
            glued = token.startswith("##") or re.fullmatch(r"[.,;:!?%)\]}'’”]+", token) or not any(shown)
            shown.append(token.removeprefix("##") if glued else f" {token}")
    return shown
