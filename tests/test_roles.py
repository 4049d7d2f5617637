"""Models with other experts than the usual ones: the dense baseline, ablations, and games of whole modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flmoe_fast import FLI2MoE, FLI2MoEConfig, TokenGame, exact_interactions, load_checkpoint, save_checkpoint
from flmoe_fast.checks import ArgumentError
from flmoe_fast.games.grouped import GroupedGame
from flmoe_fast.model.checkpoint import CheckpointError, load_weights
from flmoe_fast.model.encoders import (
    ColumnGroupEncoder,
    PatchEncoder,
    ProjectionEncoder,
    SequenceEncoder,
    TabularTokenEncoder,
    VectorEncoder,
)
from flmoe_fast.native import missing
from flmoe_fast.pipeline.explain import explain
from tests.edge_shapes import EDGES

PADDED = next(edge for edge in EDGES if edge.name == "padded")
CHANGES = (
    {"roles": ("dense",)},
    {"roles": ("synergy", "redundancy")},
    {"roles": ("uniqueness: m1",)},
    {"routing": "average", "reweight_layers": 1},
    {"task": "regression", "classes": 1},
)


def model_of(changes):
    fields = PADDED.model().config.to_dict() | changes
    model = FLI2MoE(FLI2MoEConfig.from_dict(fields)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes.values()))[:1])
def test_engines_agree_with_the_reference(changes):
    model = model_of(changes)
    games = {backend: PADDED.game(model, backend=backend, target=0) for backend in ("reference", "torch")}
    z = PADDED.coalitions(games["torch"].n)
    expected = games["reference"](z)
    torch.testing.assert_close(games["torch"](z), expected, rtol=1e-9, atol=1e-11)
    assert expected.std(0).max() > 1e-6
    if not missing():
        single = PADDED.game(model, backend="cpu", dtype=torch.float32, target=0)
        torch.testing.assert_close(single(z), expected, rtol=1e-3, atol=1e-4)
    names = model.config.expert_names
    assert games["torch"].heads == ("mixture", *names, *(f"weighted {name}" for name in names))


def test_a_dense_model_is_its_only_expert():
    model = model_of({"roles": ("dense",)})
    features, masks, fills = PADDED.sample()
    out = model([f[None] for f in features], [m[None] for m in masks])
    assert torch.equal(out.weights, torch.ones(1, 1, dtype=torch.float64))
    assert torch.equal(out.logits, out.expert_logits[:, 0])
    found = explain(model, features, masks=masks, fill=fills, candidates=2, contexts=4, progress=False)
    torch.testing.assert_close(*(torch.as_tensor(found.interactions.column("sii", head)) for head in (0, 1)))


def test_values_of_a_regression_are_its_outputs():
    model = model_of({"task": "regression", "classes": 1})
    game = PADDED.game(model, target=0, value="prob")
    features, masks, _ = PADDED.sample()
    output = model([f[None] for f in features], [m[None] for m in masks]).logits[0, 0]
    assert game(torch.ones(1, game.n, dtype=torch.bool))[0, 0].item() == pytest.approx(output.item())


@pytest.mark.parametrize("suffix", (".safetensors", ".pth"))
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes.values()))[:1])
def test_checkpoints_keep_roles(changes, suffix, tmp_path):
    model = model_of(changes)
    save_checkpoint(model, tmp_path / f"m{suffix}")
    again = load_checkpoint(tmp_path / f"m{suffix}")
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_weights_into_a_model_with_any_encoders(tmp_path):
    config = FLI2MoEConfig(("a", "b"), 8, 2, 1, 3, generation="original", num_tokens=(2, 2))

    def make(seed):
        torch.manual_seed(seed)
        return FLI2MoE(config, {"a": PatchEncoder(5, 2, 8), "b": SequenceEncoder(3, 2, 8, state=6)})

    model, other = make(0), make(1)
    model.feature_means = [torch.ones(8), torch.zeros(8)]
    save_checkpoint(model, tmp_path / "m.safetensors")
    load_weights(other, tmp_path / "m.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    assert torch.equal(other.feature_means[0], torch.ones(8))
    with pytest.raises(CheckpointError):
        load_weights(FLI2MoE(config), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="nothing"):
        load_weights(model, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("field", "value"),
    (
        ("roles", ()),
        ("roles", "dense"),
        ("roles", ("nobody",)),
        ("roles", ("synergy", "synergy")),
        ("routing", "none"),
        ("reweight_layers", 2),
    ),
)
def test_bad_roles(field, value):
    fields = PADDED.model().config.to_dict() | {field: value}
    if field == "reweight_layers":
        fields["routing"] = "average"
    with pytest.raises(ArgumentError) as caught:
        FLI2MoEConfig.from_dict(fields)
    assert caught.value.argument == field


def test_all_roles_are_none():
    config = PADDED.model().config
    same = FLI2MoEConfig.from_dict(config.to_dict() | {"roles": list(config.expert_names)})
    assert same == config and config.interactions == (0, 1, 2, 3)
    some = FLI2MoEConfig.from_dict(config.to_dict() | {"roles": ("redundancy", "dense")})
    assert some.interactions == (3, None) and some.experts == 2


def test_modalities_as_players():
    edge = next(edge for edge in EDGES if edge.name == "absent modality")
    game = edge.game()
    whole = GroupedGame(game)
    assert whole.n == 2 and whole.player_names == ("m0", "m2") and whole.heads == game.heads
    first = torch.tensor([p in game.groups[0][1] for p in range(game.n)])
    rows = torch.stack([torch.zeros_like(first), first, ~first, torch.ones_like(first)])
    z = torch.tensor([[False, False], [True, False], [False, True], [True, True]])
    assert torch.equal(whole(z), game(rows))
    values = game(rows)[:, 0]
    result = exact_interactions(whole, progress=False)
    assert result.column("sii")[0] == pytest.approx(float(values[3] - values[1] - values[2] + values[0]), abs=1e-12)
    assert whole.precise() is None and GroupedGame(edge.game(dtype=torch.float32)).precise().n == 2
    assert whole.about()["players"] == "modalities"
    with pytest.raises(ArgumentError, match="groups: got 1 groups"):
        GroupedGame(edge.game(players=[(0, 1), (), ()]))


def test_encoders_of_tables():
    torch.manual_seed(0)
    x = torch.randn(3, 7)
    groups = ColumnGroupEncoder(7, 3, 8)
    single = TabularTokenEncoder(7, 8)
    with torch.no_grad():
        single.feature_emb.copy_(groups.feature_emb)
    assert groups.sizes == [2, 2, 3] and groups(x).shape == (3, 3, 8)
    sums = torch.stack([part.sum(1) for part in single(x).split(groups.sizes, dim=1)], dim=1)
    torch.testing.assert_close(groups(x), sums + groups.bias)

    patches = PatchEncoder(7, 3, 8)
    padded = np.concatenate([x.numpy(), np.zeros((3, 2), "f")], 1).reshape(3, 3, 3)
    wanted = padded @ patches.projection.weight.detach().numpy().T + patches.projection.bias.detach().numpy()
    np.testing.assert_allclose(patches(x).detach(), wanted, rtol=1e-5, atol=1e-6)
    assert set(patches.state_dict()) == {"projection.weight", "projection.bias"}

    assert VectorEncoder(7, 8, layers=2)(x).shape == (3, 1, 8)
    sequence = SequenceEncoder(4, 2, 8, state=6)
    steps = torch.randn(3, 5, 4)
    state = sequence.gru(steps)[0][:, -1]
    torch.testing.assert_close(sequence(steps), sequence.patches(state))
    for make, name in (
        (lambda: ColumnGroupEncoder(3, 4, 8), "groups"),
        (lambda: PatchEncoder(3, 4, 8), "features"),
        (lambda: VectorEncoder(3, 8, layers=0), "layers"),
        (lambda: patches(x[:, :5]), "x"),
        (lambda: sequence(x), "x"),
        (lambda: ProjectionEncoder(0, 8), "in_features"),
    ):
        with pytest.raises(ArgumentError) as caught:
            make()
        assert caught.value.argument == name


def test_outputs_are_values_and_logits():
    game = PADDED.game()
    z = PADDED.coalitions(game.n)
    values, logits = game.outputs(z)
    assert torch.equal(values, game(z)) and logits.shape == (len(z), 5)
    torch.testing.assert_close(logits.softmax(-1)[:, 1], values[:, 0])
    assert isinstance(game, TokenGame)
