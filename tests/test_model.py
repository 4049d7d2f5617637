"""The reference network against an independent recomputation, and one test per easily missed property."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.encoders import ProjectionEncoder, TabularTokenEncoder
from flmoe_fast.model.network import FLI2MoE, sinusoid

GENERATIONS = ("fl", "original")
LENGTHS = (5, 3, 4, 2)


def make_config(generation="fl", count=2, **fields):
    fields = {"hidden": 8, "heads": 2, "layers": 2, "classes": 3, "reweight_hidden": 6, **fields}
    if generation == "original":
        fields.setdefault("num_tokens", (4,) * count)
    return FLI2MoEConfig(tuple(f"m{i}" for i in range(count)), generation=generation, **fields)


def make_model(generation="fl", count=2, seed=0, **fields):
    """A float64 model in eval mode with different experts and no parameter (norms, positions) at its start."""
    model = FLI2MoE(make_config(generation, count, **fields)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.4)
    return model


def make_features(model, batch=3, lengths=None, seed=1):
    config = model.config
    lengths = lengths or config.num_tokens or LENGTHS[: len(config.modalities)]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, t, config.hidden, generator=generator, dtype=torch.float64) for t in lengths]


def make_masks(features, seed=2):
    """Random masks with at least one valid and, in all but modalities of one token, one padded token per sample."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for feature in features:
        mask = torch.rand(feature.shape[:2], generator=generator) < 0.6
        mask[:, 0], mask[:, -1] = True, False
        masks.append(mask.double())
    return masks


def plain_forward(model, features, masks):
    """The whole model again: numpy, sample by sample, head by head, feed-forward modality by modality."""
    config = model.config
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    original = config.generation == "original"
    width, heads, lengths = config.hidden, config.heads, [f.shape[1] for f in features]
    bounds = np.cumsum([0, *lengths])
    d = width // heads

    def norm(x, key):
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * state[f"{key}.weight"] + state[f"{key}.bias"]

    def linear(x, key):
        return np.einsum("ti,oi->to", x, state[f"{key}.weight"]) + state[f"{key}.bias"]

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    gelu = np.vectorize(lambda v: 0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))))
    positions = np.zeros((bounds[-1], width))
    for p in range(bounds[-1]):
        for c in range(width):
            angle = p / 10000.0 ** ((c - c % 2) / width)
            positions[p, c] = math.cos(angle) if c % 2 else math.sin(angle)

    out = {"logits": [], "expert_logits": [], "weights": [], "latents": []}
    for b in range(features[0].shape[0]):
        raw = [f[b].numpy() for f in features]
        valid = [np.ones(t, bool) if masks is None else masks[m][b].numpy() > 0 for m, t in enumerate(lengths)]
        keys = np.concatenate(valid)
        per_expert, latents = [], []
        for e in range(config.experts):
            prefix = f"interaction_experts.{e}.fusion_model"
            x = np.concatenate(raw) + (state[f"{prefix}.pos_embed"][0] if original else positions)
            if masks is not None:
                x = x * keys[:, None]
            for layer in range(config.layers):
                key = f"{prefix}.network.{layer}"
                n = norm(x, f"{key}.norm1")
                q = n @ state[f"{key}.attn.q.weight"].T
                k = n @ state[f"{key}.attn.kv.weight"][:width].T
                v = n @ state[f"{key}.attn.kv.weight"][width:].T
                mixed = np.zeros_like(x)
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    scores = np.einsum("id,jd->ij", q[:, part], k[:, part]) / math.sqrt(d)
                    scores[:, ~keys] = -np.inf
                    mixed[:, part] = softmax(scores) @ v[:, part]
                a = linear(mixed, f"{key}.attn.proj")
                x = 2 * a if original else x + a
                for m in range(len(raw)):
                    rows = slice(bounds[m], bounds[m + 1])
                    inner = gelu(linear(norm(x[rows], f"{key}.norm2"), f"{key}.mlp.network.0"))
                    x[rows] = x[rows] + linear(inner, f"{key}.mlp.network.3")
            latent = np.concatenate(
                [x[bounds[m] : bounds[m + 1]][valid[m]].sum(0) / max(valid[m].sum(), 1) for m in range(len(raw))]
            )
            latents.append(latent)
            per_expert.append(linear(latent[None], f"{prefix}.network.{config.layers}.fc")[0])
        means = [raw[m][valid[m]].sum(0) / max(valid[m].sum(), 1) for m in range(len(raw))]
        if masks is not None:
            means = [u / max(np.sqrt((u**2).sum()), 1e-12) for u in means]
        u = np.concatenate(means)[None]
        for i in range(config.reweight_layers):
            u = linear(u, f"reweight.mlp.network.{3 * i}")
            u = np.maximum(u, 0) if i < config.reweight_layers - 1 else u
        weights = softmax(u[0] / config.temperature)
        out["logits"].append(np.einsum("e,ec->c", weights, np.stack(per_expert)))
        out["expert_logits"].append(np.stack(per_expert))
        out["weights"].append(weights)
        out["latents"].append(np.stack(latents))
    return {name: torch.from_numpy(np.stack(values)) for name, values in out.items()}


