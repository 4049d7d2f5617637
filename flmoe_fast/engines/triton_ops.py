"""The op that evaluates one chunk of coalitions, ``torch.ops.flmoe_fast.coalition_logits``, and its launches.

One op is one chunk, so that what PyTorch spends on calling it does not matter, and so that ``torch.compile``,
FakeTensor and CUDA graphs see a single opaque, pure function with one declared scratch buffer. The launches of a chunk
do not depend on the numbers of experts, coalitions or tokens; nothing is copied to the host and nothing is allocated
but the two results. Triton is imported by the first real call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.triton_kernels.configs import find
from flmoe_fast.engines.triton_kernels.precision import PRECISIONS, Precision

NAME = "coalition_logits"
#: Byte boundary of every array in the workspace.
ALIGNMENT = 256
#: Tensors of the first layer, of every later layer and of the head, in the op's list of weights.
FIRST_WEIGHTS, LATER_WEIGHTS, HEAD_WEIGHTS = 4, 8, 3


@dataclass(frozen=True)
class Sizes:
    """Sizes that fix the launches of a chunk."""

    experts: int
    layers: int
    length: int
    hidden: int
    heads: int
    wide: int
    classes: int
    modalities: int
    routing: tuple[int, ...]  # widths of the routing network's layers
    target: str
    precision: Precision

    @property
    def depth(self) -> int:
        return self.hidden // self.heads

    def config(self, kernel: str):
        """Tiles of one kernel."""
        attention = kernel in ("context", "first", "later")
        plain = kernel in ("hidden", "head", "mean_features", "gate")
        return find(kernel, "fp32" if plain else self.precision.name, self.target, self.depth if attention else 0)

    def launches(self) -> int:
        """Kernel launches of one chunk, whatever its size."""
        return 2 + 5 * (self.layers - 1) + 2 + 1 + 1 + len(self.routing)

    def block(self) -> int:
        """Columns of one block of LayerNorm statistics of the residual stream."""
        return statistics_block(self.precision.name, self.target)

    def arrays(self, coalitions: int, contexts: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Scratch arrays of a chunk."""
        precision, rows = self.precision, coalitions * self.length
        blocks = -(-self.hidden // self.block())
        between = max(self.wide, 3 * self.hidden) if self.layers > 1 else 0
        stream_tiles = -(-self.length // self.config("project_last").rows)
        wide_tiles = -(-self.length // self.config("up_last").rows)
        states = (self.experts, contexts, self.heads, 2 * self.length)
        return {
            "numerators": (torch.float32, (*states, self.depth)),
            "scalars": (torch.float32, (*states, 2)),
            "attended": (precision.operand, (precision.planes, self.experts, rows, self.hidden)),
            "stream": (torch.float32, (self.experts, rows, self.hidden)),
            "statistics": (torch.float32, (self.experts, rows, blocks, 2)),
            "between": (precision.operand, (precision.planes, self.experts, rows, between)),
            "pooled_stream": (torch.float32, (self.experts, coalitions, stream_tiles, self.modalities, self.hidden)),
            "pooled_wide": (torch.float32, (self.experts, coalitions, wide_tiles, self.modalities, self.wide)),
            "means": (torch.float32, (coalitions, self.modalities, self.hidden)),
            **{f"routing{i}": (torch.float32, (1, coalitions, w)) for i, w in enumerate(self.routing[:-1])},
        }

    def bytes(self, coalitions: int, contexts: int) -> int:
        """Bytes of workspace that a chunk needs."""
        return sum(_aligned(_size(*array)) for array in self.arrays(coalitions, contexts).values())

    def flops(self, coalitions: int, contexts: int, varying: int) -> int:
        """Multiplications and additions of a chunk's matrix products, each counted once whatever the precision."""
        tokens, hidden, wide, experts = self.length, self.hidden, self.wide, self.experts
        context = 4 * 2 * tokens * (tokens - varying) * hidden
        first = 4 * tokens * varying * hidden + 2 * tokens * hidden * hidden + 2 * tokens * hidden * wide
        later = 2 * tokens * hidden * (wide + 3 * hidden) + 4 * tokens * tokens * hidden
        later += 2 * tokens * hidden * hidden + 2 * tokens * hidden * wide
        return experts * (contexts * context + coalitions * (first + (self.layers - 1) * later))


def statistics_block(precision: str, target: str) -> int:
    """Columns of one block of LayerNorm statistics: those of a tile of the kernels that leave them, which all agree."""
    kernels = ("project", "down", "project_last")
    blocks = {find(kernel, precision, target).columns for kernel in kernels}
    if len(blocks) > 1:
        raise ArgumentError(f"configuration of {target}", f"columns {sorted(blocks)}", f"one number for {kernels}")
    return blocks.pop()


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _views(workspace: torch.Tensor, arrays: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    views, start = {}, 0
    for name, (dtype, shape) in arrays.items():
        size = _size(dtype, shape)
        views[name] = workspace[start : start + size].view(dtype).view(shape)
        start += _aligned(size)
    return views


def sizes_of(
    residual: torch.Tensor,
    segments: torch.Tensor,
    weights: list[torch.Tensor],
    routing: list[torch.Tensor],
    heads: int,
    target: str,
    precision: str,
) -> Sizes:
    """Sizes that a call's tensors imply."""
    experts, _, length, hidden = residual.shape
    return Sizes(
        experts=experts,
        layers=(len(weights) - HEAD_WEIGHTS - FIRST_WEIGHTS) // LATER_WEIGHTS + 1,
        length=length,
        hidden=hidden,
        heads=heads,
        wide=weights[2].shape[2],
        classes=weights[-1].shape[1],
        modalities=segments.shape[0] - 1,
        routing=tuple(bias.shape[-1] for bias in routing[3::2]),
        target=target,
        precision=PRECISIONS[precision],
    )


def project_states(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: str, precision: str
) -> torch.Tensor:
    """Layer-1 Q, K and V (planes, E, 2 L, 3 H) of the inputs ``rows`` (E, 2 L, H) fp32, once per sample.

    The kernel is the one that later layers use.
    """
    from flmoe_fast.engines.triton_kernels.linear import linear

    kind, block = PRECISIONS[precision], statistics_block(precision, target)
    out = torch.empty(kind.planes, *rows.shape[:2], weight.shape[2], dtype=kind.operand, device=rows.device)
    statistics = []
    for part in rows.double().split(block, dim=-1):
        mean = part.mean(-1)
        statistics.append(torch.stack([mean, (part - mean[..., None]).square().sum(-1)], dim=-1))
    linear(
        rows,
        weight,
        bias,
        out,
        rows=rows.shape[1],
        precision=kind,
        terms=kind.linear[0],
        config=find("qkv", precision, target),
        statistics=torch.stack(statistics, dim=2).float(),
        block=block,
    )
    return out


def _check(words: torch.Tensor, others: list[torch.Tensor]) -> None:
    """Refuse what the kernels would read wrongly: another dtype, strides, or memory of another device."""
    if words.dtype != torch.int64:
        raise ArgumentError("words", words.dtype, "torch.int64")
    for tensor in (words, *others):
        if tensor.device != words.device:
            raise ArgumentError("words", f"{words.device} beside a tensor on {tensor.device}", "tensors of one device")
        if not tensor.is_contiguous():
            raise ArgumentError("tensors", f"strides {tensor.stride()}", "contiguous tensors")


def _coalition_logits(
    words: torch.Tensor,
    constant: torch.Tensor,
    varying: torch.Tensor,
    states: torch.Tensor,
    residual: torch.Tensor,
    segments: torch.Tensor,
    weights: list[torch.Tensor],
    routing: list[torch.Tensor],
    workspace: torch.Tensor,
    heads: int,
    group: int,
    offset: int,
    contexts: int,
    added: bool,
    normalised: bool,
    temperature: float,
    target: str,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    from flmoe_fast.engines.triton_kernels.attention import attention
    from flmoe_fast.engines.triton_kernels.head import head
    from flmoe_fast.engines.triton_kernels.linear import linear
    from flmoe_fast.engines.triton_kernels.routing import gate, mean_features

    sizes = sizes_of(residual, segments, weights, routing, heads, target, precision)
    kind, count, length = sizes.precision, words.shape[0], sizes.length
    experts_out = torch.empty(count, sizes.experts, sizes.classes, dtype=torch.float64, device=words.device)
    weights_out = torch.empty(count, sizes.experts, dtype=torch.float64, device=words.device)
    if not count:
        return experts_out, weights_out
    _check(words, [constant, varying, states, residual, segments, *weights, *routing, workspace])
    needed = sizes.bytes(count, contexts)
    if workspace.dtype != torch.uint8 or workspace.numel() < needed:
        raise ArgumentError("workspace", f"{workspace.numel()} bytes", f"at least {needed} bytes of torch.uint8")
    arrays = _views(workspace, sizes.arrays(count, contexts))
    stream, statistics, attended = arrays["stream"], arrays["statistics"], arrays["attended"]
    common = {"rows": count * length, "precision": kind, "length": length}
    block = sizes.block()

    of_norm, of_attention, of_hidden = kind.linear

    def normalising(weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None, kernel: str, **more) -> None:
        config = sizes.config(kernel)
        before = {"statistics": statistics, "block": block, "terms": of_norm}
        linear(stream, weight, bias, out, config=config, **before, **common, **more)

    def between(width: int) -> torch.Tensor:
        shape = (kind.planes, sizes.experts, count * length, width)
        return arrays["between"].view(-1)[: math.prod(shape)].view(shape)

    sums = arrays["numerators"], arrays["scalars"]
    at_tokens = {"words": words, "sums": sums, "group": group, "offset": offset}
    attend = {"length": length, "heads": heads, "precision": kind}
    attention("context", states, batches=contexts, keys=constant, config=sizes.config("context"), **at_tokens, **attend)
    attention(
        "first", states, batches=count, keys=varying, out=attended, config=sizes.config("first"), **at_tokens, **attend
    )
    for layer in range(sizes.layers):
        first, last = layer == 0, layer == sizes.layers - 1
        at = LATER_WEIGHTS * layer
        out_w, out_b, up_w, up_b = weights[at : at + FIRST_WEIGHTS]
        into = {"residual": residual, "words": words} if first else {"residual": stream if added else None}
        pool = {"pooled": arrays["pooled_stream"], "segments": segments} if last else {}
        linear(
            attended,
            out_w,
            out_b,
            stream,
            out_statistics=statistics,
            terms=of_attention,
            config=sizes.config("project_last" if last else "project"),
            **into,
            **pool,
            **common,
        )
        if last:
            pool["pooled"] = arrays["pooled_wide"]
            normalising(up_w, up_b, None, "up_last", activation="gelu", **pool)
            break
        down_w, down_b, qkv_w, qkv_b = weights[at + FIRST_WEIGHTS : at + LATER_WEIGHTS]
        wide = between(sizes.wide)
        normalising(up_w, up_b, wide, "up", activation="gelu")
        linear(
            wide,
            down_w,
            down_b,
            stream,
            residual=stream,
            out_statistics=statistics,
            terms=of_hidden,
            config=sizes.config("down"),
            **common,
        )
        qkv = between(3 * sizes.hidden)
        normalising(qkv_w, qkv_b, qkv, "qkv")
        attention("later", qkv, batches=count, out=attended, config=sizes.config("later"), **attend)
    head(
        arrays["pooled_wide"],
        arrays["pooled_stream"],
        *weights[-HEAD_WEIGHTS:],
        experts_out,
        config=sizes.config("head"),
    )

    absent, step, *network = routing
    means = arrays["means"]
    mean_features(words, segments, absent, step, means, normalise=normalised, config=sizes.config("mean_features"))
    hidden = means.view(1, count, -1)
    for index in range(len(sizes.routing) - 1):
        weight, bias = network[2 * index : 2 * index + 2]
        following = arrays[f"routing{index}"]
        linear(
            hidden.unsqueeze(0),
            weight,
            bias,
            following,
            rows=count,
            precision=PRECISIONS["fp32"],
            terms=1,
            config=sizes.config("hidden"),
            activation="relu",
        )
        hidden = following
    gate(hidden[0], network[-2][0], network[-1][0], weights_out, temperature=temperature, config=sizes.config("gate"))
    return experts_out, weights_out


def _on_cpu(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton's interpreter runs on CPU tensors; without it there is nothing that could."""
    import triton

    if not triton.knobs.runtime.interpret:
        raise ArgumentError(
            "words", "a tensor on the CPU", "CUDA tensors (on a CPU the kernels run only under TRITON_INTERPRET=1)"
        )
    return _coalition_logits(*arguments)


_library = torch.library.Library("flmoe_fast", "DEF")
_library.define(
    NAME + "(Tensor words, Tensor constant, Tensor varying, Tensor states, Tensor residual, Tensor segments, "
    "Tensor[] weights, Tensor[] routing, Tensor(a!) workspace, int heads, int group, SymInt offset, SymInt contexts, "
    "bool added, bool normalised, float temperature, str target, str precision) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl(NAME, _coalition_logits, "CUDA")
_library.impl(NAME, _on_cpu, "CPU")


@torch.library.register_fake(f"flmoe_fast::{NAME}", lib=_library)
def _(
    words,
    constant,
    varying,
    states,
    residual,
    segments,
    weights,
    routing,
    workspace,
    heads,
    group,
    offset,
    contexts,
    added,
    normalised,
    temperature,
    target,
    precision,
):
    torch._check(words.dim() == 2, lambda: "words must be (C, words)")
    torch._check(words.dtype == torch.int64, lambda: "words must be int64")
    count, experts = words.shape[0], residual.shape[0]
    return (
        words.new_empty((count, experts, weights[-1].shape[1]), dtype=torch.float64),
        words.new_empty((count, experts), dtype=torch.float64),
    )
