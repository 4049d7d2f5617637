"""Adapters against the real libraries: our games in their estimators, our estimators in their explainers."""

from __future__ import annotations

import contextlib
import copy
import itertools
import subprocess
import sys
import warnings

import captum.attr
import encoders
import numpy as np
import pytest
import shap
import shapiq
import torch
import transformers
from edge_shapes import EDGES
from reference_modules import InteractionMoE

from flmoe_fast import ArgumentError, accelerate, exact_interactions, interactions
from flmoe_fast.explainers.captum import ShapleyInteractions
from flmoe_fast.explainers.model_forward import ModelForward
from flmoe_fast.explainers.shap import shap_pair
from flmoe_fast.explainers.shapiq import ShapiqApproximator, ShapiqGame, from_shapiq
from flmoe_fast.probes.indices import ORDERS
from flmoe_fast.probes.values import player_values

N = 6
BITS = torch.arange(N)


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(2**N, dtype=torch.float64)


@pytest.fixture
def game(values):
    return lambda z: values[(z.long() << BITS).sum(1)]


def as_numpy(game):
    """The game as shapiq calls one: from an array (n,) or (m, n) to an array (m,)."""
    return lambda coalitions: game(torch.as_tensor(np.atleast_2d(coalitions))).numpy()


@pytest.fixture(scope="module")
def edge_game():
    return next(e for e in EDGES if e.name == "three modalities").game(dtype=torch.float64)


# ---- shapiq


def test_shapiq_game_contract(edge_game):
    """Repeats, order, batches, element type and a new instance change nothing."""
    ours = ShapiqGame(edge_game, normalize=False)
    rng = np.random.default_rng(0)
    rows = rng.random((20, ours.n_players)) < 0.5
    first = ours(rows)
    assert first.shape == (20,) and first.dtype == np.float64
    one_by_one = np.concatenate([ours(row) for row in rows])
    others = (ours(rows), ours(rows[::-1])[::-1], ours(rows.astype(int)), ours(rows.astype(float)), one_by_one)
    for other in (*others, ShapiqGame(edge_game, normalize=False)(rows)):
        assert np.allclose(first, other, rtol=1e-12, atol=1e-14)
    assert not np.allclose(first, ours(~rows), rtol=1e-3)
    second = ShapiqGame(edge_game, head=1, normalize=False)
    assert not np.allclose(first, second(rows), rtol=1e-3)
    assert np.allclose(second(rows), edge_game(torch.from_numpy(rows))[:, 1], rtol=1e-12)
    assert ShapiqGame(edge_game)(np.zeros(ours.n_players, dtype=bool))[0] == 0
    with pytest.raises(ArgumentError, match="head: got 'nobody'"):
        ShapiqGame(edge_game, head="nobody")


def test_exact_computer_of_shapiq_agrees(game):
    theirs = shapiq.ExactComputer(ShapiqGame(game, n=N, normalize=False), n_players=N)("SII", 2)
    ours = exact_interactions(game, n=N, progress=False)
    for pair, value in zip(ours.pairs.tolist(), ours.sii):
        assert theirs[tuple(pair)] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", ["KernelSHAPIQ", "SVARMIQ", "SHAPIQ", "PermutationSamplingSII"])
