"""Attention importances against explicit recomputation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.pipeline.importance.tokens import (
    METHODS,
    batch_importance,
    target_classes,
    token_importance,
)

LENGTHS = (4, 3)


def make_model(generation="fl", **fields):
    fields = {"hidden": 8, "heads": 2, "layers": 2, "classes": 4, "reweight_hidden": 6, **fields}
    if generation == "original":
        fields["num_tokens"] = (4, 4)
    model = FLI2MoE(FLI2MoEConfig(("a", "b"), generation=generation, **fields)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.4)
    return model


def make_sample(model, padded=True):
    generator = torch.Generator().manual_seed(1)
    lengths = model.config.num_tokens or LENGTHS
    features = [torch.randn(1, t, 8, generator=generator, dtype=torch.float64) for t in lengths]
    if model.config.generation == "original":
        return features, None
    masks = [torch.ones(1, t) for t in lengths]
    if padded:
        masks[0][0, 3] = 0
    return features, masks


def gradients_by_differences(model, features, masks, target, expert, layer, step=1e-5):
    """d S / d A of one layer from central differences: the softmax of that layer is replaced by A +- step."""
    weights = model(features, masks).weights[0]
    attention = model.interaction_experts[expert].fusion_model.network[layer].attn
    kept = []
    model.interaction_experts[expert](features, masks, kept)
    base = kept[layer].detach()
    original = torch.Tensor.softmax

    def score(matrix):
        active = []

        def softmax(self, dim, dtype=None):
            return matrix if active else original(self, dim, dtype=dtype)

        before = attention.register_forward_pre_hook(lambda *_: active.append(True))
        after = attention.register_forward_hook(lambda *_: active.clear())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "softmax", softmax)
            logits, _ = model.interaction_experts[expert](features, masks)
        before.remove()
        after.remove()
        return float(weights[expert] * logits[0, target].mean())

    gradient = torch.zeros_like(base)
    with torch.no_grad():
        for index in np.ndindex(*base.shape):
            ends = []
            for sign in (1, -1):
                moved = base.clone()
                moved[index] += sign * step
                ends.append(score(moved))
            gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return base[0].numpy(), gradient[0].numpy()


def rollout(matrices):
    size = matrices[0].shape[-1]
    rolled = np.eye(size)
    for matrix in matrices:
        matrix = matrix + np.eye(size)
        rolled = (matrix / matrix.sum(1, keepdims=True)) @ rolled
    return rolled.mean(0)


@pytest.mark.parametrize("generation", ("fl", "original"))
def test_gradient_importance_agrees_with_finite_differences(generation):
    model = make_model(generation)
    features, masks = make_sample(model)
    result = token_importance(model, features, masks, target=2)
    length = sum(f.shape[1] for f in features)
    assert result.experts.shape == (4, length) and result.mixture.shape == (length,)
    for e in (0, 3):
        matrices = []
        for layer in range(2):
            attention, gradient = gradients_by_differences(model, features, masks, [2], e, layer)
            matrices.append((attention * np.maximum(gradient, 0)).mean(0))
        expected = torch.from_numpy(rollout(matrices))
        torch.testing.assert_close(result.experts[e], expected, rtol=1e-6, atol=1e-8)
        wrong = torch.from_numpy(rollout(matrices[::-1]))
        assert (result.experts[e] - wrong).abs().max() > 1e-5
    torch.testing.assert_close(result.mixture, result.experts.sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("generation", ("fl", "original"))
def test_rollout_agrees_with_plain_recomputation(generation):
    model = make_model(generation)
    features, masks = make_sample(model)
    result = token_importance(model, features, masks, method="attn")
    weights = model(features, masks).weights[0].detach()
    for e in range(4):
        kept = []
        model.interaction_experts[e](features, masks, kept)
        expected = rollout([softmax[0].mean(0).detach().numpy() for softmax in kept])
        torch.testing.assert_close(result.experts[e], torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
        assert result.experts[e].sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(result.mixture, weights @ result.experts, rtol=1e-12, atol=1e-12)
    assert (result.mixture - result.experts.mean(0)).abs().max() > 1e-6
    other = token_importance(model, features, masks, method="attn", target=1)
    assert torch.equal(other.mixture, result.mixture)


def test_padded_query_rows_count_in_the_mean():
    model = make_model()
    features, masks = make_sample(model)
    gradient = token_importance(model, features, masks).experts
    # No gradient flows through a padded query, so its row of every layer is the identity: 1/L of its own column.
    torch.testing.assert_close(gradient[:, 3], torch.full((4,), 1 / 7, dtype=torch.float64), rtol=1e-12, atol=0)
    spread = token_importance(model, features, masks, method="attn").experts
    assert (spread[:, 3] < 0.9 / 7).all() and (spread[:, 3] > 0).all()
    # The content of the padding itself is of no account.
    dirty = [features[0].clone(), features[1]]
    dirty[0][0, 3] = 1e6
    for method in ("attn", "attnXgrad"):
        assert torch.equal(
            token_importance(model, dirty, masks, method=method).experts,
            token_importance(model, features, masks, method=method).experts,
        )


def test_segments_cover_the_modalities():
    model = make_model()
    features, masks = make_sample(model)
    assert token_importance(model, features, masks, method="attn").segments == (slice(0, 4), slice(4, 7))


def test_model_and_features_are_untouched():
    model = make_model(dropout=0.5)
    features, masks = make_sample(model)
    reference = token_importance(model, features, masks)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    model.reweight.eval()
    for prepare in (lambda: None, lambda: model.requires_grad_(False)):
        prepare()
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                again = token_importance(model, features, masks)
            assert torch.equal(again.experts, reference.experts)
            assert not again.experts.requires_grad
    assert model.training and not model.reweight.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(feature.requires_grad for feature in features)


def test_target_defaults_to_the_prediction():
    model = make_model()
    features, masks = make_sample(model)
    predicted = int(model(features, masks).logits.argmax())
    default = token_importance(model, features, masks)
    assert torch.equal(default.experts, token_importance(model, features, masks, target=predicted).experts)
    other = token_importance(model, features, masks, target=(predicted + 1) % 4)
    assert (default.mixture - other.mixture).abs().max() > 1e-6


def test_multilabel_targets():
    logits = torch.tensor([-1.0, 2.0, 0.0, -3.0])
    assert target_classes(logits, None, "multilabel").tolist() == [1, 2]
    assert target_classes(logits - 5, None, "multilabel").tolist() == [1]
    assert target_classes(logits, torch.tensor([1, 0, 0, 1]), "multilabel").tolist() == [0, 3]
    assert target_classes(logits, torch.zeros(4), "multilabel").tolist() == [1]
    assert target_classes(logits, 3, "multilabel").tolist() == [3]
    assert target_classes(logits, None, "multiclass").tolist() == [1]
    assert target_classes(logits, torch.tensor(2), "multiclass").tolist() == [2]

    model = make_model(task="multilabel")
    features, masks = make_sample(model)
    pair = token_importance(model, features, masks, target=torch.tensor([0, 1, 0, 1])).experts
    matrices = []
    for layer in range(2):
        attention, gradient = gradients_by_differences(model, features, masks, [1, 3], 1, layer)
        matrices.append((attention * np.maximum(gradient, 0)).mean(0))
    torch.testing.assert_close(pair[1], torch.from_numpy(rollout(matrices)), rtol=1e-6, atol=1e-8)


def test_errors():
    model = make_model()
    features, masks = make_sample(model)
    for change, argument in (
        ({"method": "lime"}, "method"),
        ({"target": 4}, "target"),
        ({"target": 1.0}, "target"),
        ({"target": torch.ones(4)}, "target"),
        ({"features": [f.repeat(2, 1, 1) for f in features], "masks": None}, "features"),
        ({"masks": [m * 0 for m in masks]}, "masks"),
    ):
        with pytest.raises(ArgumentError) as caught:
            token_importance(**{"model": model, "features": features, "masks": masks, **change})
        assert caught.value.argument == argument
    for target in (torch.ones(3), torch.full((4,), 0.5), "cat"):
        with pytest.raises(ArgumentError, match="target"):
            target_classes(torch.zeros(4), target, "multilabel")


def several(model, count=3):
    """Features and masks of a few samples with different padding."""
    generator = torch.Generator().manual_seed(2)
    lengths = model.config.num_tokens or LENGTHS
    features = [torch.randn(count, t, 8, generator=generator, dtype=torch.float64) for t in lengths]
    if model.config.generation == "original":
        return features, None
    masks = [(torch.arange(t) < torch.randint(1, t + 1, (count, 1), generator=generator)).long() for t in lengths]
    return [torch.where(m[:, :, None] > 0, f, 1e5) for f, m in zip(features, masks)], masks


@pytest.mark.parametrize("generation", ("fl", "original"))
@pytest.mark.parametrize("method", METHODS)
def test_batches_are_single_samples(generation, method):
    model = make_model(generation)
    features, masks = several(model)
    whole = batch_importance(model, features, masks, targets=[0, 3, 1], method=method)
    split = batch_importance(model, features, masks, targets=[0, 3, 1], method=method, memory=1)
    assert whole.experts.shape == (3, 4, sum(f.shape[1] for f in features))
    for row, target in enumerate((0, 3, 1)):
        own = [f[row : row + 1] for f in features], None if masks is None else [m[row : row + 1] for m in masks]
        alone = token_importance(model, *own, target=target, method=method)
        for found in (whole, split):
            torch.testing.assert_close(found.experts[row], alone.experts, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(found.mixture[row], alone.mixture, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("generation", ("fl", "original"))
@pytest.mark.parametrize("task", ("multiclass", "multilabel"))
def test_integrated_gradients_agree_with_plain_recomputation(generation, task):
    model = make_model(generation, task=task)
    features, masks = several(model, 1)
    target = torch.tensor([0, 1, 0, 1]) if task == "multilabel" else 2
    wanted = [1, 3] if task == "multilabel" else [2]
    found = token_importance(model, features, masks, target=target, method="ig", ig_steps=16)
    clean = features if masks is None else [f * m[:, :, None] for f, m in zip(features, masks)]

    def attribution(score, steps=16):
        total = [torch.zeros_like(f) for f in clean]
        for step in range(1, steps + 1):
            leaves = [(f * step / steps).requires_grad_() for f in clean]
            for kept, gradient in zip(total, torch.autograd.grad(score(leaves), leaves)):
                kept += gradient / steps
        return torch.cat([f * g for f, g in zip(clean, total)], dim=1)[0]

    mixture = attribution(lambda leaves: model(leaves, masks).logits[0, wanted].mean())
    torch.testing.assert_close(found.mixture, mixture.abs().mean(1), rtol=1e-9, atol=1e-11)
    shares = []
    for e in range(4):

        def share(leaves, e=e):
            out = model(leaves, masks)
            return out.weights[0, e] * out.expert_logits[0, e, wanted].mean()

        shares.append(attribution(share))
        torch.testing.assert_close(found.experts[e], shares[-1].abs().mean(1), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(sum(shares), mixture, rtol=1e-9, atol=1e-11)
    # The path's end is not enough, and neither are frozen routing weights.
    one = token_importance(model, features, masks, target=target, method="ig", ig_steps=1)
    assert (one.mixture - found.mixture).abs().max() > 1e-4

    if generation == "original":
        # Attributions add up to the change of the score along the path. (With masks, routing reads features scaled to
        # unit length, which jump at zero.)
        fine = token_importance(model, features, masks, target=target, method="ig", ig_steps=400)
        shares = attribution(lambda leaves: model(leaves, masks).logits[0, wanted].mean(), steps=400)
        torch.testing.assert_close(fine.mixture, shares.abs().mean(1), rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            ends = [float(model(end, masks).logits[0, wanted].mean()) for end in (clean, [0 * f for f in clean])]
        assert float(shares.sum()) == pytest.approx(ends[0] - ends[1], rel=0.05, abs=0.02)


@pytest.mark.parametrize("method", ("IntegratedGradients", "InputXGradient", "Saliency", "FeatureAblation"))
def test_captum_methods(method):
    from flmoe_fast.pipeline.importance.captum import captum_importance

    model = make_model()
    features, masks = several(model, 2)
    clean = [f * m[:, :, None] for f, m in zip(features, masks)]
    options = {"n_steps": 16, "method": "riemann_right"} if method == "IntegratedGradients" else {}
    found = captum_importance(model, features, masks, attribution=method, targets=[2, 0], **options)
    if method == "IntegratedGradients":
        own = batch_importance(model, features, masks, method="ig", targets=[2, 0])
        torch.testing.assert_close(found.mixture, own.mixture, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.experts, own.experts, rtol=1e-8, atol=1e-10)
        return
    assert found.experts.shape == (2, 4, 7) and found.mixture.shape == (2, 7)
    for row, target in enumerate((2, 0)):
        own = [f[row : row + 1] for f in clean], [m[row : row + 1] for m in masks]
        if method == "FeatureAblation":
            wanted = torch.zeros(7, dtype=torch.float64)
            base = model(*own).logits[0, target]
            for m, part in enumerate(own[0]):
                for p in range(part.shape[1]):
                    for h in range(8):
                        changed = [f.clone() for f in own[0]]
                        changed[m][0, p, h] = 0.0
                        drop = (base - model(changed, own[1]).logits[0, target]).abs() / 8
                        wanted[p + (4 if m else 0)] += drop.detach()
        else:
            leaves = [f.clone().requires_grad_() for f in own[0]]
            gradients = torch.autograd.grad(model(leaves, own[1]).logits[0, target], leaves)
            times = leaves if method == "InputXGradient" else [1.0, 1.0]
            wanted = torch.cat([(g * f).detach().abs().mean(-1)[0] for g, f in zip(gradients, times)])
        torch.testing.assert_close(found.mixture[row], wanted, rtol=1e-8, atol=1e-10)
    with pytest.raises(ArgumentError, match="attribution"):
        captum_importance(model, features, masks, attribution="Lim")
