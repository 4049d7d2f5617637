"""The comparison with shapiq: what it measures is right, and what its tables say is what was measured."""

import sys

import numpy as np
import pytest

from bench import kinds, peers, peers_tables, shapiq_peers, triples

GAME = kinds.conjunction(0, n=6, size=3)


@pytest.fixture(scope="module")
def shapiq():
    worker = shapiq_peers.Shapiq(sys.executable)
    yield worker
    worker.close()


def test_a_peer_sees_the_game_and_is_charged_for_it(shapiq, monkeypatch):
    """At full budget KernelSHAP-IQ is exact: the coalitions, the values and the pairs arrive as they were sent."""
    monkeypatch.setattr(shapiq_peers, "Shapiq", lambda python: shapiq)
    game = peers.Probed.of_kind(GAME)
    estimate = peers.estimators([], [], sys.executable, ["KernelSHAP-IQ"])["shapiq KernelSHAP-IQ"]
    found = estimate(game, 64, 0)
    assert found.nmse < 1e-12 and found.evaluations == 64
    assert (GAME.truth != 0).sum() == 3 and estimate(game, 40, 0).nmse > 1e-6


def test_a_peer_that_fails_says_why_and_the_next_one_works(shapiq):
    pairs = [tuple(pair) for pair in GAME.pairs.tolist()]

    def broken(rows):
        return np.zeros(len(rows) - 1)

    with pytest.raises(shapiq_peers.Refusal, match="Error"):
        shapiq.estimate("KernelSHAP-IQ", broken, 6, pairs, 64, 0)
    assert len(shapiq.estimate("SHAP-IQ", GAME.values, 6, pairs, 64, 0).values) == 15


def test_a_peer_is_stopped_when_its_time_is_up(shapiq, monkeypatch):
    monkeypatch.setattr(shapiq_peers, "PATIENCE", 0)
    game = kinds.soum(0, n=60, terms=5)
    pairs = [tuple(pair) for pair in game.pairs.tolist()]
    with pytest.raises(shapiq_peers.Refusal, match="stopped after 0 s"):
        shapiq.estimate("SVARM-IQ", game.values, 60, pairs, 4000, 0)
    monkeypatch.undo()
    assert len(shapiq.estimate("SHAP-IQ", GAME.values, 6, [(0, 1)], 64, 0).values) == 1


def test_intervals_that_miss_are_seen():
    """The grid's intervals mostly hold; those of a game whose truth is told wrong do not."""
    game = peers.Probed.of_kind(kinds.masked_text(3, n=8))
    told = peers.ours(game, 200, 0, {"method": "grid"})
    assert set(told.held) == {"sii", "max", "sum", "strict", "ratio"}
    assert min(told.held.values()) > 0.7 and told.nmse < 5
    game.sii = game.sii + 100
    wrong = peers.ours(game, 200, 0, {"method": "grid"})
    assert wrong.held["sii"] == 0.0 and wrong.held["sum"] == told.held["sum"]


def _row(estimator: str, nmse: float, median: float) -> dict:
    return {"group": "g", "estimator": estimator, "budget": 512, "games": 2, "seeds": 3, "nmse": nmse,
            "nmse_median": median, "seconds": 0.1, "coverage_sii": 0.951, "withheld_sii": 0.0}  # fmt: skip


def test_the_default_stands_beside_the_best_of_each_kind():
    rows = [_row("default", 0.1, 0.05), _row("shapiq A", 0.4, 0.1), _row("shapiq B", 0.2, 0.2), _row("grid", 1, 1)]
    _, [line], note = peers_tables.accuracy(rows)
    assert line == ["g", "512", "0.1 (0.05)", "0.2 (0.1)", "B", "0.5 (0.5)", "95.1 %"]
    assert "2 x 3" in note
    refused = {"group": "g", "estimator": "shapiq C", "budget": 512, "games": 2, "seeds": 3, "refuses": "no"}
    assert [line[-2] for line in peers_tables.peers([*rows, refused])[1] if line[1] == "shapiq C"] == ["refuses: no"]


def test_the_slope_tells_shrinking_from_noise():
    truth = np.array([1.0, -2.0, 3.0])
    assert peers.slope(0.9 * truth, truth) == pytest.approx(0.9)
    assert peers.slope(truth + np.array([2.0, 1.0, 0.0]), truth) == pytest.approx(1.0)  # the noise is orthogonal to it
    row = {
        "group": "g",
        "estimator": "grid",
        "budget": 512,
        "games": 1,
        "seeds": 200,
        "slope": 0.94,
        "slope_stderr": 0.02,
    }
    assert peers_tables.bias([row])[1] == [["g", "grid", "512", "0.9400 ± 0.0200", "-3.0"]]


def test_a_control_that_finds_something_is_told():
    asked = {"game": "planted", "question": "screened", "budget": 2048}
    rows = [asked | {"seed": 0, "rank": 1}, asked | {"seed": 1, "refuses": "no"}, asked | {"seed": 2, "rank": 7}]
    [[*_, said]] = peers_tables.controls(rows)[1]
    assert said == "1 of 3 refused, ranks of the pair: 1, 7"
    [[*_, said]] = peers_tables.controls([asked | {"game": "null", "seed": 0, "rank": None, "reliability": 0.9}])[1]
    assert said == "0 of 1 refused, 1 accepted"


def test_triples_are_enumerated_and_told():
    """Few coalitions leave an error, all of them none; a cell's row and the distance from enumeration are lines."""
    three = triples.Triples(peers.Probed.of_kind(kinds.masked_text(1, n=6)))
    row = triples.cell([three], 40, 1, None, "default")
    assert 0 < row["nmse"] < 10 and row["most_evaluations"] == 40
    assert triples.exactness([three])["difference"] < 1e-10
    key = {"group": "g", "estimator": "default", "budget": 40}
    peer = row | {"group": "g", "estimator": "shapiq A", "budget": 40, "nmse": 2 * row["nmse"]}
    whole = {"group": "g", "estimator": "all", "budget": 64, "games": 1, "seeds": 1, "difference": 2e-14}
    _, lines, _ = peers_tables.triples([row | key, peer, whole])
    assert [line[5][:3] for line in lines[:1]] == ["0.5"] and lines[1][:3] == ["g", "all 64", "2e-14 from enumeration"]
