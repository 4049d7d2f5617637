"""Losses against numbers worked out by hand, the passes and their noise, and short training runs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.encoders import ProjectionEncoder, TabularTokenEncoder
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.chance import against_chance, chance_warning
from flmoe_fast.model.training.forward import training_forward
from flmoe_fast.model.training.losses import interaction_loss, representation_penalty
from flmoe_fast.model.training.predict import predict
from tests.fitting import fitted


def make_model(generation="fl", count=2, encoders=None, **fields):
    """A float64 model without dropout whose experts differ."""
    fields = {"hidden": 8, "heads": 2, "layers": 1, "classes": 3, "reweight_hidden": 6, "dropout": 0.0, **fields}
    if generation == "original":
        fields["num_tokens"] = (3,) * count
    names = tuple(f"m{i}" for i in range(count))
    model = FLI2MoE(FLI2MoEConfig(names, generation=generation, **fields), encoders).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    return model


def make_data(count=2, samples=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(samples, 3, 8, generator=generator, dtype=torch.float64) for _ in range(count)]
    masks = [torch.ones(samples, 3) for _ in range(count)]
    masks[0][:, 2] = 0
    return features, masks, torch.randint(3, (samples,), generator=generator)


def plain_losses(model, features, masks, seed):
    """Interaction losses from the passes, redone in numpy with the noise drawn in the documented order."""
    count, generator, losses = len(features), torch.Generator().manual_seed(seed), []
    column = 1 if model.config.generation == "fl" else 0
    for e in range(count + 2):
        passes = [model.interaction_experts[e](features, masks)[column].detach().numpy()]
        for i in range(count):
            noisy = list(features)
            noisy[i] = torch.randn(features[i].shape, generator=generator, dtype=torch.float64)
            passes.append(model.interaction_experts[e](noisy, masks)[column].detach().numpy())
        anchor, others = passes[0], passes[1:]
        if e < count:
            terms = []
            for i in range(count):
                if i != e:
                    near = np.sqrt(((anchor - others[i] + 1e-7) ** 2).sum(1))
                    far = np.sqrt(((anchor - others[e] + 1e-7) ** 2).sum(1))
                    terms.append(np.maximum(0, near - far + 1).mean())
        else:
            cosines = [
                ((anchor * z).sum(1) / (np.linalg.norm(anchor, axis=1) * np.linalg.norm(z, axis=1))).mean()
                for z in others
            ]
            terms = cosines if e == count else [1 - c for c in cosines]
        losses.append(sum(terms) / len(terms))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("generation", ("fl", "original"))
@pytest.mark.parametrize("count", (2, 3))
def test_losses_agree_with_plain_recomputation(generation, count):
    model = make_model(generation, count, interaction_weight=0.3)
    features, masks, targets = make_data(count)
    masks = masks if generation == "fl" else None
    out = training_forward(model, features, masks, targets, generator=torch.Generator().manual_seed(7))
    expected = plain_losses(model, features, masks, 7)
    torch.testing.assert_close(out.interaction_losses, expected, rtol=1e-12, atol=1e-12)
    assert (out.interaction_losses - plain_losses(model, features, masks, 8)).abs().max() > 1e-4

    plain = model(features, masks)
    for name in ("logits", "expert_logits", "weights"):
        torch.testing.assert_close(getattr(out, name), getattr(plain, name), rtol=1e-12, atol=1e-12)
    task = -plain.logits.log_softmax(-1)[torch.arange(5), targets].mean()
    torch.testing.assert_close(out.task_loss, task, rtol=1e-12, atol=1e-12)
    total = task + 0.3 * expected.sum() / (count + 2)
    torch.testing.assert_close(out.loss, total, rtol=1e-12, atol=1e-12)
    assert out.regularization == 0


@pytest.mark.parametrize("count", (2, 3, 4))
def test_number_and_order_of_passes(count):
    model = make_model(count=count)
    features, masks, targets = make_data(count)
    calls, noises = [], []
    for e, expert in enumerate(model.interaction_experts):

        def record(module, arguments, e=e):
            changed = [i for i, (a, b) in enumerate(zip(arguments[0], features)) if not torch.equal(a, b)]
            calls.append((e, changed))
            noises.extend(arguments[0][i] for i in changed)

        expert.register_forward_pre_hook(record)
    generator = torch.Generator().manual_seed(1)
    training_forward(model, features, masks, targets, generator=generator, passes="sequential")
    assert calls == [(e, [i] if i >= 0 else []) for e in range(count + 2) for i in range(-1, count)]
    assert len(calls) == {2: 12, 3: 20, 4: 30}[count]
    for a, b in itertools.combinations(noises, 2):
        assert not torch.equal(a, b)
    pooled = torch.cat([noise.flatten() for noise in noises])
    assert abs(pooled.mean()) < 0.15 and abs(pooled.std() - 1) < 0.15


def test_interaction_losses_of_simple_points():
    anchor = torch.tensor([[0.0, 1.0], [3.0, 0.0]], dtype=torch.float64)
    near = anchor + torch.tensor([0.5, 0.0], dtype=torch.float64)
    far = anchor + torch.tensor([0.0, 0.75], dtype=torch.float64)
    # Distances 0.5 and 0.75: the margin of 1 lacks 0.75 for expert 0 (whose modality moves it far).
    assert interaction_loss(0, anchor, [far, near]).item() == pytest.approx(0.75, abs=1e-6)
    assert interaction_loss(1, anchor, [far, near]).item() == pytest.approx(1.25, abs=1e-6)
    assert interaction_loss(0, anchor, [anchor + 10, near]).item() == 0.0
    orthogonal, opposite = torch.stack((-anchor[:, 1], anchor[:, 0]), dim=1), -anchor
    assert interaction_loss(2, anchor, [orthogonal, opposite]).item() == pytest.approx(-0.5, abs=1e-12)
    assert interaction_loss(3, anchor, [orthogonal, opposite]).item() == pytest.approx(1.5, abs=1e-12)
    assert interaction_loss(3, anchor, [anchor, 2 * anchor]).item() == pytest.approx(0.0, abs=1e-12)
    # The shift inside the norm keeps the gradient finite even where nothing moved.
    still = anchor.clone().requires_grad_()
    interaction_loss(0, still, [anchor, anchor]).backward()
    assert torch.isfinite(still.grad).all()


def test_losses_act_on_latents_or_on_logits():
    for generation, reaches_head in (("fl", False), ("original", True)):
        model = make_model(generation)
        features, _, targets = make_data()
        head = model.interaction_experts[2].fusion_model.network[-1].fc.weight
        query = model.interaction_experts[2].fusion_model.network[0].attn.q.weight
        losses = training_forward(model, features, None, targets).interaction_losses
        gradient, reached = torch.autograd.grad(losses.sum(), [head, query], allow_unused=True)
        assert (gradient is not None) == reaches_head
        assert reached.abs().max() > 0


def test_noise_in_padding_has_no_effect():
    model = make_model()
    features, masks, targets = make_data()
    dirty = [torch.where(m[:, :, None] > 0, f, 99.0) for f, m in zip(features, masks)]
    losses = [
        training_forward(model, f, masks, targets, generator=torch.Generator().manual_seed(0)).loss
        for f in (features, dirty)
    ]
    assert torch.equal(*losses)


def test_task_losses():
    features, masks, targets = make_data()
    weights = torch.tensor((0.5, 1.0, 3.0), dtype=torch.float64)
    out = training_forward(make_model(class_weights=(0.5, 1.0, 3.0)), features, masks, targets)
    each = -out.logits.log_softmax(-1)[torch.arange(5), targets]
    expected = (weights[targets] * each).sum() / weights[targets].sum()
    torch.testing.assert_close(out.task_loss, expected, rtol=1e-12, atol=1e-12)
    assert (out.task_loss - each.mean()).abs() > 1e-4

    labels = torch.tensor([[1, 0, 1]] * 4 + [[0, 0, 0]])
    out = training_forward(make_model(task="multilabel"), features, masks, labels)
    p = torch.sigmoid(out.logits)
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(out.task_loss, expected, rtol=1e-10, atol=1e-12)


def test_regularizers_agree_with_plain_recomputation():
    generator = np.random.default_rng(0)
    latents = [generator.normal(size=(6, 4)) for _ in range(4)]
    sums = {"rep-cos": [], "rep-barlow": [], "rep-cka": []}
    for a, b in itertools.combinations(latents, 2):
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        sums["rep-cos"].append((cosine**2).mean())
        za, zb = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (a, b))
        correlation = za.T @ zb / 6
        sums["rep-barlow"].append((correlation[~np.eye(4, dtype=bool)] ** 2).mean())
        ca, cb = a - a.mean(0), b - b.mean(0)
        cross, own_a, own_b = (np.linalg.norm(m) for m in (ca.T @ cb, ca.T @ ca, cb.T @ cb))
        sums["rep-cka"].append(cross**2 / (own_a * own_b + 1e-8))
    tensors = [torch.from_numpy(z) for z in latents]
    for name, values in sums.items():
        assert representation_penalty(name, tensors).item() == pytest.approx(np.mean(values), rel=1e-10)
    assert representation_penalty("rep-cos", [tensors[0], -2 * tensors[0]]).item() == pytest.approx(1.0)
    assert representation_penalty("rep-cka", [tensors[0], 3 * tensors[0] + 1]).item() == pytest.approx(1.0, abs=1e-6)
    assert representation_penalty(None, tensors).item() == 0.0


def test_regularizer_enters_the_total():
    model = make_model()
    features, masks, targets = make_data()

    def run(**options):
        return training_forward(model, features, masks, targets, generator=torch.Generator().manual_seed(0), **options)

    plain = run()
    for options, weight in (
        ({"regularizer": "rep-cos"}, 3e-3),
        ({"regularizer": "rep-barlow"}, 10.0),
        ({"regularizer": "rep-cka", "regularizer_weight": 0.7}, 0.7),
    ):
        out = run(**options)
        assert out.regularization.item() > 0
        torch.testing.assert_close(out.loss, plain.loss + weight * out.regularization, rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="regularizer_weight"):
        run(regularizer="rep-cka")
    with pytest.raises(ArgumentError, match="regularizer: got 'cka'"):
        run(regularizer="cka")


@pytest.mark.parametrize(
    ("fields", "targets"),
    (
        ({}, torch.zeros(4, dtype=torch.long)),
        ({}, torch.zeros(5)),
        ({}, torch.full((5,), 3)),
        ({}, torch.full((5,), -1)),
        ({}, [0] * 5),
        ({"task": "multilabel"}, torch.zeros(5, dtype=torch.long)),
        ({"task": "multilabel"}, torch.full((5, 3), 0.5)),
    ),
)
def test_bad_targets(fields, targets):
    features, masks, _ = make_data()
    with pytest.raises(ArgumentError) as caught:
        training_forward(make_model(**fields), features, masks, targets)
    assert caught.value.argument == "targets"


def separable(samples=48, seed=0):
    """Raw tokens (N, 3, 4) per modality; the class is the sign pattern of the two modalities' means."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (2, samples), generator=generator)
    inputs = [torch.randn(samples, 3, 4, generator=generator) + 2.0 * (2 * s - 1)[:, None, None] for s in signs]
    return inputs, [torch.ones(samples, 3)] * 2, signs[0] + signs[1]


