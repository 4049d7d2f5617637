"""Routing: distributions, whether weights follow what is known of the samples, and experts alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flmoe_fast.checks import ArgumentError
from flmoe_fast.pipeline.routing import AVERAGE, MIXTURE, experts_alone, routing_follows, routing_table

NAMES = ("uniqueness: a", "uniqueness: b", "synergy")


def weights_of(count, lean=0.0, seed=0):
    """Random weights of samples whose kinds take turns; ``lean`` moves them towards the expert of their kind."""
    kinds = np.arange(count) % 3
    raw = np.random.default_rng(seed).random((count, 3)) + lean * np.eye(3)[kinds]
    return raw / raw.sum(1, keepdims=True), [NAMES[k] for k in kinds]


def test_distribution_agrees_with_plain_numbers():
    weights, kinds = weights_of(60, 0.5)
    table = routing_table(weights, NAMES, kinds)
    assert len(table) == 9 and table["samples"].eq(20).all()
    row = table[(table["kind"] == NAMES[1]) & (table["expert"] == NAMES[1])].iloc[0]
    own = sorted(weights[1::3, 1])
    assert row["mean"] == pytest.approx(sum(own) / 20) and row["median"] == pytest.approx((own[9] + own[10]) / 2)
    assert row["most"] == own[-1] and row["stderr"] == pytest.approx(np.std(own, ddof=1) / math.sqrt(20))
    assert row["largest in %"] == pytest.approx(100 * np.mean(weights[1::3].argmax(1) == 1))
    assert routing_table(weights, NAMES)["kind"].eq("all").all()


def test_weights_that_follow_and_weights_that_do_not():
    follow = routing_follows(*weights_of(300, 1.0))
    assert follow["between"] > 0.5 and follow["p"] < 0.01 and follow["chance"] < 0.03
    # The negative control: about two of a hundred by chance, since three kinds have two degrees of freedom.
    ps = [routing_follows(*weights_of(90, 0.0, seed), shuffles=50, seed=seed)["p"] for seed in range(40)]
    assert 0.3 < np.mean(ps) < 0.7 and min(ps) < 0.3
    constant = routing_follows(np.full((30, 3), 1 / 3), weights_of(30)[1])
    assert constant["between"] == 0.0 and constant["spread"] < 1e-12 and constant["p"] == 1.0


def test_share_between_kinds_is_that_of_the_analysis_of_variance():
    weights, kinds = weights_of(50, 0.3)
    labels = np.array(kinds)
    inside = sum(((weights[labels == k] - weights[labels == k].mean(0)) ** 2).sum() for k in set(kinds))
    total = ((weights - weights.mean(0)) ** 2).sum()
    assert routing_follows(weights, kinds)["between"] == pytest.approx(1 - inside / total)


def test_experts_alone():
    random = np.random.default_rng(0)
    targets = random.integers(0, 2, 200)
    good = 4.0 * np.eye(2)[targets]
    logits = np.stack([good, np.zeros((200, 2)), 1.5 * np.eye(2)[1 - targets]], axis=1)
    weights = np.tile([0.6, 0.2, 0.2], (200, 1))
    table = experts_alone(logits, weights, targets, NAMES).set_index("model")
    assert table.loc[MIXTURE, "accuracy"] == 1.0 and table.loc[AVERAGE, "accuracy"] == 1.0
    assert table.loc[NAMES[0], "accuracy"] == 1.0 and table.loc[NAMES[2], "accuracy"] == 0.0
    assert table.loc[NAMES[2], "difference"] == -1.0 and table.loc[NAMES[2], "without it"] == 1.0
    assert table.loc[NAMES[0], "without it"] == 0.0  # what is left is wrong
    guess = table.loc[NAMES[1]]
    own = (targets == 0).astype(float)
    assert guess["accuracy"] == own.mean() and guess["stderr"] == pytest.approx(own.std(ddof=1) / math.sqrt(200))
    labels = np.stack([targets, 1 - targets], axis=1)
    several = experts_alone(2 * logits - 4, weights, labels, NAMES, "multilabel").set_index("model")
    assert several.loc[NAMES[0], "accuracy"] == 0.0  # class 0 is marked where the label is 1
    only = experts_alone(logits[:, :1], np.ones((200, 1)), targets, NAMES[:1]).set_index("model")
    assert math.isnan(only.loc[NAMES[0], "without it"])


def test_errors():
    weights, kinds = weights_of(9)
    for run, name in (
        (lambda: routing_table(weights, NAMES[:2]), "weights"),
        (lambda: routing_table(weights, NAMES, kinds[1:]), "kinds"),
        (lambda: routing_follows(weights, ["one"] * 9), "kinds"),
        (lambda: routing_follows(weights, list("abcdefghi")), "kinds"),
        (lambda: experts_alone(np.zeros((9, 2, 2)), weights, np.zeros(9), NAMES), "expert_logits"),
    ):
        with pytest.raises(ArgumentError) as caught:
            run()
        assert caught.value.argument == name
