"""Which GPU engine ``backend="auto"`` takes: the one that was measured to be faster, on that device and shape.

fastest.json is written by ``python -m bench.gpu`` from what it measured. Where nothing was measured it is the Triton
engine, which runs every shape.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

FILE = Path(__file__).with_name("fastest.json")


@functools.cache
def _measured() -> list[dict]:
    return json.loads(FILE.read_text())


def fastest(device: str, hidden: int, heads: int, tokens: int, precision: str) -> str:
    """``"cuda"`` or ``"triton"``; of measurements of the same device, widths and precision, the nearest in tokens."""
    key = {"device": device, "hidden": hidden, "heads": heads, "precision": precision}
    rows = [row for row in _measured() if all(row[name] == value for name, value in key.items())]
    if not rows:
        return "triton"
    return min(rows, key=lambda row: abs(math.log(row["tokens"] / tokens)))["fastest"]