def fresh(seed=0, **fields):
    torch.manual_seed(seed)
    fields = {"hidden": 8, "heads": 2, "layers": 1, "classes": 3, "reweight_hidden": 8, "dropout": 0.1, **fields}
    config = FLI2MoEConfig(("a", "b"), interaction_weight=0.1, **fields)
    return FLI2MoE(config, {name: ProjectionEncoder(4, 8) for name in "ab"})


def test_fit_lowers_the_loss_and_trains_the_encoders():
    inputs, masks, targets = separable()
    model = fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    history = fitted(model, inputs, masks, targets, epochs=8, batch_size=16, lr=1e-2, seed=0)
    assert [record["epoch"] for record in history] == list(range(8))
    assert history[-1]["task_loss"] < 0.6 * history[0]["task_loss"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert len(history[0]["interaction_losses"]) == 4 and history[0]["seconds"] > 0
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(before)
    assert not model.training
    unseen, unseen_masks, truth = separable(seed=1)
    accuracy = (predict(model, unseen, unseen_masks).logits.argmax(-1) == truth).double().mean()
    assert accuracy > 0.8


def test_fit_total_is_the_mean_over_samples():
    inputs, masks, targets = separable(20)
    model = fresh()
    record = fitted(model, inputs, masks, targets, epochs=1, batch_size=8, lr=1e-3, seed=0)[0]
    assert record["loss"] == pytest.approx(record["task_loss"] + 0.1 * np.mean(record["interaction_losses"]), rel=1e-5)
    assert (record["accuracy"] * 20) == pytest.approx(round(record["accuracy"] * 20), abs=1e-4)


def test_same_seed_same_numbers_and_untouched_global_state():
    inputs, masks, targets = separable()

    def run(seed):
        model = fresh()
        torch.manual_seed(99)
        state = torch.random.get_rng_state()
        history = fitted(model, inputs, masks, targets, epochs=2, batch_size=16, lr=1e-3, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return [record["loss"] for record in history], model.state_dict()

    (losses, state), (again, same), (other, _) = run(5), run(5), run(6)
    assert losses == again and losses != other
    assert all(torch.equal(state[key], same[key]) for key in state)


def test_barlow_weight_warms_up_from_zero():
    inputs, masks, targets = separable(16)
    weights = []
    options = {"epochs": 6, "batch_size": 16, "lr": 1e-3, "seed": 0}
    for record in fitted(fresh(), inputs, masks, targets, regularizer="rep-barlow", regularizer_weight=2.0, **options):
        rest = record["task_loss"] + 0.1 * np.mean(record["interaction_losses"])
        weights.append((record["loss"] - rest) / record["regularization"])
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0], abs=2e-3)


