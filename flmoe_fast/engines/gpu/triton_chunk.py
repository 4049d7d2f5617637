"""The steps of a chunk with Triton kernels: two launches for attention, three for every other part of a layer.

Importing this imports triton. What the fused CUDA kernels leave to Triton, the first layer's attention, the head and
the routing, is here as well.
"""

from __future__ import annotations

from typing import Any

import torch

from flmoe_fast.engines.gpu.chunk import SCORE_COLUMNS, Part, Run, Spec, Step
from flmoe_fast.engines.gpu.kernels.attention import attention
from flmoe_fast.engines.gpu.kernels.choice import choose
from flmoe_fast.engines.gpu.kernels.combine import combine, pool
from flmoe_fast.engines.gpu.kernels.grouped import grouped
from flmoe_fast.engines.gpu.kernels.head import head
from flmoe_fast.engines.gpu.kernels.linear import linear
from flmoe_fast.engines.gpu.kernels.order import place, scan
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.gpu.kernels.routing import gate, mean_features
from flmoe_fast.engines.gpu.workspace import Array


def steps(spec: Spec, part: Part) -> list[Step]:
    """What a chunk launches, in order."""
    found = layer_one_attention(spec, part)
    for layer in range(spec.layers):
        last = layer == spec.layers - 1
        found.append(_project(spec, part, layer))
        if spec.is_sparse(layer):
            found += _sparse_block(spec, part, layer)
        elif spec.wide:
            found += [_up_last(spec, part)] if last else [_up(spec, part, layer), _down(spec, part, layer)]
        if not last:
            found += [_qkv(spec, part, layer), _later(spec, part)]
    return found + logits_and_routing(spec, part)


# ---- shared with the fused CUDA kernels


def layer_one_attention(spec: Spec, part: Part) -> list[Step]:
    """Attention of the first layer into ``attended``: once per context, then per coalition what varies."""
    kind, tokens, varying = spec.kind, spec.length, part.varying
    states = (spec.experts, part.contexts, spec.heads, 2 * tokens)
    sums = {"numerators": Array(torch.float32, (*states, spec.depth)), "scalars": Array(torch.float32, (*states, 2))}
    each = 4 * tokens * spec.hidden * spec.experts

    def common(run: Run) -> dict[str, Any]:
        group = {"words": run.words, "group": run.part.group, "offset": run.part.offset}
        kept = run.arrays["numerators"], run.arrays["scalars"]
        return {"length": tokens, "heads": spec.heads, "precision": kind, "sums": kept, **group}

    def context(run: Run) -> None:
        chunk, config = run.chunk, spec.config("context")
        attention("context", chunk.states, batches=part.contexts, keys=chunk.constant, config=config, **common(run))

    def first(run: Run) -> None:
        chunk, config, out = run.chunk, spec.config("first"), run.arrays["attended"]
        attention(
            "first", chunk.states, batches=part.coalitions, keys=chunk.varying, out=out, config=config, **common(run)
        )

    return [
        Step("context", sums, context, 2 * part.contexts * each * (tokens - varying)),
        Step("first", {"attended": _attended(spec, part)}, first, part.coalitions * each * varying),
    ]


