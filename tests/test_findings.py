"""Data with planted rules, tasks that are not done twice, and the rule by which claims are judged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.findings import planted
from bench.findings.tasks import Task, work
from bench.findings.verdicts import HOLDS, NOT, PARTLY, judged, together


@pytest.mark.parametrize("rule", planted.RULES)
def test_planted_rules_are_what_they_say(rule):
    raw = planted.made(rule, 900, seed=3)
    said = np.array([planted.SAID.index(text.split()[place]) for text, place in zip(raw.texts, raw.words)])
    assert all(len(text.split()) == planted.WORDS and text.count("zero") + text.count("one") == 1 for text in raw.texts)
    rows = np.array([[[raw.pictures[n, 8 * (p // 2) :, 8 * (p % 2) :][:8, :8] for p in range(4)] for n in range(900)]])
    # A 1 has ink in its middle column where a 0 has none.
    glyph = rows[0, np.arange(900), raw.digits]
    ink = glyph[:, 2:6, 3:5].mean((1, 2)) > 0.4
    label = raw.labels.astype(bool)
    own = {"synergy": ink == said.astype(bool), "random": label}.get(rule, ink)
    agree = (own == label).mean()
    assert agree > 0.95  # by a crude look at the picture
    for alone in (ink, said.astype(bool)):
        tells = abs(2 * (alone == label).mean() - 1)
        told = {"redundancy": True, "uniqueness": alone is ink}.get(rule, False)
        assert tells > 0.9 if told else tells < 0.15  # 4.5 standard deviations of 900 coins
    assert planted.made(rule, 50, 3).texts == planted.made(rule, 50, 3).texts


def test_training_and_held_out_samples_share_no_picture():
    pictures = [planted.made("synergy", 300, 0, held_out=held).pictures for held in (False, True)]
    seen = {patch.tobytes() for picture in pictures[0] for patch in _patches(picture)}
    fresh = {patch.tobytes() for picture in pictures[1] for patch in _patches(picture)}
    assert len(fresh) > 50 and not seen & fresh


def _patches(picture):
    return (np.ascontiguousarray(picture[8 * (p // 2) :, 8 * (p % 2) :][:8, :8]) for p in range(4))


def test_a_row_is_made_once_for_its_settings(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(planted, "run", lambda **settings: made.append(settings) or {"accuracy": 1.0})
    task = Task("planted", "x", {"rule": "synergy"})
    assert task.row(tmp_path) is None
    assert work(task, tmp_path) == task.row(tmp_path) and len(made) == 1
    assert json.loads(task.path(tmp_path).read_text())["settings"] == {"rule": "synergy"}
    assert Task("planted", "x", {"rule": "random"}).row(tmp_path) is None


def test_verdicts():
    assert judged([1.0, 1.1, 0.9]) == HOLDS and judged([-1.0, -1.1, -0.9]) == NOT
    assert judged([1.0, -1.0, 0.1]) == NOT and judged([3.0, 1.0, 0.1]) == PARTLY and judged([2.0]) == NOT
    assert together([HOLDS, HOLDS]) == HOLDS and together([HOLDS, NOT]) == PARTLY and together([NOT]) == NOT