def assert_same(output, expected, tolerance=1e-12):
    for name, value in expected.items():
        torch.testing.assert_close(getattr(output, name), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", (2, 3, 4))
@pytest.mark.parametrize("case", ("fl", "fl masked", "original"))
def test_forward_agrees_with_plain_recomputation(case, count):
    model = make_model(case.split()[0], count, reweight_layers=count - 1, temperature=0.7)
    features = make_features(model)
    masks = make_masks(features) if "masked" in case else None
    with torch.no_grad():
        output = model(features, masks)
    expected = plain_forward(model, features, masks)
    assert_same(output, expected)
    with pytest.raises(AssertionError):  # the tolerance sees a change of one part in 10^9
        assert_same(output, {"logits": expected["logits"] * (1 + 1e-9)})


@pytest.mark.parametrize("generation", GENERATIONS)
def test_one_head_of_width_256(generation):
    fields = {"num_tokens": (2, 2)} if generation == "original" else {}
    model = make_model(generation, hidden=256, heads=1, layers=1, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    features = make_features(model, batch=1, lengths=(2, 2))
    with torch.no_grad():
        assert_same(model(features), plain_forward(model, features, None))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_float32_agrees_with_float64(generation):
    model = make_model(generation)
    features = make_features(model)
    with torch.no_grad():
        exact = model(features).logits
        single = model.float()([f.float() for f in features]).logits
    assert single.dtype == torch.float32
    error = (single.double() - exact).abs().max() / exact.abs().max()
    assert 0 < error < 1e-5


@pytest.mark.parametrize("generation", GENERATIONS)
def test_state_dict_keys_and_order(generation):
    model = FLI2MoE(make_config(generation, reweight_layers=3))
    keys = [f"reweight.mlp.network.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")]
    for e in range(4):
        prefix = f"interaction_experts.{e}.fusion_model"
        keys += [f"{prefix}.pos_embed"] if generation == "original" else []
        for layer in range(2):
            names = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q.weight", "attn.kv.weight")
            names += ("attn.proj.weight", "attn.proj.bias")
            names += tuple(f"mlp.network.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias"))
            keys += [f"{prefix}.network.{layer}.{name}" for name in names]
        keys += [f"{prefix}.network.2.fc.weight", f"{prefix}.network.2.fc.bias"]
    assert list(model.state_dict()) == keys
    assert len(keys) == {"fl": 110, "original": 114}[generation]


def test_parameter_count_of_the_published_size():
    model = FLI2MoE(FLI2MoEConfig(("language", "img"), hidden=256, heads=4, layers=2, classes=23, task="multilabel"))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert (count(model.interaction_experts[0]), count(model.reweight)) == (1_064_471, 132_356)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_fresh_experts_are_identical_copies(generation):
    model = FLI2MoE(make_config(generation, 3)).double().eval()
    logits = model(make_features(model)).expert_logits
    for e in range(1, 5):
        assert torch.equal(logits[:, e], logits[:, 0])
    first, second = (model.interaction_experts[e].fusion_model.network[0].attn.q.weight for e in (0, 1))
    assert first is not second and first.data_ptr() != second.data_ptr()
    if generation == "original":
        assert not model.interaction_experts[0].fusion_model.pos_embed.any()


