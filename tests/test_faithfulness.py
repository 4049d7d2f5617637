"""Drop curves, AOPC and tables against a plain implementation that fills tokens one variant at a time."""

from __future__ import annotations

import math

import numpy as np
import pandas
import pytest
import torch

from flmoe_fast import TokenGame
from flmoe_fast.checks import ArgumentError
from flmoe_fast.pipeline.faithful.curves import (
    COLUMNS,
    aopc,
    faithfulness,
    faithfulness_table,
    paired_gaps,
    selected_tokens,
    write_tables,
)
from flmoe_fast.pipeline.importance.tokens import batch_importance
from tests.edge_shapes import EDGES

EDGE = {edge.name: edge for edge in EDGES}
PERCENTS = (5.0, 20.0, 50.0, 100.0)
NAMES = ("padded", "three modalities", "absent modality", "multilabel", "original")


def target_value(model, features, masks, target):
    """p(x) of section "metrics": softmax at the class, or the mean probability of the marked classes."""
    with torch.no_grad():
        logits = model([f[None] for f in features], None if masks is None else [m[None] for m in masks]).logits[0]
    if model.config.task == "multilabel":
        return float(logits.sigmoid()[target.bool()].mean())
    return float(logits.softmax(-1)[target])


def plain(edge, model, importance, target, repeats, seed, text=()):
    """Every number of one sample by loops over percentages, repeats and modalities, through the model as written."""
    features, masks, fills = edge.sample()
    lengths = edge.tokens
    starts = [sum(lengths[:m]) for m in range(len(lengths))]
    candidates = []
    for m, length in enumerate(lengths):
        valid = torch.ones(length) if masks is None else masks[m]
        candidates.append([p for p in range(length) if valid[p] and not (m in text and p == 0)])

    def value(groups):
        changed = [feature.clone() for feature in features]
        for m, positions in enumerate(groups):
            for p in positions:
                changed[m][p] = fills[m]
        return target_value(model, changed, masks, target)

    def complement(groups):
        return [[p for p in own if p not in chosen] for own, chosen in zip(candidates, groups)]

    generator = torch.Generator().manual_seed(seed)
    full = value([[] for _ in lengths])
    rows = {name: [] for name in ("comp", "suff", "comp_random", "suff_random")}
    for percent in PERCENTS:
        counts, best = [], []
        for m, own in enumerate(candidates):
            count = max(1, math.ceil(len(own) * percent / 100)) if own else 0
            ranked = sorted(own, key=lambda p, m=m: (-float(importance[starts[m] + p]), p))
            counts.append(count)
            best.append(ranked[:count])
        rows["comp"].append(full - value(best))
        rows["suff"].append(full - value(complement(best)))
        draws = []
        for _ in range(repeats):
            groups = []
            for own, count in zip(candidates, counts):
                order = torch.randperm(len(own), generator=generator)[:count].tolist()
                groups.append([own[i] for i in order])
            draws.append((full - value(groups), full - value(complement(groups))))
        rows["comp_random"].append([comp for comp, _ in draws])
        rows["suff_random"].append([suff for _, suff in draws])
    return {name: np.array(values) for name, values in rows.items()}


def game_of(edge, model, target, **options):
    features, masks, fills = edge.sample()
    target = target.nonzero()[:, 0].tolist() if isinstance(target, torch.Tensor) else target
    return TokenGame(model, features, masks=masks, fill=fills, target=target, **options)


def target_of(edge):
    """The model's prediction, or two classes."""
    return torch.tensor([1, 0, 0, 1, 0]) if edge.task == "multilabel" else game_of(edge, edge.model(), None).target


@pytest.mark.parametrize("method", ("attnXgrad", "attn", "ig"))
@pytest.mark.parametrize("name", NAMES)
def test_curves_agree_with_plain_loops(name, method):
    edge = EDGE[name]
    model, target = edge.model(), target_of(edge)
    features, masks, _ = edge.sample()
    many = [f[None] for f in features], None if masks is None else [m[None] for m in masks]
    importance = batch_importance(model, *many, targets=[target], method=method).mixture[0]
    game = game_of(edge, model, target)
    found = faithfulness(game, importance[game.tokens], percents=PERCENTS, repeats=3, seed=4)
    expected = plain(edge, model, importance, target, 3, 4)
    for name, got in (
        ("comp", found.comprehensiveness[:, 0]),
        ("suff", found.sufficiency[:, 0]),
        ("comp_random", found.random_comprehensiveness[:, :, 0]),
        ("suff_random", found.random_sufficiency[:, :, 0]),
    ):
        np.testing.assert_allclose(got, expected[name], atol=1e-10)
    assert np.abs(expected["comp"]).max() > 1e-5
    # The least important tokens are not the most important ones.
    other = faithfulness(game, -importance[game.tokens], percents=PERCENTS, repeats=3, seed=4)
    assert np.abs(other.comprehensiveness - found.comprehensiveness).max() > 1e-6
    # All tokens are all tokens, whichever map chose them.
    np.testing.assert_allclose(other.without[-1], found.without[-1], atol=1e-12)
    np.testing.assert_allclose(found.only[-1], found.full, atol=1e-12)


