"""Coalition words and context draws: against plain loops, between the implementations, and against their stated law."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flmoe_fast import coalitions
from flmoe_fast.checks import ArgumentError
from flmoe_fast.coalitions import MODES, pack, sample_contexts, unpack, words_for
from flmoe_fast.native import extension

PLAYERS = (1, 2, 7, 8, 63, 64, 65, 128, 129, 516)
KNOWN_WORDS = [
    [144680442287685638, 2],
    [18302063631421865977, 61],
    [5488859658692339912, 40],
    [12957884415017211703, 23],
]
KNOWN_SIZE_WORDS = [
    [144680442287685636, 2],
    [18302063631421865979, 61],
    [5632974847575599304, 60],
    [12813769226133952311, 3],
]
KNOWN_U = [0.14222395501366297, 0.857776044986337, 0.45970716849006604, 0.540292831509934]
CHI_SQUARE = {19: 43.8, 79: 123.6}  # exceeded with probability 0.001, by degrees of freedom

IMPLEMENTATIONS = {"numpy": coalitions._NumPy()}
if extension()[0] is not None:
    IMPLEMENTATIONS["native"] = coalitions._Native(extension()[0])

needs_native = pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason=extension()[1] or "native is there")


@pytest.fixture(params=list(IMPLEMENTATIONS))
def implementation(request, monkeypatch):
    """Run the public functions with one implementation, then the other."""
    monkeypatch.setattr(coalitions, "_active", IMPLEMENTATIONS[request.param])
    return request.param


def random_coalitions(count: int, n: int) -> torch.Tensor:
    return torch.rand(count, n) < torch.rand(count, 1)


def naive_pack(coalition: torch.Tensor) -> list[int]:
    """Words of one coalition as unsigned Python integers."""
    words = [0] * words_for(len(coalition))
    for player, member in enumerate(coalition.tolist()):
        words[player // 64] += member * 2 ** (player % 64)
    return words


# ---- words


@pytest.mark.parametrize("n", PLAYERS)
def test_words_against_loops(implementation, n):
    z = random_coalitions(9, n)
    z[0], z[1] = False, True
    words = pack(z)
    assert words.dtype == torch.int64
    assert words.shape == (9, words_for(n))
    assert [[w % 2**64 for w in row] for row in words.tolist()] == [naive_pack(row) for row in z]
    assert torch.equal(unpack(words, n), z)


def test_wrong_words_are_noticed(implementation):
    """The comparisons above can fail: words swapped, a bit too many."""
    z = torch.zeros(1, 65, dtype=torch.bool)
    z[0, 3] = z[0, 64] = True
    words = pack(z)
    assert not torch.equal(unpack(words.flip(1), 65), z)
    assert not torch.equal(unpack(words ^ 16, 65), z)


def test_nothing_is_allowed(implementation):
    assert pack(torch.zeros(0, 70, dtype=torch.bool)).shape == (0, 2)
    assert unpack(torch.zeros(0, 2, dtype=torch.int64), 70).shape == (0, 70)
    assert unpack(torch.zeros(2, 0, dtype=torch.int64), 0).shape == (2, 0)


def test_strided_input(implementation):
    z = random_coalitions(40, 130)
    words = pack(z)
    assert torch.equal(pack(z.T.contiguous().T), words)
    assert torch.equal(unpack(words[::3], 130), z[::3])


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack(torch.zeros(2, 3)),
        lambda: pack(torch.zeros(3, dtype=torch.bool)),
        lambda: pack([[True]]),
        lambda: unpack(torch.zeros(1, 2, dtype=torch.int64), 64),
        lambda: unpack(torch.zeros(1, 1, dtype=torch.int32), 64),
        lambda: unpack(torch.zeros(1, 1, dtype=torch.int64), -1),
        lambda: sample_contexts(0, 2, seed=0),
        lambda: sample_contexts(4, 3, seed=0),
        lambda: sample_contexts(4, 0, seed=0),
        lambda: sample_contexts(4, 2, seed=-1),
        lambda: sample_contexts(4, 2, seed=2**64),
        lambda: sample_contexts(4, 2, seed=0, replicate=2**32),
        lambda: sample_contexts(4, 2, seed=0, mode="sobol"),
        lambda: sample_contexts(4, 2, seed=0.5),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ArgumentError):
        call()


# ---- draws


@needs_native
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", PLAYERS)
def test_implementations_have_the_same_bits(n, mode):
    numpy, native = IMPLEMENTATIONS["numpy"], IMPLEMENTATIONS["native"]
    for units in (1, 2, 7, 64, 129):
        for seed in (0, 1, 2**32, 2**64 - 1):
            for replicate in (0, 2**32 - 1):
                for antithetic in (False, True):
                    arguments = (n, units, seed, replicate, MODES.index(mode), antithetic)
                    for a, b in zip(numpy.sample(*arguments), native.sample(*arguments)):
                        assert torch.equal(a, b), arguments


def test_known_draw(implementation):
    """A draw is part of the interface: a result can be recomputed from its seed for as long as this test stands."""
    words, u = sample_contexts(70, 4, seed=2026, mode="lhs")
    assert [[w % 2**64 for w in row] for row in words.tolist()] == KNOWN_WORDS
    assert u.tolist() == KNOWN_U
    words, u = sample_contexts(70, 4, seed=2026)  # the default, mode "size"
    assert [[w % 2**64 for w in row] for row in words.tolist()] == KNOWN_SIZE_WORDS
    assert u.tolist() == KNOWN_U


def test_size_mode_draws_exact_sizes(implementation):
    """Sizes are floor(u (n + 1)), not binomial around it as in the other modes."""
    for n in (1, 2, 64, 70):
        words, u = sample_contexts(n, 30, seed=8, mode="size", antithetic=False)
        assert unpack(words, n).sum(1).tolist() == (u * (n + 1)).floor().long().tolist()
    words, u = sample_contexts(70, 30, seed=8, mode="lhs", antithetic=False)
    assert unpack(words, 70).sum(1).tolist() != (u * 71).floor().long().tolist()


@pytest.mark.parametrize("mode", MODES)
def test_antithetic_rows_are_complements(implementation, mode):
    words, u = sample_contexts(129, 22, seed=5, mode=mode)
    assert words.shape == (22, 3)
    assert u.shape == (22,)
    assert u.dtype == torch.float64
    assert torch.equal(~unpack(words[0::2], 129), unpack(words[1::2], 129))
    assert torch.equal(u[0::2] + u[1::2], torch.ones(11, dtype=torch.float64))
    assert bool((u[0::2] <= 0.5).all())
    assert torch.equal(unpack(words, 129).sum(0), torch.full((129,), 11))  # every player in half of the contexts


def test_replicates_and_seeds_differ(implementation):
    draws = [sample_contexts(64, 16, seed=s, replicate=r).words for s, r in ((1, 0), (1, 1), (2, 0), (1 + 2**32, 0))]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert 300 < int(unpack(a ^ b, 64).sum()) < 724  # 1024 bits; far from equal and from opposite
    assert torch.equal(draws[0], sample_contexts(64, 16, seed=1).words)


def test_torch_random_state_is_left_alone(implementation):
    before = torch.get_rng_state()
    sample_contexts(64, 16, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("units", [1, 2, 16, 101])
def test_every_player_visits_every_stratum_once(units):
    strata = np.floor(coalitions._uniforms(40, units, 3, 0) * units).astype(int)
    assert (np.sort(strata, axis=0) == np.arange(units)[:, None]).all()
    if units >= 16:  # control: independent uniforms do not
        strata = np.floor(sliced_uniforms(40, units, 3, 0) * units).astype(int)
        assert not (np.sort(strata, axis=0) == np.arange(units)[:, None]).all(axis=0).any()


def sliced_uniforms(n: int, units: int, seed: int, replicate: int) -> np.ndarray:
    """U[k, p] of the modes with independent U, from all its digits: float64 (units, n)."""
    unit, word = np.indices((units, words_for(n)), dtype=np.uint64)
    uniforms = np.zeros((units, n))
    for s in range(53):
        stream = np.full_like(unit, 2 + s // 2)
        bits = coalitions._philox((unit, word, stream, np.full_like(unit, replicate)), seed)[2 * (s % 2) :][:2]
        words = torch.from_numpy(((bits[0] << np.uint64(32)) | bits[1]).view(np.int64))
        uniforms += unpack(words, n).numpy() * 2.0 ** -(s + 1)
    return uniforms


@pytest.mark.parametrize("mode", ["stratified", "iid"])
@pytest.mark.parametrize("n", [1, 63, 64, 130])
def test_words_are_compared_as_numbers_are(implementation, mode, n):
    """Digit by digit, 64 players at a time, is U < u; at a u that no U equals, and at one that some do."""
    words, u = sample_contexts(n, 50, seed=6, mode=mode, antithetic=False, replicate=3)
    uniforms = sliced_uniforms(n, 50, 6, 3)
    assert np.array_equal(unpack(words, n).numpy(), uniforms < u.numpy()[:, None])
    assert not np.array_equal(unpack(words, n).numpy(), uniforms < 0.5)
    everybody = pack(torch.ones(1, n, dtype=torch.bool))[0].numpy().view(np.uint64)
    for limit in (uniforms[:, n // 2], np.nextafter(uniforms[:, 0], 1), np.zeros(50), np.ones(50)):
        found = coalitions._sliced_words(everybody, 50, 6, 3, limit)
        assert np.array_equal(unpack(torch.from_numpy(found.view(np.int64)), n).numpy(), uniforms < limit[:, None])


@pytest.mark.parametrize("mode", ["lhs", "stratified", "size"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_sizes_are_stratified(implementation, mode, antithetic):
    u = sample_contexts(16, 40, seed=9, mode=mode, antithetic=antithetic).u
    assert torch.equal((u * 40).long().sort().values, torch.arange(40))


def test_independent_sizes_are_not_stratified(implementation):
    u = sample_contexts(16, 40, seed=9, mode="iid", antithetic=False).u
    assert not torch.equal((u * 40).long().sort().values, torch.arange(40))


def size_chi_square(words: torch.Tensor, n: int) -> float:
    """Distance of the sizes of coalitions (C, W) from equal shares of 0..n."""
    counts = torch.bincount(unpack(words, n).sum(1), minlength=n + 1).double()
    assert len(counts) == n + 1
    expected = len(words) / (n + 1)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("n", CHI_SQUARE)
def test_sizes_follow_the_law(implementation, mode, antithetic, n):
    """Integrating Bernoulli(u) over u makes every size 0..n equally likely."""
    draws = [sample_contexts(n, 20, seed=11, mode=mode, antithetic=antithetic, replicate=r).words for r in range(250)]
    assert size_chi_square(torch.cat(draws), n) < CHI_SQUARE[n]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", CHI_SQUARE)
def test_a_biased_draw_is_noticed(mode, n, monkeypatch):
    """Control: the same draws with u in [0.06, 0.94]."""
    monkeypatch.setattr(coalitions, "_active", IMPLEMENTATIONS["numpy"])
    fair = coalitions._sizes
    monkeypatch.setattr(coalitions, "_sizes", lambda *arguments: 0.06 + 0.88 * fair(*arguments))
    draws = [sample_contexts(n, 20, seed=11, mode=mode, antithetic=False, replicate=r).words for r in range(250)]
    assert size_chi_square(torch.cat(draws), n) > CHI_SQUARE[n]


@pytest.mark.parametrize("mode", MODES)
def test_players_are_independent_given_u(implementation, mode):
    """Within one context players are independent given u: pairs co-occur as often as the mean of u^2."""
    n, replicates = 30, 200
    draws = [sample_contexts(n, 16, seed=4, mode=mode, replicate=r) for r in range(replicates)]
    z = unpack(torch.cat([d.words for d in draws]), n).double()
    both = (z.T @ z / len(z))[~torch.eye(n, dtype=torch.bool)].mean()
    assert float(both) == pytest.approx(1 / 3, abs=0.01)