def logits_and_routing(spec: Spec, part: Part) -> list[Step]:
    """Results from the pooled sums, and from the means of the features."""
    count = part.coalitions

    def run_head(run: Run) -> None:
        chunk, sums = run.chunk, (run.arrays["pooled_wide"], run.arrays["pooled_stream"])
        weights = chunk.head_wide, chunk.head_stream, chunk.head_bias
        head(*sums, *weights, run.results[0], config=spec.config("head"))

    def means(run: Run) -> None:
        chunk, config = run.chunk, spec.config("mean_features")
        inputs = run.words, chunk.segments, chunk.absent, chunk.step
        mean_features(*inputs, run.arrays["routing0"], normalise=spec.normalised, config=config)

    def hidden(layer: int) -> Step:
        def launch(run: Run) -> None:
            linear(
                run.arrays[f"routing{layer}"].view(1, 1, count, -1),
                *run.chunk.router[layer],
                run.arrays[f"routing{layer + 1}"],
                rows=count,
                precision=PRECISIONS["fp32"],
                terms=1,
                config=spec.config("hidden"),
                activation="relu",
            )

        return Step("hidden", {f"routing{layer + 1}": Array(torch.float32, (1, count, spec.routing[layer]))}, launch)

    def run_gate(run: Run) -> None:
        weight, bias = run.chunk.router[-1]
        inputs = run.arrays[f"routing{len(spec.routing) - 1}"].view(count, -1)
        gate(inputs, weight[0], bias[0], *run.results, temperature=spec.temperature, config=spec.config("gate"))

    features = Array(torch.float32, (count, spec.modalities, spec.hidden))
    return [
        Step("head", {}, run_head),
        Step("mean_features", {"routing0": features}, means),
        *(hidden(layer) for layer in range(len(spec.routing) - 1)),
        Step("gate", {}, run_gate),
    ]


def _attended(spec: Spec, part: Part) -> Array:
    kind = spec.kind
    return Array(kind.operand, (kind.planes, spec.experts, part.rows(spec), spec.hidden))


# ---- dense layers


