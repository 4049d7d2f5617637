"""When a probe ends before its budget is spent: good enough, out of time, or interrupted.

Evaluations are made in batches that grow by half of what there is. Their order does not depend on what ends them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from flmoe_fast.checks import ArgumentError, one_of

ON_INTERRUPT = ("raise", "return")


@dataclass
class Stopping:
    """What ends a probe.

    Attributes
    ----------
    until : float or None
        Largest standard error of an interaction that is good enough, absolute or relative to the largest interaction.
    relative : bool
    deadline : float
        By the monotonic clock.
    returns : bool
        Whether an interrupt returns what there is.
    reason : str or None
        What ended the probe: "until", "seconds" or "interrupt"; None as long as the budget does.
    """

    until: float | None = None
    relative: bool = False
    deadline: float = math.inf
    returns: bool = False
    reason: str | None = field(default=None, init=False)

    @classmethod
    def of(cls, until: float | str | None, seconds: float | None, on_interrupt: str) -> Stopping:
        """From the arguments of :func:`interactions`."""
        expected = 'a positive number, or a percentage such as "5%" of the largest interaction'
        number, relative = until, isinstance(until, str)
        if isinstance(until, str):
            try:
                number = float(until.removesuffix("%")) / 100 if until.endswith("%") else math.nan
            except ValueError:
                number = math.nan
        if number is not None and (not isinstance(number, (int, float)) or not 0 < number < math.inf):
            raise ArgumentError("until", repr(until), expected)
        if seconds is not None and (not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf):
            raise ArgumentError("seconds", repr(seconds), "a positive number")
        one_of("on_interrupt", on_interrupt, ON_INTERRUPT)
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        return cls(None if number is None else float(number), relative, deadline, on_interrupt == "return")

    @property
    def asked(self) -> bool:
        """Whether anything but the budget may end the probe."""
        return self.until is not None or self.deadline < math.inf or self.returns

    def totals(self, least: int, most: int, step: int = 1) -> Iterator[int]:
        """How much there is after every batch: ``least`` at first, half as much again each time, ``most`` in the end.

        Multiples of ``step``, save the last.
        """
        total = least if self.asked else most
        while total < most:
            yield total
            total = -(-max(total + 1, total * 3 // 2) // step) * step
        yield most

    def ends(self, sii: torch.Tensor, stderr: torch.Tensor) -> bool:
        """Whether estimates (P, O) are good enough for every head."""
        if self.until is None:
            return False
        wanted = self.until * sii.abs().max(0).values if self.relative else self.until
        good = bool((stderr <= wanted).all())  # not where it is NaN
        self.reason = "until" if good else self.reason
        return good

    def late(self) -> bool:
        """Whether the time is over."""
        over = time.monotonic() >= self.deadline
        self.reason = "seconds" if over else self.reason
        return over

    def interrupted(self, enough: bool) -> bool:
        """Whether an interrupt returns what there is; it does where that is ``enough`` for an estimate."""
        if not (self.returns and enough):
            return False
        self.reason = "interrupt"
        return True
