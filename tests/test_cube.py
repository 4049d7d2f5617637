"""Tables of all values: transforms, indices and gaps against the definitions, and draws that keep what was seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flmoe_fast import exact_interactions, interactions
from flmoe_fast.probes.cube import codes, spectrum, table_gaps, table_indices, walsh
from flmoe_fast.probes.drawing import complementary
from flmoe_fast.probes.exact import exact_index, pair_interaction
from flmoe_fast.probes.gap import GAPS
from flmoe_fast.probes.link import Logit, left_out, link_of, share_of_link, unseen_weights
from flmoe_fast.probes.parity import ParityProcess
from flmoe_fast.probes.surrogate import kernel, signs
from flmoe_fast.probes.tables import TableSource

N = 7
EVERY = ((torch.arange(2**N)[:, None] >> torch.arange(N)) & 1).bool()
PAIRS = torch.combinations(torch.arange(N), 2)


def tables(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2**N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_transform_of_a_table():
    """Against its definition, for numbers of bits that do and do not fill the steps."""
    for n in (1, 4, N):
        some = tables()[:, : 2**n]
        every = EVERY[: 2**n, :n].double()
        by_definition = some @ (1 - 2 * ((every @ every.T) % 2))
        assert torch.allclose(walsh(some), by_definition, rtol=0, atol=1e-12)
        assert torch.allclose(walsh(walsh(some)) / 2**n, some, rtol=0, atol=1e-14)


def test_kernel_is_diagonal_under_the_transform():
    rate = torch.linspace(0.1, 1.0, N, dtype=torch.float64)
    some = tables()
    applied = some @ kernel(signs(EVERY), signs(EVERY), rate)
    assert torch.allclose(walsh(walsh(some) * spectrum(rate)), applied, rtol=0, atol=1e-12)
    assert torch.equal(codes(EVERY), torch.arange(2**N))


@pytest.mark.parametrize(
    "name, order", [("SII", 2), ("STII", 2), ("FSII", 2), ("BII", 2), ("SV", 1), ("BV", 1), ("FSII", 1)]
)
def test_indices_of_tables(name, order):
    members = torch.combinations(torch.arange(N), order)
    some = tables()
    assert torch.allclose(table_indices(some, members, name, order), exact_index(some.T, N, members, name, order))


@pytest.mark.parametrize("kind", GAPS)
def test_gaps_of_tables(kind):
    some = tables()
    one_by_one = torch.stack([pair_interaction(some.T, N, i, j, kind)[1] for i, j in PAIRS.tolist()])
    assert torch.allclose(table_gaps(some, PAIRS.flip(1), kind), one_by_one)


def fitted(values: torch.Tensor, count: int, link: Logit | None = None) -> TableSource:
    z = complementary(N, count, 0)
    upper, lower = values[codes(z), None], values[codes(~z), None]
    process = ParityProcess(z, *(part if link is None else link.of(part) for part in (upper, lower)))
    return TableSource(process, link, upper, lower, 0)


def test_drawn_tables_are_games_of_the_posterior():
    """They keep what was evaluated, their mean's index is the closed form, and their spread its variance."""
    rate = torch.full((N,), 0.4, dtype=torch.float64)
    values = walsh(tables(1) * spectrum(rate).sqrt())[0] + 2 * (signs(EVERY).sum(1) / N) ** 3  # extremes at the ends
    source = fitted(values, 40)
    drawn = source.draw(0, 400)
    both = torch.cat([codes(source.process.coalitions), codes(~source.process.coalitions)])
    assert torch.equal(drawn[:, both], values[both].expand(401, -1))
    found = table_indices(drawn, PAIRS, "SII", 2)
    value, variance = source.process.index(PAIRS, "SII", 2)
    # Scales of left-out errors stand between the two.
    assert torch.allclose(found[:, 0], value[:, 0], rtol=0, atol=0.2 * float(variance.max().sqrt()))
    ratio = found[:, 1:].var(1).mean() / variance.mean()
    assert 0.3 < float(ratio) < 2


