"""Checkpoints: round trips, files laid out as the published code writes them, and every way a file can be wrong."""

from __future__ import annotations

import collections
import json
import os
import pickle
import warnings

import pytest
import safetensors.torch
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.encoders import ColumnGroupEncoder, ProjectionEncoder, TabularTokenEncoder
from flmoe_fast.model.network import FLI2MoE

GIVEN = {"modalities": ("img", "lab"), "heads": 2, "temperature": 2.0, "task": "multiclass"}


def make_model(generation="fl", count=2, encoders=True, **fields):
    fields = {"hidden": 8, "heads": 2, "layers": 2, "classes": 3, "reweight_hidden": 6, "temperature": 2.0, **fields}
    if generation == "original":
        fields["num_tokens"] = (5,) * count
    names = ("img", "lab", "note", "code")[:count]
    built = {n: TabularTokenEncoder(5, 8) if n == "lab" else ProjectionEncoder(4, 8) for n in names}
    model = FLI2MoE(FLI2MoEConfig(names, generation=generation, **fields), built if encoders else None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def forward(model):
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    count = len(model.config.modalities)
    features = [torch.randn(2, 5, model.config.hidden, generator=generator).to(dtype) for _ in range(count)]
    with torch.no_grad():
        return model(features).logits


def published(model):
    """The content of a file as the published code writes it: no configuration, frozen backbones included."""
    encoders = {name: encoder.state_dict() for name, encoder in model.encoders.items()}
    for state in encoders.values():
        if "proj.weight" in state:
            state["backbone.vision_model.embeddings.weight"] = torch.randn(50, 4)
            state["backbone.text_model.embeddings.position_ids"] = torch.arange(7)[None]
            state["vit.embeddings.weight"] = state["backbone.vision_model.embeddings.weight"]
    return {"ensemble_model": collections.OrderedDict(model.ensemble_state_dict()), "encoder_dict": encoders}


def test_columns_in_groups_come_back(tmp_path):
    config = FLI2MoEConfig(("img", "lab"), 8, 2, 1, 3, reweight_hidden=6)
    model = FLI2MoE(config, {"img": ColumnGroupEncoder(11, 4, 8), "lab": TabularTokenEncoder(5, 8)}).eval()
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert [type(encoder) for encoder in loaded.encoders.values()] == [ColumnGroupEncoder, TabularTokenEncoder]
    inputs = [torch.randn(2, 11), torch.randn(2, 5)]
    for found, expected in zip(loaded.encode(inputs), model.encode(inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("suffix", ("pth", "pt", "safetensors"))
@pytest.mark.parametrize("generation", ("fl", "original"))
@pytest.mark.parametrize("count", (2, 4))
def test_round_trip(tmp_path, suffix, generation, count):
    fields = {"class_weights": (1.0, 2.0, 3.0), "reweight_layers": count - 1, "dropout": 0.2, "ffn_multiple": 3}
    model = make_model(generation, count, **fields)
    path = tmp_path / f"model.{suffix}"
    save_checkpoint(model.train(), path)
    state = torch.random.get_rng_state()
    loaded = load_checkpoint(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.config == model.config
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert [type(e) for e in loaded.encoders.values()] == [type(e) for e in model.encoders.values()]
    assert torch.equal(forward(loaded), forward(model.eval()))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", ("pth", "safetensors"))
def test_round_trip_keeps_the_dtype_and_needs_no_encoders(tmp_path, suffix):
    for dtype in (torch.float64, torch.float16):
        model = make_model(encoders=False).to(dtype)
        save_checkpoint(model, tmp_path / f"m.{suffix}")
        loaded = load_checkpoint(tmp_path / f"m.{suffix}")
        assert not loaded.encoders
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert torch.equal(forward(loaded), forward(model))


@pytest.mark.parametrize("generation", ("fl", "original"))
@pytest.mark.parametrize("legacy", (False, True))
def test_published_layout_needs_only_what_tensors_do_not_tell(tmp_path, generation, legacy):
    fields = {"reweight_layers": 3, "layers": 3, "classes": 7, "ffn_multiple": 3}
    model = make_model(generation, **fields)
    path = tmp_path / "seed_1_modality_IL.pth"
    torch.save(published(model), path, _use_new_zipfile_serialization=not legacy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_checkpoint(path, **GIVEN)
    assert loaded.config == model.config
    assert torch.equal(forward(loaded), forward(model))
    assert list(loaded.state_dict()) == list(model.state_dict())
    patches = torch.randn(1, 5, 4)
    assert torch.equal(loaded.encoders["img"](patches), model.encoders["img"](patches))

    for name in GIVEN:
        rest = {key: value for key, value in GIVEN.items() if key != name}
        with pytest.raises(ArgumentError, match=f"all of {name} as arguments; its encoders are named .'img', 'lab'"):
            load_checkpoint(path, **rest)
    with pytest.raises(ArgumentError, match="modalities: .*2 names"):
        load_checkpoint(path, **{**GIVEN, "modalities": ("img", "lab", "note")})
    with pytest.raises(ArgumentError, match="heads: got 3"):
        load_checkpoint(path, **{**GIVEN, "heads": 3})


def test_file_written_for_the_published_readers(tmp_path):
    model = make_model("original")
    save_checkpoint(model, tmp_path / "m.pth")
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert list(content) == ["ensemble_model", "encoder_dict", "config"]
    assert list(content["ensemble_model"]) == list(model.ensemble_state_dict())
    assert list(content["ensemble_model"])[4] == "interaction_experts.0.fusion_model.pos_embed"
    assert {name: list(state) for name, state in content["encoder_dict"].items()} == {
        "img": ["proj.weight", "proj.bias"],
        "lab": ["feature_emb", "bias"],
    }
    assert content["config"] == model.config.to_dict()


def test_keys_of_a_safetensors_file(tmp_path):
    model = make_model()
    save_checkpoint(model, tmp_path / "m.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    wanted = {f"ensemble_model.{key}" for key in model.ensemble_state_dict()}
    wanted |= {"encoder_dict.img.proj.weight", "encoder_dict.img.proj.bias"}
    assert set(tensors) == wanted | {"encoder_dict.lab.feature_emb", "encoder_dict.lab.bias"}
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == model.config.to_dict()


def test_arguments_and_config_replace_what_is_stored(tmp_path):
    model = make_model()
    path = tmp_path / "m.pth"
    save_checkpoint(model, path)
    assert load_checkpoint(path, temperature=5.0).config.temperature == 5.0
    renamed = FLI2MoEConfig(**{**model.config.to_dict(), "dropout": 0.1})
    assert load_checkpoint(path, config=renamed).config == renamed
    with pytest.raises(ArgumentError, match="heads: .*beside config"):
        load_checkpoint(path, config=renamed, heads=2)
    with pytest.raises(ArgumentError, match="config: got dict"):
        load_checkpoint(path, config=model.config.to_dict())
    for field, value in (("layers", 3), ("classes", 4), ("hidden", 16), ("reweight_hidden", 7)):
        other = FLI2MoEConfig(**{**model.config.to_dict(), field: value})
        with pytest.raises(CheckpointError, match=rf"m\.pth: {field}: found .* in the tensors, expected {value} from"):
            load_checkpoint(path, config=other)


def test_unreadable_encoders_are_left_out_with_a_warning(tmp_path):
    content = published(make_model())
    content["encoder_dict"]["lab"] = {"projection.weight": torch.zeros(8, 3), "projection.bias": torch.zeros(8)}
    torch.save(content, tmp_path / "m.pth")
    with pytest.warns(UserWarning, match=r"no encoders loaded.*lab \(projection.weight, projection.bias\)"):
        assert not load_checkpoint(tmp_path / "m.pth", **GIVEN).encoders


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ("zip", "legacy", "pickle", "inside"))
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, path = tmp_path / "mark", tmp_path / "m.pth"
    content = {**published(make_model()), "extra": Payload(mark)}
    if kind == "inside":
        content = published(make_model())
        content["ensemble_model"]["reweight.mlp.network.0.bias"] = Payload(mark)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(CheckpointError, match="refused unexecuted"):
        load_checkpoint(path, **GIVEN)
    assert not mark.exists()
    if kind == "zip":  # the payload does work where it is let through
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("suffix", ("pth", "safetensors"))
def test_missing_and_damaged_files(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    with pytest.raises(CheckpointError, match="found nothing"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no regular file"):
        load_checkpoint(tmp_path)
    save_checkpoint(make_model(), path)
    load_checkpoint(path)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1], whole[:20], b"", b"no checkpoint at all"):
        path.write_bytes(part)
        with pytest.raises(CheckpointError, match=r"m\.\w+: file: found .*damaged"):
            load_checkpoint(path)


def _sparse(state):
    state["interaction_experts.0.fusion_model.network.0.mlp.experts.htoh4.weight"] = torch.zeros(4, 16, 8)


def _rename(before, after):
    def change(state):
        for key in list(state):
            if before in key:
                state[key.replace(before, after)] = state.pop(key)

    return change


def _drop_experts(state):
    for key in list(state):
        if key.startswith(("interaction_experts.2", "interaction_experts.3")):
            del state[key]


EXPERT = "interaction_experts.1.fusion_model."


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (_sparse, "1 unexpected keys"),
        (lambda s: s.update({EXPERT + "modality_gates.0.0.weight": torch.zeros(1)}), "1 unexpected keys"),
        (lambda s: s.update({EXPERT + "layers.0.mlp.moe.gate.gate_map.weight": torch.zeros(1)}), "1 unexpected keys"),
        (_rename("interaction_experts.", "experts."), "ablation without interaction losses"),
        (lambda s: s.update({"reweight.weights": torch.zeros(4)}), "learned global average"),
        (lambda s: s.update({"interaction_expert.fusion_model.x": torch.zeros(4)}), "single expert"),
        (_drop_experts, "synergy and redundancy only"),
        (lambda s: s.pop("reweight.mlp.network.3.bias"), "reweight.mlp.network.3.bias: found no such key"),
        (lambda s: s.pop("reweight.mlp.network.0.weight"), "reweight.mlp.network.0.weight: found no such key"),
        (_rename("reweight.mlp.network.3", "reweight.mlp.network.2"), r"linear layers at \[0, 2\]"),
        (lambda s: s.pop(EXPERT + "network.1.norm2.bias"), r"network\.1\.norm2\.bias: found no such key"),
        (_rename("network.2.fc", "network.9.fc"), r"numbers \[0, 1, 9\]"),
        (_rename("interaction_experts.3", "interaction_experts.7"), r"numbers \[0, 1, 2, 7\]"),
        (lambda s: s.update({EXPERT + "extra": torch.zeros(1)}), "1 unexpected keys"),
        (lambda s: s.update({EXPERT + "network.1.attn.q.weight": torch.zeros(8, 7)}), r"found shape \(8, 7\)"),
        (lambda s: s.update({"reweight.mlp.network.0.weight": torch.zeros(6, 15)}), "multiple of H = 8 columns"),
        (lambda s: s.update({"reweight.mlp.network.0.weight": torch.zeros(6)}), "expected 2 dimensions"),
        (lambda s: s.update({"reweight.mlp.network.0.weight": 3}), "found a int"),
        (lambda s: s["reweight.mlp.network.3.bias"].fill_(float("nan")), "4 values that are NaN"),
        (lambda s: s[EXPERT + "network.2.fc.weight"][1, 5].fill_(float("inf")), "1 values that are NaN or inf"),
        (lambda s: s.update({EXPERT + "network.2.fc.bias": torch.zeros(3).double()}), "torch.float64"),
        (lambda s: s.update({EXPERT + "network.2.fc.bias": torch.zeros(1).expand(3)}), "fewer stored values"),
    ),
)
def test_wrong_contents(tmp_path, change, message):
    content = published(make_model())
    path = tmp_path / "m.pth"
    torch.save(content, path)
    load_checkpoint(path, **GIVEN)
    change(content["ensemble_model"])
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, **GIVEN)
    assert caught.value.path == path and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("wrap", "message"),
    (
        (lambda c: {"fusion_model": c["ensemble_model"], "encoder_dict": {}}, "fusion_model: found keys reweight"),
        (lambda c: c["ensemble_model"], "a bare state dict"),
        (lambda c: {"model": {}}, "keys model"),
        (lambda c: torch.zeros(3), "found a Tensor"),
        (lambda c: {**c, "ensemble_model": [1]}, "ensemble_model: found a list"),
        (lambda c: {**c, "ensemble_model": {}}, "found no such key"),
        (lambda c: {**c, "encoder_dict": [1]}, "encoder_dict: found a list"),
        (lambda c: {**c, "encoder_dict": {"img": c["encoder_dict"]["img"]}}, "one for each modality"),
        (lambda c: {**c, "config": {"hidden": 8}}, "bad configuration"),
        (lambda c: {**c, "config": 5}, "bad configuration"),
        (lambda c: {**c, "config": make_model(layers=5).config.to_dict()}, "layers: found 2 in the tensors"),
    ),
)
def test_wrong_layouts(tmp_path, wrap, message):
    torch.save(wrap(published(make_model())), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "m.pth", **GIVEN)


def test_wrong_encoder_shapes_are_named_as_in_the_file(tmp_path):
    content = published(make_model())
    content["encoder_dict"]["lab"]["bias"] = torch.zeros(5, 9)
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"encoder_dict\.lab\.bias: found shape \(5, 9\)"):
        load_checkpoint(tmp_path / "m.pth", **GIVEN)


