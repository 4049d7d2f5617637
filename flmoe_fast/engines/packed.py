"""A model's weights as the engines use them: experts stacked, norms folded into the projections that follow them.

All of it is exact algebra, done in float64:

* A LayerNorm's gain g and shift s go into the next projection: ``W (g * n + s) = (W diag(g)) n + W s``.
* The 1/sqrt(d) of the scores goes into Q.
* A constant added to every key moves all scores of a query alike, which a softmax does not see: K needs no shift.
* Attention weights sum to one, so a constant added to every value comes out as it went in: V's shift goes into the
  output projection's.
* The original generation adds its attention output to itself instead of to the layer's input; that factor of two goes
  into the output projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_fast.model.network import FLI2MoE, sinusoid


@dataclass(frozen=True)
class PackedLayer:
    """One encoder layer of all E experts; every matrix is stored input-major, ready for ``x @ w``."""

    qkv: torch.Tensor  # (3, E, h, H, d) Q, K and V of each head
    q_bias: torch.Tensor  # (E, h, 1, d)
    out: torch.Tensor  # (E, H, H)
    out_bias: torch.Tensor  # (E, 1, H)
    up: torch.Tensor  # (E, H, F) LayerNorm gain folded in
    up_bias: torch.Tensor  # (E, 1, F)
    down: torch.Tensor  # (E, F, H)
    down_bias: torch.Tensor  # (E, 1, H)


@dataclass(frozen=True)
class PackedModel:
    """All weights of an :class:`FLI2MoE` in one dtype on one device."""

    layers: tuple[PackedLayer, ...]
    head: torch.Tensor  # (E, M*H, K)
    head_bias: torch.Tensor  # (E, 1, K)
    positions: torch.Tensor  # (1 or E, Lp, H): one sinusoid, or learned per expert
    routing: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # float64 (in, out), (out,)
    temperature: float
    heads: int
    residual: bool  # whether a layer's attention is added to its input (not in the original generation)

    @staticmethod
    def of(model: FLI2MoE, padded_lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> PackedModel:
        """Pack ``model`` for sequences of the given padded lengths."""
        config = model.config
        hidden, scale = config.hidden, (config.hidden // config.heads) ** -0.5
        residual = config.generation == "fl"
        branch = 1.0 if residual else 2.0
        # Folding in float64 keeps the folded weights correctly rounded in the target dtype.
        state = {k: v.detach().to(device="cpu", dtype=torch.float64) for k, v in model.state_dict().items()}

        def stack(name: str) -> torch.Tensor:
            return torch.stack([state[f"interaction_experts.{e}.fusion_model.{name}"] for e in range(config.experts)])

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype).contiguous()

        def layer(index: int) -> PackedLayer:
            at = f"network.{index}."
            gain1, shift1 = stack(at + "norm1.weight"), stack(at + "norm1.bias")
            gain2, shift2 = stack(at + "norm2.weight"), stack(at + "norm2.bias")
            key, value = stack(at + "attn.kv.weight").chunk(2, dim=1)
            qkv = torch.stack([stack(at + "attn.q.weight") * scale, key, value])  # (3, E, H, H)
            q_shift, _, v_shift = qkv @ shift1[:, :, None]  # (E, H, 1) each
            out = branch * stack(at + "attn.proj.weight")
            out_bias = branch * stack(at + "attn.proj.bias")[:, :, None] + out @ v_shift
            by_head = (qkv * gain1[:, None, :]).unflatten(2, (config.heads, -1))  # (3, E, h, d, H)
            up = stack(at + "mlp.network.0.weight")  # (E, F, H)
            return PackedLayer(
                qkv=cast(by_head.transpose(3, 4)),
                q_bias=cast(q_shift.unflatten(1, (config.heads, -1)).transpose(2, 3)),
                out=cast(out.transpose(1, 2)),
                out_bias=cast(out_bias.transpose(1, 2)),
                up=cast((up * gain2[:, None, :]).transpose(1, 2)),
                up_bias=cast((up @ shift2[:, :, None]).transpose(1, 2) + stack(at + "mlp.network.0.bias")[:, None, :]),
                down=cast(stack(at + "mlp.network.3.weight").transpose(1, 2)),
                down_bias=cast(stack(at + "mlp.network.3.bias")[:, None, :]),
            )

        if config.generation == "original":
            positions = stack("pos_embed")[:, 0]
        else:
            positions = sinusoid(sum(padded_lengths), hidden, dtype=torch.float64)[None]
        linears = range(0, 3 * config.reweight_layers, 3)
        return PackedModel(
            layers=tuple(layer(i) for i in range(config.layers)),
            head=cast(stack(f"network.{config.layers}.fc.weight").transpose(1, 2)),
            head_bias=cast(stack(f"network.{config.layers}.fc.bias")[:, None, :]),
            positions=cast(positions),
            routing=tuple(
                (
                    state[f"reweight.mlp.network.{i}.weight"].T.to(device),
                    state[f"reweight.mlp.network.{i}.bias"].to(device),
                )
                for i in linears
            ),
            temperature=float(config.temperature),
            heads=config.heads,
            residual=residual,
        )