def test_start_symbol_of_a_text_is_never_masked():
    edge = EDGE["padded"]
    config = edge.model().config.to_dict() | {"modalities": ["language", "img"]}
    model = type(edge.model())(type(edge.model().config).from_dict(config)).double().eval()
    model.load_state_dict(edge.model().state_dict())
    importance = torch.arange(sum(edge.tokens), 0, -1).double()  # the start symbol would be first
    game = game_of(edge, model, 2)
    found = faithfulness(game, importance[game.tokens], percents=PERCENTS, repeats=2, seed=1)
    expected = plain(edge, model, importance, 2, 2, 1, text=(0,))
    np.testing.assert_allclose(found.comprehensiveness[:, 0], expected["comp"], atol=1e-10)
    np.testing.assert_allclose(found.random_sufficiency[:, :, 0], expected["suff_random"], atol=1e-10)
    wrong = plain(edge, model, importance, 2, 2, 1)
    assert np.abs(wrong["comp"] - expected["comp"]).max() > 1e-4


def test_one_batch_and_matched_controls():
    asked = []

    def game(z):
        asked.append(z.clone())
        return z.double() @ torch.arange(1.0, 9.0, dtype=torch.float64)

    found = faithfulness(game, [3.0, 9, 9, 1, 0, 0, 2, 2], n=8, percents=(10, 30), repeats=4)
    (rows,) = asked
    assert len(rows) == 1 + 2 * 2 * 5 and rows[0].all()
    without, only = rows[1:11], rows[11:]
    assert torch.equal(without, ~only)
    assert (~without).sum(1).tolist() == [1] * 5 + [3] * 5  # ceil(0.8), ceil(2.4)
    assert (~without[0]).nonzero().flatten().tolist() == [1] and (~without[5]).nonzero().flatten().tolist() == [0, 1, 2]
    assert found.comprehensiveness[:, 0].tolist() == [2.0, 6.0] and found.sufficiency[:, 0].tolist() == [34.0, 30.0]
    again = faithfulness(game, [3.0, 9, 9, 1, 0, 0, 2, 2], n=8, percents=(10, 30), repeats=4)
    other = faithfulness(game, [3.0, 9, 9, 1, 0, 0, 2, 2], n=8, percents=(10, 30), repeats=4, seed=1)
    assert np.array_equal(found.random_only, again.random_only)
    assert not np.array_equal(found.random_only, other.random_only)


def test_selection():
    scores = torch.tensor([0.5, 0.9, 0.9, 0.1])
    assert selected_tokens(scores, 1).tolist() == [1]
    assert selected_tokens(scores, 50).tolist() == [1, 2]
    assert selected_tokens(scores, 51).tolist() == [1, 2, 0]
    assert selected_tokens(scores[:0], 50).tolist() == []


@pytest.fixture(scope="module")
def samples():
    edge = EDGE["padded"]
    model = edge.model()
    game = game_of(edge, model, 2)
    generator = torch.Generator().manual_seed(0)
    return [
        faithfulness(game, torch.rand(game.n, generator=generator), percents=PERCENTS, repeats=3, seed=seed)
        for seed in range(5)
    ]


def trapezoid(x, y):
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:])) / (x[-1] - x[0])


def test_table_agrees_with_plain_averages(samples):
    targets = torch.tensor([0, 1, 2, 3, 4])
    predicted = [int(sample.logits.argmax()) for sample in samples]
    for mode in ("mean", "auc"):
        table = faithfulness_table(samples, targets, mode=mode)
        assert tuple(table.columns) == COLUMNS and list(table["K_percent"]) == list(PERCENTS)
        curves = {}
        for name in ("comprehensiveness", "sufficiency"):
            id_, rnd = [], []
            for k in range(len(PERCENTS)):
                id_.append(sum(getattr(s, name)[k, 0] for s in samples) / 5)
                rnd.append(sum(sum(getattr(s, "random_" + name)[k, :, 0]) / 3 for s in samples) / 5)
            area = (lambda v: sum(v) / 4) if mode == "mean" else (lambda v: trapezoid(PERCENTS, v))
            curves[name] = (area(id_), area(rnd))
            np.testing.assert_allclose(table[f"{name}_prob_mean_identified"], id_, atol=1e-12)
            np.testing.assert_allclose(table[f"{name}_prob_mean_random"], rnd, atol=1e-12)
            np.testing.assert_allclose(table[f"aopc_{name}_prob_identified"], area(id_), atol=1e-12)
            np.testing.assert_allclose(table[f"aopc_{name}_prob_random"], area(rnd), atol=1e-12)
            sign = 1 if name == "comprehensiveness" else -1
            np.testing.assert_allclose(table[f"{name}_prob_gap"], sign * (np.array(id_) - rnd), atol=1e-12)
            np.testing.assert_allclose(table[f"aopc_{name}_prob_gap"], sign * (area(id_) - area(rnd)), atol=1e-12)
        right = sum(p == t for p, t in zip(predicted, targets.tolist())) / 5
        assert table["orig_acc"].tolist() == [right] * 4
    gaps = paired_gaps(samples)
    mean = faithfulness_table(samples)
    assert gaps["comprehensiveness"][0] == pytest.approx(mean["aopc_comprehensiveness_prob_gap"][0])
    assert gaps["sufficiency"][0] == pytest.approx(mean["aopc_sufficiency_prob_gap"][0])


