"""Training of sparse models and other back-ends: all passes in a batch against one after the other, and short runs."""

from __future__ import annotations

import pytest
import torch
from edge_shapes import BACKEND_EDGES, EDGES, Edge, sparse

from flmoe_fast import interactions
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.model import sparse as blocks
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.sparse import SparseMLP
from flmoe_fast.model.training.forward import training_forward
from flmoe_fast.model.training.predict import predict
from flmoe_fast.native import missing
from tests.fitting import fitted

# Both orders of summation accumulate rounding of a few hundred terms; losses and gradients are of order 1.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
SHAPES = ("padded", "three modalities", "one layer", "original")
CASES = [
    sparse(next(e for e in EDGES if e.name == name), gate, networks, capacity)
    for name, gate, networks, capacity in (
        *((name, "switch", 12, "reference") for name in SHAPES),
        ("padded", "gshard", 10, "reference"),
        ("three layers", "gshard", 4, "reference"),
        ("original", "naive", 4, "none"),
        ("three modalities", "noisy", 3, "none"),
        ("padded", "switch", 4, "none"),
    )
]


@pytest.fixture(autouse=True)
def no_gate_noise(monkeypatch):
    """Batched and sequential passes draw a gate's noise in different orders, so there is none here."""
    monkeypatch.setattr(blocks, "SWITCH_NOISE", 0.0)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


def make(edge: Edge, samples: int = 3, **changes):
    """A float64 model in train mode without dropout, features, masks and targets of a few samples."""
    config = edge.model().config.to_dict() | {"dropout": 0.0, "interaction_weight": 0.7, "gate_weight": 0.3} | changes
    model = FLI2MoE(FLI2MoEConfig.from_dict(config)).double().train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    features = [torch.randn(samples, t, edge.hidden, generator=generator, dtype=torch.float64) for t in edge.tokens]
    masks = edge.valid and [(torch.arange(t) < v).long().repeat(samples, 1) for t, v in zip(edge.tokens, edge.valid)]
    return model, features, masks, torch.randint(5, (samples,), generator=generator)


def run(model, features, masks, targets, passes, **options):
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(0)
    out = training_forward(model, features, masks, targets, generator=generator, passes=passes, **options)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("edge", (*CASES, *BACKEND_EDGES[::3]), ids=lambda e: e.name)
def test_batched_passes_are_the_sequential_ones(edge: Edge, monkeypatch):
    inputs = make(edge)
    if edge.fusion == "interpretcc":  # whose gates draw in place
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda draws: draws.fill_(1.0))
    expected, gradients = run(*inputs, "sequential")
    found, ours = run(*inputs, "batched")
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, **TOLERANCE)
    assert set(ours) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
    assert (expected.gate_loss > 0) == (edge.gate in ("switch", "gshard", "noisy"))


def test_passes_that_compete_with_each_other_are_seen(monkeypatch):
    """Negative control: without the split into passes, capacity and balancing are those of one large batch."""
    inputs = make(CASES[0])
    expected, _ = run(*inputs, "sequential")
    forward = SparseMLP.forward

    def together(self, x, passes=1):
        out, balance = forward(self, x, 1)
        return out, balance.expand(passes)

    monkeypatch.setattr(SparseMLP, "forward", together)
    found, _ = run(*inputs, "batched")
    assert (found.interaction_losses - expected.interaction_losses).abs().max() > 1e-4
    assert (found.gate_loss - expected.gate_loss).abs() > 1e-4