@pytest.mark.parametrize("generation", ("fl", "original"))
def test_fit_on_features_of_a_model_without_encoders(generation):
    model = make_model(generation)
    features, masks, targets = make_data()
    masks = masks if generation == "fl" else None
    history = fitted(model, features, masks, targets, epochs=5, batch_size=5, lr=1e-2, seed=0)
    assert history[-1]["task_loss"] < history[0]["task_loss"]


def test_fit_multilabel_by_name():
    inputs, masks, classes = separable()
    labels = torch.stack((classes > 0, classes > 1, classes == 0), dim=1).float()
    model = fresh(task="multilabel")
    named = {"b": inputs[1], "a": inputs[0]}
    options = {"epochs": 6, "batch_size": 16, "lr": 1e-2, "seed": 0}
    history = fitted(model, named, {"a": masks[0], "b": masks[1]}, labels, **options)
    assert history[-1]["accuracy"] > history[0]["accuracy"]
    assert torch.equal(predict(model, named, masks).logits, predict(model, inputs, masks).logits)


def test_fit_errors():
    inputs, masks, targets = separable(8)
    model = fresh()
    for change, argument in (
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": 1e38}, "lr"),
        ({"seed": -1}, "seed"),
        ({"inputs": inputs[:1]}, "inputs"),
        ({"inputs": {"a": inputs[0]}}, "inputs"),
        ({"inputs": [inputs[0], inputs[1][:5]]}, "inputs[1]"),
        ({"inputs": [inputs[0], None]}, "inputs[1]"),
        ({"masks": [masks[0], masks[1][:5]]}, "masks[1]"),
        ({"targets": targets[:3]}, "targets"),
    ):
        arguments = {"inputs": inputs, "masks": masks, "targets": targets, "epochs": 1, "batch_size": 4, "lr": 1e-3}
        with pytest.raises(ArgumentError) as caught:
            fitted(model, **{**arguments, "seed": 0, **change})
        assert caught.value.argument == argument
    model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="trainable"):
        fitted(model, inputs, masks, targets, epochs=1)