def test_heads_are_columns(samples):
    expert = faithfulness_table(samples, head="synergy")
    position = samples[0].heads.index("synergy")
    drops = np.mean([s.comprehensiveness[:, position] for s in samples], axis=0)
    np.testing.assert_allclose(expert["comprehensiveness_prob_mean_identified"], drops, atol=1e-12)
    assert not np.allclose(drops, faithfulness_table(samples)["comprehensiveness_prob_mean_identified"])


def test_aopc():
    assert aopc((5, 10, 25), np.array([[1.0, 2.0, 4.0]]), "auc") == pytest.approx((5 * 1.5 + 15 * 3) / 20)
    assert aopc((5, 10, 25), np.array([[1.0, 2.0, 4.0]])) == pytest.approx(7 / 3)
    assert aopc((5,), np.array([[1.0], [3.0]]), "auc") == 2.0
    assert aopc((5, 10), np.array([[1.0, np.nan]])) == 1.0
    assert math.isnan(aopc((5, 10), np.full((2, 2), np.nan)))


def test_files(samples, tmp_path):
    tables = [faithfulness_table(samples[:3]), faithfulness_table(samples[2:])]
    raw, pretty = write_tables(tables, tmp_path, "digits", suffix="_test")
    assert raw.name == "digits_imoe_masking_per_modality_mean_std_raw_test.csv"
    assert pretty.name == "digits_imoe_masking_per_modality_mean_std_pretty_test.csv"
    found = pandas.read_csv(raw)
    values = [c for c in COLUMNS if c != "K_percent"]
    assert len(values) == 15
    assert list(found.columns) == ["K_percent", *(f"{c}_mean" for c in values), *(f"{c}_std" for c in values)]
    name = "sufficiency_prob_gap"
    both = np.array([table[name] for table in tables])
    np.testing.assert_allclose(found[f"{name}_mean"], both.mean(0), atol=1e-12)
    np.testing.assert_allclose(found[f"{name}_std"], np.abs(both[0] - both[1]) / math.sqrt(2), atol=1e-12)
    text = pandas.read_csv(pretty)
    assert list(text.columns) == list(COLUMNS)
    mean, std = found[f"{name}_mean"][0], found[f"{name}_std"][0]
    assert text[name][0] == f"{100 * mean:.2f}±{100 * std:.2f}"
    single = pandas.read_csv(write_tables(tables[:1], tmp_path / "new", "digits")[0])
    assert (single[[f"{c}_std" for c in values]] == 0).all().all()


def test_without_random_draws(samples):
    game = game_of(EDGE["padded"], EDGE["padded"].model(), 2)
    table = faithfulness_table([faithfulness(game, torch.ones(game.n), repeats=0)])
    assert table["comprehensiveness_prob_mean_random"].isna().all()
    assert table["comprehensiveness_prob_mean_identified"].notna().all()


def test_errors(samples):
    game = game_of(EDGE["padded"], EDGE["padded"].model(), 2)
    good = torch.ones(game.n)
    for arguments, options, name in (
        ((game, good[1:]), {}, "importance"),
        ((game, good * math.nan), {}, "importance"),
        ((game, good), {"percents": ()}, "percents"),
        ((game, good), {"percents": (10, 5)}, "percents"),
        ((game, good), {"percents": (0,)}, "percents[0]"),
        ((game, good), {"percents": (5, 101)}, "percents[1]"),
        ((game, good), {"repeats": -1}, "repeats"),
        ((game, good), {"seed": -1}, "seed"),
    ):
        with pytest.raises(ArgumentError) as caught:
            faithfulness(*arguments, **options)
        assert caught.value.argument == name
    other = faithfulness(game, good, percents=(5.0,))
    for run, name in (
        (lambda: faithfulness_table([]), "samples"),
        (lambda: faithfulness_table([samples[0], other]), "samples"),
        (lambda: faithfulness_table(samples, head="nobody"), "head"),
        (lambda: faithfulness_table(samples, torch.zeros(3)), "targets"),
        (lambda: faithfulness_table(samples, mode="median"), "mode"),
        (lambda: write_tables([], "x", "y"), "tables"),
    ):
        with pytest.raises(ArgumentError) as caught:
            run()
        assert caught.value.argument == name
