"""Sparse feed-forward blocks and the other back-ends against loops over single tokens."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch.nn import functional

from flmoe_fast.checks import ArgumentError
from flmoe_fast.model import sparse
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.sparse import SparseMLP, first_come, largest
from flmoe_fast.model.training.predict import predict

H = 8
GATES = ("naive", "gshard", "switch", "noisy")


def make_config(gate, **fields):
    fields = {"heads": 2, "layers": 2, "classes": 3, "reweight_hidden": 6, "ffn_experts": 4, **fields}
    return FLI2MoEConfig(("m0", "m1"), hidden=H, gate=gate, **fields)


def shaken(module, scale=0.4, seed=0):
    """The module in float64 with no parameter at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def plain_block(block, config, tokens, training, uniform=None):
    """One pass (N, H), token by token: outputs, dropped slots, balancing loss."""
    state = {key: value.detach() for key, value in block.state_dict().items()}
    count, networks = len(tokens), config.ffn_experts
    picks, scores, all_logits = [], [], []
    for n, token in enumerate(tokens):
        if config.gate == "noisy":
            logits = token @ state["gate.w_gate"]
        else:
            logits = state["gate.gate.weight"] @ token + state["gate.gate.bias"]
        if config.gate == "switch" and training:
            logits = logits + 0.9 + 0.2 * uniform[n]
        all_logits.append(logits)
        order = sorted(range(networks), key=lambda x: (-float(logits[x]), x))[: config.top_k]
        weights = [math.exp(float(logits[x])) for x in (order if config.gate != "switch" else range(networks))]
        picks.append(list(order))
        scores.append([math.exp(float(logits[x])) / sum(weights) for x in order])
    first_choices = [chosen[0] for chosen in picks]
    softmax = torch.stack(all_logits).softmax(-1)
    factor = 1.2 if training else 2.4
    room = math.inf
    if config.capacity == "reference" and config.gate == "gshard":
        room = math.ceil(factor * count) * 2 // networks
    if config.capacity == "reference" and config.gate == "switch":
        room = math.ceil(factor * count / networks)
    used, dropped = [0] * networks, 0
    for chosen in picks:
        for slot, network in enumerate(chosen):
            used[network] += 1
            if used[network] > room:
                chosen[slot], dropped = -1, dropped + 1
    out = torch.zeros_like(tokens)
    for n, token in enumerate(tokens):
        for network, score in zip(picks[n], scores[n]):
            if network >= 0:
                inner = state["experts.htoh4.weight"][network] @ token + state["experts.htoh4.bias"][network]
                inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
                out[n] += score * (
                    state["experts.h4toh.weight"][network] @ inner + state["experts.h4toh.bias"][network]
                )
    loss = 0.0
    if config.gate == "gshard":
        share = [first_choices.count(x) / count for x in range(networks)]
        loss = sum(s * float(p) for s, p in zip(share, softmax.mean(0))) / networks * networks**2
    if config.gate == "switch":
        kept = [min(first_choices.count(x), room) for x in range(networks)]
        loss = networks * sum(k / sum(kept) * float(p) / sum(kept) for k, p in zip(kept, softmax.sum(0)))
    if config.gate == "noisy":
        importance, load = [0.0] * networks, [0.0] * networks
        for chosen, weights in zip(picks, scores):
            for network, weight in zip(chosen, weights):
                importance[network] += weight
                load[network] += 1
        loss = sum(statistics.variance(x) / (statistics.mean(x) ** 2 + 1e-10) for x in (importance, load))
    return out, dropped, loss


# The noisy gate in training has a test of its own.
CASES = [(gate, mode) for gate in GATES for mode in ("eval", "train") if (gate, mode) != ("noisy", "train")]


