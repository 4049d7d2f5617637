"""What colours, widths and fading mean in every picture of interactions: one meaning each, for any colour vision.

Colour is the kind of effect, width its size, fading its uncertainty.
"""

from __future__ import annotations

import numpy as np

#: Positive SII, negative SII, and a positive redundancy gap.
SYNERGY, SUBSTITUTION, BACKUP = "#d1495b", "#2e6fba", "#b8860b"
#: Diverging colour maps of the same meaning: SII, and gap.
SII_MAP, GAP_MAP = "RdBu_r", "PuOr_r"
#: Drawn under lines, so that they are seen on pictures of their own colour. Pages put their ground in its place.
GROUND = "#fdfefd"
#: Outlines what has a line.
MARK = "#e0a100"
#: Points, of the smallest and the largest effect of a picture.
THINNEST, THICKEST = 0.8, 6.0
#: Standard errors from which on an effect is drawn in full.
SURE = 4.0
FAINTEST, FULL = 0.18, 0.92


def colour_of(value: float, of: str) -> str:
    """The colour of an SII or a gap."""
    if of == "gap":
        return BACKUP if value > 0 else "0.5"
    return SYNERGY if value > 0 else SUBSTITUTION


def width_of(value: float, largest: float) -> float:
    """Width in points of an effect beside the largest of a picture."""
    return THINNEST + (THICKEST - THINNEST) * min(1.0, abs(value) / largest if largest > 0 else 0.0)


def fade_of(value: float, error: float) -> float:
    """Opacity of an effect with a standard error."""
    if not error > 0:  # exact, or nothing is known about it
        return FULL if error == 0 else FAINTEST
    return float(np.clip(FAINTEST + (FULL - FAINTEST) * abs(value) / (SURE * error), FAINTEST, FULL))


def unit_of(about: dict) -> str:
    """What values are measured in, for an axis."""
    return {"prob": "probability", "logit": "logits"}.get(str(about.get("value")), "units of the game")
