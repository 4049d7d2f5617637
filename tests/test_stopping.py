"""Probes that end before their budget is spent: on what, with what, and marked as such."""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest
import torch

from flmoe_fast import ArgumentError, interactions


class Counted:
    """A smooth game that keeps what it was asked for, and may be interrupted or slow."""

    def __init__(self, n: int, interrupt_after: int | None = None, delay: float = 0.0):
        self.n, self.asked, self.interrupt_after, self.delay = n, [], interrupt_after, delay
        self.weight = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / n**0.5

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        if self.interrupt_after is not None and sum(map(len, self.asked)) >= self.interrupt_after:
            self.interrupt_after = None
            raise KeyboardInterrupt
        time.sleep(self.delay)
        self.asked.append(z.clone())
        return 3 * (z.double() @ self.weight).tanh().sum(1)


def probed(game: Counted, **options):
    pairs = [(0, 1), (2, 3), (1, 4)]
    return interactions(game, n=game.n, pairs=pairs, budget=500, progress=False, **options)


#: Every way that a probe goes.
WAYS = pytest.mark.parametrize("n, method", [(12, "auto"), (40, "auto"), (12, "grid"), (12, "surrogate")])


@pytest.mark.parametrize("n, method", [(12, "auto"), (40, "auto"), (12, "grid")])
def test_good_enough_is_enough(n, method):
    """It stops once the errors are small enough, not before, and has asked for the first part of the same order."""
    probe = functools.partial(probed, method=method)
    whole = Counted(n)
    until_end = probe(whole, until=1e-12)
    assert "stopped" not in until_end.about and until_end.evaluations > 400
    bound = 1.5 * float(until_end.sii_stderr.max())
    game = Counted(n)
    found = probe(game, until=bound)
    assert found.about["stopped"] == "until" and "ended by 'until'" in repr(found)
    assert found.evaluations < until_end.evaluations and float(found.sii_stderr.max()) <= bound
    mine, all_of_it = torch.cat(game.asked), torch.cat(whole.asked)
    assert torch.equal(mine, all_of_it[: len(mine)])
    share = float((until_end.sii_stderr / np.abs(until_end.sii).max()).max())
    assert probe(Counted(n), until=f"{150 * share}%").about["stopped"] == "until"


@WAYS
def test_interrupts_return_what_there_is(n, method):
    probe = functools.partial(probed, method=method)
    game = Counted(n, interrupt_after=200)
    found = probe(game, on_interrupt="return")
    assert found.about["stopped"] == "interrupt" and 100 <= found.evaluations < 450
    assert np.isfinite(found.sii_stderr).all() and (found.sii_stderr > 0).all()
    with pytest.raises(KeyboardInterrupt):
        probe(Counted(n, interrupt_after=0))
    with pytest.raises(KeyboardInterrupt):  # nothing to return
        probe(Counted(n, interrupt_after=0), on_interrupt="return")


@WAYS
def test_time_that_is_over(n, method):
    probe = functools.partial(probed, method=method)
    found = probe(Counted(n, delay=0.02), seconds=0.01)
    assert found.about["stopped"] == "seconds" and found.evaluations < 200
    assert "stopped" not in probe(Counted(n), seconds=600).about


def test_everything_seen_is_exact_when_it_could_have_ended_sooner():
    found = interactions(Counted(8), n=8, budget=400, until=1e-300, progress=False)
    exact = interactions(Counted(8), n=8, budget=400, progress=False)
    assert found.evaluations == 256 and np.allclose(found.sii, exact.sii, rtol=0, atol=1e-12)
    assert "stopped" not in found.about and not found.sii_stderr.any()


def test_a_last_batch_of_two_contexts_is_a_pair_of_complements():
    """No interaction among additive players, whatever the batches: 12 contexts come as 6, 4 and 2."""
    weights = torch.arange(30, dtype=torch.float64)
    pairs = [(0, 1), (2, 3)]
    found = interactions(lambda z: z.double() @ weights, n=30, pairs=pairs, budget=12 * 7, until=1e-300, progress=False)
    assert found.evaluations == 12 * 7 and np.abs(found.sii).max() < 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"until": 0.0},
        {"until": "5"},
        {"until": "x%"},
        {"seconds": -1.0},
        {"on_interrupt": "stop"},
        {"adaptive": True, "method": "grid", "until": 0.1},
    ],
)
def test_refusals(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        probed(Counted(12), **wrong)