def _stream(spec: Spec, part: Part) -> dict[str, Array]:
    """The residual stream and its statistics."""
    rows, blocks = part.rows(spec), -(-spec.hidden // spec.block())
    stream = Array(torch.float32, (spec.experts, rows, spec.hidden))
    return {"stream": stream, "statistics": Array(torch.float32, (spec.experts, rows, blocks, 2))}


def _between(spec: Spec, rows: int, width: int) -> dict[str, Array]:
    """Operands of the next product: hidden activations, or queries, keys and values; never both at a time."""
    kind = spec.kind
    return {"between": Array(kind.operand, (kind.planes, spec.experts, rows, width))}


def _products(spec: Spec, part: Part, width: int, columns: int) -> int:
    """Multiplications and additions of one matrix product over all tokens."""
    return 2 * spec.experts * part.rows(spec) * width * columns


def _project(spec: Spec, part: Part, layer: int) -> Step:
    """Output projection of attention onto the stream; in the last layer also sums of the stream."""
    last = layer == spec.layers - 1
    kernel = "project_last" if last else "project"
    config, terms = spec.config(kernel), spec.kind.linear[1]
    writes = _stream(spec, part)
    if last:
        tiles = (spec.experts, part.coalitions, -(-spec.length // config.rows), spec.modalities)
        writes["pooled_stream"] = Array(torch.float32, (*tiles, spec.hidden))
        if not (spec.wide or spec.is_sparse(layer)):
            writes["pooled_wide"] = Array(
                torch.float32, (*tiles, 0)
            )  # there is no block whose sums the head could read

    def launch(run: Run) -> None:
        chunk, arrays = run.chunk, run.arrays
        weights = chunk.layers[layer]
        residual = arrays["stream"] if spec.added else None
        linear(
            arrays["attended"],
            weights.out,
            weights.out_bias,
            arrays["stream"],
            out_statistics=arrays["statistics"],
            rows=part.rows(spec),
            length=spec.length,
            precision=spec.kind,
            terms=terms,
            config=config,
            residual=chunk.residual if layer == 0 else residual,
            words=run.words if layer == 0 else None,
            pooled=arrays["pooled_stream"] if last else None,
            segments=chunk.segments if last else None,
        )

    return Step(kernel, writes, launch, _products(spec, part, spec.hidden, spec.hidden))


def _normalising(spec: Spec, part: Part, run: Run, kernel: str) -> dict[str, Any]:
    """What every product of the normalised stream is given."""
    before = {"statistics": run.arrays["statistics"], "block": spec.block(), "terms": spec.kind.linear[0]}
    return {
        "rows": part.rows(spec),
        "length": spec.length,
        "precision": spec.kind,
        "config": spec.config(kernel),
    } | before


def _up(spec: Spec, part: Part, layer: int) -> Step:
    def launch(run: Run) -> None:
        weights, arrays = run.chunk.layers[layer], run.arrays
        inputs = arrays["stream"], weights.up, weights.up_bias, arrays["between"]
        linear(*inputs, activation="gelu", **_normalising(spec, part, run, "up"))

    return Step("up", _between(spec, part.rows(spec), spec.wide), launch, _products(spec, part, spec.hidden, spec.wide))


def _down(spec: Spec, part: Part, layer: int) -> Step:
    def launch(run: Run) -> None:
        weights, arrays = run.chunk.layers[layer], run.arrays
        linear(
            arrays["between"],
            weights.down,
            weights.down_bias,
            arrays["stream"],
            residual=arrays["stream"],
            out_statistics=arrays["statistics"],
            rows=part.rows(spec),
            length=spec.length,
            precision=spec.kind,
            terms=spec.kind.linear[2],
            config=spec.config("down"),
        )

    return Step("down", _stream(spec, part), launch, _products(spec, part, spec.wide, spec.hidden))


def _up_last(spec: Spec, part: Part) -> Step:
    """Hidden activations of the last block, summed over each modality's tokens and never written."""
    tiles = -(-spec.length // spec.config("up_last").rows)
    pooled = Array(torch.float32, (spec.experts, part.coalitions, tiles, spec.modalities, spec.wide))

    def launch(run: Run) -> None:
        weights, common = run.chunk.layers[-1], _normalising(spec, part, run, "up_last")
        common |= {"pooled": run.arrays["pooled_wide"], "segments": run.chunk.segments}
        linear(run.arrays["stream"], weights.up, weights.up_bias, None, activation="gelu", **common)

    return Step("up_last", {"pooled_wide": pooled}, launch, _products(spec, part, spec.hidden, spec.wide))


def _qkv(spec: Spec, part: Part, layer: int) -> Step:
    """Queries, keys and values of the layer after ``layer``."""

    def launch(run: Run) -> None:
        weights, arrays = run.chunk.layers[layer], run.arrays
        inputs = arrays["stream"], weights.qkv, weights.qkv_bias, arrays["between"]
        linear(*inputs, **_normalising(spec, part, run, "qkv"))

    width = 3 * spec.hidden
    return Step("qkv", _between(spec, part.rows(spec), width), launch, _products(spec, part, spec.hidden, width))


def _later(spec: Spec, part: Part) -> Step:
    """Attention of a later layer."""

    def launch(run: Run) -> None:
        attention(
            "later",
            run.arrays["between"],
            length=spec.length,
            heads=spec.heads,
            batches=part.coalitions,
            precision=spec.kind,
            config=spec.config("later"),
            out=run.arrays["attended"],
        )

    products = 4 * spec.experts * part.rows(spec) * spec.length * spec.hidden
    return Step("later", {"attended": _attended(spec, part)}, launch, products)


# ---- sparse feed-forward blocks


def _sparse_block(spec: Spec, part: Part, layer: int) -> list[Step]:
    """A sparse block, from the stream back to it, or in the last layer to sums for the head."""
    found = [*_sent(spec, part, layer), _sparse_up(spec, part, layer)]
    if layer == spec.layers - 1:
        return [*found, _pool(spec, part)]
    return [*found, _sparse_down(spec, part, layer), _combine(spec, part)]


def _sent(spec: Spec, part: Part, layer: int) -> list[Step]:
    """Which networks a token goes to, and every slot's place in its network's queue."""
    last = layer == spec.layers - 1
    rows, runs = part.rows(spec), (spec.experts, spec.networks, part.coalitions * spec.modalities)
    slots = spec.experts, rows, spec.slots
    chosen = {"chosen": Array(torch.int32, slots), "scores": Array(torch.float32, slots)}
    chosen["counts"] = Array(torch.int32, runs)
    scanned = {"starts": Array(torch.int32, runs), "totals": Array(torch.int32, runs[:2])}
    placed = {"order": Array(torch.int32, (spec.experts, rows * spec.slots))}
    if not last:
        placed["places"] = Array(torch.int32, slots)

    def run_choose(run: Run) -> None:
        chunk, arrays, weights = run.chunk, run.arrays, run.chunk.layers[layer]
        choose(
            arrays["stream"],
            arrays["statistics"],
            weights.gate,
            weights.gate_bias,
            chunk.segments,
            chunk.room,
            *(arrays[name] for name in ("chosen", "scores", "counts")),
            length=spec.length,
            block=spec.block(),
            among_all=spec.among_all,
            config=spec.config("choose"),
        )

    def run_scan(run: Run) -> None:
        scan(*(run.arrays[name] for name in ("counts", "starts", "totals")), config=spec.config("scan"))

    def run_place(run: Run) -> None:
        chunk, arrays = run.chunk, run.arrays
        place(
            arrays["chosen"],
            arrays["starts"],
            arrays["totals"],
            chunk.segments,
            chunk.room,
            arrays["order"],
            None if last else arrays["places"],
            length=spec.length,
            config=spec.config("place"),
        )

    return [
        Step("choose", chosen, run_choose, _products(spec, part, spec.hidden, spec.networks)),
        Step("scan", scanned, run_scan),
        Step("place", placed, run_place),
    ]


def _sparse_up(spec: Spec, part: Part, layer: int) -> Step:
    def launch(run: Run) -> None:
        weights, arrays = run.chunk.layers[layer], run.arrays
        inputs = arrays["stream"], weights.up, weights.up_bias, arrays["between"], arrays["totals"]
        common = _normalising(spec, part, run, "sparse_up")
        del common["length"]
        grouped(*inputs, order=arrays["order"], **common)

    rows, products = part.rows(spec) * spec.slots, _products(spec, part, spec.hidden, spec.wide)
    return Step("sparse_up", _between(spec, rows, spec.wide), launch, spec.slots * products)


def _sparse_down(spec: Spec, part: Part, layer: int) -> Step:
    rows = part.rows(spec)

    def launch(run: Run) -> None:
        weights, arrays, config = run.chunk.layers[layer], run.arrays, spec.config("sparse_down")
        inputs = arrays["between"], weights.down, weights.down_bias, arrays["found"], arrays["totals"]
        grouped(*inputs, rows=rows, precision=spec.kind, terms=spec.kind.linear[2], config=config)

    found = Array(torch.float32, (spec.experts, rows * spec.slots, spec.hidden))
    products = spec.slots * _products(spec, part, spec.wide, spec.hidden)
    return Step("sparse_down", {"found": found}, launch, products)


def _combine(spec: Spec, part: Part) -> Step:
    """What a token's networks made of it, onto the stream."""

    def launch(run: Run) -> None:
        names = ("found", "places", "scores", "stream", "statistics")
        combine(*(run.arrays[name] for name in names), block=spec.block(), config=spec.config("combine"))

    return Step("combine", _stream(spec, part), launch)


def _pool(spec: Spec, part: Part) -> Step:
    """Sums of the last block's hidden activations over the tokens of each network and modality."""

    def launch(run: Run) -> None:
        names = ("between", "order", "scores", "counts", "starts", "totals", "pooled_wide")
        pool(*(run.arrays[name] for name in names), config=spec.config("pool"))

    groups = (spec.experts, part.coalitions, 1, spec.modalities * spec.networks)
    return Step("pool", {"pooled_wide": Array(torch.float32, (*groups, spec.wide + SCORE_COLUMNS))}, launch)