def test_no_masks_routes_differently_from_masks_of_ones():
    model = make_model()
    features = make_features(model)
    ones = [torch.ones(f.shape[:2]) for f in features]
    none, masked = model(features), model(features, ones)
    torch.testing.assert_close(none.expert_logits, masked.expert_logits, rtol=1e-12, atol=1e-12)
    assert (none.weights - masked.weights).abs().max() > 1e-3


def test_routing_with_masks_ignores_the_scale_of_a_modality():
    model = make_model()
    features = make_features(model)
    masks = make_masks(features)
    scaled = [features[0] * 5, features[1]]
    torch.testing.assert_close(model.reweight(features, masks), model.reweight(scaled, masks), rtol=1e-12, atol=1e-12)
    assert (model.reweight(features) - model.reweight(scaled)).abs().max() > 1e-3


def test_routing_uses_features_without_positions():
    model = make_model()
    features = make_features(model)
    masks = make_masks(features)
    flipped = [f.flip(1) for f in features], [m.flip(1) for m in masks]
    torch.testing.assert_close(model.reweight(*flipped), model.reweight(features, masks), rtol=1e-12, atol=1e-12)
    assert (model(*flipped).expert_logits - model(features, masks).expert_logits).abs().max() > 1e-3


@pytest.mark.parametrize("garbage", (0.0, 1e3, float("nan"), float("inf")))
def test_padding_content_changes_nothing(garbage):
    model = make_model(count=3)
    features = make_features(model)
    masks = make_masks(features)
    dirty = [torch.where(mask[:, :, None] > 0, f, garbage) for f, mask in zip(features, masks)]
    for clean, other in zip(model(features, masks), model(dirty, masks)):
        assert torch.equal(clean, other)
    masks[1][:, 0] = 1 - masks[1][:, 0]  # unlike the content of a token that is valid
    assert not torch.equal(model(features, masks).logits, model(dirty, make_masks(features)).logits)


def test_padded_length_moves_later_modalities():
    model = make_model()
    features = make_features(model)
    masks = [torch.ones(f.shape[:2]) for f in features]
    extra = torch.zeros(3, 2, 8, dtype=torch.float64)

    def padded(m):
        longer = [torch.cat((f, extra), dim=1) if i == m else f for i, f in enumerate(features)]
        return model(longer, [torch.cat((k, extra[:, :, 0]), dim=1) if i == m else k for i, k in enumerate(masks)])

    plain = model(features, masks)
    torch.testing.assert_close(padded(1).logits, plain.logits, rtol=1e-12, atol=1e-12)
    shift = padded(0)
    assert (shift.logits - plain.logits).abs().max() > 1e-3
    torch.testing.assert_close(shift.weights, plain.weights, rtol=1e-12, atol=1e-12)


def test_fully_padded_modality_pools_to_zero():
    model = make_model()
    features = make_features(model)
    masks = [torch.ones(f.shape[:2]) for f in features]
    masks[1][0] = 0
    output = model(features, masks)
    assert torch.isfinite(output.logits).all()
    assert not output.latents[0, :, 8:].any() and output.latents[1, :, 8:].any()


def test_replaced_features_keep_position_and_mask():
    # A token filled with zeros is not a removed token: its position encoding is still attended to and pooled.
    model = make_model()
    features = make_features(model)
    masks = [torch.ones(f.shape[:2]) for f in features]
    filled = [features[0].clone(), features[1]]
    filled[0][:, 1] = 0
    removed = [masks[0].clone(), masks[1]]
    removed[0][:, 1] = 0
    assert (model(filled, masks).expert_logits - model(filled, removed).expert_logits).abs().max() > 1e-3
    assert_same(model(filled, masks), plain_forward(model, filled, masks))


def test_attention_block_of_the_original_doubles_the_attention_output():
    layer = make_model("original").interaction_experts[0].fusion_model.network[0]
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.mlp.parameters():
            parameter.zero_()
        attended, _ = layer.attn(layer.norm1(x), None)
        assert torch.equal(layer(x, None)[0], attended + attended)
        layer.input_residual = True
        assert torch.equal(layer(x, None)[0], x + attended)


