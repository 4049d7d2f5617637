"""Argument checks with one shape of message: which argument, what came, what was expected."""

from __future__ import annotations

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


def shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Check a tensor's shape; ``None`` matches any size. ``meaning`` spells the axes, e.g. ``(T, H)``."""
    fits = tensor.dim() == len(expected) and all(e is None or e == s for e, s in zip(expected, tensor.shape))
    if not fits:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ArgumentError(name, f"shape {tuple(tensor.shape)}", f"{meaning} = ({sizes})")


def finite(name: str, tensor: torch.Tensor) -> None:
    """Check that a float tensor has no NaN and no infinity; the message says where the first one is."""
    wrong = ~torch.isfinite(tensor)
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        value = float(tensor[first])
        raise ArgumentError(name, f"{value} at index {first} ({int(wrong.sum())} such values)", "finite numbers")
