"""The steps of a chunk with the fused CUDA kernels: one launch a layer, and attention between two of them.

Everything between two attentions is one kernel (csrc/fused/chain.h), and so is the last layer (csrc/fused/last.h). The
first layer's attention, the head and the routing, which are small, are Triton kernels. On tensors of the CPU, where
Triton's interpreter stands in for those, csrc/fused/emulator.h stands in for these.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch

from flmoe_fast.engines.gpu.chunk import Part, Run, Spec, Step
from flmoe_fast.engines.gpu.triton_chunk import layer_one_attention, logits_and_routing
from flmoe_fast.engines.gpu.workspace import Array

#: There is a chunk of these kernels only where the extension was found.
_C = importlib.import_module("flmoe_fast._C")
#: csrc/fused: Residual, Stage and Where.
NO_RESIDUAL, STATES, STREAM = 0, 1, 2
WHOLE, TAIL, ATTENTION = 0, 1, 2
DEVICE, ONE_GROUP, TWO_GROUPS = 0, 1, 2


@dataclass(frozen=True)
class Emulation:
    """How the kernels run on tensors of the CPU (csrc/fused/emulator.h).

    Groups of 64 rows in a block, in which order its threads go, and a planted mistake.
    """

    groups: int = TWO_GROUPS
    backwards: bool = False
    fault: int = 0


#: For tests: both block shapes, both orders, and mistakes that must be seen.
emulation = Emulation()


def steps(spec: Spec, part: Part) -> list[Step]:
    """What a chunk launches, in order."""
    found = layer_one_attention(spec, part)
    for layer in range(spec.layers - 1):
        found.append(_chain(spec, part, layer))
        if layer + 2 < spec.layers:
            found.append(_last(spec, part, ATTENTION))
    found.append(_last(spec, part, TAIL if spec.layers == 1 else WHOLE))
    return found + logits_and_routing(spec, part)


def _chain(spec: Spec, part: Part, layer: int) -> Step:
    """From one layer's attention to the operands of the next one's."""
    sizes = _C.fused_layout(spec.hidden, spec.kind.planes, spec.depth, spec.length, spec.wide)
    rows, kind = part.rows(spec), spec.kind
    images = part.coalitions * spec.heads * sizes["key_tiles"] * sizes["image_bytes"]
    writes = {
        "stream": Array(torch.float32, (spec.experts, rows, spec.hidden)),
        "query": Array(torch.float16, (kind.planes, spec.experts, rows, spec.hidden)),
        "images": Array(torch.uint8, (spec.experts, images)),
    }

    def launch(run: Run) -> None:
        weights = run.chunk.layers[layer]
        with torch.cuda.device_of(run.words):
            _C.fused_chain(
                **_common(spec, run),
                **_onto(spec, run, layer),
                tape=weights.tape.data_ptr(),
                tape_bytes=weights.tape.stride(0),
                out_bias=weights.out_bias.data_ptr(),
                up_bias=weights.up_bias.data_ptr(),
                down_bias=weights.down_bias.data_ptr(),
                qkv_bias=weights.qkv_bias.data_ptr(),
                stream_rows=run.arrays["stream"].data_ptr(),
            )

    columns = spec.hidden + 2 * spec.wide + 3 * spec.hidden
    return Step("fused_chain", writes, launch, 2 * spec.experts * rows * spec.hidden * columns)


def _last(spec: Spec, part: Part, stage: int) -> Step:
    """Attention of a later layer, or the last layer down to sums for the head, or that without attention."""
    sizes = _C.fused_layout(spec.hidden, spec.kind.planes, spec.depth, spec.length, spec.wide)
    rows, kind = part.rows(spec), spec.kind
    attending = 0 if stage == TAIL else 4 * spec.experts * rows * spec.length * spec.hidden
    if stage == ATTENTION:
        attended = Array(kind.operand, (kind.planes, spec.experts, rows, spec.hidden))
        writes, products = {"attended": attended}, attending
    else:
        pooled = (spec.experts, part.coalitions, sizes["query_tiles"], spec.modalities)
        writes = {
            "pooled_stream": Array(torch.float32, (*pooled, spec.hidden)),
            "pooled_wide": Array(torch.float32, (*pooled, spec.wide)),
        }
        products = attending + 2 * spec.experts * rows * spec.hidden * (spec.hidden + spec.wide)

    def launch(run: Run) -> None:
        weights = run.chunk.layers[-1]
        with torch.cuda.device_of(run.words):
            _C.fused_last(
                **_common(spec, run),
                **_onto(spec, run, spec.layers - 1),
                query_terms=kind.attention[0],
                modalities=spec.modalities,
                stage=stage,
                tape=weights.tape.data_ptr(),
                tape_bytes=weights.tape.stride(0),
                out_bias=weights.out_bias.data_ptr(),
                up_bias=weights.up_bias.data_ptr(),
                segments=run.chunk.segments.data_ptr(),
                pooled_stream=_address(run, "pooled_stream"),
                pooled_wide=_address(run, "pooled_wide"),
            )

    return Step("fused_last", writes, launch, products)


def _address(run: Run, name: str) -> int:
    """Address of an array, or null where no step so far has written it."""
    return run.arrays[name].data_ptr() if name in run.arrays else 0


def _common(spec: Spec, run: Run) -> dict[str, int]:
    """Arguments that both kernels take."""
    words, on_device = run.words, run.words.device.type == "cuda"
    attended, query = run.arrays["attended"], run.arrays.get("query")
    return {
        "hidden": spec.hidden,
        "terms": spec.kind.planes,
        "depth": spec.depth,
        "experts": spec.experts,
        "coalitions": len(words),
        "length": spec.length,
        "wide": spec.wide,
        "attended": attended.data_ptr(),
        "attended_plane": attended.stride(0),
        "query": _address(run, "query"),
        "query_plane": 0 if query is None else query.stride(0),
        "images": _address(run, "images"),
        "words": words.data_ptr(),
        "width": words.shape[1],
        "where": DEVICE if on_device else emulation.groups,
        "fault": emulation.fault,
        "backwards": emulation.backwards,
        "stream": torch.cuda.current_stream(words.device).cuda_stream if on_device else 0,
    }


def _onto(spec: Spec, run: Run, layer: int) -> dict[str, int]:
    """What is added to the attention of a layer."""
    if not spec.added:
        return {"residual": NO_RESIDUAL, "residual_rows": 0}
    if layer == 0:
        return {"residual": STATES, "residual_rows": run.chunk.residual.data_ptr()}
    return {"residual": STREAM, "residual_rows": run.arrays["stream"].data_ptr()}