def test_estimators_of_shapiq_run_on_our_game(game, name):
    ours = ShapiqGame(game, n=N)
    options = {"index": "SII", "max_order": 2, "n": N, "random_state": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(shapiq, name)(**options).approximate(300, ours)
        plain = getattr(shapiq, name)(**options).approximate(300, as_numpy(game))
    for pair in itertools.combinations(range(N), 2):
        assert np.isfinite(found[pair])
        if name != "SHAPIQ":  # that one depends on the value of the empty coalition
            assert found[pair] == pytest.approx(plain[pair], abs=1e-9)


@pytest.mark.parametrize("index", ["SII", "k-SII", "STII", "FSII", "BII", "SV", "BV"])
def test_a_budget_for_every_coalition_gives_the_index_itself(game, index):
    order = 1 if index in ("SV", "BV") else 2
    truth = shapiq.ExactComputer(as_numpy(game), N)(index, order)
    found = ShapiqApproximator(N, order, index).approximate(2**N, as_numpy(game))
    assert not found.estimated and found.estimation_budget == 2**N
    for k in range(1, order + 1):
        for members in itertools.combinations(range(N), k):
            assert found[members] == pytest.approx(truth[members], abs=1e-12)
    if index != "k-SII":
        assert ShapiqApproximator(N, order, index).approximate(2**N - 1, as_numpy(game)).estimated


@pytest.mark.parametrize("index", ["SII", "k-SII", "STII", "FSII", "BII", "SV", "BV"])
def test_our_approximator(game, index, monkeypatch):
    """Right to within its standard errors, never over budget, in shapiq's own container."""
    monkeypatch.setattr(f"{ShapiqApproximator.__module__}.MOST_PLAYERS", 0)  # no budget enumerates
    asked = []

    def counting(coalitions):
        asked.append(len(np.atleast_2d(coalitions)))
        return game(torch.as_tensor(np.atleast_2d(coalitions))).numpy()

    order = 1 if index in ("SV", "BV") else 2
    approximator = ShapiqApproximator(N, order, index, random_state=3)
    found = approximator.approximate(40_000, counting)
    assert isinstance(found, shapiq.InteractionValues) and found.index == index
    assert sum(asked) == found.estimation_budget <= 40_000
    truth = shapiq.ExactComputer(as_numpy(game), N)(index, order)
    error, size = [], []
    for k in range(1, order + 1):
        for members in itertools.combinations(range(N), k):
            error.append(found[members] - truth[members])
            size.append(truth[members])
    assert np.sum(np.square(error)) < 0.1 * np.sum(np.square(size))
    # Another index is not mistaken for this one.
    other = {"SII": "BII", "k-SII": "FSII", "STII": "SII", "FSII": "BII", "BII": "STII", "SV": "BV", "BV": "SV"}[index]
    wrong = shapiq.ExactComputer(as_numpy(game), N)(other, order)
    worse = [found[m] - wrong[m] for k in range(1, order + 1) for m in itertools.combinations(range(N), k)]
    assert np.sum(np.square(worse)) > 2 * np.sum(np.square(error))


def test_our_approximator_in_explainers_of_shapiq():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(60, 5))

    def model(x):
        x = x.astype(float)  # some versions of shapiq impute into arrays of objects
        return x[:, 0] * x[:, 1] + x[:, 2]

    point = np.array([2.0, 1.5, 1.0, 0.0, 0.0])
    ours, theirs = (
        shapiq.TabularExplainer(
            model, data, imputer="baseline", index="k-SII", max_order=2, approximator=approximator, random_state=0
        ).explain(point, budget=budget, random_state=0)
        for approximator, budget in ((ShapiqApproximator(5, 2, "k-SII", random_state=0), 400), ("regression", 32))
    )
    for members in [(0,), (2,), (0, 1), (0, 2), (3, 4)]:  # theirs enumerates; a game of order two is exact in ours
        assert ours[members] == pytest.approx(theirs[members], abs=1e-6)
    game = ShapiqGame(lambda z: (z[:, 0] & z[:, 1]).double() + z[:, 2], n=4)
    explainer = shapiq.AgnosticExplainer(game, index="SII", max_order=2, approximator=ShapiqApproximator(4))
    found = explainer.explain(budget=200, random_state=5)
    expected = {(0, 1): 1.0, (2,): 1.0, (2, 3): 0.0}
    assert {members: found[members] for members in expected} == pytest.approx(expected, abs=1e-12)


