"""A model's weights as the engines use them: experts stacked, norms folded into the projections that follow them.

All of it is exact algebra, done in float64:

* A LayerNorm's gain g and shift s go into the next projection: ``W (g * n + s) = (W diag(g)) n + W s``.
* The 1/sqrt(d) of the scores goes into Q.
* A constant added to every key moves all scores of a query alike, which a softmax does not see: K needs no shift.
* Attention weights sum to one, so a constant added to every value comes out as it went in: V's shift goes into the
  output projection's.
* The original generation adds its attention output to itself instead of to the layer's input; that factor of two goes
  into the output projection. So does that of MoE++, which adds its attention output to the layer's input twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_fast.model.network import FLI2MoE, sinusoid


@dataclass(frozen=True)
class PackedNetworks:
    """A sparse feed-forward block of all E experts: X networks each, expert after expert."""

    gate: torch.Tensor  # (E, H, X) LayerNorm gain folded in
    gate_bias: torch.Tensor  # (E, 1, X)
    up: torch.Tensor  # (E*X, H, F) LayerNorm gain folded in
    up_bias: torch.Tensor  # (E*X, 1, F)
    down: torch.Tensor  # (E*X, F, H)
    down_bias: torch.Tensor  # (E*X, 1, H)


@dataclass(frozen=True)
class PackedLayer:
    """One encoder layer of all E experts; every matrix is stored input-major, ready for ``x @ w``.

    A sparse feed-forward block is in ``networks``; its layer's dense one, like that of a layer which has none, is of
    width F = 0.
    """

    qkv: torch.Tensor  # (3, E, h, H, d) Q, K and V of each head
    q_bias: torch.Tensor  # (E, h, 1, d)
    out: torch.Tensor  # (E, H, H)
    out_bias: torch.Tensor  # (E, 1, H)
    up: torch.Tensor  # (E, H, F) LayerNorm gain folded in
    up_bias: torch.Tensor  # (E, 1, F)
    down: torch.Tensor  # (E, F, H)
    down_bias: torch.Tensor  # (E, 1, H)
    networks: PackedNetworks | None = None


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
    slots: int  # networks a token uses in sparse feed-forward blocks, 0 without such blocks
    residual: bool  # whether a layer's attention is added to its input (not in the original generation)

    @staticmethod
    def of(model: FLI2MoE, padded_lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> PackedModel:
        """Pack ``model`` for sequences of the given padded lengths."""
        config = model.config
        hidden, scale = config.hidden, (config.hidden // config.heads) ** -0.5
        # The published MoE++ keeps the last layer only, which adds its attention to its input, twice.
        alone = config.fusion == "moepp"
        residual = config.generation == "fl" or alone
        branch = 1.0 if config.generation == "fl" else 2.0
        # Folding in float64 keeps the folded weights correctly rounded in the target dtype.
        state = {k: v.detach().to(device="cpu", dtype=torch.float64) for k, v in model.state_dict().items()}

        def stack(name: str) -> torch.Tensor:
            return torch.stack([state[f"interaction_experts.{e}.fusion_model.{name}"] for e in range(config.experts)])

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype).contiguous()

        def folded(weight: torch.Tensor, bias: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> tuple:
            """Input-major weight and bias of a projection (G, out, in) behind a LayerNorm (G, in)."""
            return cast((weight * gain[:, None]).mT), cast((weight @ shift[:, :, None]).mT + bias[:, None])

        def feed_forward(at: str) -> dict[str, torch.Tensor | PackedNetworks]:
            norm = stack(at + "norm2.weight"), stack(at + "norm2.bias")
            if f"interaction_experts.0.fusion_model.{at}mlp.network.0.weight" in state:
                up, up_bias = folded(stack(at + "mlp.network.0.weight"), stack(at + "mlp.network.0.bias"), *norm)
                down, down_bias = stack(at + "mlp.network.3.weight"), stack(at + "mlp.network.3.bias")
                return {"up": up, "up_bias": up_bias, "down": cast(down.mT), "down_bias": cast(down_bias[:, None])}
            sizes = {"up": (hidden, 0), "up_bias": (1, 0), "down": (0, hidden), "down_bias": (1, hidden)}
            none = {name: cast(torch.zeros(config.experts, *size)) for name, size in sizes.items()}
            if alone:
                return none
            at += "mlp."
            if config.gate == "noisy":  # whose gate is stored input-major already and has no bias
                gate = stack(at + "gate.w_gate").mT
                gate_bias = torch.zeros(gate.shape[:2], dtype=gate.dtype)
            else:
                gate, gate_bias = stack(at + "gate.gate.weight"), stack(at + "gate.gate.bias")
            gate, gate_bias = folded(gate, gate_bias, *norm)
            each = (part.repeat_interleave(config.ffn_experts, dim=0) for part in norm)
            wide = [stack(at + f"experts.{name}").flatten(0, 1) for name in ("htoh4.weight", "htoh4.bias")]
            narrow = [stack(at + f"experts.{name}").flatten(0, 1) for name in ("h4toh.weight", "h4toh.bias")]
            networks = (*folded(*wide, *each), cast(narrow[0].mT), cast(narrow[1][:, None]))
            return none | {"networks": PackedNetworks(gate, gate_bias, *networks)}

        def layer(at: str) -> PackedLayer:
            gain1, shift1 = stack(at + "norm1.weight"), stack(at + "norm1.bias")
            key, value = stack(at + "attn.kv.weight").chunk(2, dim=1)
            qkv = torch.stack([stack(at + "attn.q.weight") * scale, key, value])  # (3, E, H, H)
            q_shift, _, v_shift = qkv @ shift1[:, :, None]  # (E, H, 1) each
            out = branch * stack(at + "attn.proj.weight")
            out_bias = branch * stack(at + "attn.proj.bias")[:, :, None] + out @ v_shift
            by_head = (qkv * gain1[:, None, :]).unflatten(2, (config.heads, -1))  # (3, E, h, d, H)
            return PackedLayer(
                qkv=cast(by_head.transpose(3, 4)),
                q_bias=cast(q_shift.unflatten(1, (config.heads, -1)).transpose(2, 3)),
                out=cast(out.transpose(1, 2)),
                out_bias=cast(out_bias.transpose(1, 2)),
                **feed_forward(at),
            )

        if config.generation == "original":
            positions = stack("pos_embed")[:, 0]
        else:
            positions = sinusoid(sum(padded_lengths), hidden, dtype=torch.float64)[None]
        places = [f"layers.{config.layers - 1}."] if alone else [f"network.{i}." for i in range(config.layers)]
        head = "classification_head.fc." if alone else f"network.{config.layers}.fc."
        linears = range(0, 3 * config.reweight_layers, 3)
        return PackedModel(
            layers=tuple(layer(place) for place in places),
            head=cast(stack(head + "weight").transpose(1, 2)),
            head_bias=cast(stack(head + "bias")[:, None, :]),
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
            slots=config.top_k or 0,
            residual=residual,
        )