def test_gate_loss_enters_the_total_with_or_without_its_gradient():
    model, features, masks, targets = make(CASES[4])
    with_, gradients = run(model, features, masks, targets, "batched")
    without, others = run(model, features, masks, targets, "batched", gate_gradient=False)
    assert torch.equal(with_.loss, without.loss)
    own = model.config.gate_weight * with_.gate_loss
    rest = with_.task_loss + 0.7 * with_.interaction_losses.sum() / 4
    torch.testing.assert_close(with_.loss, rest + own, rtol=1e-12, atol=1e-12)
    gate = "interaction_experts.0.fusion_model.network.0.mlp.gate.gate.bias"
    assert (gradients[gate] - others[gate]).abs().max() > 1e-6
    head = "reweight.mlp.network.3.bias"
    torch.testing.assert_close(gradients[head], others[head], rtol=1e-12, atol=1e-12)
    # What the loss is: of the last modality, summed over layers, averaged over experts and passes.
    balances = []
    for expert in model.interaction_experts:
        found: list = []
        expert(features, masks, balance=found)
        balances.append(sum(found))
    with_only_true_features = training_forward(model, features, masks, targets, perturbed=())
    torch.testing.assert_close(with_only_true_features.gate_loss, torch.cat(balances).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("passes", ("sequential", "batched"))
def test_networks_of_a_single_transformer_are_kept_apart(passes):
    """rep-cka against loops over tokens, on a model without other experts."""
    changes = {"roles": ("dense",), "routing": "average", "reweight_layers": 1}
    model, features, masks, targets = make(CASES[-1], samples=6, **changes)
    options = {"regularizer": "rep-cka", "regularizer_weight": 0.5, "passes": passes}
    out = training_forward(model, features, masks, targets, **options)
    block = model.interaction_experts[0].fusion_model.network[0].mlp
    calls = []
    hook = block.register_forward_pre_hook(lambda m, a: calls.append(a[0]))
    model.interaction_experts[0](features, masks)
    hook.remove()
    values = []
    for x in calls:
        chosen = block.gate(x.flatten(0, 1)[None]).chosen[0].unflatten(0, x.shape[:2])
        means = {}
        for network in range(4):
            for b in range(6):
                rows = [block.experts(x[b, t][None], network)[0] for t, k in (chosen[b] == network).nonzero().tolist()]
                if rows:
                    means[network, b] = torch.stack(rows).mean(0)
        pairs = []
        for i in range(4):
            for j in range(i + 1, 4):
                common = [b for b in range(6) if (i, b) in means and (j, b) in means]
                if len(common) > 1:
                    a, c = (torch.stack([means[n, b] for b in common]) for n in (i, j))
                    a, c = a - a.mean(0), c - c.mean(0)
                    own = torch.linalg.norm(a.T @ a) * torch.linalg.norm(c.T @ c)
                    pairs.append(torch.linalg.norm(a.T @ c) ** 2 / (own + 1e-8))
        values += [torch.stack(pairs).mean()] if pairs else []
    torch.testing.assert_close(out.regularization, torch.stack(values).mean(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        out.loss, out.task_loss + 0.5 * out.regularization + 0.3 * out.gate_loss, rtol=1e-12, atol=1e-12
    )
    gradient = torch.autograd.grad(out.regularization, block.experts.htoh4.weight)[0]
    assert gradient.abs().max() > 1e-6
    assert not block._forward_hooks and not block.gate._forward_hooks


def separable(samples=48, seed=0):
    """Features (N, 3, 8) per modality; the class is the sum of the two modalities' signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (2, samples), generator=generator)
    features = [torch.randn(samples, 3, 8, generator=generator) + 1.5 * (2 * s - 1)[:, None, None] for s in signs]
    return features, signs[0] + signs[1]


@pytest.mark.parametrize(
    "fields",
    (
        {"gate": "switch", "ffn_experts": 4, "capacity": "reference"},
        {"gate": "gshard", "ffn_experts": 4, "random_routing": True},
        {"gate": "noisy", "ffn_experts": 4},
        {"fusion": "moepp", "ffn_experts": 5, "generation": "original", "num_tokens": (3, 3)},
    ),
    ids=lambda f: f.get("gate") or f["fusion"],
)
def test_fit_and_probe_end_to_end(fields, monkeypatch):
    """Trains with all noise on, predicts unseen samples, and is probed for the interaction it was made to learn."""
    monkeypatch.undo()
    features, targets = separable()
    torch.manual_seed(0)
    config = FLI2MoEConfig(("a", "b"), 8, 2, 1, 3, reweight_hidden=8, dropout=0.1, interaction_weight=0.1, **fields)
    model = FLI2MoE(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"epochs": 10, "batch_size": 16, "lr": 1e-2, "seed": 0}
    history = fitted(model, features, None, targets, **options)
    assert history[-1]["task_loss"] < 0.6 * history[0]["task_loss"]
    assert (history[0]["gate_loss"] > 0) == (config.gate is not None)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert all(key in moved for key in before if ".mlp.gate." in key or ".htoh4." in key)
    unseen, truth = separable(seed=1)
    assert (predict(model, unseen).logits.argmax(-1) == truth).double().mean() > 0.8
    torch.manual_seed(1)  # the same run again is the same run
    again = FLI2MoE(config)
    again.load_state_dict(before)
    assert [r["loss"] for r in fitted(again, features, None, targets, **options)] == [r["loss"] for r in history]
    game = TokenGame(model, [f[0] for f in unseen], fill="zero", value="logit")
    result = interactions(game, contexts=8)
    native = not missing() and config.fusion == "transformer"
    assert result.sii.shape[0] == 9 and result.backend == ("cpu" if native else "torch")
