"""What a call may spend: one rule for contexts and budgets, and which way the default goes with it."""

from __future__ import annotations

from dataclasses import dataclass

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.probes.grid import CornerGrid

DEFAULT_CONTEXTS = 64
#: Most players for whom coalitions of no particular structure are always worth more than corner grids, and the contexts
#: that a budget has to pay for where players are more, or where it is more than a process takes.
MOST_PLAYERS, FEW_CONTEXTS, LEAST_CONTEXTS = 24, 3, 6
#: Complementary pairs that a process takes: its matrices have as many rows, 128 MB each at 4,096.
MOST_ROWS = 4096
#: Fewest evaluations that a process is fitted to.
LEAST_BUDGET = 16


@dataclass(frozen=True)
class Spending:
    """``evaluations`` that may be made, and how many whole ``contexts`` of a corner grid these pay for."""

    evaluations: int
    contexts: int


def spend(grid: CornerGrid, contexts: int | None, budget: int | None) -> Spending:
    """What ``contexts`` or a ``budget`` stand for; 64 contexts where neither is given.

    From four on, contexts that a budget pays for are even in number, so that they come with their complements.
    """
    if budget is None:
        count = integer("contexts", DEFAULT_CONTEXTS if contexts is None else contexts, least=1)
        return Spending(count * grid.evaluations, count)
    if contexts is not None:
        raise ArgumentError("budget", "a budget together with contexts", "one of the two")
    affordable = integer("budget", budget, least=1) // grid.evaluations
    return Spending(budget, affordable - affordable % 2 if affordable >= 4 else affordable)


def enumerates(n: int, total: int, ended: bool) -> bool:
    """Whether all 2^n coalitions are asked for in order.

    Not where something else than the budget may end a probe (``ended``) and a process takes as many: that sees all of
    them too, and is worth something before.
    """
    return n < 63 and 2**n <= total and not (ended and 2**n <= 2 * MOST_ROWS)


def default_way(n: int, spending: Spending, ended: bool = False) -> tuple[str, str]:
    """Which way the default goes, "enumeration", "points", "contexts" or "grid", and why, for a person to read.

    ``ended``: something else than the budget may end it, so that half of it has to be worth something.
    """
    total, contexts = spending.evaluations, spending.contexts
    if enumerates(n, total, ended):
        return "enumeration", f"all {2**n} coalitions cost no more than the budget"
    if contexts >= FEW_CONTEXTS and n > MOST_PLAYERS and total >= LEAST_BUDGET:
        return "contexts", f"{n} players, more than {MOST_PLAYERS}, and a budget for {contexts} contexts"
    if contexts >= LEAST_CONTEXTS and total > 2 * MOST_ROWS:
        return "contexts", f"more evaluations than the {2 * MOST_ROWS} that a process takes"
    if total >= LEAST_BUDGET:
        few = f"{n} players, at most {MOST_PLAYERS}" if n <= MOST_PLAYERS else f"a budget for {contexts} contexts only"
        return "points", few
    if contexts:
        return "grid", f"{total} evaluations, fewer than a process is fitted to"
    raise ArgumentError("budget", total, f"at least {LEAST_BUDGET} evaluations")
