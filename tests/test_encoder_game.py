"""Transformers on the encoder engine: the model itself, one masked input at a time, is the truth."""

from __future__ import annotations

import copy
import dataclasses
import json

import encoders
import numpy as np
import pytest
import torch
import transformers as hf
from encoders import CLS, IDS, MASK, VALID, patches, pixels, text_inputs, words
from torch import nn

from flmoe_fast import ArgumentError, accelerate, exact_interactions, image_players, interactions, text_players
from flmoe_fast.adapt.encoder_game import EncoderGame
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import ModuleGame
from flmoe_fast.adapt.remember import Remembered
from flmoe_fast.engines import cpu_model
from flmoe_fast.engines.cpu_stack import NARROW, CpuStack
from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.levels import LEVEL_VARIABLE, levels
from flmoe_fast.pipeline.faithful.masking import mask_pairs

FP64 = 1e-10


def coalitions(n: int, count: int = 8) -> torch.Tensor:
    """Random ones of all sizes, with the empty and the full one."""
    return torch.rand(count, n) < torch.linspace(0, 1, count)[:, None]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def by_hand(model: nn.Module, z: torch.Tensor, text: int | str | None, image: float | None) -> torch.Tensor:
    """Logits (C, K) of coalitions of the four words, then the nine patches: one forward pass each."""
    rows = []
    for coalition in z.tolist():
        given = {}
        coalition = list(coalition)
        if text is not None:
            given = {"input_ids": IDS.clone(), "attention_mask": VALID.clone()}
            for position, present in enumerate(coalition[:4], start=1):
                if not present and text == "remove":
                    given["attention_mask"][0, position] = 0
                elif not present:
                    given["input_ids"][0, position] = text
            del coalition[:4]
        if image is not None:
            given["pixel_values"] = pixels()
            for patch, present in enumerate(coalition):
                top, left = 4 * (patch // 3), 4 * (patch % 3)
                if not present:
                    given["pixel_values"][0, :, top : top + 4, left : left + 4] = image
        with torch.no_grad():
            output = model(**given)
        rows.append(output if isinstance(output, torch.Tensor) else output.logits)
    return torch.cat(rows)


def by_single(model: nn.Module, z: torch.Tensor, text: int | str | None, image: float | None) -> torch.Tensor:
    """The same with a model in float32."""
    forward = model.forward

    def single(**given):
        return forward(**{name: v.float() if v.is_floating_point() else v for name, v in given.items()})

    model.forward = single
    return by_hand(model, z, text, image)


MODELS = {
    "bert, post-norm": (encoders.bert, MASK, None),
    "bert, removed": (encoders.bert, "remove", None),
    "roberta": (encoders.roberta, MASK, None),
    "roberta, removed": (encoders.roberta, "remove", None),
    "roberta, padding moves the other tokens": (encoders.roberta, 1, None),
    "distilbert, removed": (encoders.distilbert, "remove", None),
    "pre-norm roberta, removed": (encoders.prelayernorm, "remove", None),
    "one layer": (lambda: encoders.bert_of(1), "remove", None),
    "six layers": (lambda: encoders.bert_of(6), MASK, None),
    "mean of the unmasked tokens": (lambda: encoders.ready(encoders.Pooled(True)), "remove", None),
    "mean of the unmasked tokens, replaced": (lambda: encoders.ready(encoders.Pooled(True)), MASK, None),
    "mean of all tokens, masked too": (lambda: encoders.ready(encoders.Pooled(False)), "remove", None),
    "torch layers, pre-norm": (lambda: encoders.ready(encoders.Torch(True)), "remove", None),
    "torch layers, post-norm": (lambda: encoders.ready(encoders.Torch(False)), MASK, None),
    "vit": (encoders.vit, None, 0.0),
    "dinov2, layer scales": (encoders.dinov2, None, 0.5),
    "a tower of clip": (encoders.clip_tower, None, 0.5),
    "a tower of siglip, attention pooling": (encoders.siglip_tower, None, 0.0),
    "vilt": (encoders.vilt, MASK, 0.0),
    "vilt, words removed, patches replaced": (encoders.vilt, "remove", 0.25),
}


@pytest.mark.parametrize(("make", "text", "image"), MODELS.values(), ids=MODELS)
def test_values_are_the_models(make, text, image):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs, players = {}, []
    if text is not None:
        inputs, players = text_inputs(), [words(text)]
    if image is not None:
        inputs, players = {**inputs, "pixel_values": pixels()}, [*players, patches(image)]
    game = EncoderGame(model, inputs, players, target=1, value="logit")
    z = coalitions(game.n)
    expected = by_hand(model, z, text, image)[:, 1]
    assert relative(game(z), expected) <= FP64
    assert relative(game(~z), expected) > 1e-3  # negative control: other coalitions have other values
    slow = ModuleGame(model, inputs, players, target=1, value="logit", batch=3)
    assert relative(slow(z), expected) <= FP64
    assert relative(game(z[[0, 0, 5]]), expected[[0, 0, 5]]) <= FP64
    assert game(z[:0]).shape == (0,) and slow(z[:0]).shape == (0,)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_left_out():
    """Padding is not computed, removed tokens neither, and the last layer only for what the head reads."""
    game = EncoderGame(encoders.bert(), text_inputs(), words("remove"), value="logit")
    engine = game.tower.engine
    assert engine.problem.length == 6 and engine.reads.tolist() == [0] and engine.packed
    sizes = [tokens.shape[1] for _, tokens in engine._groups(torch.eye(4).bool())]
    assert sizes == [3]  # start, end, and one player
    pooled = EncoderGame(encoders.ready(encoders.Pooled(True)), text_inputs(), words("remove"), value="logit")
    assert not pooled.tower.engine.packed
    shared = EncoderGame(encoders.roberta(), text_inputs(), words(1), value="logit")
    assert shared.tower.engine.states is None  # several players to a token: the embeddings are made for each coalition


def test_texts_without_padding_and_with_the_last_word_of_the_vocabulary():
    """Roberta counts positions by what is not padding, which a token put in for a hidden one must not disturb."""
    model = encoders.roberta()
    ids = torch.tensor([[CLS, 39, 39, 38, 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    game = EncoderGame(model, inputs, text_players(ids, special=[CLS, 0]), target=0, value="logit")
    z = coalitions(3)
    mask = torch.cat([torch.ones(8, 1), z, torch.ones(8, 1)], 1).long()
    with torch.no_grad():
        expected = [model(input_ids=ids, attention_mask=row[None]).logits[0, 0] for row in mask]
    assert relative(game(z), torch.stack(expected)) <= FP64


def removed_by_hand(model, z):
    """Patches taken out of the sequence after the embeddings, in front of the model's own layers."""
    rows = []
    for coalition in z:
        with torch.no_grad():
            states = model.vit.embeddings(pixels())
            states = states[:, torch.cat([torch.ones(1).bool(), coalition])]
            for layer in model.vit.layers:
                states = layer(states)
            rows.append(model.classifier(model.vit.layernorm(states)[:, 0]))
    return torch.cat(rows)


def test_patches_removed_from_a_model_without_masks():
    model = encoders.vit()
    game = EncoderGame(model, {"pixel_values": pixels()}, patches("remove"), target=2, value="logit")
    z = coalitions(game.n)
    assert relative(game(z), removed_by_hand(model, z)[:, 2]) <= FP64
    filled = EncoderGame(model, {"pixel_values": pixels()}, patches(0.0), target=2, value="logit")
    assert relative(filled(z), game(z)) > 1e-3
    with pytest.raises(ArgumentError, match="players: got image players that are removed"):
        ModuleGame(model, {"pixel_values": pixels()}, patches("remove"), value="logit")


@pytest.mark.parametrize("snapped", [True, False], ids=["by patches", "across patches"])
def test_superpixels(snapped):
    """Superpixels that cut through patches make tokens with several owners: slower, and still right."""
    model, image = encoders.vit(), pixels()
    segments = torch.full((12, 12), 2)
    segments[:7, :6], segments[5:, 8:] = 0, 1
    players = image_players(image, by=segments, patch=4 if snapped else None)
    game = EncoderGame(model, {"pixel_values": image}, players, target=0, value="logit")
    assert (game.tower.engine.states is None) != snapped
    z = coalitions(3)
    expected = []
    for coalition in z:
        kept = coalition[players.owner]
        with torch.no_grad():
            expected.append(model(pixel_values=torch.where(kept, image, 0.0)).logits[0, 0])
    assert relative(game(z), torch.stack(expected)) <= FP64


def test_whole_modalities_and_words():
    model = encoders.vilt()
    inputs = {**text_inputs(), "pixel_values": pixels()}
    both = [words(by="all"), image_players(pixels(), by="all")]
    game = EncoderGame(model, inputs, both, target=1)
    assert game.n == 2 and game.player_names == ("text", "image") and game.groups == (("text", (0,)), ("image", (1,)))
    exact = exact_interactions(game, progress=False)
    v = game(torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool())
    assert exact.sii[0] == pytest.approx(float(v[0] - v[1] - v[2] + v[3]), abs=1e-12)
    grouped = text_players(IDS, by="word", word_ids=[None, 0, 0, 1, 1, None, None, None], absent=MASK)
    by_word = EncoderGame(model, inputs, grouped, target=1, value="logit")
    tokens = EncoderGame(model, inputs, words(), target=1, value="logit")
    assert torch.allclose(by_word(torch.tensor([[True, False]])), tokens(torch.tensor([[True, True, False, False]])))


def test_coalitions_are_computed_once():
    game = EncoderGame(encoders.bert(), text_inputs(), words())
    everything = torch.cartesian_prod(*[torch.tensor([False, True])] * 4)
    first = game(everything)
    interactions(game, contexts=16, progress=False)
    assert game._values.computed == 16 and torch.equal(game(everything.flip(0)), first.flip(0))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("flmoe_fast.adapt.remember.MOST_ROWS", 5)
    calls = []
    values = Remembered(lambda rows: calls.append(len(rows)) or rows.double().sum(1))
    everything = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    assert values(everything).tolist() == [0, 1, 1, 2, 1, 2, 2, 3] and values(everything[:4]).tolist() == [0, 1, 1, 2]
    values(everything[2:7])  # more than fits beside what is known: that is forgotten, and what is new is kept
    assert calls == [8] and len(values._rows) == 8
    small = Remembered(values.compute)
    small(everything[:4]), small(everything[3:6]), small(everything[4:6])
    assert calls == [8, 4, 2] and len(small._rows) == 2 and small.computed == 6


def test_probes_work_unchanged_and_places_are_kept(tmp_path):
    inputs = {**text_inputs(), "pixel_values": pixels()}
    offsets = [(0, 0), (0, 3), (3, 5), (6, 9), (9, 10), (0, 0), (0, 0), (0, 0)]
    both = [words("remove", offsets=offsets, text="abcde fghi"), patches()]
    game = EncoderGame(encoders.vilt(), inputs, both, dtype=torch.float32)
    assert game.player_names[:5] == ("abc", "de", "fgh", "i", "image 0,0")
    found = interactions(game, rows=[0, 1], cols=[5, 6], contexts=4, progress=False)
    assert found.backend == "encoder stack" and 0 < found.noise_share < 1 and found.check_evaluations > 0
    assert found.about["places"][1] == [3, 5] and found.about["places"][5] == [0, 4, 4, 8]
    found.save(tmp_path / "r.npz")
    assert json.dumps(found.about) and type(found).load(tmp_path / "r.npz").about == found.about
    masked = mask_pairs(game, found.pairs, most=(1, 2), repeats=2)
    assert masked.tokens.shape == (2, 2) and np.isfinite(masked.top).all()
    precise = game.precise()
    z = coalitions(game.n)
    assert precise.dtype == torch.float64 and precise.precise() is None
    assert 0 < relative(game(z), precise(z)) < 1e-4


@pytest.mark.parametrize("make", [encoders.bert, encoders.prelayernorm], ids=["post-norm", "pre-norm"])
def test_float32_is_as_exact_as_the_model_in_float32(make):
    """Twice the model's own error in float32, plus one rounding."""
    model = make()
    z = coalitions(4, 16)
    exact = by_hand(model, z, "remove", None)[:, 1]
    plain = by_hand(copy.deepcopy(model).float(), z, "remove", None)[:, 1].double()
    game = EncoderGame(model, text_inputs(), words("remove"), target=1, value="logit", dtype=torch.float32)
    limit = 2 * float((plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max())
    assert 0 < float((game(z) - exact).abs().max()) <= limit


NATIVE = {
    "vit, eps 1e-12": (encoders.vit, None, 0.0),
    "deit, two class tokens, eps 1e-3": (encoders.deit, None, 0.5),
    "vilt, padding inside": (encoders.vilt, MASK, 0.25),
}


@pytest.mark.parametrize("level", [name for name, (_, missing) in levels().items() if not missing])
@pytest.mark.parametrize(("make", "text", "image"), NATIVE.values(), ids=NATIVE)
def test_the_native_engine_is_as_exact_as_its_arithmetic(make, text, image, level, monkeypatch):
    """Twice the model's own error in float32, plus one rounding; two bfloat16 terms hold 8 bits less of an operand."""
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    model = make()
    inputs = {**(text_inputs() if text else {}), "pixel_values": pixels()}
    both = [*([words(text)] if text else []), patches(image)]
    game = EncoderGame(model, inputs, both, target=1, value="logit", dtype=torch.float32, backend="cpu")
    z = coalitions(game.n, 20)
    exact = by_hand(model, z, text, image)[:, 1]
    plain = by_single(copy.deepcopy(model).float(), z, text, image)[:, 1].double()
    limit = 2 * float((plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max())
    arithmetic = game.about()["arithmetic"]
    if arithmetic != "fp32":
        limit *= 2**8
    assert game.about()["level"] == level and 0 < float((game(z) - exact).abs().max()) <= limit
    assert game.more_exact.startswith("dtype" if arithmetic == "fp32" else "precision='fp32'")
    precise = game.precise()  # of the weights in float32
    assert precise.about().get("level") is None and relative(precise(z), exact) <= 1e-5
    if level == "portable":  # negative control: another scale of the stream is another epsilon
        monkeypatch.setattr(cpu_model, "EPSILON", 1e-14)
        monkeypatch.setattr("flmoe_fast.adapt.encoder_game.check_with_model", lambda tower: None)
        wrong = EncoderGame(model, inputs, both, target=1, value="logit", dtype=torch.float32, backend="cpu")
        assert float((wrong(z) - exact).abs().max()) > 10 * limit


@pytest.mark.skipif(not levels(), reason="built without the C++ extension")
@pytest.mark.parametrize(
    ("make", "text", "image", "reason"),
    [
        (encoders.bert, MASK, None, "its LayerNorms come after the sub-blocks"),
        (encoders.clip_tower, None, 0.0, "its activation is not the exact GELU"),
        (encoders.dinov2, None, 0.0, "the model's head reads 10 tokens"),
        (encoders.prelayernorm, "remove", None, "absent tokens are not all replaced"),
    ],
)
def test_why_not_the_native_engine(make, text, image, reason):
    inputs = {**(text_inputs() if text else {}), **({"pixel_values": pixels()} if image is not None else {})}
    both = words(text) if text else patches(image)
    with pytest.raises(ArgumentError, match=f"backend: got 'cpu', but .*{reason}"):
        EncoderGame(make(), inputs, both, dtype=torch.float32, value=first_logits, backend="cpu")
    assert EncoderGame(make(), inputs, both, dtype=torch.float32, value=first_logits).about().get("level") is None


@pytest.mark.skipif(not levels(), reason="built without the C++ extension")
def test_wide_layers_go_to_the_native_engine_only_where_its_products_are_cheaper(monkeypatch):
    """In float32 PyTorch multiplies wide matrices faster; "auto" takes it and says so, a backend asked for is taken."""
    best = next(name for name, (arithmetic, missing) in levels().items() if arithmetic == "fp32" and not missing)
    monkeypatch.setenv(LEVEL_VARIABLE, best)
    narrow, wide = (
        hf.ViTForImageClassification(hf.ViTConfig(**{**encoders.IMAGE, "hidden_size": width})).eval()
        for width in (NARROW, 2 * NARROW)
    )
    inputs, players = {"pixel_values": pixels().float()}, patches(0.0)

    def made(model: nn.Module, **options) -> dict:
        return EncoderGame(model, inputs, players, value="logit", **options).about()

    assert made(narrow)["level"] == made(wide, backend="cpu")["level"] == best
    about = made(wide)
    assert "level" not in about and about["reason"] == "in float32 PyTorch is faster on layers of width 512"
    products = {name: ("bf16x3", missing) for name, (_, missing) in levels().items()}
    monkeypatch.setattr("flmoe_fast.engines.levels.levels", lambda: products)
    assert CpuStack.slower(Request(torch.float32, torch.device("cpu"), wide_problem(wide, inputs, players))) == ""


def wide_problem(model: nn.Module, inputs: dict, players):
    """What an engine is asked to evaluate."""
    return EncoderGame(model, inputs, players, value="logit", backend="torch").tower.engine.problem


def first_logits(output):
    return (output if isinstance(output, torch.Tensor) else output.logits)[:, 0]


def test_half_precision_models_are_taken_in_float32():
    model = encoders.bert().to(torch.bfloat16)
    game = EncoderGame(model, text_inputs(), words(), target=1, value="logit")
    z = coalitions(4)
    expected = by_hand(copy.deepcopy(model).float(), z, MASK, None)[:, 1].double()
    assert game.dtype == torch.float32 and relative(game(z), expected) < 1e-4
    assert next(model.parameters()).dtype == torch.bfloat16


def test_values_of_ones_own():
    model = encoders.bert()
    z = coalitions(4)
    logits = by_hand(model, z, MASK, None)
    game = EncoderGame(model, text_inputs(), words(), value=lambda output: output.logits[:, :2], heads=("a", "b"))
    assert game.heads == ("a", "b") and relative(game(z), logits[:, :2]) <= FP64
    single = EncoderGame(model, text_inputs(), words(), value=lambda output: output.logits[:, 3])
    assert single.heads is None and relative(single(z), logits[:, 3]) <= FP64
    prob = EncoderGame(model, text_inputs(), words())
    full = by_hand(model, torch.ones(1, 4).bool(), MASK, None)[0]
    assert prob.target == int(full.argmax()) and relative(prob(z), logits.softmax(1)[:, prob.target]) <= FP64
    states = hf.BertModel(model.config, add_pooling_layer=False).double().eval()
    states.load_state_dict(model.bert.state_dict(), strict=False)
    norm = EncoderGame(states, text_inputs(), words(), value=lambda output: output.last_hidden_state[:, 2, :3])
    assert norm.tower.problem.reads.tolist() == [2] and norm(z).shape == (8, 3)


def test_probabilities_of_other_tasks():
    model = encoders.bert()
    z = coalitions(4)
    logits = by_hand(model, z, MASK, None)
    model.config.problem_type = "multi_label_classification"
    for path in ("engine", "module"):
        game = accelerate(model).game(text_inputs(), words(), target=2, path=path)
        assert relative(game(z), logits[:, 2].sigmoid()) <= FP64
    model.config.problem_type = "regression"
    with pytest.raises(ArgumentError, match="value: got 'prob' of a regression model, expected 'logit'"):
        accelerate(model).game(text_inputs(), words())
    single = encoders.ready(hf.BertForSequenceClassification(hf.BertConfig(**{**encoders.TEXT, "num_labels": 1})))
    game = EncoderGame(single, text_inputs(), words())
    assert relative(game(z), by_hand(single, z, MASK, None)[:, 0].sigmoid()) <= FP64


# ---- planted mistakes ------------------------------------------------------------------------------------------------


def break_scale(engine):
    engine.layers[1].qkv[:, : engine.layers[1].width].mul_(1.01)


def break_owner(engine):
    engine.owner = engine.owner.roll(1)


def break_reads(engine):
    engine.reads = engine.reads + 1


def break_states(engine):
    engine.states = tuple(part.flip(0) for part in engine.states)


def break_bias(engine):
    engine.layers[0].out_bias[0].add_(0.01)  # the norm after it would take a shift of all away


def break_norm(engine):
    last = engine.layers[-1]
    layer = dataclasses.replace(last, norm2=dataclasses.replace(last.norm2, epsilon=1.0))
    engine.layers = (*engine.layers[:-1], layer)


@pytest.mark.parametrize("mistake", [break_scale, break_owner, break_reads, break_states, break_bias, break_norm])
def test_a_mistake_is_seen(mistake):
    model = encoders.bert()
    game = EncoderGame(model, text_inputs(), words(), target=1, value="logit")
    z = coalitions(4)
    expected = by_hand(model, z, MASK, None)[:, 1]
    assert relative(game(z), expected) <= FP64
    mistake(game.tower.engine)
    game._values = Remembered(lambda rows: game.score.values(game.tower.encode(rows)))
    assert relative(game(z), expected) > 1e-5


# ---- what the engine does not take -----------------------------------------------------------------------------------


def changed():
    model = encoders.vit()
    model.vit.layers[1].register_forward_hook(lambda layer, args, output: 1.5 * output)
    return model


def convolution():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Linear(36, 4)

        def forward(self, pixel_values):
            return self.second(self.first(pixel_values).relu().flatten(1))

    return encoders.ready(Small())


def twice():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = encoders.vit()

        def forward(self, pixel_values):
            return self.model(pixel_values).logits + self.model(pixel_values.flip(3)).logits

    return Again()


OTHERS = {
    "a changed layer": (changed, r"vit\.layers\.1 \(ViTLayer\), whose output differs from a plain encoder layer's"),
    "no transformer": (convolution, "a Small without a list of equal layers"),
    "run twice": (twice, "which runs 2 times in one forward pass"),
}


@pytest.mark.parametrize(("make", "reason"), OTHERS.values(), ids=OTHERS)
def test_other_models_take_the_slow_path_and_say_why(make, reason):
    model = make()
    inputs = {"pixel_values": pixels()}
    with pytest.raises(Unsupported, match=reason):
        accelerate(model).game(inputs, patches(), path="engine")
    with pytest.warns(UserWarning, match=f"slow path: a forward pass for every coalition, because .*{reason}"):
        game = accelerate(model).game(inputs, patches(), target=1, value="logit")
    assert game.backend == "module (slow path)" and "slow: " in game.about()["path"]
    z = coalitions(9)
    assert relative(game(z), by_hand(model, z, None, 0.0)[:, 1]) <= FP64
    assert interactions(game, pairs=[(0, 1)], contexts=4, progress=False).backend == "module (slow path)"


def test_small_differences_are_seen_in_float32_too():
    """Rotary positions move an untrained model's layers by 1e-5 only, and still they are no plain layers."""
    torch.manual_seed(0)
    model = hf.RoFormerForSequenceClassification(hf.RoFormerConfig(**encoders.TEXT)).eval()
    with pytest.raises(Unsupported, match=r"roformer.encoder.layer.0 \(RoFormerLayer\), whose output differs"):
        EncoderGame(model, text_inputs(), words())


def test_a_layer_gets_back_the_forward_it_had():
    model = encoders.bert()
    layer = model.bert.encoder.layer[1]
    original, calls = layer.forward, []
    layer.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    wrapped = layer.forward
    EncoderGame(model, text_inputs(), words())
    assert layer.forward is wrapped and calls
    assert "forward" not in model.bert.encoder.layer[0].__dict__


def test_layers_are_read_and_compared_once_for_many_samples(monkeypatch):
    model = encoders.bert()
    fast = accelerate(model)
    first = fast.game(text_inputs(), words(), target=1, value="logit")
    monkeypatch.setattr("flmoe_fast.adapt.tower.compare_layers", None)  # would fail if it were called
    other = {**text_inputs(), "input_ids": IDS.roll(1, 0).where(IDS < 5, IDS + 1)}
    second = fast.game(other, text_players(other["input_ids"], special=[0, 2, 3], absent=MASK), target=1, value="logit")
    assert second.tower.engine.layers is first.tower.engine.layers
    z = coalitions(4)
    slow = fast.game(other, second.players.parts, target=1, value="logit", path="module")
    assert relative(second(z), slow(z)) <= FP64 and relative(second(z), first(z)) > 1e-3


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    z = coalitions(13)
    inputs = {**text_inputs(), "pixel_values": pixels()}
    for absent in (MASK, "remove"):
        model, both = encoders.vilt(), [words(absent), patches()]
        expected = EncoderGame(model, inputs, both, target=1, value="logit")(z)
        moved = {name: value.cuda() for name, value in inputs.items()}
        found = EncoderGame(model.cuda(), moved, both, target=1, value="logit")(z)
        assert found.device.type == "cpu" and relative(found, expected) <= 1e-8


def test_the_slow_path_can_be_asked_for():
    model = encoders.bert().float()
    slow = accelerate(model).game(text_inputs(), words(), path="module", value="logit", target=0)
    fast = accelerate(model).game(text_inputs(), words(), value="logit", target=0)
    assert isinstance(slow, ModuleGame) and isinstance(fast, EncoderGame)
    z = coalitions(4)
    assert relative(slow(z), fast(z)) < 1e-4 and slow.precise().module.dtype == torch.float64
    assert relative(slow.precise()(z), slow(z)) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "odds"}, "value: got 'odds'"),
        ({"target": 9}, "target: got 9"),
        ({"target": 1, "value": lambda output: output.logits[:, 0]}, "target: got 1, expected None"),
        ({"value": lambda output: output.logits[None]}, r"value: got shape \(1, 1, 4\)"),
        ({"value": lambda output: 3.0}, "value: got float"),
        ({"heads": ("a",)}, "heads: got"),
        ({"heads": ("a",), "value": lambda output: output.logits[:, :2]}, "heads: got 1 names"),
        ({"memory": 0}, "memory: got 0"),
        ({"dtype": torch.float16}, "dtype: got torch.float16"),
        ({"inputs": [IDS]}, "inputs: got list"),
        ({"model": "bert"}, "model: got str"),
        ({"players": text_players(IDS, absent="remove")}, "players: got players who own every token"),
    ],
)
def test_bad_input_is_named(options, message):
    given = {"model": encoders.bert(), "inputs": text_inputs(), "players": words(), **options}
    with pytest.raises(ArgumentError, match=message):
        EncoderGame(given.pop("model"), given.pop("inputs"), given.pop("players"), **given)
    assert CLS in IDS