def test_divergence_is_named(tmp_path):
    inputs, masks, targets = separable(8)
    model = fresh()
    with torch.no_grad():
        model.interaction_experts[0].fusion_model.network[-1].fc.bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="training diverged in epoch 0"):
        fitted(model, inputs, masks, targets, epochs=2, batch_size=8)
    # With a wild rate the first step's loss is fine, and the features after it are not.
    for rate, batch_size in ((1e36, 8), (1e36, 2), (1e30, 2)):
        checkpoint = tmp_path / f"{rate}-{batch_size}.pt"
        with pytest.raises(FloatingPointError, match="diverged in epoch [01], by step .*a smaller lr than 1e[+]3[06]"):
            fitted(fresh(), inputs, masks, targets, epochs=9, lr=rate, batch_size=batch_size, checkpoint=checkpoint)
        if checkpoint.exists():  # of the epoch before, with weights that are numbers
            assert all(w.isfinite().all() for w in torch.load(checkpoint, weights_only=True)["model"].values())


def test_one_class_is_refused():
    inputs, masks, targets = separable(8)
    with pytest.raises(ArgumentError, match="targets: got 1 for all 8 samples"):
        fitted(fresh(), inputs, masks, torch.ones_like(targets), epochs=1)
    with pytest.raises(ArgumentError, match=r"targets: got \[1.0, 0.0, 0.0\] for all 8"):
        fitted(fresh(task="multilabel"), inputs, masks, torch.eye(3)[[0] * 8], epochs=1)
    with pytest.raises(ArgumentError, match="targets: got 0.5 for all 8"):
        fitted(fresh(task="regression", classes=1), inputs, masks, torch.full((8, 1), 0.5), epochs=1)


