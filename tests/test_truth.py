"""Inputs that computations cannot bear are refused before they give a number."""

from __future__ import annotations

import tomllib

import pytest
import torch
from edge_shapes import EDGES

from flmoe_fast import FLI2MoEConfig, TokenGame
from flmoe_fast.checks import ArgumentError, device
from flmoe_fast.runs.settings import read_settings

EDGE = EDGES[0]


@pytest.mark.parametrize("value", (1e20, -1e18, float("inf"), float("nan")))
def test_features_that_float32_cannot_square_are_refused(value):
    features, masks, fills = EDGE.sample()
    features[1][2, 3] = value
    with pytest.raises(ArgumentError, match=r"features\[1\]: got .*expected finite numbers below 1e\+18"):
        TokenGame(EDGE.model(), features, masks=masks, fill=fills)
    with pytest.raises(ArgumentError, match=r"features\[1\]"):
        EDGE.model()([part[None] for part in features], [mask[None] for mask in masks])
    features, masks, fills = EDGE.sample()
    fills[0][0] = value
    with pytest.raises(ArgumentError, match=r"fill\[0\]"):
        TokenGame(EDGE.model(), features, masks=masks, fill=fills)


def test_a_temperature_that_divides_by_nothing_is_refused():
    for name in ("temperature", "gumbel_temperature"):
        for value in (1e-320, 1e-7, 0.0):
            with pytest.raises(ArgumentError, match=f"{name}: got .*>= 1e-06"):
                FLI2MoEConfig(("a", "b"), 8, 2, 1, 3, **{name: value})
    assert torch.tensor(1e3 / 1e-6).isfinite()


def test_settings_that_cannot_be_are_one_error(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("a = " + "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ArgumentError, match="settings: got"):
        read_settings(path)
    text = (
        '[data]\nkind = "own"\npath = "x.csv"\ntarget = "y"\nmodalities = {words = {text = "t"}}\n[model]\nhidden = 8\n'
    )
    text += '[encoders.words]\nname = "./models/none/bert"\n'
    path.write_text(text)
    assert tomllib.loads(text)
    with pytest.raises(ArgumentError, match=r"encoders\.words\.name: got .*no such folder"):
        read_settings(path)


def test_a_device_that_is_not_there_is_one_error():
    assert device("training.device", "cpu") == torch.device("cpu")
    with pytest.raises(ArgumentError, match=r"training\.device: got 'cuda:63'"):
        device("training.device", "cuda:63")