def test_keys_are_the_first_rows_of_kv_and_nothing_but_proj_has_a_bias():
    attention = make_model().interaction_experts[0].fusion_model.network[0].attn
    assert attention.q.bias is None and attention.kv.bias is None and attention.proj.bias is not None
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        attention.kv.weight[:8] = 0  # equal keys: uniform attention over unchanged values
        output, softmax = attention(x, None)
        torch.testing.assert_close(softmax, torch.full_like(softmax, 0.25), rtol=1e-12, atol=1e-12)
        mean = (x @ attention.kv.weight[8:].T).mean(1, keepdim=True).expand(-1, 4, -1)
        torch.testing.assert_close(output, attention.proj(mean), rtol=1e-12, atol=1e-12)


def test_gelu_is_exact_and_norms_use_1e_5():
    layer = make_model().interaction_experts[0].fusion_model.network[0]
    assert layer.norm1.eps == layer.norm2.eps == 1e-5
    x = torch.tensor([1.3], dtype=torch.float64)
    exact = 0.5 * 1.3 * (1 + math.erf(1.3 / math.sqrt(2)))
    assert layer.mlp.network[1](x).item() == pytest.approx(exact, abs=1e-15)
    assert torch.nn.functional.gelu(x, approximate="tanh").item() != pytest.approx(exact, abs=1e-6)


def test_attention_list_holds_every_layer_attached_to_the_graph():
    model = make_model(layers=3)
    features = make_features(model)
    masks = make_masks(features)
    kept = []
    logits, latent = model.interaction_experts[1](features, masks, kept)
    assert logits.shape == (3, 3) and latent.shape == (3, 16)
    assert [a.shape for a in kept] == [(3, 2, 8, 8)] * 3
    keys = torch.cat(masks, dim=1).bool()
    for softmax in kept:
        torch.testing.assert_close(softmax.sum(-1), torch.ones(3, 2, 8, dtype=torch.float64), rtol=1e-12, atol=0)
        assert not softmax.transpose(1, 3)[~keys].any()
    gradients = torch.autograd.grad(logits.sum(), kept)
    assert all(g.abs().max() > 0 for g in gradients)
    assert not gradients[-1].transpose(1, 2)[~keys].any()  # nothing reads the last layer's padded queries


