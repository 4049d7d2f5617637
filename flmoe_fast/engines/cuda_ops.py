"""The op that evaluates one chunk of coalitions with the fused CUDA kernels, ``torch.ops.flmoe_fast.fused_coalitions``.

Everything between two attentions is one kernel (csrc/fused/chain.h), and so is the last layer (csrc/fused/last.h). The
first layer's attention, the head and the routing, which are small, are the Triton kernels' (triton_ops.py). On tensors
of the CPU, where Triton's interpreter stands in for its kernels, csrc/fused/emulator.h stands in for these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.triton_kernels.precision import PRECISIONS
from flmoe_fast.engines.triton_ops import (
    HEAD_WEIGHTS,
    Sizes,
    check,
    layer_one_attention,
    library,
    logits_and_routing,
    new_results,
    scratch,
)

NAME = "fused_coalitions"
#: Tensors of the last layer and of every other one, in the op's list of weights; after them come the head's.
LAST_WEIGHTS, CHAIN_WEIGHTS = 3, 5
#: csrc/fused: Residual, Stage and Where.
NO_RESIDUAL, STATES, STREAM = 0, 1, 2
WHOLE, TAIL, ATTENTION = 0, 1, 2
DEVICE, ONE_GROUP, TWO_GROUPS = 0, 1, 2


@dataclass(frozen=True)
class FusedSizes(Sizes):
    """Sizes that fix the launches and the scratch memory of a chunk of the fused kernels."""

    @cached_property
    def layout(self) -> dict[str, int]:
        """Sizes that the kernels prescribe, csrc/fused/bind.cpp."""
        from flmoe_fast import _C

        return _C.fused_layout(self.hidden, self.precision.planes, self.depth, self.length, self.wide)

    def launches(self) -> int:
        """Kernel launches of one chunk, whatever its size."""
        # Attention of the first layer; chains, with attention between two of them; the last layer; head and routing.
        return 2 + max(2 * (self.layers - 1) - 1, 0) + 1 + 2 + len(self.routing)

    def arrays(self, coalitions: int, contexts: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Scratch arrays of a chunk."""
        kept = ("numerators", "scalars", "attended", "means", *(f"routing{i}" for i in range(len(self.routing) - 1)))
        arrays = super().arrays(coalitions, contexts)
        rows, pooled = coalitions * self.length, (coalitions, self.layout["query_tiles"], self.modalities)
        found = {name: arrays[name] for name in kept}
        if self.layers > 1:
            images = coalitions * self.heads * self.layout["key_tiles"] * self.layout["image_bytes"]
            found["stream"] = torch.float32, (self.experts, rows, self.hidden)
            found["query"] = torch.float16, (self.precision.planes, self.experts, rows, self.hidden)
            found["images"] = torch.uint8, (self.experts, images)
        found["pooled_stream"] = torch.float32, (self.experts, *pooled, self.hidden)
        found["pooled_wide"] = torch.float32, (self.experts, *pooled, self.wide)
        return found


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


def fused_sizes(
    residual: torch.Tensor,
    segments: torch.Tensor,
    weights: list[torch.Tensor],
    routing: list[torch.Tensor],
    heads: int,
    target: str,
    precision: str,
) -> FusedSizes:
    """Sizes that a call's tensors imply."""
    experts, _, length, hidden = residual.shape
    return FusedSizes(
        experts=experts,
        layers=(len(weights) - HEAD_WEIGHTS - LAST_WEIGHTS) // CHAIN_WEIGHTS + 1,
        length=length,
        hidden=hidden,
        heads=heads,
        wide=weights[2].shape[1],
        classes=weights[-1].shape[1],
        modalities=segments.shape[0] - 1,
        routing=tuple(bias.shape[-1] for bias in routing[3::2]),
        target=target,
        precision=PRECISIONS[precision],
    )