@pytest.mark.parametrize(("gate", "mode"), CASES)
@pytest.mark.parametrize("capacity", ("none", "reference"))
@pytest.mark.parametrize("networks", (2, 4, 16))
def test_block_agrees_with_a_loop_over_tokens(gate, mode, capacity, networks, monkeypatch):
    training = mode == "train"
    config = make_config(gate, capacity=capacity, ffn_experts=networks)
    block = shaken(SparseMLP(config)).train(training)
    x = torch.randn(4, 15, H, dtype=torch.float64)  # two passes of two samples
    uniform = torch.rand(2, 30, networks, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda _: uniform)
    with torch.no_grad():
        out, balance = block(x, 2)
    total = 0
    for p in range(2):
        expected, dropped, loss = plain_block(block, config, x[2 * p : 2 * p + 2].flatten(0, 1), training, uniform[p])
        torch.testing.assert_close(out[2 * p : 2 * p + 2].flatten(0, 1), expected, rtol=1e-12, atol=1e-12)
        assert float(balance[p]) == pytest.approx(loss, rel=1e-12)
        total += dropped
    if networks == 16:
        assert (total > 0) == (capacity == "reference" and gate in ("gshard", "switch"))


def test_capacity_goes_to_the_first_in_the_order_token_then_slot():
    chosen = torch.tensor([[[0, 1], [1, 0], [0, 2], [1, 0]]])
    assert first_come(chosen, 3, 2).tolist() == [[[0, 1], [1, 0], [-1, 2], [-1, -1]]]
    assert first_come(chosen, 3, 4).tolist() == chosen.tolist()
    assert first_come(chosen, 3, 0).unique().tolist() == [-1]
    assert [sparse.slots_per_network("gshard", n, 4, False) for n in (1, 4, 5)] == [1, 5, 6]
    assert [sparse.slots_per_network("gshard", n, 4, True) for n in (1, 4, 5)] == [1, 2, 3]
    assert [sparse.slots_per_network("switch", n, 16, False) for n in (1, 100)] == [1, 15]


def test_autocast_rounds_and_nothing_else():
    block = SparseMLP(make_config("naive", top_k=4))  # every token uses every network: no choice can flip
    x = torch.randn(2, 6, H)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = block(x)[0]
    with torch.no_grad():
        exact = block(x)[0]
    assert rounded.dtype == torch.float32
    # Five roundings on the way, each of the largest term: gate, two products, two sums with a bias.
    assert 0 < (rounded - exact).abs().max() < 5 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_ties_go_to_the_lower_index():
    values = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]] * 50)
    assert all(row == [1, 2, 4] for row in largest(values, 3)[1].tolist())
    block = shaken(SparseMLP(make_config("naive")))
    with torch.no_grad():
        block.gate.gate.weight.zero_(), block.gate.gate.bias.zero_()
    assert block.gate(torch.randn(1, 9, H, dtype=torch.float64)).chosen.tolist() == [[[0, 1]] * 9]


