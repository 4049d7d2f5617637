"""The batched training forward against the sequence of passes that defines it: losses, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.batched import can_batch
from flmoe_fast.model.training.forward import training_forward
from tests.edge_shapes import EDGES

# Both orders of summation accumulate rounding of a few hundred terms; losses and gradients are of order 1.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def make_model(edge, **changes):
    fields = edge.model().config.to_dict() | {"dropout": 0.0, "interaction_weight": 0.7} | changes
    model = FLI2MoE(FLI2MoEConfig.from_dict(fields)).double().train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def batch(edge, samples=3):
    """Features and masks of a few samples, all but one with the padding of the edge."""
    generator = torch.Generator().manual_seed(5)
    size = [(samples, t, edge.hidden) for t in edge.tokens]
    features = [torch.randn(s, generator=generator, dtype=torch.float64) for s in size]
    if edge.valid is None:
        return features, None
    masks = [(torch.arange(t) < v).long().repeat(samples, 1) for t, v in zip(edge.tokens, edge.valid)]
    for mask in masks:
        mask[0] = 1
    for feature, mask in zip(features, masks):
        feature[mask == 0] = 1e6
    return features, masks


def targets_of(model, samples=3):
    generator = torch.Generator().manual_seed(6)
    classes, task = model.config.classes, model.config.task
    if task == "multiclass":
        return torch.randint(classes, (samples,), generator=generator)
    numbers = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return (numbers > 0).long() if task == "multilabel" else numbers


def run(model, features, masks, passes, seed=0, **options):
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(seed)
    out = training_forward(model, features, masks, targets_of(model), generator=generator, passes=passes, **options)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients


def agree(a, b):
    for one, other in zip(a[0], b[0]):
        torch.testing.assert_close(one, other, **TOLERANCE)
    assert set(a[1]) == set(b[1])
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.name)
def test_same_losses_and_gradients(edge):
    model = make_model(edge)
    features, masks = batch(edge)
    sequential = run(model, features, masks, "sequential")
    agree(run(model, features, masks, "batched"), sequential)
    other = run(model, features, masks, "batched", seed=1)
    assert (other[0].interaction_losses - sequential[0].interaction_losses).abs().max() > 1e-6


PADDED = next(edge for edge in EDGES if edge.name == "padded")
THREE = next(edge for edge in EDGES if edge.name == "three modalities")
ORIGINAL = next(edge for edge in EDGES if edge.name == "original")


@pytest.mark.parametrize("regularizer", ("rep-cos", "rep-barlow", "rep-cka"))
def test_regularizers(regularizer):
    model = make_model(PADDED)
    features, masks = batch(PADDED)
    options = {"regularizer": regularizer, "regularizer_weight": 0.5}
    agree(*(run(model, features, masks, passes, **options) for passes in ("batched", "sequential")))


@pytest.mark.parametrize(
    "options",
    (
        {"perturbed": ()},
        {"perturbed": (0, 2)},
        {"perturbed": (1,)},
        {"detach": True},
        {"replacements": [torch.zeros(t, 24, dtype=torch.float64) for t in THREE.tokens]},
        {"replacements": [torch.ones(3, t, 24, dtype=torch.float64) for t in THREE.tokens], "perturbed": (2,)},
    ),
    ids=("none", "two", "one", "detached", "zeros", "given"),
)
def test_ablations(options):
    model = make_model(THREE)
    features, masks = batch(THREE)
    agree(*(run(model, features, masks, passes, **options) for passes in ("batched", "sequential")))


@pytest.mark.parametrize("edge", (PADDED, ORIGINAL), ids=("fl", "original"))
@pytest.mark.parametrize(
    "changes",
    (
        {"roles": ("synergy", "redundancy")},
        {"roles": ("dense",)},
        {"roles": ("uniqueness: m1", "dense")},
        {"routing": "average", "reweight_layers": 1},
        {"task": "regression"},
    ),
    ids=("two", "dense", "mixed", "average", "regression"),
)
def test_other_configurations(edge, changes):
    model = make_model(edge, **changes)
    features, masks = batch(edge)
    agree(*(run(model, features, masks, passes) for passes in ("batched", "sequential")))


def test_dropout_has_the_same_law():
    model = make_model(PADDED, dropout=0.3)
    features, masks = batch(PADDED)
    means = []
    for passes in ("batched", "sequential"):
        torch.manual_seed(0)
        with torch.no_grad():
            options = {"perturbed": (), "passes": passes}
            logits = [training_forward(model, features, masks, targets_of(model), **options) for _ in range(300)]
        values = torch.stack([out.expert_logits[:, 0, 0] for out in logits])
        means.append((values.mean(0), values.std(0) / len(values) ** 0.5, values.std(0)))
    (a, a_error, a_spread), (b, b_error, b_spread) = means
    assert a_error.min() > 0
    assert ((a - b).abs() < 4.5 * (a_error**2 + b_error**2).sqrt()).all()
    assert ((a_spread / b_spread - 1).abs() < 0.3).all()


def test_foreign_experts_run_one_by_one():
    model = make_model(PADDED)
    features, masks = batch(PADDED)
    expected = run(model, features, masks, "sequential")
    assert can_batch(model)

    class Other(torch.nn.Sequential):
        """A feed-forward block of another kind that happens to compute the same."""

    layer = model.interaction_experts[1].fusion_model.network[0]
    layer.mlp.network = Other(*layer.mlp.network)
    layer.mlp.__class__ = type("Sparse", (type(layer.mlp),), {})
    assert not can_batch(model)
    agree(run(model, features, masks, "auto"), expected)
    with pytest.raises(ArgumentError, match="passes"):
        run(model, features, masks, "batched")


def test_padding_does_not_reach_anything():
    model = make_model(PADDED)
    features, masks = batch(PADDED)
    dirty = [torch.where(mask[:, :, None] > 0, feature, -7.0) for feature, mask in zip(features, masks)]
    agree(run(model, dirty, masks, "batched"), run(model, features, masks, "batched"))
