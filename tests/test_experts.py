"""The experts interface of transformers: our experts against the module's own loop and against grouped_mm."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward, use_experts_implementation

from flmoe_fast.adapt import experts as ours
from flmoe_fast.adapt import grouped
from flmoe_fast.adapt.experts import experts_forward, register
from flmoe_fast.environment import MissingExtra, require


class Config:
    _experts_implementation = "eager"


def experts_module(E=5, H=12, I=8, *, has_gate=True, has_bias=False, is_transposed=False, has_norm=False):  # noqa: E741
    """An experts module as transformers has them, with a loop of its own as the reference, and large random weights."""

    @use_experts_implementation(
        has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed, has_post_expert_norm=has_norm
    )
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            wide = 2 * I if has_gate else I
            name = "gate_up_proj" if has_gate else "up_proj"
            turned = (lambda a, b: (E, a, b)) if is_transposed else (lambda a, b: (E, b, a))
            self.register_parameter(name, nn.Parameter(torch.randn(turned(H, wide))))
            self.down_proj = nn.Parameter(torch.randn(turned(I, H)))
            if has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, wide)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, H))
            if has_norm:
                self.post_expert_norm = nn.LayerNorm(H)
            self.num_experts, self.act_fn = E, nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            up = self.gate_up_proj if has_gate else self.up_proj
            rows = []
            for token, (index, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights)):
                total = torch.zeros_like(hidden_states[token])
                for e, weight in zip(index, weights):
                    if e >= E:
                        continue
                    matrix = up[e] if is_transposed else up[e].T
                    wide = hidden_states[token] @ matrix
                    if has_bias:
                        wide = wide + getattr(self, "gate_up_proj_bias" if has_gate else "up_proj_bias")[e]
                    wide = self._apply_gate(wide[None])[0] if has_gate else self.act_fn(wide)
                    result = wide @ (self.down_proj[e] if is_transposed else self.down_proj[e].T)
                    result = result + self.down_proj_bias[e] if has_bias else result
                    total = total + weight * (self.post_expert_norm(result) if has_norm else result)
                rows.append(total)
            return torch.stack(rows) if rows else torch.zeros_like(hidden_states)

    return Experts(Config())


def routed(tokens: int, experts: int, k: int, width: int, dtype=torch.float64, only: int | None = None):
    """Hidden states, chosen experts (all the same one with ``only``) and weights that do not sum to one."""
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k).long()
    if only is not None:
        index = torch.full_like(index, only)
    return torch.randn(tokens, width, dtype=dtype), index, torch.rand(tokens, k, dtype=dtype)


KINDS = {
    "gated": {},
    "plain": {"has_gate": False},
    "biases": {"has_bias": True},
    "transposed with biases": {"has_bias": True, "is_transposed": True},
    "norm after": {"has_norm": True},
}
ROUTES = {
    "one token": (1, 2, None),
    "few tokens": (6, 2, None),
    "all experts": (4, 5, None),
    "one expert for all": (40, 1, 3),
    "many tokens": (200, 2, None),
    "no tokens": (0, 2, None),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_the_modules_own_loop(kind, route):
    module = experts_module(**kind).double()
    tokens, k, only = route
    given = routed(tokens, 5, k, 12, only=only)
    with torch.no_grad():
        expected, found = module(*given), experts_forward(module, *given)
        # Both ways, whichever the number of tokens would choose.
        chosen, order = given[1].reshape(-1).sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(5), right=True)
        rest = (chosen, order, order // k, given[2], ends)
        both = [found, ours._grouped(module, given[0], *rest)]
        if tokens:
            both.append(ours._one_by_one(module, given[0], order // k, given[2].reshape(-1)[order], ends))
    for result in both:
        assert result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-10, atol=1e-10)


def test_indices_beyond_the_experts_add_nothing():
    for kind in KINDS.values():
        module = experts_module(**kind).double()
        states, index, weights = routed(50, 5, 2, 12)
        index[::3, 1] = 5
        index[4] = 5
        with torch.no_grad():
            expected = module(states, index, weights)
            assert torch.allclose(experts_forward(module, states, index, weights), expected, rtol=1e-10, atol=1e-10)
        assert not bool(expected[4].any())


@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_grouped_mm(tokens, dtype):
    """At most twice grouped_mm's error against float64, plus one rounding; with broken experts it must be far more."""
    module = experts_module(E=8, H=32, I=16).to(dtype)
    states, index, weights = routed(tokens, 8, 3, 32, dtype)
    with torch.no_grad():
        theirs = grouped_mm_experts_forward(module, states, index, weights).double()
        found = experts_forward(module, states, index, weights)
        exact = module.double()(states.double(), index, weights.double())
        module.to(dtype)
        limit = 2 * float((theirs - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max())
        assert found.dtype == dtype and float((found.double() - exact).abs().max()) <= limit
        # Negative controls: shifted expert numbers, and no experts at all.
        shifted = experts_forward(module, states, (index + 1) % 8, weights).double()
        module.down_proj.zero_()
        nothing = experts_forward(module, states, index, weights).double()
    for broken in (shifted, nothing):
        assert float((broken - exact).abs().max()) > 10 * limit


@pytest.mark.parametrize("kind", [{}, {"has_bias": True, "is_transposed": True}], ids=["gated", "biases"])
def test_gradients(kind):
    module = experts_module(E=4, H=6, I=5, **kind).double()
    states, index, weights = routed(9, 4, 2, 6)
    index[0, 0] = 4
    states.requires_grad_(), weights.requires_grad_()
    gradients = []
    for function in (module.forward, lambda *given: experts_forward(module, *given)):
        value = (function(states, index, weights) * torch.arange(6.0).double().cos()).square().sum()
        gradients.append(torch.autograd.grad(value, [states, weights, *module.parameters()]))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9) and bool(a.abs().max() > 0)


