"""Live modules and files in the published layout: the same numbers on the engine, or the layer and the reason."""

from __future__ import annotations

import pytest
import torch
from reference_modules import GShardGate, InteractionMoE, NaiveGate, Router, SparsePerceptron, SwitchGate
from torch import nn

import flmoe_fast
from flmoe_fast import ArgumentError, accelerate, interactions, save_checkpoint

FP64 = 1e-10
SHAPES = {
    "two modalities": {},
    "three modalities, one routing layer": {"modalities": 3, "routing_layers": 1},
    "one head, one layer": {"heads": 1, "layers": 1},
    "four modalities, three layers": {"modalities": 4, "layers": 3, "routing_layers": 3},
    "original": {"patches": 3},
    "sparse, naive gate": {"sparse": (NaiveGate, 3), "layers": 3},
    "sparse, gshard gate": {"sparse": (GShardGate, 4)},
    "sparse, gshard gate that drops": {"sparse": (GShardGate, 12)},
    "sparse, switch gate that drops": {"sparse": (SwitchGate, 8)},
    "original, sparse": {"patches": 3, "sparse": (SwitchGate, 4)},
    "original, three modalities, one head": {"patches": 2, "modalities": 3, "heads": 1},
}


def sample(module: InteractionMoE, batch: int = 2) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Inputs and masks (None for the original generation) of a batch."""
    fusion = module.interaction_experts[0].fusion_model
    width = fusion.network[0].norm1.weight.shape[0]
    count = module.reweight.mlp.network[0].in_features // width
    original = fusion.pos_embed is not None
    lengths = [fusion.pos_embed.shape[1] // count if original else 3 + m for m in range(count)]
    inputs = [torch.randn(batch, t, width, dtype=torch.float64) for t in lengths]
    if original:
        return inputs, None
    masks = [torch.ones(batch, t, dtype=torch.float64) for t in lengths]
    masks[0][0, 1:] = 0
    masks[-1][-1, -1] = 0
    return inputs, masks


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_inference_equals_the_module(options):
    module = InteractionMoE(**options).double().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    fast = accelerate(module)
    inputs, masks = sample(module)
    for given in [None] if masks is None else [None, masks]:
        expected = module.eval().inference(inputs, given)
        ours = fast.inference(inputs, given)
        assert len(ours[0]) == len(expected[0])
        for a, b in zip((*ours[0], *ours[1:]), (*expected[0], *expected[1:])):
            assert relative(a, b.detach()) <= FP64
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    if masks is not None:  # negative control: masks matter, and none are not ones
        plain, ones = fast.inference(inputs), fast.inference(inputs, [torch.ones_like(mask) for mask in masks])
        assert relative(plain[1], ones[1]) > 1e-6 and relative(ones[2], fast.inference(inputs, masks)[2]) > 1e-6


@pytest.mark.parametrize("options", [{}, {"patches": 3}], ids=["fl", "original"])
def test_coalitions_equal_a_loop_over_the_module(options):
    """The same coalitions by hand: replaced tokens, one forward pass each, through the module itself."""
    module = InteractionMoE(**options).double().eval()
    inputs, masks = sample(module, batch=1)
    fills = [torch.randn(part.shape[-1], dtype=torch.float64) for part in inputs]
    game = accelerate(module).game(inputs, masks, fill=fills, target=1, value="logit")
    coalitions = torch.rand(8, game.n) < torch.linspace(0, 1, 8)[:, None]
    expected = []
    for coalition in coalitions:
        replaced = [part.clone() for part in inputs]
        for (m, position), present in zip(game.positions, coalition.tolist()):
            if not present:
                replaced[m][0, position] = fills[m]
        logits, weights, mixture = module.inference(replaced, masks)
        experts = torch.stack([part[0, 1] for part in logits])
        expected.append(torch.cat([mixture[0, 1:2], experts, weights[0] * experts]))
    expected = torch.stack(expected).detach()
    assert relative(game(coalitions), expected) <= FP64
    assert relative(game(~coalitions), expected) > 1e-3  # negative control
    exact = interactions(game, contexts=4, progress=False)
    assert exact.backend in ("torch", "cpu") and len(exact.heads) == expected.shape[1]


@pytest.mark.parametrize("gate", [GShardGate, SwitchGate])
def test_capacity_in_inference_and_in_games(gate):
    """``inference`` drops what the module drops; a game does not, unless it is asked to."""
    module = InteractionMoE(sparse=(gate, 12), layers=1).double().eval()
    inputs, masks = sample(module, batch=1)
    whole = torch.ones(1, 7, dtype=torch.bool)
    options = {"fill": "zero", "target": 0, "value": "logit", "heads": ("experts",), "players": [range(1), range(4)]}
    masks = [torch.ones_like(mask) for mask in masks]
    published = torch.stack([logits[0, 0] for logits in module.inference(inputs, masks)[0]]).detach()
    fast, limited = accelerate(module), accelerate(module, capacity="reference")
    assert fast.model.config.capacity == "none" and fast.model.config.gate == gate.__name__[:-4].lower()
    assert relative(torch.stack(fast.inference(inputs, masks)[0])[:, 0, 0], published) <= FP64
    full = whole[:, : limited.game(inputs, masks, **options).n]
    assert relative(limited.game(inputs, masks, **options)(full)[0], published) <= FP64
    assert relative(fast.game(inputs, masks, **options)(full)[0], published) > 1e-6
    assert fast.model.config.capacity == "none"


def test_a_training_module_becomes_an_eval_model_and_names_are_taken():
    module = InteractionMoE().double().train()
    fast = accelerate(module, modalities=("text", "image"), task="multilabel")
    assert module.training and not fast.model.training
    config = fast.model.config
    assert (config.modalities, config.task, config.heads, config.temperature) == (
        ("text", "image"),
        "multilabel",
        3,
        0.7,
    )
    assert "AcceleratedMoE(text, image; 4 experts of 2 layers" in repr(fast)


def test_files_likewise(tmp_path):
    module = InteractionMoE().double().eval()
    inputs, masks = sample(module)
    torch.save({"ensemble_model": module.state_dict(), "encoder_dict": {}}, tmp_path / "m.pth")
    given = {"modalities": ("a", "b"), "heads": 3, "temperature": 0.7, "task": "multiclass"}
    fast = accelerate(tmp_path / "m.pth", **given)
    assert relative(fast.inference(inputs, masks)[2], module.inference(inputs, masks)[2].detach()) <= FP64
    save_checkpoint(fast.model, tmp_path / "m.safetensors")
    again = accelerate(str(tmp_path / "m.safetensors"))
    assert torch.equal(again.inference(inputs, masks)[2], fast.inference(inputs, masks)[2])


def test_a_model_of_this_package_is_taken_as_it_is():
    model = accelerate(InteractionMoE()).model
    assert accelerate(model).model is model
    with pytest.raises(ArgumentError, match="heads: got a value, expected nothing"):
        accelerate(model, heads=2)


def relu(module):
    module.interaction_experts[2].fusion_model.network[1].mlp.network[1] = nn.ReLU()


def wide_eps(module):
    module.interaction_experts[0].fusion_model.network[0].norm2.eps = 0.3


def no_residual(module):
    module.interaction_experts[1].fusion_model.network[0].residual = False


def scaled_head(module):
    head = module.interaction_experts[0].fusion_model.network[2]
    head.register_forward_hook(lambda part, args, output: 1.1 * output)


def other_routing(module):
    module.reweight.register_forward_hook(lambda part, args, output: output.flip(1))


def other_mixture(module):
    inference = module.inference
    module.inference = lambda *given: (*inference(*given)[:2], 2 * inference(*given)[2])


def random_choices(module):
    for expert in module.interaction_experts:
        expert.fusion_model.network[0].mlp = SparsePerceptron(12, 4, GShardGate).double()
    module.interaction_experts[1].fusion_model.network[0].mlp.gate.random_routing = True


def unknown_gate(module):
    for expert in module.interaction_experts:
        expert.fusion_model.network[0].mlp = SparsePerceptron(12, 4, Router).double()


def other_order(module):
    for expert in module.interaction_experts:
        expert.fusion_model.network[0].mlp = SparsePerceptron(12, 8, SwitchGate).double()
        expert.fusion_model.network[0].mlp.gate.fill = lambda index, room: index


def interpretcc(module):
    module.interaction_experts[0].fusion_model.modality_gates = nn.ModuleList([nn.Linear(2, 2)])


def extra(module):
    module.interaction_experts[1].fusion_model.network[1].gain = nn.Parameter(torch.ones(3))


def uneven(module):
    module.interaction_experts[1].fusion_model.network[1].attn.num_heads = 4


def no_inference(module):
    module.inference = None


def nothing_returned(module):
    module.inference = lambda *given: None


def nan(module):
    module.interaction_experts[0].fusion_model.network[0].norm1.weight.data[0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (relu, r"interaction_experts\.2\.fusion_model\.network\.1 \(Block\), whose output differs .* exact GELU"),
        (wide_eps, r"interaction_experts\.0\.fusion_model\.network\.0 \(Block\), whose output differs"),
        (no_residual, r"interaction_experts\.1\.fusion_model\.network\.0 \(Block\), whose output differs"),
        (scaled_head, r"interaction_experts\.0\.fusion_model\.network\.2 \(Output\), whose output differs"),
        (other_routing, r"reweight \(Weights\), whose output differs"),
        (other_mixture, r"whose results differ by .* although its layers agree"),
        (random_choices, r"interaction_experts\.1\.fusion_model\.network\.0\.mlp\.gate with random_routing"),
        (unknown_gate, r"gate: got None, expected the kind of the sparse blocks' gates, whose classes are Router"),
        (other_order, r"network\.0 \(Block\), whose output differs .* as far as their capacity goes"),
        (interpretcc, r"InterpretCC experts, whose gates draw random numbers in evaluation too"),
        (extra, r"unexpected keys: .*network\.1\.gain"),
        (uneven, r"different numbers of attention heads, 3 at .* and 4 at interaction_experts\.1"),
        (no_inference, "without an inference method"),
        (nothing_returned, "whose inference returns NoneType"),
        (nan, r"values that are NaN or infinite.* at interaction_experts\.0\.fusion_model\.network\.0\.norm1"),
    ],
)
def test_what_cannot_be_taken_says_which_layer_and_why(spoil, message):
    module = InteractionMoE().double().eval()
    spoil(module)
    with pytest.raises(ArgumentError, match=message):
        accelerate(module)


def test_wrong_facts_are_found():
    """Heads and temperature are not in the state dict: a wrong number shows in the first layer that it changes."""
    module = InteractionMoE().double().eval()
    with pytest.raises(
        ArgumentError, match=r"interaction_experts\.0\.fusion_model\.network\.0 .* whose output differs"
    ):
        accelerate(module, heads=4)
    with pytest.raises(ArgumentError, match=r"reweight \(Weights\), whose output differs"):
        accelerate(module, temperature=2.0)
    del module.reweight.temperature
    with pytest.raises(ArgumentError, match="temperature: got None, expected the routing's temperature"):
        accelerate(module)


def test_other_arguments():
    with pytest.raises(ArgumentError, match="module: got int, expected a torch.nn.Module"):
        accelerate(3)
    with pytest.raises(ArgumentError, match="heads: got 2, expected nothing: a Linear is no InteractionMoE"):
        accelerate(nn.Linear(2, 2), heads=2)
    fast = accelerate(InteractionMoE().double())
    inputs, masks = sample(InteractionMoE())
    with pytest.raises(ArgumentError, match="masks: got masks for some modalities only"):
        fast.inference(inputs, [masks[0], None])
    assert flmoe_fast.accelerate is accelerate
