"""Argument checks with one shape of message: which argument, what came, what was expected."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch


class ArgumentError(ValueError):
    """A bad argument. The message reads ``name: got ..., expected ...``."""

    def __init__(self, name: str, got: object, expected: str):
        super().__init__(f"{name}: got {got}, expected {expected}")
        self.argument = name


def integer(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """Return ``value`` as an int within [least, most], or raise :class:`ArgumentError`."""
    bounds = [f">= {least}"] if least is not None else []
    bounds += [f"<= {most}"] if most is not None else []
    expected = "an integer" + (" " + " and ".join(bounds) if bounds else "")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentError(name, f"{value!r} ({type(value).__name__})", expected)
    number = int(value)
    if (least is not None and number < least) or (most is not None and number > most):
        raise ArgumentError(name, repr(value), expected)
    return number


def one_of(name: str, value: Any, allowed: tuple) -> Any:
    """Return ``value`` if it is one of ``allowed``, or raise :class:`ArgumentError`."""
    if value not in allowed:
        raise ArgumentError(name, repr(value), "one of " + ", ".join(map(repr, allowed)))
    return value


def device(name: str, value: str) -> torch.device:
    """The device called ``value``, if torch can use it here; else :class:`ArgumentError`."""
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError) as problem:
        got = f"{value!r} ({str(problem).splitlines()[0]})"
        raise ArgumentError(name, got, "a device that torch can use here") from None


def shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Check a tensor's shape; ``None`` matches any size. ``meaning`` spells the axes, e.g. ``(T, H)``."""
    fits = tensor.dim() == len(expected) and all(e is None or e == s for e, s in zip(expected, tensor.shape))
    if not fits:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ArgumentError(name, f"shape {tuple(tensor.shape)}", f"{meaning} = ({sizes})")


#: Features have to be smaller: the squares of larger ones are infinite in float32, and a LayerNorm of them is zero.
LARGEST_FEATURE = 1e18


def finite(name: str, tensor: torch.Tensor, below: float = math.inf) -> None:
    """Check that a float tensor has no NaN, no infinity, and nothing of a size that a computation cannot bear.

    The message says where the first such value is.
    """
    wrong = ~(tensor.abs() < below)
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        value = float(tensor[first])
        expected = "finite numbers" + ("" if math.isinf(below) else f" below {below:g}")
        raise ArgumentError(name, f"{value} at index {first} ({int(wrong.sum())} such values)", expected)
