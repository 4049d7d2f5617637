"""The experts of an FL-I2MoE or I2MoE as stacks side by side.

Beside the folding of every stack (:mod:`flmoe_fast.engines.stack`): the original generation adds its attention output
to itself instead of to the layer's input; that factor of two goes into the output projection. So does that of MoE++,
which adds its attention output to the layer's input twice.
"""

from __future__ import annotations

import torch

from flmoe_fast.engines.stack import Layer, Networks, Stack
from flmoe_fast.model.network import FLI2MoE

#: Weight and bias, or gain and shift.
Pair = tuple[torch.Tensor, torch.Tensor]


class Weights:
    """A model's state dict in float64 on the CPU, experts stacked."""

    def __init__(self, model: FLI2MoE):
        self.config = model.config
        self.state = {k: v.detach().to(device="cpu", dtype=torch.float64) for k, v in model.state_dict().items()}

    def has(self, name: str) -> bool:
        """Whether the experts have a parameter of that name."""
        return f"interaction_experts.0.fusion_model.{name}" in self.state

    def __call__(self, name: str) -> torch.Tensor:
        """A parameter of all experts (E, ...)."""
        at = (f"interaction_experts.{e}.fusion_model.{name}" for e in range(self.config.experts))
        return torch.stack([self.state[key] for key in at])

    def pair(self, name: str) -> Pair:
        """Weight and bias of one module."""
        return self(f"{name}.weight"), self(f"{name}.bias")


def fold(weights: Weights) -> Stack:
    """The layers of all experts."""
    config = weights.config
    # The published MoE++ keeps the last layer only, which adds its attention to its input, twice.
    alone = config.fusion == "moepp"
    places = [f"layers.{config.layers - 1}."] if alone else [f"network.{i}." for i in range(config.layers)]
    return Stack(
        layers=tuple(_layer(weights, place) for place in places),
        heads=config.heads,
        residual=config.generation == "fl" or alone,
        gate=config.gate,
        slots=config.top_k or 0,
    )


def _layer(weights: Weights, at: str) -> Layer:
    config = weights.config
    gain, shift = weights.pair(at + "norm1")
    branch = 1.0 if config.generation == "fl" else 2.0
    key, value = weights(at + "attn.kv.weight").chunk(2, dim=1)
    query = weights(at + "attn.q.weight") * (config.hidden // config.heads) ** -0.5
    qkv = torch.stack([query, key, value])  # (3, E, D, H)
    q_shift, _, v_shift = qkv @ shift[:, :, None]  # (E, D, 1) each
    weight, bias = weights.pair(at + "attn.proj")
    out = branch * weight
    norm = weights.pair(at + "norm2")
    up, up_bias, down, down_bias = _dense(weights, at, norm)
    return Layer(
        qkv=(qkv * gain[:, None, :]).permute(1, 3, 0, 2).flatten(2),
        q_bias=q_shift.mT,
        out=out.mT.contiguous(),
        out_bias=(branch * bias[:, :, None] + out @ v_shift).mT,
        up=up,
        up_bias=up_bias,
        down=down,
        down_bias=down_bias,
        networks=_networks(weights, at + "mlp.", norm) if weights.has(at + "mlp.experts.htoh4.weight") else None,
    )


def _dense(weights: Weights, at: str, norm: Pair) -> tuple[torch.Tensor, ...]:
    """Up-projection and bias, down-projection and bias of a layer's dense block; of width 0 where it has none."""
    config = weights.config
    if weights.has(at + "mlp.network.0.weight"):
        down, down_bias = weights.pair(at + "mlp.network.3")
        return *_behind(norm, *weights.pair(at + "mlp.network.0")), down.mT.contiguous(), down_bias[:, None]
    sizes = (config.hidden, 0), (1, 0), (0, config.hidden), (1, config.hidden)
    return tuple(torch.zeros(config.experts, *size, dtype=torch.float64) for size in sizes)


def _networks(weights: Weights, at: str, norm: Pair) -> Networks:
    config = weights.config
    if config.gate == "noisy":  # whose gate is stored input-major already and has no bias
        gate = weights(at + "gate.w_gate").mT
        gate_bias = torch.zeros(gate.shape[:2], dtype=gate.dtype)
    else:
        gate, gate_bias = weights.pair(at + "gate.gate")
    gate, gate_bias = _behind(norm, gate, gate_bias)
    count = gate.shape[2]
    wide, wide_bias = weights.pair(at + "experts.htoh4")  # (E, X, F, H), (E, X, F)
    narrow, narrow_bias = weights.pair(at + "experts.h4toh")
    each = norm[0].repeat_interleave(count, dim=0), norm[1].repeat_interleave(count, dim=0)
    up, up_bias = _behind(each, wide.flatten(0, 1), wide_bias.flatten(0, 1))
    down, down_bias = narrow.flatten(0, 1).mT.contiguous(), narrow_bias.flatten(0, 1)[:, None]
    return Networks(gate, gate_bias, up, up_bias, down, down_bias)


def _behind(norm: Pair, weight: torch.Tensor, bias: torch.Tensor) -> Pair:
    """Input-major weight and bias of a projection (G, out, in) behind a LayerNorm's gain and shift (G, in)."""
    gain, shift = norm
    return (weight * gain[:, None]).mT.contiguous(), (weight @ shift[:, :, None]).mT + bias[:, None]