def _fused_coalitions(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flmoe_fast import _C

    sizes = fused_sizes(residual, segments, weights, routing, heads, target, precision)
    count = words.shape[0]
    results = new_results(words, sizes)
    if not count:
        return results
    check(words, [constant, varying, states, residual, segments, *weights, *routing, workspace])
    arrays = scratch(workspace, sizes, count, contexts)
    layer_one_attention(words, constant, varying, states, sizes, arrays, group, offset, contexts)

    def place(name: str) -> int:
        return arrays[name].data_ptr() if name in arrays else 0

    def plane(name: str) -> int:
        return arrays[name].stride(0) if name in arrays else 0

    on_device = words.device.type == "cuda"
    common = {
        "hidden": sizes.hidden,
        "terms": sizes.precision.planes,
        "depth": sizes.depth,
        "experts": sizes.experts,
        "coalitions": count,
        "length": sizes.length,
        "wide": sizes.wide,
        "attended": place("attended"),
        "attended_plane": plane("attended"),
        "query": place("query"),
        "query_plane": plane("query"),
        "images": place("images"),
        "words": words.data_ptr(),
        "width": words.shape[1],
        "where": DEVICE if on_device else emulation.groups,
        "fault": emulation.fault,
        "backwards": emulation.backwards,
        "stream": torch.cuda.current_stream(words.device).cuda_stream if on_device else 0,
    }

    def onto(layer: int) -> dict[str, int]:
        """What is added to the attention of a layer."""
        if not added:
            return {"residual": NO_RESIDUAL, "residual_rows": 0}
        if layer == 0:
            return {"residual": STATES, "residual_rows": residual.data_ptr()}
        return {"residual": STREAM, "residual_rows": place("stream")}

    def last_layer(stage: int, tape: torch.Tensor, out_bias: torch.Tensor, up_bias: torch.Tensor) -> None:
        _C.fused_last(
            **common,
            **onto(sizes.layers - 1),
            query_terms=sizes.precision.attention[0],
            modalities=sizes.modalities,
            stage=stage,
            tape=tape.data_ptr(),
            tape_bytes=tape.stride(0),
            out_bias=out_bias.data_ptr(),
            up_bias=up_bias.data_ptr(),
            segments=segments.data_ptr(),
            pooled_stream=place("pooled_stream"),
            pooled_wide=place("pooled_wide"),
        )

    last = weights[-HEAD_WEIGHTS - LAST_WEIGHTS : -HEAD_WEIGHTS]
    with torch.cuda.device_of(words):
        for layer in range(sizes.layers - 1):
            tape, *biases = weights[CHAIN_WEIGHTS * layer : CHAIN_WEIGHTS * (layer + 1)]
            out_bias, up_bias, down_bias, qkv_bias = (bias.data_ptr() for bias in biases)
            _C.fused_chain(
                **common,
                **onto(layer),
                tape=tape.data_ptr(),
                tape_bytes=tape.stride(0),
                out_bias=out_bias,
                up_bias=up_bias,
                down_bias=down_bias,
                qkv_bias=qkv_bias,
                stream_rows=place("stream"),
            )
            if layer + 2 < sizes.layers:
                last_layer(ATTENTION, *last)
        last_layer(TAIL if sizes.layers == 1 else WHOLE, *last)
    logits_and_routing(words, segments, weights, routing, sizes, arrays, normalised, temperature, results)
    return results


def _on_cpu(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Emulated, with Triton's interpreter for the Triton kernels; without it there is nothing that could."""
    import triton

    if not triton.knobs.runtime.interpret:
        raise ArgumentError(
            "words", "a tensor on the CPU", "CUDA tensors (on a CPU the kernels run only under TRITON_INTERPRET=1)"
        )
    return _fused_coalitions(*arguments)


library.define(
    NAME + "(Tensor words, Tensor constant, Tensor varying, Tensor states, Tensor residual, Tensor segments, "
    "Tensor[] weights, Tensor[] routing, Tensor(a!) workspace, int heads, int group, SymInt offset, SymInt contexts, "
    "bool added, bool normalised, float temperature, str target, str precision) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl(NAME, _fused_coalitions, "CUDA")
library.impl(NAME, _on_cpu, "CPU")


@torch.library.register_fake(f"flmoe_fast::{NAME}", lib=library)
def _(words, constant, varying, states, residual, segments, weights, *others):
    torch._check(words.dim() == 2, lambda: "words must be (C, words)")
    torch._check(words.dtype == torch.int64, lambda: "words must be int64")
    count, experts, classes = words.shape[0], residual.shape[0], weights[-1].shape[1]
    shapes = (count, experts, classes), (count, experts), (count, classes)
    return tuple(words.new_empty(shape, dtype=torch.float64) for shape in shapes)