def test_our_approximator_in_the_benchmark_of_shapiq(values):
    """Their runner makes it from its class, scores it against their own truth, and finds nothing to complain about."""
    reason = "shapiq before 1.8 comes without a benchmark runner"
    runner = pytest.importorskip("shapiq_benchmark", reason=reason)
    game = ShapiqGame(lambda z: values[(z.long() << BITS).sum(1)], n=N, normalize=False)
    contests = [("SII", 2), ("k-SII", 2), ("FSII", 2), ("STII", 2), ("SV", 1)]
    for index, order in contests:
        benchmark = runner.Benchmark(game)
        ours = runner.run(benchmark, [ShapiqApproximator], [4000], index=index, order=order, seeds=(0, 1))
        assert list(ours.status) == ["ok", "ok"] and (ours.nmse < 0.25).all(), (index, ours.nmse)
        assert set(ours.scored_orders) == {"1" if order == 1 else "1-2"}
    worse = runner.run(benchmark, [ShapiqApproximator], [40], index="SV", order=1)
    assert worse.nmse[0] > ours.nmse.max()
    refused = runner.run(benchmark, [ShapiqApproximator], [400], index="SII", order=3)
    assert list(refused.status) == ["failed"] and "max_order: got 3" in refused.error[0]


def test_approximator_refuses_and_advances(game):
    call = as_numpy(game)
    approximator = ShapiqApproximator(N, random_state=1)
    first, second = (approximator.approximate(60, call)[(0, 1)] for _ in range(2))
    approximator.set_random_state(1)
    assert first != second and approximator.approximate(60, call)[(0, 1)] == first
    with pytest.raises(ArgumentError, match="budget: got 9, expected at least 16"):
        approximator.approximate(10, call)
    with pytest.raises(ArgumentError, match="index: got 'SV'"):
        ShapiqApproximator(N, 2, "SV")
    with pytest.raises(ArgumentError, match="pairs: got some pairs"):
        ShapiqApproximator(N, 2, "k-SII", pairs=[(0, 1)])


def test_to_shapiq(game):
    result = interactions(game, n=N, pairs=[(3, 1), (0, 2)], contexts=8, also=("SV", "STII"), progress=False)
    found = result.to_shapiq()
    assert found[(1, 3)] == result.sii[0] and found[(0, 2)] == result.sii[1] and found.min_order == 1
    assert found[(1,)] == result.index("SV", 1)["value"][1]
    assert result.to_shapiq("STII")[(1, 3)] == result.index("STII")["value"][0]
    with pytest.raises(ArgumentError, match="index: got 'FSII'"):
        result.to_shapiq("FSII")


def test_from_shapiq_is_the_same_game(game):
    there_and_back = from_shapiq(ShapiqGame(game, n=N, normalize=False))
    z = torch.rand(9, N) < 0.5
    assert torch.equal(there_and_back(z), game(z))
    with pytest.raises(ArgumentError, match="n: got None"):
        from_shapiq(lambda z: z)


# ---- indices


def test_indices_against_the_exact_computer(values, game):
    """All coalitions as contexts, weighted by the law: every index is exact, and they differ from one another."""
    computer = shapiq.ExactComputer(as_numpy(game), N)
    result = interactions(game, n=N, contexts=3000, method="grid", also=tuple(ORDERS), progress=False)
    for (name, _), estimate in result.also.items():
        truth = computer(name, 1 if name in ("SV", "BV") else 2)
        true = np.array([truth[tuple(members)] for members in estimate.members.tolist()])
        assert np.abs((estimate.values - true) / estimate.stderr).max() < 4.5
        assert np.abs((estimate.values + 0.3 - true) / estimate.stderr).max() > 4.5
    player = player_values(game, n=N, contexts=3000, method="grid", progress=False)
    truth = computer("SV", 1)
    assert np.abs((player.values - [truth[(i,)] for i in range(N)]) / player.stderr).max() < 4.5
    low, high = player.interval()
    assert (low < player.values).all() and (player.values < high).all()


# ---- captum


@pytest.fixture
def network():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    return net.double().eval()