@pytest.mark.parametrize("task", ("multiclass", "multilabel", "regression"))
def test_chance_is_told_from_skill(task):
    """Of 200 models that know nothing at most one in ten looks better, for two chances of 5 %; skill is always seen."""
    rng = np.random.default_rng(0)
    found = {0.0: 0, 1.0: 0}
    for skill in found:
        for _ in range(200):
            classes = torch.from_numpy(rng.choice(3, 240, p=[0.6, 0.3, 0.1]))
            named, noise = torch.eye(3)[classes], torch.from_numpy(rng.normal(size=(240, 3)))
            targets, logits = classes if task == "multiclass" else named, skill * (6.0 * named - 3.0) + 0.5 * noise
            if task == "regression":
                targets, logits = classes[:, None].double(), skill * classes[:, None] + 0.2 * noise[:, :1]
            judged = against_chance(logits[:40], targets[:40], targets[40:], task)
            assert judged.samples == 40 and (chance_warning(judged) is None) == judged.better
            assert chance_warning(judged.to_dict()) == chance_warning(judged)
            found[skill] += judged.better
    # A constant guess is made of the shares, so a model without skill is mostly worse than it: far below 10 %.
    assert found[1.0] == 200 and found[0.0] <= 0.1 * 200


def test_predict_restores_modes_and_does_not_depend_on_the_batch_size():
    model = FLI2MoE(
        FLI2MoEConfig(("a", "b"), hidden=8, heads=2, layers=1, classes=3, dropout=0.5),
        {"a": ProjectionEncoder(4, 8), "b": TabularTokenEncoder(5, 8)},
    ).double()
    inputs = [torch.randn(7, 3, 4, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)]
    masks = [torch.ones(7, 3), torch.ones(7, 5)]
    masks[0][:4, 1:] = 0
    model.reweight.eval()
    whole, parts = predict(model, inputs, masks), predict(model, inputs, masks, batch_size=2)
    assert model.training and not model.reweight.training and model.interaction_experts.training
    for a, b in zip(whole, parts):
        assert a.shape[0] == 7 and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    model.eval()
    torch.testing.assert_close(whole.logits, model(model.encode(inputs), masks).logits, rtol=1e-12, atol=1e-12)
