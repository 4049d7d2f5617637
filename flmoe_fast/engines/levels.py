"""Instruction levels of the native CPU engine, and which of them runs."""

from __future__ import annotations

import os
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.engine import Engine, Request
from flmoe_fast.native import extension

#: Forces an instruction level: amx, avx512, avx2 or portable.
LEVEL_VARIABLE = "FLMOE_CPU_LEVEL"


def levels() -> dict[str, tuple[str, str]]:
    """Instruction levels, best first: name to (arithmetic, what is missing or nothing)."""
    module, _ = extension()
    if module is None:
        return {}
    return {name: (arithmetic, missing) for name, arithmetic, missing in module.cpu_levels()}


def usable_level(name: str | None = None) -> str:
    """The level that runs: the one asked for, else ``FLMOE_CPU_LEVEL``, else the best this machine has.

    Raises
    ------
    ArgumentError
        The level asked for is not one of this machine.
    """
    known = levels()
    usable = [level for level, (_, missing) in known.items() if not missing]
    argument = "level" if name is not None else LEVEL_VARIABLE
    name = os.environ.get(LEVEL_VARIABLE, "").strip().lower() if name is None else name
    if not name:
        return usable[0]
    if name not in usable:
        reason = f" ({known[name][1]})" if name in known else ""
        raise ArgumentError(argument, repr(name) + reason, "a level of this machine: " + ", ".join(usable))
    return name


def arithmetics() -> tuple[str, ...]:
    """Operands that the levels of this machine multiply, that of the best level first."""
    return tuple(dict.fromkeys(arithmetic for arithmetic, missing in levels().values() if not missing))


def level_of(precision: str) -> str:
    """The level for a ``precision`` of :func:`arithmetics`: the best one, or that of ``FLMOE_CPU_LEVEL`` if it fits."""
    best = usable_level()
    if precision == levels()[best][0]:
        return best
    return next(name for name, (operands, missing) in levels().items() if operands == precision and not missing)


def missing(dtype: torch.dtype, device: torch.device) -> str:
    """What keeps the native engine from that dtype and device here; empty if nothing does."""
    module, why = extension()
    if module is None:
        return why
    if device.type != "cpu":
        return f"the device is {device}"
    if dtype != torch.float32:
        return f"the dtype is {dtype}, and the engine computes in float32"
    return ""


class AtLevel(Engine[Any, Any]):
    """An engine that runs at an instruction level of this machine.

    Attributes
    ----------
    level : str
        The one asked for, else ``FLMOE_CPU_LEVEL``, else the best the machine has.
    """

    def __init__(self, problem: Any, *, level: str | None = None, **options: Any):
        super().__init__(problem, **options)
        self.level = usable_level(level)
        self._asked_for = level is not None or bool(os.environ.get(LEVEL_VARIABLE, "").strip())

    @classmethod
    def make(cls, request: Request) -> Engine:
        level = None if request.precision == "auto" else level_of(request.precision)
        return cls(
            request.known_problem, dtype=request.dtype, device=request.device, memory=request.memory, level=level
        )

    @property
    def arithmetic(self) -> str:
        """Operands of the level's matrix products."""
        return levels()[self.level][0]

    @property
    def coarse(self) -> bool:
        """Whether the level's products are coarser than float32, and nobody asked for the level."""
        return self.arithmetic != "fp32" and not self._asked_for

    def finer(self) -> Request | None:
        """The best level that multiplies float32, then float64."""
        if self.coarse:
            return Request(self.dtype, self.device, self.problem, self.name, "fp32")
        return super().finer()

    @property
    def more_exact(self) -> str:
        """How to get the same game with less rounding, for a person to read."""
        return "dtype=torch.float64" if self.arithmetic == "fp32" else "precision='fp32', or dtype=torch.float64"

    def about(self) -> dict[str, Any]:
        """Level and arithmetic."""
        return {"level": self.level, "arithmetic": self.arithmetic}