@pytest.mark.parametrize("perturbations", [1, 32, 256])
def test_attribute_equals_captum(network, perturbations):
    """The same permutations, hence the same numbers, in fewer and fuller forward passes."""
    inputs, baselines = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]])
    calls, rows = [0, 0], [0, 0]

    def counted(which):
        def forward(x):
            calls[which] += 1
            rows[which] += len(x)
            return network(x)

        return forward

    options = {"baselines": baselines, "target": torch.tensor([0, 2]), "feature_mask": mask, "n_samples": 40}
    options["perturbations_per_eval"] = perturbations
    torch.manual_seed(5)
    theirs = captum.attr.ShapleyValueSampling(counted(0)).attribute(inputs, **options)
    torch.manual_seed(5)
    ours = ShapleyInteractions(counted(1)).attribute(inputs, **options)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-6)  # captum adds up in float32
    assert rows[1] < 0.6 * rows[0] and calls[1] <= calls[0]
    torch.manual_seed(6)
    assert not torch.allclose(ShapleyInteractions(network).attribute(inputs, **options), theirs, rtol=0, atol=1e-4)


def test_attribute_of_tuples_outputs_and_arguments():
    """Two inputs that share a feature, an argument passed along, several outputs, a default mask."""

    def forward(a, b, scale, power):
        return torch.stack([(a * b[:, :2]).sum(1) * scale, (a.sum(1) + b.prod(1)) ** power], 1)

    a, b, scale = torch.randn(3, 2), torch.randn(3, 3), torch.rand(3)
    masks = (torch.tensor([[0, 1]]), torch.tensor([[1, 2, 3]]))
    for options in ({"target": 1, "feature_mask": masks}, {"target": 0}, {"target": [0, 1, 1]}, {}):
        options = {"additional_forward_args": (scale, 2), "n_samples": 10, **options}
        torch.manual_seed(1)
        theirs = captum.attr.ShapleyValueSampling(forward).attribute((a, b), **options)
        torch.manual_seed(1)
        ours = ShapleyInteractions(forward).attribute((a, b), **options, perturbations_per_eval=7)
        for one, other in zip(ours, theirs):
            assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_one_number_a_batch_is_left_to_captum():
    inputs = torch.randn(2, 3)
    torch.manual_seed(1)
    theirs = captum.attr.ShapleyValueSampling(lambda x: x.prod(1).sum()).attribute(inputs)
    torch.manual_seed(1)
    ours = ShapleyInteractions(lambda x: x.prod(1).sum()).attribute(inputs)
    assert torch.allclose(ours, theirs)


def test_pairs_of_features(network):
    inputs = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]])
    found = ShapleyInteractions(network).interactions(
        inputs, target=torch.tensor([0, 2]), feature_mask=mask, contexts=400, perturbations_per_eval=64
    )
    for b, target in enumerate((0, 2)):

        def value(z, b=b, target=target):
            return network(torch.where(z[:, mask[0]], inputs[b], 0.0))[:, target]

        truth = exact_interactions(value, n=6, progress=False)  # the default enumerates so few features as well
        assert np.allclose(found[b].sii, truth.sii, rtol=0, atol=1e-12) and (found[b].sii_stderr == 0).all()
    assert not np.allclose(found[0].sii, found[1].sii, atol=1e-3)


# ---- captum on an engine


@pytest.fixture(scope="module")
def mixture():
    """A mixture in float64, two samples with padding, and features that own tokens of several modalities."""
    edge = next(e for e in EDGES if e.name == "three modalities")
    model = edge.model()
    generator = torch.Generator().manual_seed(3)
    features = tuple(torch.randn(2, t, edge.hidden, generator=generator, dtype=torch.float64) for t in edge.tokens)
    masks = tuple((torch.arange(t) < v)[None].expand(2, -1) for t, v in zip(edge.tokens, edge.valid))
    owner = tuple((torch.arange(t)[None, :, None] + m) % 5 for m, t in enumerate(edge.tokens))
    return model, features, masks, owner