def test_softmax_of_half_precision_is_taken_in_float32():
    attention = make_model().interaction_experts[0].fusion_model.network[0].attn.bfloat16()
    seen = []
    original = torch.Tensor.softmax

    def spy(self, dim, dtype=None):
        seen.append(dtype)
        return original(self, dim, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", spy)
        assert attention(torch.randn(1, 4, 8, dtype=torch.bfloat16), None)[1].dtype == torch.bfloat16
        attention.double()(torch.randn(1, 4, 8, dtype=torch.float64), None)
    assert seen == [torch.float32, torch.float64]


def test_temperature_divides_the_routing_logits():
    model = make_model(temperature=2.0)
    features = make_features(model)
    raw = model.reweight.mlp(torch.cat([f.mean(1) for f in features], dim=-1))
    torch.testing.assert_close(model(features).weights, (raw / 2).softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", (1, 2, 4))
def test_reweight_depth(layers):
    keys = [k for k in FLI2MoE(make_config(reweight_layers=layers)).state_dict() if k.startswith("reweight")]
    assert keys == [f"reweight.mlp.network.{3 * i}.{kind}" for i in range(layers) for kind in ("weight", "bias")]


def test_logits_do_not_depend_on_the_batch():
    model = make_model()
    features = make_features(model)
    masks = make_masks(features)
    alone = torch.cat([model([f[b : b + 1] for f in features], [m[b : b + 1] for m in masks]).logits for b in range(3)])
    torch.testing.assert_close(alone, model(features, masks).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probability", (0.0, 0.5))
def test_dropout_acts_in_train_mode_only(probability):
    model = make_model(dropout=probability)
    features = make_features(model)
    reference = model(features).logits
    assert torch.equal(model(features).logits, reference)
    changed = not torch.equal(model.train()(features).logits, reference)
    assert changed == (probability > 0)


def test_train_mode_blocks_apply_both_dropouts_to_the_branch():
    # With everything dropped, pre-norm leaves the input and the original block leaves nothing.
    for generation, kept in (("fl", True), ("original", False)):
        layer = make_model(generation).interaction_experts[0].fusion_model.network[0].train()
        for module in layer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 1.0
        x = torch.randn(2, 8, 8, dtype=torch.float64)
        assert torch.equal(layer(x, None)[0], x if kept else torch.zeros_like(x))


def test_sinusoid_is_exact_and_rounded_once():
    exact = sinusoid(600, 6, dtype=torch.float64)
    assert exact[517, 2].item() == pytest.approx(math.sin(517 / 10000 ** (2 / 6)), abs=1e-13)
    assert exact[517, 3].item() == pytest.approx(math.cos(517 / 10000 ** (2 / 6)), abs=1e-13)
    assert torch.equal(exact[0], torch.tensor([0.0, 1.0] * 3, dtype=torch.float64))
    assert torch.equal(sinusoid(600, 6, dtype=torch.float32), exact.float())


def test_encoders():
    config = make_config()
    model = FLI2MoE(config, {"m1": TabularTokenEncoder(5, 8), "m0": ProjectionEncoder(4, 8)}).eval()
    assert list(model.encoders) == ["m0", "m1"]
    assert not any(key.startswith("encoders") for key in model.ensemble_state_dict())
    patches, table = torch.randn(2, 3, 4), torch.randn(2, 5)
    features = model.encode([patches, table])
    by_name = model.encode({"m1": table, "m0": patches})
    assert all(torch.equal(a, b) for a, b in zip(features, by_name))
    encoder = model.encoders["m1"]
    assert encoder.feature_emb.std() > 0.005 and encoder.feature_emb.std() < 0.05 and not encoder.bias.any()
    with torch.no_grad():
        encoder.bias.normal_()
    assert torch.allclose(encoder(table)[1, 3], table[1, 3] * encoder.feature_emb[3] + encoder.bias[3])
    proj = model.encoders["m0"].proj
    assert torch.allclose(features[0][1, 2], patches[1, 2] @ proj.weight.T + proj.bias)
    assert model(features).logits.shape == (2, 3)


def test_names_and_dict_round_trip():
    config = make_config("original", 3, class_weights=(0.5, 1, 2))
    assert config.experts == 5
    assert config.expert_names == ("uniqueness: m0", "uniqueness: m1", "uniqueness: m2", "synergy", "redundancy")
    assert FLI2MoEConfig.from_dict(config.to_dict()) == config
    assert isinstance(config.to_dict()["num_tokens"], list)
    with pytest.raises(ArgumentError, match="unknown.*depth"):
        FLI2MoEConfig.from_dict({**config.to_dict(), "depth": 3})
    with pytest.raises(ArgumentError, match="no .*'hidden'"):
        FLI2MoEConfig.from_dict({"modalities": ("a", "b"), "heads": 1, "layers": 1, "classes": 2})


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("modalities", ("a",)),
        ("modalities", ("a", "a")),
        ("modalities", "ab"),
        ("modalities", tuple("abcdefghi")),
        ("modalities[1]", ("a", "b.c")),
        ("hidden", 7),
        ("hidden", 0),
        ("hidden", 8.0),
        ("heads", 3),
        ("heads", True),
        ("layers", 0),
        ("classes", 0),
        ("generation", "new"),
        ("task", "ranking"),
        ("num_tokens", (3,)),
        ("num_tokens[1]", (3, 0)),
        ("ffn_multiple", 0),
        ("reweight_hidden", 0),
        ("reweight_layers", 0),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("interaction_weight", -1),
        ("class_weights", (1.0, 2.0)),
        ("class_weights[0]", (0.0, 1.0, 1.0)),
    ),
)
def test_bad_configurations_name_the_field(name, value):
    fields = make_config().to_dict()
    FLI2MoEConfig(**fields)
    with pytest.raises(ArgumentError) as caught:
        FLI2MoEConfig(**{**fields, name.partition("[")[0]: value})
    assert caught.value.argument == name


def test_bad_combinations_in_configurations():
    fields = make_config().to_dict()
    for change in ({"generation": "original"}, {"generation": "original", "num_tokens": (3, 4)}):
        with pytest.raises(ArgumentError, match="num_tokens"):
            FLI2MoEConfig(**{**fields, **change})
    assert FLI2MoEConfig(**{**fields, "num_tokens": (3, 4)}).num_tokens == (3, 4)
    with pytest.raises(ArgumentError, match="class_weights"):
        FLI2MoEConfig(**{**fields, "task": "multilabel", "class_weights": (1.0, 1.0, 1.0)})


def _inputs(model):
    features = make_features(model)
    return features, [torch.ones(f.shape[:2]) for f in features]


@pytest.mark.parametrize(
    ("argument", "change"),
    (
        ("features", lambda f, m: (f[0], m)),
        ("features", lambda f, m: (f[:1], m)),
        ("features[1]", lambda f, m: ([f[0], f[1].numpy()], m)),
        ("features[1]", lambda f, m: ([f[0], f[1][:2]], m)),
        ("features[1]", lambda f, m: ([f[0], f[1][..., :4]], m)),
        ("features[0]", lambda f, m: ([f[0][:, 0], f[1]], m)),
        ("features[0]", lambda f, m: ([f[0][:, :0], f[1]], m)),
        ("features[0]", lambda f, m: ([f[0].float(), f[1]], m)),
        ("features[1]", lambda f, m: ([f[0], f[1].to("meta")], m)),
        ("features[1]", lambda f, m: ([f[0], f[1] / 0.0], m)),
        ("masks", lambda f, m: (f, m[:1])),
        ("masks[1]", lambda f, m: (f, [m[0], m[1][:, :1]])),
        ("masks[0]", lambda f, m: (f, [m[0] * 0.5, m[1]])),
        ("masks[0]", lambda f, m: (f, [None, m[1]])),
        ("masks", lambda f, m: (f, [k.index_fill(0, torch.tensor([1]), 0) for k in m])),
    ),
)
def test_bad_inputs_name_the_argument(argument, change):
    model = make_model()
    features, masks = _inputs(model)
    model(features, masks)
    with pytest.raises(ArgumentError) as caught:
        model(*change(features, masks))
    assert caught.value.argument == argument


def test_sample_without_any_valid_token_is_named():
    model = make_model()
    features, masks = _inputs(model)
    for mask in masks:
        mask[2] = 0
    with pytest.raises(ArgumentError, match="sample 2"):
        model(features, masks)
    kept = []
    model.interaction_experts[0](features, masks, kept)
    assert torch.isnan(kept[0][2]).all()  # what the check spares the user


def test_original_takes_neither_masks_nor_other_lengths():
    model = make_model("original")
    features, masks = _inputs(model)
    with pytest.raises(ArgumentError, match="masks: .*original"):
        model(features, masks)
    with pytest.raises(ArgumentError, match=r"features\[1\]"):
        model([features[0], features[1][:, :3]])


def test_encoder_errors():
    config = make_config()
    with pytest.raises(ArgumentError, match="encoders"):
        FLI2MoE(config).encode([torch.zeros(1, 1)] * 2)
    with pytest.raises(ArgumentError, match="encoders: got keys"):
        FLI2MoE(config, {"m0": ProjectionEncoder(4, 8)})
    with pytest.raises(ArgumentError, match=r"encoders\['m1'\]"):
        FLI2MoE(config, {"m0": ProjectionEncoder(4, 8), "m1": torch.relu})
    model = FLI2MoE(config, {"m0": ProjectionEncoder(4, 8), "m1": TabularTokenEncoder(5, 8)})
    with pytest.raises(ArgumentError, match="inputs: got keys"):
        model.encode({"m0": torch.zeros(1, 2, 4)})
    with pytest.raises(ArgumentError, match="inputs: got 1 items"):
        model.encode([torch.zeros(1, 2, 4)])
    with pytest.raises(ArgumentError, match=r"x: got shape \(1, 2, 3\)"):
        model.encode([torch.zeros(1, 2, 3), torch.zeros(1, 5)])
    clash = FLI2MoEConfig(("keys", "m1"), hidden=8, heads=2, layers=1, classes=2)
    with pytest.raises(ArgumentError, match="'keys'"):
        FLI2MoE(clash, {"keys": ProjectionEncoder(4, 8), "m1": ProjectionEncoder(4, 8)})