def test_wrong_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    model = make_model()
    tensors = {f"ensemble_model.{key}": value for key, value in model.ensemble_state_dict().items()}
    safetensors.torch.save_file(tensors, path)
    assert torch.equal(forward(load_checkpoint(path, **GIVEN)), forward(model))
    with pytest.raises(ArgumentError, match="modalities, heads, temperature, task"):
        load_checkpoint(path)
    safetensors.torch.save_file(tensors, path, {"config": "{"})
    with pytest.raises(CheckpointError, match="config: found no JSON"):
        load_checkpoint(path)
    safetensors.torch.save_file({**tensors, "reweight.x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="reweight.x: found this key"):
        load_checkpoint(path, **GIVEN)


def test_bad_arguments_of_save(tmp_path):
    model = make_model()
    with pytest.raises(ArgumentError, match="path"):
        save_checkpoint(model, tmp_path / "m.bin")
    with pytest.raises(ArgumentError, match="existing directory"):
        save_checkpoint(model, tmp_path / "nowhere" / "m.pth")
    with pytest.raises(ArgumentError, match="model: got OrderedDict"):
        save_checkpoint(model.state_dict(), tmp_path / "m.pth")
    with torch.no_grad():
        model.reweight.mlp.network[0].bias[2] = float("nan")
    with pytest.raises(ArgumentError, match=r"reweight.mlp.network.0.bias: got nan at index \(2,\)"):
        save_checkpoint(model, tmp_path / "m.pth")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", ("pth", "safetensors"))
@pytest.mark.parametrize("step", ("fsync", "replace"))
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, suffix, step):
    path = tmp_path / f"m.{suffix}"
    old, new = make_model(), make_model()
    save_checkpoint(old, path)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(new, path)
    assert os.listdir(tmp_path) == [path.name]
    assert torch.equal(forward(load_checkpoint(path)), forward(old))
    save_checkpoint(new, path)
    assert torch.equal(forward(load_checkpoint(path)), forward(new))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_feature_means_are_kept(tmp_path, suffix):
    config = FLI2MoEConfig(modalities=("a", "b"), hidden=8, heads=2, layers=1, classes=3)
    model = FLI2MoE(config)
    path = tmp_path / f"model{suffix}"
    save_checkpoint(model, path)
    assert load_checkpoint(path).feature_means is None
    features = [torch.randn(5, 4, 8), torch.randn(5, 3, 8)]
    masks = [torch.ones(5, 4), torch.tensor([[1, 0, 0]] * 5)]
    model.set_feature_means(features, masks)
    save_checkpoint(model, path)
    loaded = load_checkpoint(path).feature_means
    assert torch.equal(loaded[0], features[0].double().mean((0, 1)).float())
    assert torch.equal(loaded[1], features[1][:, 0].double().mean(0).float())
    model.feature_means = model.feature_means[:1]
    save_checkpoint(model, path)
    with pytest.raises(CheckpointError, match="feature_means"):
        load_checkpoint(path)