def both_attribute(theirs, ours, inputs, seed=5, **options):
    """captum's and our attribution with the same permutations."""
    found = []
    for method in (captum.attr.ShapleyValueSampling(theirs), ours):
        torch.manual_seed(seed)
        found.append(method.attribute(inputs, **options))
    return [part if isinstance(part, tuple) else (part,) for part in found]


def furthest(one, other):
    """Largest difference of two attributions, relative to the largest number."""
    assert [part.shape for part in one] == [part.shape for part in other]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other))


@pytest.mark.parametrize("perturbations", [1, 32, 256])
def test_mixture_on_the_engine(mixture, perturbations):
    """A mixture's coalitions run on the engine, whatever perturbations_per_eval says; captum calls the model."""
    model, features, masks, owner = mixture
    plain = ModelForward(model, value="prob")
    options = {"target": torch.tensor([1, 3]), "feature_mask": owner, "additional_forward_args": masks}
    options |= {"baselines": tuple(torch.full_like(part[:1], 0.2) for part in features), "n_samples": 4}
    ours = ShapleyInteractions(plain)
    with watched(model) as calls:
        theirs, found = both_attribute(plain, ours, features, perturbations_per_eval=perturbations, **options)
    assert ours.path.startswith("engine") and calls["after"] == 0 < calls["before"]
    assert furthest(found, theirs) < 2e-6  # captum adds up in float32
    _, other = both_attribute(plain, ours, features, seed=6, perturbations_per_eval=perturbations, **options)
    assert furthest(other, theirs) > 1e-3


def test_mixture_of_every_kind(mixture):
    """Bare models and accelerated ones; all classes at once; a single precision one on the native engine."""
    model, features, masks, owner = mixture
    options = {"feature_mask": owner, "additional_forward_args": masks, "n_samples": 3}
    wrapped = ModelForward(model)
    for given in (model, accelerate(model)):
        ours = ShapleyInteractions(given)
        theirs, found = both_attribute(wrapped, ours, features, **options)
        assert furthest(found, theirs) < 2e-6 and ours.path.startswith("engine")
    assert found[0].shape == (2, 5, *features[0].shape[1:])
    single = copy.deepcopy(model).float()
    inputs = tuple(part.float() for part in features)
    theirs, found = both_attribute(ModelForward(single), ShapleyInteractions(single), inputs, **options)
    assert furthest(found, theirs) < 1e-3
    one = {"feature_mask": owner, "additional_forward_args": tuple(mask[:1] for mask in masks), "target": 1}
    pairs = ShapleyInteractions(single).interactions(tuple(part[:1] for part in inputs), contexts=8, **one)
    assert 0 < pairs.noise_share < 1e-3 and pairs.about["dtype"] == "float32"


def test_a_live_module_of_the_published_layout():
    """captum runs the module's own inference; ours the engine of what accelerate reads of it."""
    module = InteractionMoE().double().eval()
    features = tuple(torch.randn(2, t, 12, dtype=torch.float64) for t in (3, 4))
    masks = tuple(torch.ones(2, t) for t in (3, 4))
    owner = (torch.arange(3)[None, :, None], 3 + torch.arange(4)[None, :, None])
    options = {"feature_mask": owner, "additional_forward_args": masks, "n_samples": 3, "target": 1}

    def inference(*tensors):
        return module.inference(list(tensors[:2]), list(tensors[2:]))[2]

    ours = ShapleyInteractions(module)
    theirs, found = both_attribute(inference, ours, features, **options)
    assert ours.path.startswith("engine") and furthest(found, theirs) < 2e-6


def test_features_inside_a_token_take_the_model_itself(mixture):
    model, features, masks, _ = mixture
    one = tuple(part[:1] for part in features)
    owner = tuple((torch.arange(part[0].numel()) % 3).view(1, *part.shape[1:]) for part in features)
    options = {"target": 2, "feature_mask": owner, "additional_forward_args": tuple(mask[:1] for mask in masks)}
    ours = ShapleyInteractions(model)
    with pytest.warns(UserWarning, match="slow path: .* divide a token, expected whole tokens"):
        theirs, found = both_attribute(ModelForward(model), ours, one, n_samples=3, **options)
    assert "in batches, because" in ours.path and furthest(found, theirs) < 2e-6
    wrong = tuple(part[..., :-1] for part in one)
    with pytest.warns(UserWarning, match="slow path"), pytest.raises(ArgumentError, match="shape"):
        ours.attribute(wrong, target=2)


