"""The op that evaluates one chunk of coalitions, ``torch.ops.flmoe_fast.coalition_logits``, and its launches.

One op is one chunk, so that what PyTorch spends on calling it does not matter, and so that ``torch.compile``,
FakeTensor and CUDA graphs see a single opaque, pure function with one declared scratch buffer. The launches of a chunk
do not depend on the numbers of experts, coalitions or tokens; nothing is copied to the host and nothing is allocated
but the results. Triton is imported by the first real call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
#: Columns behind the pooled activations of a sparse block: the sum of the scores, and zeros that keep rows aligned.
SCORE_COLUMNS = 16
#: Kernels whose products are small or none, in fp32 whatever the precision.
PLAIN = ("hidden", "head", "mean_features", "gate", "choose", "scan", "place", "combine", "pool")


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
    networks: int = 0  # of a sparse feed-forward block
    slots: int = 0  # networks that a token goes to
    sparse: tuple[bool, ...] = ()  # which layers' feed-forward blocks are

    @property
    def depth(self) -> int:
        return self.hidden // self.heads

    def config(self, kernel: str):
        """Tiles of one kernel."""
        attention = kernel in ("context", "first", "later")
        precision = "fp32" if kernel in PLAIN else self.precision.name
        return find(kernel, precision, self.target, self.depth if attention else 0)

    def launches(self) -> int:
        """Kernel launches of one chunk, whatever its size."""
        count = 2 + 2 + len(self.routing)  # layer-1 attention, head, routing
        for layer in range(self.layers):
            last = layer == self.layers - 1
            if self.is_sparse(layer):
                blocks = 5 if last else 6
            else:
                blocks = (1 if last else 2) if self.wide else 0
            count += 1 + blocks + (0 if last else 2)  # output projection, feed-forward, next layer's attention
        return count

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward block is sparse."""
        return bool(self.sparse) and self.sparse[layer]

    def block(self) -> int:
        """Columns of one block of LayerNorm statistics of the residual stream."""
        return statistics_block(self.precision.name, self.target)

    def arrays(self, coalitions: int, contexts: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Scratch arrays of a chunk."""
        precision, rows = self.precision, coalitions * self.length
        blocks = -(-self.hidden // self.block())
        last = self.layers - 1
        between = 3 * self.hidden if last else 0
        for layer in range(self.layers):
            if self.is_sparse(layer) or layer < last:
                between = max(between, self.wide * (self.slots if self.is_sparse(layer) else 1))
        stream_tiles = -(-self.length // self.config("project_last").rows)
        pooled = (-(-self.length // self.config("up_last").rows), self.modalities, self.wide)
        if self.is_sparse(last):
            pooled = (1, self.modalities * self.networks, self.wide + SCORE_COLUMNS)
        states = (self.experts, contexts, self.heads, 2 * self.length)
        return {
            "numerators": (torch.float32, (*states, self.depth)),
            "scalars": (torch.float32, (*states, 2)),
            "attended": (precision.operand, (precision.planes, self.experts, rows, self.hidden)),
            "stream": (torch.float32, (self.experts, rows, self.hidden)),
            "statistics": (torch.float32, (self.experts, rows, blocks, 2)),
            "between": (precision.operand, (precision.planes, self.experts, rows, between)),
            "pooled_stream": (torch.float32, (self.experts, coalitions, stream_tiles, self.modalities, self.hidden)),
            "pooled_wide": (torch.float32, (self.experts, coalitions, *pooled)),
            "means": (torch.float32, (coalitions, self.modalities, self.hidden)),
            **{f"routing{i}": (torch.float32, (1, coalitions, w)) for i, w in enumerate(self.routing[:-1])},
            **(self._sparse_arrays(coalitions) if any(self.sparse) else {}),
        }

    def _sparse_arrays(self, coalitions: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Scratch arrays of sparse feed-forward blocks; one block is done with them before the next."""
        rows = coalitions * self.length
        runs = (self.experts, self.networks, coalitions * self.modalities)
        found = rows * self.slots if any(self.sparse[:-1]) else 0
        return {
            "chosen": (torch.int32, (self.experts, rows, self.slots)),
            "scores": (torch.float32, (self.experts, rows, self.slots)),
            "places": (torch.int32, (self.experts, rows, self.slots)),
            "order": (torch.int32, (self.experts, rows * self.slots)),
            "counts": (torch.int32, runs),
            "starts": (torch.int32, runs),
            "totals": (torch.int32, runs[:2]),
            "found": (torch.float32, (self.experts, found, self.hidden)),
        }

    def bytes(self, coalitions: int, contexts: int) -> int:
        """Bytes of workspace that a chunk needs."""
        return sum(_aligned(_size(*array)) for array in self.arrays(coalitions, contexts).values())

    def flops(self, coalitions: int, contexts: int, varying: int) -> int:
        """Multiplications and additions of a chunk's matrix products, each counted once whatever the precision.

        Of sparse blocks as if every slot found room.
        """
        tokens, hidden, experts = self.length, self.hidden, self.experts
        context = 4 * 2 * tokens * (tokens - varying) * hidden
        each = 4 * tokens * varying * hidden
        for layer in range(self.layers):
            last = layer == self.layers - 1
            slots = self.slots if self.is_sparse(layer) else 1
            each += 2 * tokens * hidden * hidden
            each += (1 if last else 2) * 2 * tokens * slots * hidden * self.wide
            if self.is_sparse(layer):
                each += 2 * tokens * hidden * self.networks
            if not last:
                each += 2 * tokens * hidden * 3 * hidden + 4 * tokens * tokens * hidden
        return experts * (contexts * context + coalitions * each)


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
    networks: Sequence[torch.Tensor] = (),
    slots: int = 0,
) -> Sizes:
    """Sizes that a call's tensors imply."""
    experts, _, length, hidden = residual.shape
    sparse = tuple(gate.numel() > 0 for gate in networks[1::2])
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
        networks=max((gate.shape[2] for gate in networks[1::2]), default=0),
        slots=slots,
        sparse=sparse,
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


