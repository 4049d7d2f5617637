"""Results: ranking, tables, intervals, files."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import t

from flmoe_fast import ArgumentError, InteractionResult, interactions


@pytest.fixture
def result() -> InteractionResult:
    weights = torch.randn(2, 6, 6, dtype=torch.float64)

    def game(z):
        return torch.einsum("ci,oij,cj->co", z.double(), weights, z.double()) + z[:, :3].all(1)[:, None]

    return interactions(game, n=6, pairs=[(0, 3), (1, 4), (2, 5), (0, 1)], contexts=12, progress=False)


def test_ranking(result):
    for head in (0, "output 1"):
        column = result.column("sii", head)
        assert result.order("sii", head).tolist() == np.argsort(-column).tolist()
        assert result.order("-sii", head).tolist() == np.argsort(column).tolist()
        assert result.order("abs_sii", head).tolist() == np.argsort(-np.abs(column)).tolist()
        assert result.order("gap", head).tolist() == np.argsort(-result.column("gap", head)).tolist()
    top = result.top(2, by="sii", head=1)
    assert top["sii"].tolist() == sorted(result.sii[:, 1], reverse=True)[:2]
    assert [top["i"][0], top["j"][0]] == result.pairs[np.argmax(result.sii[:, 1])].tolist()


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
