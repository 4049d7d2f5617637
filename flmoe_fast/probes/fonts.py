"""Letters that the default font lacks: a font of the system that has them, or a box and one warning where none has.

matplotlib remembers which fonts there were when it first ran, so the system is asked anew, when a letter is missing.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

#: How files of fonts begin that are taken before others: many letters, without serifs, one colour.
PREFERRED = (
    "notosanscjk", "sourcehansans", "wqy", "droidsansfallback", "notosans-", "notosans", "notoemoji", "symbola",
)  # fmt: skip
#: Stands for a letter that no font has; the default font has it.
BOX = "\u25a1"
#: Change how the letter before them looks, and need no glyph of their own.
UNSEEN = frozenset([0x200B, 0x200C, 0x200D, 0xFE0E, 0xFE0F, 0x0A])
_SAID: set[str] = set()


@functools.cache
def letters_of(path: str) -> frozenset[int]:
    """Code points that a font's file has outlines for; none where matplotlib cannot draw it."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()  # colour fonts are bitmaps


@functools.cache
def system_fonts() -> tuple[str, ...]:
    """Files of the system's fonts, those that are worth asking first in front."""
    from matplotlib import font_manager

    def rank(path: str) -> tuple:
        name = Path(path).name.lower()
        place = next((n for n, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
        return place, "regular" not in name, name

    return tuple(sorted(font_manager.findSystemFonts(), key=rank))


@functools.cache
def family_with(letter: str) -> str | None:
    """The family of a font of the system that can draw a letter, which matplotlib knows from now on."""
    path = next((path for path in system_fonts() if ord(letter) in letters_of(path)), None)
    return None if path is None else _known(path)


@functools.cache
def _known(path: str) -> str:
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    font_manager.fontManager.addfont(path)
    return FT2Font(path).family_name


@functools.cache
def _own(families: tuple[str, ...]) -> frozenset[int]:
    """What some families can draw between them."""
    from matplotlib.font_manager import FontProperties, findfont

    return frozenset().union(*(letters_of(str(findfont(FontProperties(family=[name])))) for name in families))


def make_legible(axes: Axes) -> None:
    """Give every text of some axes the fonts that its letters need.

    Letters that no font has become boxes, and one warning in the process's life names each. Where texts stay texts (SVG
    for a page) they are left to whoever shows them, who may have more fonts.
    """
    from matplotlib.text import Text

    elsewhere = matplotlib.rcParams["svg.fonttype"] == "none"
    lost: set[str] = set()
    for text in axes.findobj(Text):
        if isinstance(text, Text) and not text.get_text().isascii():
            lost |= _fitted(text)
    if elsewhere or not lost:
        return
    boxes = str.maketrans(dict.fromkeys(lost, BOX))
    for text in axes.findobj(Text):
        if isinstance(text, Text):
            text.set_text(text.get_text().translate(boxes))
    for axis in (axes.xaxis, axes.yaxis):  # which write their labels anew whenever they are drawn
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if lost & set("".join(labels)):
            axis.set_ticks(axis.get_majorticklocs(), [label.translate(boxes) for label in labels])
    if lost - _SAID:
        shown = " ".join(f"{letter} (U+{ord(letter):04X})" for letter in sorted(lost - _SAID))
        _SAID.update(lost)
        warnings.warn(f"no font here has {shown}; drawn as {BOX}, tables and pages keep them", stacklevel=4)


def _fitted(text: Text) -> set[str]:
    """Add families to a text's own; the letters that none has."""
    own = tuple(text.get_fontfamily())
    lacking = {c for c in text.get_text() if ord(c) not in _own(own) and ord(c) not in UNSEEN}
    found = {letter: family_with(letter) for letter in sorted(lacking)}
    more = dict.fromkeys(family for family in found.values() if family is not None)
    if more:
        text.set_fontfamily([*own, *more])
    return {letter for letter, family in found.items() if family is None}