def test_pairs_of_a_mixture_on_the_engine(mixture):
    """The same contexts with and without the engine: the same interactions."""
    model, features, masks, owner = mixture
    plain = ModelForward(model, value="prob")
    options = {"target": [1, 3], "feature_mask": owner, "additional_forward_args": masks, "contexts": 8}
    ours = ShapleyInteractions(plain)
    found = ours.interactions(features, **options)
    assert ours.path.startswith("engine") and found[0].about["dtype"] == "float64"
    slow = ShapleyInteractions(lambda *tensors: plain(*tensors)).interactions(
        features, perturbations_per_eval=64, **options
    )
    for one, other in zip(found, slow):
        assert np.allclose(one.sii, other.sii, rtol=0, atol=1e-9) and np.allclose(one.gap, other.gap, rtol=0, atol=1e-9)
    assert not np.allclose(found[0].sii, found[1].sii, atol=1e-3)


def transformer(kind):
    """A small transformer, its inputs for captum, the names they go by, baselines and features."""
    torch.manual_seed(2)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "vit":
        config = transformers.ViTConfig(**small, image_size=16, patch_size=8, num_labels=3)
        patches = torch.arange(4).view(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1)
        model, inputs = transformers.ViTForImageClassification(config), torch.randn(2, 3, 16, 16)
        return model, (inputs,), {"baselines": 0.0, "feature_mask": patches[None, None]}, None
    ids, seen = torch.randint(5, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=60, **small, num_labels=3)
        seen[1, 4:] = 0
        words = torch.tensor([[0, 1, 1, 2, 3, 3]])
        options = {"baselines": 4, "feature_mask": words, "additional_forward_args": seen}
        return transformers.BertForSequenceClassification(config), (ids,), options, None
    config = transformers.ViltConfig(
        vocab_size=60, **small, image_size=16, patch_size=8, max_image_length=-1, num_labels=3
    )
    patches = 2 + torch.arange(4).view(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1)
    masks = (torch.tensor([[0, 0, 0, 1, 1, 3]]), patches[None, None])  # the last token goes with a patch
    options = {"baselines": (4, 0.0), "feature_mask": masks, "additional_forward_args": seen}
    names = ("input_ids", "pixel_values", "attention_mask")
    return transformers.ViltForQuestionAnswering(config), (ids, torch.randn(2, 3, 16, 16)), options, names


@pytest.mark.parametrize("kind", ["vit", "bert", "vilt"])
def test_transformers_on_the_engine(kind):
    model, inputs, options, names = transformer(kind)
    model = model.double().eval()
    inputs = tuple(part.double() if part.is_floating_point() else part for part in inputs)
    forward = ModelForward(model, names)
    ours = ShapleyInteractions(model if names is None else forward)
    options |= {"target": torch.tensor([0, 2]), "n_samples": 5}
    theirs, found = both_attribute(forward, ours, inputs, perturbations_per_eval=8, **options)
    assert ours.path.startswith("engine") and furthest(found, theirs) < 2e-6
    _, other = both_attribute(forward, ours, inputs, **{**options, "target": torch.tensor([1, 1])})
    assert furthest(other, theirs) > 1e-3