def test_noisy_gate_in_training(monkeypatch):
    config = make_config("noisy")
    block = shaken(SparseMLP(config)).train()
    tokens, noise = torch.randn(1, 7, H, dtype=torch.float64), torch.randn(1, 7, 4, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    routing = block.gate(tokens)
    normal = statistics.NormalDist()
    importance, load = [0.0] * 4, [0.0] * 4
    for n in range(7):
        clean = (tokens[0, n] @ block.gate.w_gate).tolist()
        spread = (functional.softplus(tokens[0, n] @ block.gate.w_noise) + 0.01).tolist()
        noisy = [c + s * float(z) for c, s, z in zip(clean, spread, noise[0, n])]
        order = sorted(range(4), key=lambda x: -noisy[x])
        assert routing.chosen[0, n].tolist() == order[:2]
        for network in range(4):
            # Among the others, the second largest is what has to be beaten.
            others = sorted((noisy[x] for x in range(4) if x != network), reverse=True)
            load[network] += normal.cdf((clean[network] - others[1]) / spread[network])
        for network, score in zip(order[:2], routing.scores[0, n].tolist()):
            importance[network] += score
    expected = sum(statistics.variance(x) / statistics.mean(x) ** 2 for x in (importance, load))
    assert routing.balance.item() == pytest.approx(expected, rel=1e-8)
    gradients = torch.autograd.grad(routing.balance.sum(), [block.gate.w_gate, block.gate.w_noise])
    assert all(float(g.abs().max()) > 0 for g in gradients)
    assert torch.equal(block.eval().gate(tokens).chosen[0, 0], largest(tokens[0, 0] @ block.gate.w_gate, 2)[1])


def test_random_routing_drops_second_slots_in_training_only():
    block = shaken(SparseMLP(make_config("gshard", random_routing=True)))
    tokens = torch.randn(1, 4000, H, dtype=torch.float64)
    routing = block.train().gate(tokens)
    dropped = routing.chosen[0, :, 1] == -1
    assert not (routing.chosen[0, :, 0] == -1).any()
    assert float(dropped.double().mean()) == pytest.approx((1 - 2 * routing.scores[0, :, 1]).mean().item(), abs=0.03)
    assert not (block.eval().gate(tokens).chosen == -1).any()


def make_model(gate, **fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(FLI2MoE(make_config(gate, **fields))).eval()


def make_inputs(lengths=(5, 3), samples=3):
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(samples, t, H, generator=generator, dtype=torch.float64) for t in lengths]
    masks = [torch.ones(samples, t) for t in lengths]
    masks[0][:, 3:] = 0
    return features, masks


@pytest.mark.parametrize("generation", ("fl", "original"))
def test_equal_networks_are_one_dense_block(generation):
    """Scores sum to one, so a sparse model whose networks are all alike is a dense model."""
    fields = {"generation": generation, "layers": 4, "num_tokens": (4, 4) if generation == "original" else None}
    model = make_model("naive", **fields)
    with torch.no_grad():
        for expert in model.interaction_experts:
            for layer in expert.fusion_model.network[:4:2]:
                for parameter in layer.mlp.experts.parameters():
                    parameter[:] = parameter[:1].clone()
    state = {k: v for k, v in model.state_dict().items() if ".gate." not in k and ".all_gates." not in k}
    for key in list(state):
        renamed = key.replace("experts.htoh4", "network.0").replace("experts.h4toh", "network.3")
        if renamed != key and ".mlp." in key:
            state[renamed] = state.pop(key)[0]
    dense = FLI2MoE(make_config(None, ffn_experts=None, **fields)).double().eval()
    dense.load_state_dict(state)
    features, masks = make_inputs((4, 4))
    masks = None if generation == "original" else masks
    with torch.no_grad():
        torch.testing.assert_close(model(features, masks).logits, dense(features, masks).logits, rtol=1e-12, atol=1e-12)
        model.interaction_experts[1].fusion_model.network[2].mlp.experts.h4toh.bias[1:, 0] += 0.1
        assert (model(features, masks).logits - dense(features, masks).logits).abs().max() > 1e-6


def test_sparse_layers_see_one_modality_at_a_time():
    model = make_model("switch", layers=4)
    seen = []
    for layer in model.interaction_experts[0].fusion_model.network[:-1]:
        layer.mlp.register_forward_pre_hook(lambda m, a: seen.append((type(m).__name__, tuple(a[0].shape))))
    features, masks = make_inputs()
    balance = []
    model.interaction_experts[0](features, masks, balance=balance)
    pair = [("SparseMLP", (3, 5, H)), ("SparseMLP", (3, 3, H))]
    assert seen == [*pair, ("MLP", (3, 8, H)), *pair, ("MLP", (3, 8, H))]
    assert [b.shape for b in balance] == [(1,)] * 2


@pytest.mark.parametrize("gate", ("gshard", "noisy"))
def test_balancing_loss_of_a_layer(gate):
    """The last modality's loss, as the published gates overwrite it; noisy gates add theirs up."""
    model = make_model(gate, layers=1)
    features, masks = make_inputs()
    losses, balance = [], []
    block = model.interaction_experts[2].fusion_model.network[0].mlp
    block.register_forward_hook(lambda m, a, out: losses.append(out[1]))
    model.interaction_experts[2](features, masks, balance=balance)
    assert len(losses) == 2 and losses[0] != losses[1]
    assert torch.equal(balance[0], losses[1] if gate == "gshard" else losses[0] + losses[1])


def test_only_capacity_makes_samples_depend_on_their_batch():
    features, masks = make_inputs(samples=4)
    for capacity, depends in (("none", False), ("reference", True)):
        model = make_model("switch", capacity=capacity, ffn_experts=16)
        parts = [model([f[b : b + 1] for f in features], [m[b : b + 1] for m in masks]).logits for b in range(4)]
        change = (torch.cat(parts) - model(features, masks).logits).abs().max()
        assert (change > 1e-6) if depends else (change < 1e-12)
        alone = model(features, masks, passes=4).logits
        torch.testing.assert_close(torch.cat(parts), alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(predict(model, features, masks, batch_size=3).logits, alone, rtol=1e-12, atol=1e-12)
        with pytest.raises(ArgumentError, match="passes: got 3, expected a divisor of the 4 samples"):
            model(features, masks, passes=3)
        other = {"none": "reference", "reference": "none"}[capacity]
        model.set_capacity(other)
        assert model.config.capacity == other
        torch.testing.assert_close(
            model(features, masks).logits,
            make_model("switch", capacity=other, ffn_experts=16)(features, masks).logits,
            rtol=1e-12,
            atol=1e-12,
        )


def test_padding_takes_capacity():
    """Padded tokens count in N and, where they come first, take slots."""
    model = make_model("switch", capacity="reference", ffn_experts=16, layers=1)
    features, _ = make_inputs((8, 3), samples=1)
    front, back = torch.ones(1, 8), torch.ones(1, 8)
    front[0, :5], back[0, 3:] = 0, 0
    rest = torch.ones(1, 3)
    routed = {}
    block = model.interaction_experts[0].fusion_model.network[0].mlp
    for name, mask in (("front", front), ("back", back)):
        model.interaction_experts[0]([features[0], features[1]], [mask, rest])
        normed = []
        hook = block.register_forward_pre_hook(lambda m, a, normed=normed: normed.append(a[0]))
        model.interaction_experts[0](features, [mask, rest])
        hook.remove()
        routed[name] = block.gate(normed[0]).chosen[0, :, 0]
    assert (routed["front"][:5] >= 0).sum() == 2  # ceil(2.4 * 8 / 16) of the five alike padded tokens
    assert (routed["back"][3:] >= 0).sum() <= 2


def test_interpretcc_against_plain_algebra():
    config = FLI2MoEConfig(
        ("a", "b", "c"), hidden=H, heads=1, layers=1, classes=3, generation="original", num_tokens=(1, 1, 1),
        fusion="interpretcc", gumbel_temperature=0.7, gate_threshold=0.6,
    )  # fmt: skip
    model = shaken(FLI2MoE(config)).eval()
    features = [torch.randn(6, 1, H, dtype=torch.float64) for _ in range(3)]
    output = model(features)
    openings = []
    for e, expert in enumerate(model.interaction_experts):
        state = {k: v for k, v in expert.fusion_model.state_dict().items()}
        for b in range(6):
            parts = []
            for m in range(3):
                x = features[m][b, 0]
                inner = (state[f"modality_gates.{m}.0.weight"] @ x + state[f"modality_gates.{m}.0.bias"]).clamp(min=0)
                score = state[f"modality_gates.{m}.2.weight"] @ inner + state[f"modality_gates.{m}.2.bias"]
                opening = float(1 / (1 + math.exp(-float(score) / 0.7)) > 0.6)
                openings.append(opening)
                parts.append(opening * x)
            inner = (state["fusion_layer.0.weight"] @ torch.cat(parts) + state["fusion_layer.0.bias"]).clamp(min=0)
            inner = (state["classifier.0.weight"] @ inner + state["classifier.0.bias"]).clamp(min=0)
            logits = state["classifier.2.weight"] @ inner + state["classifier.2.bias"]
            torch.testing.assert_close(output.expert_logits[b, e], logits, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(output.latents[b, e], torch.cat(parts), rtol=1e-12, atol=1e-12)
    assert 0 < sum(openings) < len(openings)
    # In training gates are noisy, and a hard gate passes the soft gate's gradient.
    gate = model.interaction_experts[0].fusion_model.train()
    draws = torch.stack([gate.opening(0, features[0][:, 0]) for _ in range(200)]).round().mean(0)
    assert bool(((draws > 0.02) & (draws < 0.98)).any())
    gradient = torch.autograd.grad(gate.opening(0, features[0][:, 0]).sum(), gate.modality_gates[0][2].weight)[0]
    assert gradient.abs().max() > 0


def test_moepp_is_the_last_layers_attention_taken_twice():
    config = FLI2MoEConfig(
        ("a", "b"), hidden=H, heads=2, layers=3, classes=3, generation="original", num_tokens=(4, 4),
        fusion="moepp", ffn_experts=8,
    )  # fmt: skip
    model = shaken(FLI2MoE(config)).eval()
    features = [torch.randn(2, 4, H, dtype=torch.float64) for _ in range(2)]
    before = model(features).expert_logits
    fusion = model.interaction_experts[1].fusion_model
    x = torch.cat(features, dim=1) + fusion.pos_embed
    layer = fusion.layers[2]
    x = x + 2 * layer.attn(layer.norm1(x), None)[0]
    latent = torch.cat([x[:, :4].mean(1), x[:, 4:].mean(1)], dim=-1)
    expected = latent @ fusion.classification_head.fc.weight.T + fusion.classification_head.fc.bias
    torch.testing.assert_close(before[:, 1], expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for unused in (*fusion.layers[:2].parameters(), *layer.mlp.parameters(), *layer.norm2.parameters()):
            unused.add_(1.0)
    assert torch.equal(model(features).expert_logits, before)


@pytest.mark.parametrize(
    ("argument", "fields"),
    (
        ("gate", {"gate": "top2"}),
        ("ffn_experts", {"ffn_experts": None}),
        ("ffn_experts", {"ffn_experts": 1}),
        ("ffn_experts", {"gate": None}),
        ("top_k", {"gate": "gshard", "top_k": 1}),
        ("top_k", {"top_k": 5}),
        ("top_k", {"gate": "switch", "top_k": 2}),
        ("top_k", {"gate": None, "ffn_experts": None, "top_k": 2}),
        ("capacity", {"capacity": 1.2}),
        ("random_routing", {"random_routing": True}),
        ("random_routing", {"random_routing": "yes"}),
        ("gate_weight", {"gate_weight": -1.0}),
        ("gumbel_temperature", {"gumbel_temperature": 0.0}),
        ("gate_threshold", {"gate_threshold": 1.0}),
        ("fusion", {"fusion": "lstm"}),
        ("fusion", {"fusion": "moepp"}),
        ("gate", {"fusion": "moepp", "generation": "original", "num_tokens": (2, 2)}),
        ("num_tokens", {"fusion": "interpretcc", "generation": "original", "num_tokens": (2, 2), "gate": None}),
        ("ffn_experts", {"fusion": "moepp", "generation": "original", "num_tokens": (2, 2), "gate": None}),
    ),
)
def test_bad_configurations_name_the_field(argument, fields):
    good = make_config("naive").to_dict()
    assert FLI2MoEConfig.from_dict(good).top_k == 2 and make_config("switch").top_k == 1
    with pytest.raises(ArgumentError) as caught:
        FLI2MoEConfig.from_dict({**good, "top_k": None, **fields})
    assert caught.value.argument == argument
