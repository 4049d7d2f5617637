"""Modules with quantised weights: no engine takes them apart, and nothing shares a batch that changes the scale."""

from __future__ import annotations

import warnings

import pytest
import torch
from decoders import TEXTS, prompt
from encoders import bert, text_inputs, words
from torch import nn

from flmoe_fast import accelerate, interactions, next_token, text_players
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import ModuleGame


def quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)


def test_an_encoder():
    model = quantised(bert())
    with pytest.warns(UserWarning, match="slow path: .* with quantised parts"):
        game = accelerate(model).game(text_inputs(), words(), value="logit", target=1)
    assert isinstance(game, ModuleGame) and "may take its scale from what shares a batch" in game.about()["batch"]
    z = torch.rand(6, 4) < 0.5
    alone = []
    for coalition in z:
        given = text_inputs()
        given["input_ids"] = given["input_ids"].clone()
        given["input_ids"][0, 1:5] = torch.where(coalition, given["input_ids"][0, 1:5], 4)
        with torch.no_grad():
            alone.append(model(**given).logits[0, 1].double())
    assert torch.equal(game(z), torch.stack(alone))
    with pytest.warns(UserWarning, match="rounding is not measured"):
        assert len(interactions(game, progress=False).sii) == 6
    with pytest.raises(Unsupported, match="floating point weights: what is computed together would change the scales"):
        accelerate(model).game(text_inputs(), words(), path="engine")


def test_a_decoder():
    ids = prompt(0, 8)
    around = ids[0, [0, 1, -1, -2]].tolist()
    with pytest.warns(UserWarning, match="slow path: .* a LlamaForCausalLM with quantised parts"):
        game = accelerate(quantised(TEXTS["Llama"]())).game(
            {"input_ids": ids}, text_players(ids, special=around), value=next_token(4)
        )
    z = torch.rand(5, game.n) < 0.5
    assert torch.equal(game(z), torch.cat([game(row[None]) for row in z]))