def test_a_dual_encoder_on_the_engine():
    """The similarity of every example's image and text, each side encoded once for all coalitions of the other."""
    model = encoders.clip()
    ids = torch.tensor([[2, 9, 11, 7, 3], [2, 30, 8, 12, 3]])
    inputs = (ids, torch.randn(2, 3, 12, 12, dtype=torch.float64))
    patches = 5 + torch.arange(9).view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    forward = ModelForward(model, ("input_ids", "pixel_values"))
    ours = ShapleyInteractions(forward)
    blank = ids.masked_fill((ids != 2) & (ids != 3), 4)  # start and end stay as they are
    options = {"baselines": (blank, 0.0), "feature_mask": (torch.arange(5)[None], patches[None, None]), "n_samples": 3}
    theirs, found = both_attribute(forward, ours, inputs, **options)
    assert ours.path == "engine: dual encoder" and furthest(found, theirs) < 2e-6
    # The text's end symbol, which says where the model reads, may not be switched off on the engine.
    masked = {**options, "baselines": (4, 0.0)}
    with pytest.warns(UserWarning, match="slow path: .* differs from the engine's"):
        theirs_too, found = both_attribute(forward, ours, inputs, **masked)
    assert "in batches" in ours.path and furthest(found, theirs_too) < 2e-6
    swapped = (ids.flip(0), inputs[1])
    assert furthest(both_attribute(forward, ours, swapped, **options)[1], theirs) > 1e-3


def test_a_plain_module_with_encoder_layers_keeps_its_own_call():
    """A module of one's own is captum's to call, and on the engine where its layers are plain; else it is as before."""

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True, activation="gelu")
            self.stack = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = torch.nn.Linear(12, 3)

        def forward(self, tokens, scale=None):
            logits = self.head(self.stack(tokens)[:, 0])
            return logits if scale is None else logits * scale[:, None]

    reader = Reader().eval().double()
    inputs, owner = torch.randn(2, 5, 12, dtype=torch.float64), torch.arange(5)[None, :, None]
    options = {"target": 1, "feature_mask": owner, "n_samples": 4, "perturbations_per_eval": 4}
    ours = ShapleyInteractions(reader)
    theirs, found = both_attribute(reader, ours, inputs, **options)
    assert ours.path.startswith("engine") and furthest(found, theirs) < 2e-6
    theirs, found = both_attribute(reader, ours, inputs, additional_forward_args=torch.rand(2), **options)
    assert furthest(found, theirs) < 2e-6
    convolution = torch.nn.Sequential(torch.nn.Conv1d(5, 3, 12), torch.nn.Flatten()).double()
    ours = ShapleyInteractions(convolution)
    theirs, found = both_attribute(convolution, ours, inputs, **options)
    assert ours.path == "forward function in batches" and furthest(found, theirs) < 2e-6


@contextlib.contextmanager
def watched(model):
    """How many batches of a model ran before and after our method was asked: the first coalition asked is captum's."""
    calls = {"before": 0, "after": 0}
    which = ["before"]
    attribute = ShapleyInteractions.attribute

    def ours(*args, **kwargs):
        which[0] = "after"
        try:
            return attribute(*args, **kwargs)
        finally:
            which[0] = "before"

    def count(*_):
        calls[which[0]] += 1

    hook = model.register_forward_pre_hook(count)
    ShapleyInteractions.attribute = ours
    try:
        yield calls
    finally:
        ShapleyInteractions.attribute = attribute
        hook.remove()


# ---- shap


def test_shap_explainers_on_our_game(values, game, edge_game):
    model, masker = shap_pair(game, N)
    found = shap.explainers.Exact(model, masker)(masker.everyone)
    truth = shapiq.ExactComputer(as_numpy(game), N)("SV", 1)
    assert np.allclose(found.values[0], [truth[(i,)] for i in range(N)], rtol=0, atol=1e-9)
    assert float(np.ravel(found.base_values)[0]) == pytest.approx(float(values[0]))
    pairs = shap.explainers.Exact(model, masker)(masker.everyone, interactions=2).values[0]
    theirs = shapiq.ExactComputer(as_numpy(game), N)("STII", 2)
    assert 2 * pairs[0, 1] == pytest.approx(theirs[(0, 1)], abs=1e-9)  # they report half the Shapley-Taylor index
    permutation = shap.explainers.Permutation(model, masker, seed=0)(masker.everyone, max_evals=400)
    assert np.abs(permutation.values[0] - found.values[0]).max() < 0.5

    model, masker = shap_pair(edge_game, clustered=True)
    partition = shap.explainers.Partition(model, masker)(masker.everyone, max_evals=100)
    ones, zeros = torch.ones(1, edge_game.n).bool(), torch.zeros(1, edge_game.n).bool()
    total = edge_game(ones) - edge_game(zeros)
    assert partition.values.shape == (1, edge_game.n, len(edge_game.heads))
    assert np.allclose(partition.values.sum(1), total, rtol=0, atol=1e-9)


