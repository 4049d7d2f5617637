"""Checkpoints of sparse and other back-ends: published names, round trips, and what is wrong with a file."""

from __future__ import annotations

import collections

import pytest
import torch

from flmoe_fast import InteractionResult
from flmoe_fast.checks import ArgumentError
from flmoe_fast.cli import main
from flmoe_fast.data.sample import save_sample
from flmoe_fast.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.network import FLI2MoE

GIVEN = {"modalities": ("a", "b"), "heads": 2, "temperature": 2.0, "task": "multiclass"}
ORIGINAL = {"generation": "original", "num_tokens": (4, 4)}
KINDS = {
    "naive": {"gate": "naive", "top_k": 3, "ffn_experts": 4, "layers": 3},
    "gshard": {"gate": "gshard", "ffn_experts": 4, "capacity": "reference"},
    "switch": {"gate": "switch", "ffn_experts": 16, "layers": 1, **ORIGINAL},
    "noisy": {"gate": "noisy", "ffn_experts": 3},
    "moepp": {"fusion": "moepp", "ffn_experts": 8, **ORIGINAL},
    "interpretcc": {
        **{"fusion": "interpretcc", "generation": "original", "num_tokens": (1, 1), "heads": 1, "layers": 1},
        **{"gumbel_temperature": 0.5, "gate_threshold": 0.4},
    },
}


def make_model(kind, **fields):
    base = {"hidden": 8, "heads": 2, "layers": 2, "classes": 3, "reweight_hidden": 6, "temperature": 2.0}
    config = FLI2MoEConfig(("a", "b"), **{**base, **KINDS[kind], **fields})
    model = FLI2MoE(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def forward(model):
    generator = torch.Generator().manual_seed(0)
    lengths = model.config.num_tokens or (5, 4)
    with torch.no_grad():
        return model([torch.randn(2, t, 8, generator=generator) for t in lengths]).logits


@pytest.mark.parametrize("suffix", ("pth", "safetensors"))
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path, kind, suffix):
    model = make_model(kind)
    save_checkpoint(model, tmp_path / f"m.{suffix}")
    loaded = load_checkpoint(tmp_path / f"m.{suffix}")
    assert loaded.config == model.config
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert torch.equal(forward(loaded), forward(model))


def test_names_of_a_sparse_layer():
    names = {
        "gate.gate.weight": (16, 8),
        "gate.gate.bias": (16,),
        "experts.htoh4.weight": (16, 16, 8),
        "experts.htoh4.bias": (16, 16),
        "experts.h4toh.weight": (16, 8, 16),
        "experts.h4toh.bias": (16, 8),
        "all_gates.0.gate.weight": (16, 8),
        "all_gates.0.gate.bias": (16,),
    }
    prefix = "interaction_experts.3.fusion_model.network.0.mlp."
    state = make_model("switch").state_dict()
    assert {k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if k.startswith(prefix)} == names
    noisy = [k for k in make_model("noisy").state_dict() if ".0.mlp." in k and ".fusion_model" in k and "gate" in k]
    assert [k.rpartition("mlp.")[2] for k in noisy[:4]] == [
        *("gate.w_gate", "gate.w_noise"),
        *("all_gates.0.w_gate", "all_gates.0.w_noise"),
    ]
    assert [i for i in range(5) if i in make_model("naive", layers=5).config.sparse_layers] == [0, 2, 4]