def test_weights_of_what_was_not_seen():
    """Independent errors of all values that were not evaluated give the interactions the variance that they say."""
    z = complementary(N, 40, 0)
    errors = torch.randn(4000, 2**N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors[:, codes(z)] = errors[:, codes(~z)] = 0
    simulated = table_indices(errors, PAIRS, "SII", 2).square().mean()
    # Of the even half's errors, whose variance is half that of the values'.
    assert float(unseen_weights(z).sum()) / 2 == pytest.approx(float(simulated), rel=0.05)


def test_no_step_is_certain_before_all_is_seen():
    """AND of four: seldom seen, its interactions are no certain zeros; a game that never varied has no error bar."""
    inside = []
    for seed in range(6):
        found = interactions(lambda z: z[:, :4].all(1).double(), n=10, budget=48, seed=seed, progress=False)
        truth = exact_interactions(lambda z: z[:, :4].all(1).double(), n=10, progress=False)
        low, high = found.interval()
        assert (high > low).all()
        inside.append((low <= truth.sii) & (truth.sii <= high))
    assert np.mean(inside) >= 0.9
    flat = interactions(lambda z: torch.full((len(z),), 3.0), n=10, budget=48, progress=False)
    assert not flat.sii.any() and np.isnan(flat.sii_stderr).all() and np.isnan(flat.gap_stderr).all()


def test_link_is_used_as_far_as_it_predicts_better():
    odds = 1 + 3 * signs(EVERY) @ torch.linspace(-0.5, 1.5, N, dtype=torch.float64)
    shares = []
    for values in (odds.sigmoid(), (odds / 20).square().clamp(max=1)):
        link = link_of(values)
        assert link is not None
        plain, linked = fitted(values, 32).process, fitted(values, 32, link).process
        shares.append(share_of_link(plain, 0, linked, link))
    assert shares[0] > 0.8 and shares[1] < 0.2
    assert link_of(odds) is None and link_of((odds / 20).tanh()) == Logit(-1.0, 1.0)
    assert link_of((odds > 0).double()) is None  # nothing between the bounds


def test_left_out_errors_are_those_of_leaving_out():
    """On the logit scale too: the mean of a coalition's and its complement's values, fitted without them."""
    values = (1 + signs(EVERY) @ torch.linspace(-0.5, 1.5, N, dtype=torch.float64)).sigmoid()
    link = Logit(0.0, 1.0)
    process = fitted(values, 32, link).process
    rest = torch.arange(32) != 5
    predicted = []
    for sign in (1, -1):
        half = process.half(sign)
        y, mean = (process.values + sign * process.complements)[:, 0] / 2, float(half.mean)  # the mean stays what it is
        covariance = torch.linalg.inv(half.inverse)
        weight = torch.linalg.solve(covariance[rest][:, rest], covariance[rest, 5])
        predicted.append(weight @ (y[rest] - mean) + mean)
    even, odd = predicted
    upper, lower = link.inverse(even + odd), link.inverse(even - odd)
    true = (link.inverse(process.values[5, 0]) + link.inverse(process.complements[5, 0])) / 2
    assert float(left_out(process, 0, link)[5]) == pytest.approx(float(true - (upper + lower) / 2), rel=1e-6)


def test_linked_values_are_closer_and_covered():
    """A probability that saturates: the error falls, and the intervals of indices and gaps hold."""
    weight = torch.randn(10, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def probability(z: torch.Tensor) -> torch.Tensor:
        pull = signs(z) @ weight
        return (1 + pull[:, 0] + 0.3 * pull.tanh().sum(1)).sigmoid()

    truth = exact_interactions(probability, n=10, progress=False)
    inside, errors = [], []
    for seed in range(3):
        found = interactions(probability, n=10, budget=128, seed=seed, progress=False)
        assert found.about["logit_share"][0] > 0.5
        # The same values on a scale that has no bounds: no link is tried.
        plain = interactions(lambda z: 2 + 3 * probability(z), n=10, budget=128, seed=seed, progress=False)
        assert plain.about["logit_share"] == [0.0]
        errors.append([np.square(found.sii - truth.sii).sum(), np.square(plain.sii / 3 - truth.sii).sum()])
        for of, true in (("sii", truth.sii), ("gap", truth.gap)):
            low, high = found.interval(of=of)
            inside.append((low - 1e-12 <= true) & (true <= high + 1e-12))
    linked, unlinked = np.sum(errors, 0)
    assert linked < 0.5 * unlinked and np.mean(inside) >= 0.9
