"""A prepared model and sample laid out as the GPU kernels read them: cast once, from float64, and on the device.

What depends on the model alone is kept with it, so that its next sample casts and packs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.gpu.chunk import SCORE_COLUMNS, Chunk, Layer, Spec
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.prepared import PreparedModel, PreparedSample
from flmoe_fast.engines.stack import LOG2E
from flmoe_fast.native import extension

#: Room of a network without capacity.
UNLIMITED = 2**31 - 1
#: Inputs or outputs of one stage of a tape: the hidden width is a multiple.
SLAB = 64


@dataclass(frozen=True)
class Weights:
    """What a chunk reads of a model, whatever the sample."""

    qkv: torch.Tensor  # (E, H, 3 H) of the first layer
    qkv_bias: torch.Tensor  # (E, 3 H) fp32
    layers: tuple[Layer, ...]
    router: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True)
class _Casting:
    """Where numbers go and what they become there."""

    precision: str
    device: torch.device

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """A matrix in the operand type; an error where a number of it does not fit."""
        kind = PRECISIONS[self.precision]
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= torch.finfo(kind.operand).max:
            raise ArgumentError("precision", f"{self.precision!r} with a weight of {largest:.3g}", "'tf32'")
        return tensor.to(self.device, kind.operand).contiguous()

    def single(self, tensor: torch.Tensor) -> torch.Tensor:
        """Numbers in float32."""
        return tensor.to(self.device, torch.float32).contiguous()

    def none(self) -> torch.Tensor:
        """Nothing."""
        return torch.empty(0, device=self.device)


def lay_out(sample: PreparedSample, engine: str, precision: str, arch: str, device: torch.device) -> Chunk:
    """Everything that the chunks of one sample read; which tokens vary is not known yet.

    Raises
    ------
    ArgumentError
        A weight does not fit the operand type.
    """
    model, problem = sample.model, sample.problem
    casting = _Casting(precision, device)
    weights = model.kept((engine, precision, str(device)), lambda: _weights(model, engine, casting))
    stack, config = model.stack, problem.model.config
    spec = Spec(
        engine=engine,
        arch=arch,
        precision=precision,
        experts=stack.count,
        layers=len(stack.layers),
        length=problem.length,
        hidden=stack.width,
        heads=stack.heads,
        wide=stack.expanded,
        classes=config.classes,
        modalities=len(problem.segments),
        routing=tuple(bias.numel() for _, bias in model.routing),
        normalised=problem.masked,
        temperature=model.temperature,
        added=stack.residual,
        sparse=tuple(layer.networks is not None for layer in stack.layers),
        networks=stack.networks,
        slots=stack.slots,
        among_all=stack.gate == "switch",
    )
    x = sample.tokens.expand(stack.count, -1, -1, -1)  # (E, 2, L, H)
    room = sample.room or (UNLIMITED,) * spec.modalities
    edges = [start for start, _ in problem.segments] + [problem.length]
    none = torch.empty(0, dtype=torch.int32, device=device)
    return Chunk(
        spec,
        constant=none,
        varying=none,
        states=_project_states(casting.single(x.flatten(1, 2)), weights, spec),
        residual=casting.single(x if stack.residual else torch.zeros_like(x)),
        segments=torch.tensor(edges, dtype=torch.int32, device=device),
        head_wide=casting.single(_wide_head(sample)),
        head_stream=casting.single(sample.stream_head),
        head_bias=casting.single(sample.head_bias),
        absent=casting.single(sample.absent),
        step=casting.single(sample.step),
        room=torch.tensor(room, dtype=torch.int32, device=device) if any(spec.sparse) else none,
        layers=weights.layers,
        router=weights.router,
    )


def _wide_head(sample: PreparedSample) -> torch.Tensor:
    """The classifier on sums of hidden activations (E, M, F, K).

    Sums of a sparse block are apart for its networks, and have the sum of the scores behind them, which is what the
    bias of a network is multiplied with: (E, M * X, F + SCORE_COLUMNS, K).
    """
    wide = sample.wide_head  # (E, M, X, F, K)
    if sample.model.stack.layers[-1].networks is None:
        return wide[:, :, 0]
    scores = sample.score_head[:, :, :, None]
    zeros = scores.new_zeros(*scores.shape[:3], SCORE_COLUMNS - 1, scores.shape[4])
    return torch.cat([wide, scores, zeros], dim=3).flatten(1, 2)


def _weights(model: PreparedModel, engine: str, casting: _Casting) -> Weights:
    """The model's part, for the kernels of one engine."""
    layers, stack = [], model.stack
    single, none = casting.single, casting.none()
    for layer, following in zip(stack.layers, (*stack.layers[1:], None)):
        block = layer.networks or layer
        matrices = {"out": casting.operand(layer.out), "up": casting.operand(block.up)}
        biases = {"out_bias": single(layer.out_bias[:, 0]), "up_bias": single(block.up_bias[:, 0])}
        if following is not None:
            qkv, shift = following.projections(LOG2E)
            matrices |= {"down": casting.operand(block.down), "qkv": casting.operand(qkv)}
            biases |= {"down_bias": single(block.down_bias[:, 0]), "qkv_bias": single(shift[:, 0])}
        parts = biases | ({"tape": _tape(**matrices).to(casting.device)} if engine == "cuda" else matrices)
        if layer.networks is not None:
            parts |= {"gate": single(layer.networks.gate), "gate_bias": single(layer.networks.gate_bias[:, 0])}
        layers.append(Layer(**{name: parts.get(name, none) for name in Layer.__dataclass_fields__}))
    qkv, shift = stack.layers[0].projections(LOG2E)
    router = tuple((single(weight[None]), single(bias[None])) for weight, bias in model.routing)
    return Weights(casting.operand(qkv), single(shift[:, 0]), tuple(layers), router)