def test_to_shap(game):
    result = interactions(game, n=N, contexts=16, also=("SV",), progress=False)
    found = result.to_shap()
    assert found.values.shape == (N, N) and np.allclose(found.values, found.values.T)
    assert np.allclose(found.values.sum(1), result.also["SV", 1].values)
    pair = result.pairs[3]
    assert 2 * found.values[tuple(pair)] == pytest.approx(result.sii[3])
    some = interactions(game, n=N, pairs=[(0, 1)], contexts=16, progress=False).to_shap()
    assert np.isnan(some.values).sum() == N * N - 2


# ---- extras that are not installed


@pytest.mark.parametrize("extra", ["shapiq", "captum", "shap", "pyarrow"])
def test_a_missing_extra_says_what_to_install(extra):
    module = {"pyarrow": "scale.dataset"}.get(extra, f"explainers.{extra}")
    start = f"import sys; sys.modules[{extra!r}] = None\nimport flmoe_fast\n"
    body = f"import flmoe_fast.{module} as m\n" + ("m.require('pyarrow', 'parquet')\n" if extra == "pyarrow" else "")
    found = subprocess.run([sys.executable, "-c", start + body], capture_output=True, text=True, timeout=120)
    name = {"pyarrow": "parquet"}.get(extra, extra)
    assert found.stderr.strip().splitlines()[-1] == (
        f"flmoe_fast.environment.MissingExtra: {extra} is not installed: pip install 'flmoe-fast[{name}]'"
    )
    # Everything else works without it.
    rest = "flmoe_fast.interactions(lambda z: z.double().sum(1), n=3, contexts=4, progress=False)"
    assert subprocess.run([sys.executable, "-c", start + rest], timeout=120).returncode == 0


def test_without_any_extra_everything_else_works(tmp_path):
    """Where none is installed, every module but the explainers can be imported, and what needs no extra runs."""
    extras = ("captum", "shap", "shapiq", "transformers", "pyarrow", "h5py", "triton")
    code = f"""
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({extras!r})
import flmoe_fast
from flmoe_fast.environment import MissingExtra
refused = set()
for module in pkgutil.walk_packages(flmoe_fast.__path__, "flmoe_fast."):
    if "gpu.kernels" in module.name or module.name.endswith("_chunk") or module.name == "flmoe_fast._C":
        continue
    try:
        importlib.import_module(module.name)
    except MissingExtra as missing:
        refused.add(module.name)
assert refused == {{f"flmoe_fast.explainers.{{name}}" for name in ("captum", "shap", "shapiq")}}, refused
import torch
from flmoe_fast.cli import main
class Model(torch.nn.Sequential):
    def forward(self, input_ids):
        return super().forward(input_ids)
layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
stack = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
model = Model(torch.nn.Embedding(9, 8), stack, torch.nn.Flatten(), torch.nn.Linear(32, 2)).eval()
ids = torch.tensor([[1, 2, 3, 4]])
players = flmoe_fast.text_players(ids, absent=0)
game = flmoe_fast.accelerate(model).game({{"input_ids": ids}}, players, path="engine")
result = flmoe_fast.interactions(game, budget=200, method="auto", also=("SV",), progress=False)
for needs in (result.to_shapiq, result.to_shap):
    try:
        needs()
    except MissingExtra:
        continue
    raise AssertionError(needs)
assert main(["doctor"]) == 0
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
