"""Results: ranking, tables, intervals, files."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import t

from flmoe_fast import ArgumentError, InteractionResult, exact_interactions, interactions, player_values


@pytest.fixture
def result() -> InteractionResult:
    weights = torch.randn(2, 6, 6, dtype=torch.float64)

    def game(z):
        return torch.einsum("ci,oij,cj->co", z.double(), weights, z.double()) + z[:, :3].all(1)[:, None]

    return interactions(game, n=6, pairs=[(0, 3), (1, 4), (2, 5), (0, 1)], contexts=12, method="grid", progress=False)


def test_ranking(result):
    for head in (0, "output 1"):
        column = result.column("sii", head)
        assert result.order("sii", head).tolist() == np.argsort(-column).tolist()
        assert result.order("-sii", head).tolist() == np.argsort(column).tolist()
        assert result.order("abs_sii", head).tolist() == np.argsort(-np.abs(column)).tolist()
        assert result.order("gap", head).tolist() == np.argsort(-result.column("gap", head), kind="stable").tolist()
    top = result.top(2, by="sii", head=1)
    assert top["sii"].tolist() == sorted(result.sii[:, 1], reverse=True)[:2]
    assert [top["i"][0], top["j"][0]] == result.pairs[np.argmax(result.sii[:, 1])].tolist()


def test_strongest_first_unless_asked(result):
    assert result.order().tolist() == np.argsort(-np.abs(result.sii[:, 0])).tolist()
    assert abs(result.top(1)["sii"][0]) == np.abs(result.sii[:, 0]).max()


def test_pairs_by_number_and_by_name(result):
    named = result.named(["red", "dragon", "red", "cave", "brave", "forest"])
    assert len(named) == 4 == len(list(named))
    score = named["dragon", "brave"]
    assert (score.i, score.j, score.head) == (1, 4, "output 0")
    assert float(score) == score.sii == result.sii[1, 0] and score == named[4, 1]
    assert score.gap_stderr == result.gap_stderr[1, 0] and score.contexts == 12
    low, high = result.interval(of="gap", head=1)
    assert named.pair(4, "dragon", head=1).gap_interval == (low[1], high[1])
    assert [(s.name_i, s.j) for s in named][2:] == [("red", 5), ("red", 1)]
    assert ("cave", 0) in named and ("cave", "forest") not in named and "cave" not in named
    assert (named.top(4)["name_j"] == [named.player_names[j] for j in named.top(4)["j"]]).all()


def test_names_given_to_a_probe():
    def game(z):
        return z[:, 0] * z[:, 1] * 1.0

    found = interactions(game, n=3, names=["a", "b", "c"], contexts=4, method="grid", progress=False)
    assert found["a", "b"].sii == 1.0 and found.about["method"] == "grid"
    exact = exact_interactions(game, n=3, names=["a", "b", "c"], progress=False)
    assert exact["b", "a"].sii == pytest.approx(1.0) and exact.about["method"] == "enumeration"
    assert "a x b  SII +1.0000 exactly" in repr(exact)
    with pytest.raises(ArgumentError, match="names: got 2 names, expected one name for each of 3 players"):
        interactions(game, n=3, names=["a", "b"], contexts=4, progress=False)


def test_shows_itself(result):
    strongest = result.order()[0]
    i, j = result.pairs[strongest]
    text = repr(result)
    assert text.splitlines()[1].startswith(f"  {i} x {j}  SII {result.sii[strongest, 0]:+.2}"[:14])
    assert "4 pairs of 'output 0' (first of 2 heads)" in text and f"{result.evaluations:,} evaluations" in text
    html = result.named(["<b>", *"12345"])._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html and html.count("<tr") == 5


def test_json_and_csv(result, tmp_path):
    text = result.to_json(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_text() == text
    read = json.loads(text)
    assert read["pairs"] == result.pairs.tolist() and read["sii"] == result.sii.tolist()
    assert read["about"]["method"] == "grid" and read["heads"] == ["output 0", "output 1"]
    gap = result.gap.copy()
    gap[1, 0] = np.nan
    odd = dataclasses.replace(result, gap=gap, degrees=np.full(4, np.inf))
    read = json.loads(odd.to_json(), parse_constant=pytest.fail)
    assert read["gap"][1][0] is None and read["degrees"] == [None] * 4
    result.to_csv(tmp_path / "result.csv", head=1)
    assert len((tmp_path / "result.csv").read_text().splitlines()) == 5


def test_undefined_scores_rank_last(result):
    gap = result.gap.copy()
    gap[1, 0] = np.nan
    assert dataclasses.replace(result, gap=gap).order("gap", 0)[-1] == 1


def test_tables_and_intervals(result):
    frame = result.to_dataframe()
    assert len(frame) == 8 and list(frame["head"].unique()) == ["output 0", "output 1"]
    assert len(result.to_dataframe(head=1)) == 4
    low, high = result.interval(0.9, "gap", 1)
    half = t.ppf(0.95, result.degrees) * result.gap_stderr[:, 1]
    assert np.allclose(low, result.gap[:, 1] - half) and np.allclose(high, result.gap[:, 1] + half)


def test_round_trip(result, tmp_path):
    path = tmp_path / "result.npz"
    result.save(path)
    loaded = InteractionResult.load(path)
    for field in dataclasses.fields(result):
        ours, theirs = getattr(result, field.name), getattr(loaded, field.name)
        assert np.array_equal(ours, theirs, equal_nan=True) if isinstance(ours, np.ndarray) else ours == theirs
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


def test_bad_files_are_named(result, tmp_path):
    with pytest.raises(ArgumentError, match="path: .*expected a name ending in .npz"):
        result.save(tmp_path / "result.csv")
    with pytest.raises(FileNotFoundError):
        InteractionResult.load(tmp_path / "nothing.npz")
    path = tmp_path / "result.npz"
    result.save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ArgumentError, match="expected a file written by InteractionResult.save"):
        InteractionResult.load(path)

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    np.savez(path, _json=np.array([Payload()], dtype=object))
    with pytest.raises(ArgumentError):
        InteractionResult.load(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ArgumentError):
        InteractionResult.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: r.top(0), "k: got 0"),
        (lambda r: r.top(3, by="size"), "by: got 'size'"),
        (lambda r: r.top(3, head="expert 9"), "head: got 'expert 9', expected one of 'output 0', 'output 1'"),
        (lambda r: r.top(3, head=2), "head: got 2"),
        (lambda r: r[0, 2], r"pair: got \(0, 2\), expected a pair that was probed"),
        (lambda r: r[0], "pair: got 0, expected two players"),
        (lambda r: r["x", 1], "player: got 'x', expected a number, or one of player_names"),
        (lambda r: r.named("abcdef")["a", 9], "names: got 'abcdef'"),
        (lambda r: r.named([1, 1, 2, 3, 4, 5])["1", 3], r"player: got '1', the name of players \[0, 1\]"),
        (lambda r: r.interval(1.5), "level: got 1.5"),
        (lambda r: r.interval(of="pairs"), "of: got 'pairs'"),
    ],
)
def test_bad_arguments_are_named(result, call, message):
    with pytest.raises(ArgumentError, match=message):
        call(result)


def test_plot_shows_every_pair(result):
    import matplotlib

    matplotlib.use("Agg")
    axes = result.plot(head=1)
    matrix = axes.images[0].get_array()
    for (i, j), value in zip(result.pairs.tolist(), result.sii[:, 1]):
        row = [t.get_text() for t in axes.get_yticklabels()].index(str(i))
        col = [t.get_text() for t in axes.get_xticklabels()].index(str(j))
        assert matrix[row, col] == value
    assert "output 1" in axes.get_title()


def committee(present: torch.Tensor) -> torch.Tensor:
    return (present[:, 0] & present[:, 1]).double() + 0.25 * present[:, 2]


def test_values_of_players_are_read_like_pairs(tmp_path):
    values = player_values(committee, n=3, names=["Ada", "<b>", "Cy"], progress=False)
    assert len(values) == 3 and values.evaluations == 8  # all coalitions cost less than 64 contexts
    assert float(values["Ada"]) == pytest.approx(0.5) and values[2].interval == pytest.approx((0.25, 0.25))
    assert [score.name for score in values] == ["Ada", "<b>", "Cy"] and "Cy   SV +0.2500 exactly" in repr(values)
    assert "&lt;b&gt;" in values._repr_html_() and "<b>" not in values._repr_html_()
    assert values.top(1)["name"].tolist() in (["Ada"], ["<b>"])
    read = json.loads(values.to_json(tmp_path / "values.json"), parse_constant=pytest.fail)
    assert read["player_names"] == ["Ada", "<b>", "Cy"] and read["values"] == values.values.tolist()
    values.to_csv(tmp_path / "values.csv")
    assert (tmp_path / "values.csv").read_text().splitlines()[0] == "player,name,value,stderr,low,high"
    bars = values.plot().patches
    assert sorted(bar.get_width() for bar in bars) == pytest.approx([0.25, 0.5, 0.5])
    with pytest.raises(ArgumentError, match="one whose value was estimated"):
        player_values(committee, n=3, players=[0], progress=False)[1]
    drawn = player_values(committee, n=3, contexts=1, method="grid", progress=False)
    assert drawn.evaluations == 4 and "exactly" not in repr(drawn)


@pytest.mark.parametrize(("index", "share"), (("SV", 1 / 3), ("BV", 1 / 4)))
def test_drawn_values_hold_the_exact_ones(index, share):
    """Fewer evaluations than there are coalitions; three that need each other share what they are worth."""
    weight, three = torch.randn(12, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)

    def game(z):
        return z.double() @ weight + z.view(len(z), 4, 3).all(2).double() @ three

    truth = (weight + share * three.repeat_interleave(3)).numpy()
    drawn = player_values(game, n=12, index=index, contexts=200, method="grid", progress=False)
    assert drawn.evaluations == 200 * 13
    assert (np.abs(drawn.values - truth) / drawn.stderr).max() < 4.5
    assert (np.abs(drawn.values + 0.3 - truth) / drawn.stderr).max() > 4.5
    low, high = drawn.interval()
    assert (low < drawn.values).all() and (drawn.values < high).all()


def test_values_of_heads(result):
    both = player_values(lambda z: torch.stack([committee(z), -committee(z)], 1), n=3, progress=False)
    assert both["1"].head == "output 0" and both.to_dataframe(head=1)["value"].tolist()[2] == pytest.approx(-0.25)
    assert len(both.to_dataframe()) == 6 and both.plot(head=1).get_title() == "Shapley value, output 1"


def test_an_estimate_without_spread_is_not_called_exact():
    """Zero in every context that was drawn is no proof."""
    drawn = interactions(committee, n=20, pairs=[(0, 2), (0, 1)], contexts=4, method="grid", progress=False)
    assert drawn.sii_stderr[0] == 0 and "0 x 2  SII +0.0000 ± 0.0000" in repr(drawn) and "exactly" not in repr(drawn)


def test_errors_of_a_function_say_how_it_was_called():
    with pytest.raises(ValueError, match="one element") as caught:
        interactions(lambda one: float(one[0]), n=3, progress=False)
    assert caught.value.__notes__ == ["The game was called with 8 coalitions at once, a bool tensor (8, 3)."]