def _project_states(rows: torch.Tensor, weights: Weights, spec: Spec) -> torch.Tensor:
    """Layer-1 Q, K and V (planes, E, 2 L, 3 H) of the inputs ``rows`` (E, 2 L, H) fp32, once per sample.

    The kernel is the one that later layers use.
    """
    from flmoe_fast.engines.gpu.kernels.linear import linear

    kind, block = spec.kind, spec.block()
    shape = (kind.planes, *rows.shape[:2], weights.qkv.shape[2])
    out = torch.empty(*shape, dtype=kind.operand, device=rows.device)
    statistics = []
    for part in rows.double().split(block, dim=-1):
        mean = part.mean(-1)
        statistics.append(torch.stack([mean, (part - mean[..., None]).square().sum(-1)], dim=-1))
    linear(
        rows,
        weights.qkv,
        weights.qkv_bias,
        out,
        rows=rows.shape[1],
        precision=kind,
        terms=kind.linear[0],
        config=spec.config("qkv"),
        statistics=torch.stack(statistics, dim=2).float(),
        block=block,
    )
    return out


# ---- the fused CUDA kernels' tape


def _tape(
    out: torch.Tensor, up: torch.Tensor, down: torch.Tensor | None = None, qkv: torch.Tensor | None = None
) -> torch.Tensor:
    """Stages of one layer (E, bytes), byte for byte and in the order in which they are copied to shared memory.

    Output projection (E, H, H), up (E, H, F); before the last layer down (E, F, H) and Q, K, V (E, H, 3 H).
    """
    tapes = []
    for expert in range(len(out)):
        stages = [_stages(out[expert], wide=True)]
        hidden = _stages(up[expert], wide=False)
        if down is not None:
            # Up and down in turn: 64 hidden activations leave the registers before the next are computed.
            hidden = torch.stack([hidden, _stages(down[expert], wide=True)], dim=1).flatten(0, 1)
        stages.append(hidden)
        if qkv is not None:
            stages += [_stages(part, wide=True) for part in qkv[expert].chunk(3, dim=1)]
        tapes.append(torch.cat(stages).flatten())
    return torch.stack(tapes)


def _stages(matrix: torch.Tensor, wide: bool) -> torch.Tensor:
    """A matrix (inputs, outputs) of halves as stages (count, bytes): of 64 inputs if ``wide``, else of 64 outputs."""
    matrix = matrix.cpu().contiguous()
    inputs, outputs = matrix.shape
    hidden, count = (outputs, inputs // SLAB) if wide else (inputs, outputs // SLAB)
    stages = torch.empty(count, 2 * hidden * SLAB, dtype=torch.uint8)
    module, missing = extension()
    assert module is not None, missing
    module.fused_pack(matrix.data_ptr(), stages.data_ptr(), inputs, outputs, hidden, wide)
    return stages
