"""The progress bar of a probe: none at all where the probe is over before anybody could read it."""

from __future__ import annotations

from tqdm.auto import tqdm

#: Seconds before a bar is drawn.
QUICK = 0.5


def progress_bar(total: int, what: str, shown: bool) -> tqdm:
    """A bar over ``total`` evaluations that leaves nothing behind."""
    return tqdm(total=total, unit="eval", desc=what, disable=not shown, leave=False, delay=QUICK)