def test_the_operator():
    x, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    ends = torch.tensor([2, 2, 7])
    found = grouped.grouped_linear(x, weight, ends)
    assert torch.allclose(found[:2], x[:2] @ weight[0]) and torch.allclose(found[2:7], x[2:7] @ weight[2])
    assert not bool(found[7:].any())
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(grouped.grouped_linear, (x.requires_grad_(), turned.requires_grad_(), ends))
    torch.library.opcheck(grouped.grouped_outer, (x.detach(), torch.randn(9, 5, dtype=torch.float64), ends))
    nobody = grouped.grouped_linear(torch.randn(5, 8), torch.randn(2, 8, 8), torch.tensor([1, 3]))
    assert not bool(nobody[3:].any())  # PyTorch's own leaves these rows as they were in memory


def tiny(**options) -> Qwen3MoeForCausalLM:
    """A small mixture model whose experts matter: at their initial scale zeroed experts would pass many a test."""
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, **options,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.mul_(25)
    return model


def test_in_a_model_of_transformers():
    model, ids = tiny(), torch.randint(0, 40, (3, 11))
    assert register() == "flmoe_fast" and "flmoe_fast" in ALL_EXPERTS_FUNCTIONS
    values = {}
    with torch.no_grad():
        for name in ("eager", "grouped_mm", "flmoe_fast"):
            model.set_experts_implementation(name)
            values[name] = model(ids).logits
        layer = model.model.layers[0].mlp.experts
        kept = layer.down_proj.clone()
        layer.down_proj.zero_()
        zeroed = model(ids).logits
        layer.down_proj.copy_(kept.roll(1, 0))
        shifted = model(ids).logits
    scale = float(values["eager"].abs().max())
    assert float((values["flmoe_fast"] - values["eager"]).abs().max()) <= 1e-4 * scale
    assert float((values["flmoe_fast"] - values["grouped_mm"]).abs().max()) <= 1e-4 * scale
    for broken in (zeroed, shifted):
        assert float((broken - values["eager"]).abs().max()) > 1e-2 * scale
    with pytest.raises(ValueError, match="not supported"):
        model.set_experts_implementation("flmoe_quick")


def test_float64_where_grouped_mm_has_none():
    model, ids = tiny().double(), torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(ids).logits
        model.set_experts_implementation(register())
        assert torch.allclose(model(ids).logits, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="Double"):
        F.grouped_mm(torch.randn(4, 8).double(), torch.randn(2, 8, 8).double(), offs=torch.tensor([2, 4]).int())


def test_compiles_in_one_piece():
    module = experts_module(E=4, H=8, I=8).eval()
    states, index, weights = routed(6, 4, 2, 8, torch.float32)

    def run(states, index, weights):
        return experts_forward(module, states, index, weights)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(states, index, weights), run(states, index, weights), atol=1e-5)


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    install = r"pip install 'flmoe-fast\[transformers\]'$"
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(MissingExtra, match=r"^transformers [\d.]+ has no .*\.moe, a newer one is needed: " + install):
        register()
    with pytest.raises(MissingExtra, match="^no_such_package is not installed: " + install):
        require("no_such_package.part", "transformers")