def test_names_of_the_other_backends():
    inter = make_model("interpretcc").state_dict()
    expert = [k.partition("fusion_model.")[2] for k in inter if k.startswith("interaction_experts.0.")]
    layers = ("modality_gates.0.0", "modality_gates.0.2", "modality_gates.1.0", "modality_gates.1.2")
    layers += ("fusion_layer.0", "classifier.0", "classifier.2")
    assert expert == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    plus = make_model("moepp").state_dict()
    prefix = "interaction_experts.0.fusion_model."
    shapes = {k.removeprefix(prefix): tuple(v.shape) for k, v in plus.items() if k.startswith(prefix)}
    mixture = {
        "gate.wg.0.weight": (64, 8),
        "gate.wg.2.weight": (8, 64),
        "gate.gate_map.weight": (8, 8),
        "experts.experts.3.up_proj.weight": (128, 8),
        "experts.experts.3.down_proj.weight": (8, 64),
        "experts.experts.4.constant": (8,),
        "experts.experts.5.wg.weight": (2, 8),
    }
    assert all(shapes[f"layers.1.mlp.moe.{name}"] == shape for name, shape in mixture.items())
    assert shapes["pos_embed"] == (1, 8, 8) and shapes["classification_head.fc.weight"] == (3, 16)
    assert not any("experts.experts.6" in k for k in shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_published_files_need_only_what_tensors_do_not_tell(tmp_path, kind):
    model = make_model(kind, capacity="none")
    state = collections.OrderedDict(model.ensemble_state_dict())
    for key in list(state):  # a second router, which the published code makes and never asks
        if "all_gates.0" in key:
            state[key.replace("all_gates.0", "all_gates.1")] = torch.randn_like(state[key])
    path = tmp_path / "m.pth"
    torch.save({"ensemble_model": state, "encoder_dict": {}}, path)
    needed = dict(GIVEN)
    if kind == "interpretcc":
        del needed["heads"]
        needed |= {"gumbel_temperature": 0.5, "gate_threshold": 0.4}
    if kind in ("naive", "gshard", "switch"):
        needed["gate"] = kind
    if kind in ("naive", "noisy"):
        needed["top_k"] = model.config.top_k
    loaded = load_checkpoint(path, **needed)
    assert loaded.config == model.config
    assert torch.equal(forward(loaded), forward(model))
    for name in needed:
        with pytest.raises(ArgumentError, match=f"all of {name}"):
            load_checkpoint(path, **{key: value for key, value in needed.items() if key != name})
    if kind == "gshard":
        assert load_checkpoint(path, **needed, capacity="reference").config.capacity == "reference"
        assert load_checkpoint(path, **{**needed, "gate": "naive", "top_k": 1}).config.top_k == 1


FIRST = "interaction_experts.0.fusion_model."


def test_a_published_transformer_on_its_own(tmp_path):
    """The GShard baseline: one sparse transformer, without routing."""
    model = make_model("gshard", capacity="none", roles=("dense",), routing="average", reweight_layers=1)
    path = tmp_path / "m.pth"
    state = model.interaction_experts[0].fusion_model.state_dict()
    torch.save({"fusion_model": state, "encoder_dict": {}}, path)
    given = {"modalities": ("a", "b"), "heads": 2, "task": "multiclass"}
    loaded = load_checkpoint(path, **given, gate="gshard")
    assert loaded.config.expert_names == ("dense",) and loaded.config.temperature == 1.0
    assert torch.equal(forward(loaded), forward(model))
    with pytest.raises(ArgumentError, match="all of gate"):
        load_checkpoint(path, **given)
    for change, message in (
        (lambda s: s.pop("network.2.fc.weight"), "fusion_model: found keys"),
        (lambda s: s.update({"network.2.fc.weight": torch.zeros(3)}), "expected 2 dimensions"),
        (lambda s: s.update({"network.2.fc.weight": torch.zeros(3, 17)}), "a multiple of H = 8"),
        (lambda s: s.pop("network.0.mlp.gate.gate.bias"), "no such key"),
    ):
        wrong = dict(state)
        change(wrong)
        torch.save({"fusion_model": wrong, "encoder_dict": {}}, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, **given, gate="gshard")


SPARSE = "interaction_experts.1.fusion_model.network.0.mlp."


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    (
        ("gshard", lambda s: s.pop(SPARSE + "experts.htoh4.bias"), r"htoh4\.bias: found no such key"),
        ("gshard", lambda s: s.pop(SPARSE + "all_gates.0.gate.bias"), r"all_gates\.0\.gate\.bias: found no such key"),
        ("gshard", lambda s: s[SPARSE + "all_gates.0.gate.bias"].add_(1.0), "the same router under both names"),
        ("gshard", lambda s: s.update({SPARSE + "gate.gate.weight": torch.zeros(5, 8)}), r"found shape \(5, 8\)"),
        ("gshard", lambda s: s.update({SPARSE + "experts.h4toh.weight": torch.zeros(4, 8, 8)}), "found shape"),
        ("gshard", lambda s: s.update({SPARSE + "network.0.weight": torch.zeros(16, 8)}), "1 unexpected keys"),
        ("gshard", lambda s: s[SPARSE + "experts.h4toh.weight"].fill_(float("nan")), "512 values"),
        ("moepp", lambda s: s.pop(FIRST + "layers.0.mlp.moe.gate.gate_map.weight"), "gate_map"),
        ("moepp", lambda s: s.pop("interaction_experts.2.fusion_model.layers.1.attn.q.weight"), "no such key"),
        ("interpretcc", lambda s: s.pop(FIRST + "classifier.2.weight"), "classifier.2.weight"),
        ("interpretcc", lambda s: s.pop("interaction_experts.1.fusion_model.modality_gates.1.2.bias"), "no such key"),
    ),
)  # fmt: skip
def test_wrong_contents(tmp_path, kind, change, message):
    model = make_model(kind)
    content = {"ensemble_model": {k: v.clone() for k, v in model.ensemble_state_dict().items()}}
    content |= {"encoder_dict": {}, "config": model.config.to_dict()}
    torch.save(content, tmp_path / "m.pth")
    load_checkpoint(tmp_path / "m.pth")
    change(content["ensemble_model"])
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "m.pth")


def test_a_configuration_that_contradicts_the_tensors(tmp_path):
    path = tmp_path / "m.pth"
    save_checkpoint(make_model("gshard"), path)
    for kind, found in (("switch", "ffn_experts"), ("noisy", "ffn_experts"), ("moepp", "fusion"), ("naive", "layers")):
        with pytest.raises(CheckpointError, match=rf"{found}: found|generation: found"):
            load_checkpoint(path, config=make_model(kind).config)
    with pytest.raises(CheckpointError, match="no such key"):
        load_checkpoint(path, config=make_model("noisy", ffn_experts=4).config)
    with pytest.raises(CheckpointError, match="ffn_experts: found 4 in the tensors, expected None"):
        load_checkpoint(path, config=FLI2MoEConfig(("a", "b"), 8, 2, 2, 3, reweight_hidden=6))


def test_command_line_takes_what_a_published_sparse_file_does_not_tell(tmp_path, capsys):
    model = make_model("switch", generation="fl", num_tokens=None)
    torch.save({"ensemble_model": model.ensemble_state_dict(), "encoder_dict": {}}, tmp_path / "m.pth")
    features = {name: torch.randn(4, 8) for name in ("a", "b")}
    save_sample(tmp_path / "s.npz", features=features)
    command = ["explain", str(tmp_path / "m.pth"), str(tmp_path / "s.npz"), "--out", str(tmp_path / "out")]
    command += ["--modalities", "a", "b", "--heads", "2", "--temperature", "2", "--task", "multiclass"]
    command += ["--fill", "zero", "--contexts", "4", "--candidates", "2", "--no-progress"]
    assert main(command) == 2
    assert "gate: got nothing for gate" in capsys.readouterr().err
    assert main([*command, "--gate", "switch", "--capacity", "reference"]) == 0
    found = InteractionResult.load(tmp_path / "out" / "interactions.npz")
    assert len(found.pairs) == 4 and found.sii.any()