def check(words: torch.Tensor, others: list[torch.Tensor]) -> None:
    """Refuse what the kernels would read wrongly: another dtype, strides, or memory of another device."""
    if words.dtype != torch.int64:
        raise ArgumentError("words", words.dtype, "torch.int64")
    for tensor in (words, *others):
        if tensor.device != words.device:
            raise ArgumentError("words", f"{words.device} beside a tensor on {tensor.device}", "tensors of one device")
        if not tensor.is_contiguous():
            raise ArgumentError("tensors", f"strides {tensor.stride()}", "contiguous tensors")


def new_results(words: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (C, E, K), routing (C, E) and mixture (C, K), uninitialised."""
    count, options = words.shape[0], {"dtype": torch.float64, "device": words.device}
    shapes = (count, sizes.experts, sizes.classes), (count, sizes.experts), (count, sizes.classes)
    return tuple(torch.empty(*shape, **options) for shape in shapes)


def scratch(workspace: torch.Tensor, sizes: Sizes, coalitions: int, contexts: int) -> dict[str, torch.Tensor]:
    """The arrays of a chunk in the workspace."""
    needed = sizes.bytes(coalitions, contexts)
    if workspace.dtype != torch.uint8 or workspace.numel() < needed:
        raise ArgumentError("workspace", f"{workspace.numel()} bytes", f"at least {needed} bytes of torch.uint8")
    return _views(workspace, sizes.arrays(coalitions, contexts))


def layer_one_attention(
    words: torch.Tensor,
    constant: torch.Tensor,
    varying: torch.Tensor,
    states: torch.Tensor,
    sizes: Sizes,
    arrays: dict[str, torch.Tensor],
    group: int,
    offset: int,
    contexts: int,
) -> None:
    """Attention of the first layer into ``attended``: once per context, then per coalition what varies."""
    from flmoe_fast.engines.triton_kernels.attention import attention

    sums = arrays["numerators"], arrays["scalars"]
    common = {"length": sizes.length, "heads": sizes.heads, "precision": sizes.precision}
    common |= {"words": words, "sums": sums, "group": group, "offset": offset}
    attention("context", states, batches=contexts, keys=constant, config=sizes.config("context"), **common)
    out = arrays["attended"]
    attention("first", states, batches=len(words), keys=varying, out=out, config=sizes.config("first"), **common)


def logits_and_routing(
    words: torch.Tensor,
    segments: torch.Tensor,
    weights: list[torch.Tensor],
    routing: list[torch.Tensor],
    sizes: Sizes,
    arrays: dict[str, torch.Tensor],
    normalised: bool,
    temperature: float,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """``results`` from the pooled sums, and from the means of the features; the head is what ``weights`` ends with."""
    from flmoe_fast.engines.triton_kernels.head import head
    from flmoe_fast.engines.triton_kernels.linear import linear
    from flmoe_fast.engines.triton_kernels.routing import gate, mean_features

    count = len(words)
    head(
        arrays["pooled_wide"],
        arrays["pooled_stream"],
        *weights[-HEAD_WEIGHTS:],
        results[0],
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
    last_w, last_b = network[-2][0], network[-1][0]
    gate(hidden[0], last_w, last_b, *results, temperature=temperature, config=sizes.config("gate"))


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
    networks: list[torch.Tensor],
    slots: int,
    among_all: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flmoe_fast.engines.triton_kernels.attention import attention
    from flmoe_fast.engines.triton_kernels.choice import choose
    from flmoe_fast.engines.triton_kernels.combine import combine, pool
    from flmoe_fast.engines.triton_kernels.grouped import grouped
    from flmoe_fast.engines.triton_kernels.linear import linear
    from flmoe_fast.engines.triton_kernels.order import place, scan

    sizes = sizes_of(residual, segments, weights, routing, heads, target, precision, networks, slots)
    kind, count, length = sizes.precision, words.shape[0], sizes.length
    results = new_results(words, sizes)
    if not count:
        return results
    check(words, [constant, varying, states, residual, segments, *weights, *routing, *networks, workspace])
    arrays = scratch(workspace, sizes, count, contexts)
    stream, statistics, attended = arrays["stream"], arrays["statistics"], arrays["attended"]
    common = {"rows": count * length, "precision": kind, "length": length}
    block = sizes.block()

    of_norm, of_attention, of_hidden = kind.linear

    def normalising(weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None, kernel: str, **more) -> None:
        config = sizes.config(kernel)
        before = {"statistics": statistics, "block": block, "terms": of_norm}
        linear(stream, weight, bias, out, config=config, **before, **common, **more)

    def between(width: int, rows: int = count * length) -> torch.Tensor:
        shape = (kind.planes, sizes.experts, rows, width)
        return arrays["between"].view(-1)[: math.prod(shape)].view(shape)

    def feed_forward(layer: int, last: bool, up: tuple[torch.Tensor, ...], down: list[torch.Tensor]) -> None:
        """A sparse block, from the stream back to it, or in the last layer to sums for the head."""
        sent = {name: arrays[name] for name in ("chosen", "scores", "counts", "starts", "totals", "order")}
        room, gate_w, gate_b = networks[0], *networks[1 + 2 * layer : 3 + 2 * layer]
        choose(
            stream,
            statistics,
            gate_w,
            gate_b,
            segments,
            room,
            *(sent[name] for name in ("chosen", "scores", "counts")),
            length=length,
            block=block,
            among_all=among_all,
            config=sizes.config("choose"),
        )
        scan(sent["counts"], sent["starts"], sent["totals"], config=sizes.config("scan"))
        places = None if last else arrays["places"]
        queued = sent["chosen"], sent["starts"], sent["totals"], segments, room, sent["order"], places
        place(*queued, length=length, config=sizes.config("place"))
        wide = between(sizes.wide, count * length * slots)
        same = {"rows": count * length, "precision": kind}
        rows = {"order": sent["order"], "statistics": statistics, "block": block, "terms": of_norm}
        grouped(stream, *up, wide, sent["totals"], config=sizes.config("sparse_up"), **rows, **same)
        if last:
            runs = (sent[name] for name in ("order", "scores", "counts", "starts", "totals"))
            pool(wide, *runs, arrays["pooled_wide"], config=sizes.config("pool"))
            return
        found = arrays["found"]
        grouped(wide, *down, found, sent["totals"], terms=of_hidden, config=sizes.config("sparse_down"), **same)
        combine(found, places, sent["scores"], stream, statistics, block=block, config=sizes.config("combine"))

    layer_one_attention(words, constant, varying, states, sizes, arrays, group, offset, contexts)
    attend = {"length": length, "heads": heads, "precision": kind}
    for layer in range(sizes.layers):
        first, last = layer == 0, layer == sizes.layers - 1
        at = LATER_WEIGHTS * layer
        out_w, out_b, up_w, up_b = weights[at : at + FIRST_WEIGHTS]
        into = {"residual": residual, "words": words} if first else {"residual": stream if added else None}
        pooling = {"pooled": arrays["pooled_stream"], "segments": segments} if last else {}
        linear(
            attended,
            out_w,
            out_b,
            stream,
            out_statistics=statistics,
            terms=of_attention,
            config=sizes.config("project_last" if last else "project"),
            **into,
            **pooling,
            **common,
        )
        down_w, down_b, qkv_w, qkv_b = [None] * 4 if last else weights[at + FIRST_WEIGHTS : at + LATER_WEIGHTS]
        if sizes.is_sparse(layer):
            feed_forward(layer, last, (up_w, up_b), [down_w, down_b])
        elif last and sizes.wide:
            pool_wide = {**pooling, "pooled": arrays["pooled_wide"]}
            normalising(up_w, up_b, None, "up_last", activation="gelu", **pool_wide)
        elif sizes.wide:
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
        if last:
            break
        qkv = between(3 * sizes.hidden)
        normalising(qkv_w, qkv_b, qkv, "qkv")
        attention("later", qkv, batches=count, out=attended, config=sizes.config("later"), **attend)
    logits_and_routing(words, segments, weights, routing, sizes, arrays, normalised, temperature, results)
    return results


def _on_cpu(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton's interpreter runs on CPU tensors; without it there is nothing that could."""
    import triton

    if not triton.knobs.runtime.interpret:
        raise ArgumentError(
            "words", "a tensor on the CPU", "CUDA tensors (on a CPU the kernels run only under TRITON_INTERPRET=1)"
        )
    return _coalition_logits(*arguments)


library = torch.library.Library("flmoe_fast", "DEF")
library.define(
    NAME + "(Tensor words, Tensor constant, Tensor varying, Tensor states, Tensor residual, Tensor segments, "
    "Tensor[] weights, Tensor[] routing, Tensor(a!) workspace, int heads, int group, SymInt offset, SymInt contexts, "
    "bool added, bool normalised, float temperature, str target, str precision, Tensor[] networks, int slots, "
    "bool among_all) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl(NAME, _coalition_logits, "CUDA")
library.impl(NAME, _on_cpu, "CPU")


@torch.library.register_fake(f"flmoe_fast::{NAME}", lib=library)
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
    networks,
    slots,
    among_all,
):
    torch._check(words.dim() == 2, lambda: "words must be (C, words)")
    torch._check(words.dtype == torch.int64, lambda: "words must be int64")
    count, experts, classes = words.shape[0], residual.shape[0], weights[-1].shape[1]
    shapes = (count, experts, classes), (count, experts), (count, classes)
    return tuple(words.new_empty(shape, dtype=torch.float64) for shape in shapes)
