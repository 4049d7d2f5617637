"""The search for a process's scales: SciPy's L-BFGS-B, whose BLAS keeps to one thread meanwhile.

SciPy brings a BLAS of its own. Its threads wait for work in a loop, on the cores that PyTorch's threads compute the
objective on: a search over vectors of some dozen numbers then slows its own objective down several times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

#: Relative change of the objective at which a search ends: ten thousandths of a nat where a likelihood has hundreds.
ENOUGH = 1e-6

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


def minimum(objective: Objective, start: np.ndarray, bounds: np.ndarray, steps: int) -> np.ndarray:
    """Where a search from ``start`` (P,) within ``bounds`` (P, 2) ends after at most so many steps, (P,).

    The objective returns its value and its gradient (P,).
    """
    with _libraries().limit(limits=1, user_api="blas"):
        options = {"maxiter": steps, "ftol": ENOUGH}
        return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


@functools.cache
def _libraries() -> ThreadpoolController:
    """The libraries of this process with threads of their own; found by milliseconds of reading, so once."""
    return ThreadpoolController()
