"""A model's weights as the engines use them: experts stacked, norms folded into the projections that follow them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_fast.model.network import FLI2MoE, sinusoid


@dataclass(frozen=True)
class PackedLayer:
    """One encoder layer of all E experts; every matrix is stored input-major, ready for ``x @ w``.

    The original generation adds its attention output to itself instead of to the layer's input; that factor of two is
    part of ``out`` and ``out_bias``.
    """

    qkv: torch.Tensor  # (E, H, 3H) LayerNorm gain and the 1/sqrt(d) of the scores folded in
    qkv_bias: torch.Tensor  # (E, 1, 3H) from the LayerNorm shift; the projection itself has no bias
    out: torch.Tensor  # (E, H, H)
    out_bias: torch.Tensor  # (E, 1, H)
    up: torch.Tensor  # (E, H, F) LayerNorm gain folded in
    up_bias: torch.Tensor  # (E, 1, F)
    down: torch.Tensor  # (E, F, H)
    down_bias: torch.Tensor  # (E, 1, H)


@dataclass(frozen=True)
class PackedModel:
    """All weights of an :class:`FLI2MoE` in one dtype on one device.

    Folding a LayerNorm's gain g and shift s into the next projection W is exact algebra:
    ``W (g * n + s) = (W diag(g)) n + W s`` for the plain normalised row n.
    """

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
            qkv = torch.cat([stack(at + "attn.q.weight") * scale, stack(at + "attn.kv.weight")], dim=1)  # (E, 3H, H)
            up = stack(at + "mlp.network.0.weight")  # (E, F, H)
            return PackedLayer(
                qkv=cast((qkv * gain1[:, None, :]).transpose(1, 2)),
                qkv_bias=cast((qkv @ shift1[:, :, None]).transpose(1, 2)),
                out=cast(branch * stack(at + "attn.proj.weight").transpose(1, 2)),
                out_bias=cast(branch * stack(at + "attn.proj.bias")[:, None, :]),
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
                (state[f"reweight.mlp.network.{i}.weight"].T.to(device), state[f"reweight.mlp.network.{i}.bias"].to(device))
                for i in linears
            ),
            temperature=float(config.temperature),
            heads=config.heads,
            residual=residual,
        )

