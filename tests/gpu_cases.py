"""What the GPU engines are compared on and with: in Triton's interpreter or the emulator, or compiled on a GPU.

A coarse arithmetic is compared with the float64 model of the weights that it rounds to, on few coalitions: the
interpreter takes milliseconds per program.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from unittest import mock

import pytest
import torch
from edge_shapes import Edge, sparse
from parity import Mixed, allowed, coalitions_of, corners_of, exact, flat, named, problem_of, tolerance

from flmoe_fast.engines.gpu import triton as triton_engine
from flmoe_fast.engines.gpu.cuda import CudaEngine
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.gpu.triton import TritonEngine
from flmoe_fast.engines.portable import TorchEngine
from flmoe_fast.engines.prepared import prepared
from flmoe_fast.engines.problem import Logits, TokenProblem
from flmoe_fast.engines.stack import LOG2E, Layer, Networks
from flmoe_fast.native import extension

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
#: The interpreter takes milliseconds per program: where the shape is not the point, it is as small as it gets.
TINY = Edge("tiny", (2, 2), (2, 1), hidden=16, heads=1)


def engine(edge: Edge, precision: str = "fp32", **options) -> TritonEngine:
    return TritonEngine(problem_of(edge), device=DEVICE, precision=precision, **options)


def rounded_problem(problem: TokenProblem, operand: torch.dtype, device: str = "cpu") -> TorchEngine:
    """The float64 torch engine of the model whose matrices were rounded to ``operand`` as the kernels' are."""
    model = copy.deepcopy(problem.model)
    ready = prepared(model)
    *layers, last = ready.stack.layers
    rounded = [_rounded(layer, operand, down=True) for layer in layers]
    # The last down-projection is multiplied with the classifier first, and never rounded.
    rounded.append(_rounded(last, operand, down=False))
    ready.stack = dataclasses.replace(ready.stack, layers=tuple(rounded))
    return TorchEngine(dataclasses.replace(problem, model=model), dtype=torch.float64, device=device)


def _rounded(layer: Layer, operand: torch.dtype, down: bool) -> Layer:
    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(operand).double()

    def block(part: Layer | Networks) -> dict[str, torch.Tensor]:
        return {"up": cast(part.up), "down": cast(part.down) if down else part.down}

    q, k, v = layer.qkv.chunk(3, dim=2)
    qkv = torch.cat([cast(q * LOG2E) / LOG2E, cast(k), cast(v)], dim=2)
    networks = layer.networks and dataclasses.replace(layer.networks, **block(layer.networks))
    return dataclasses.replace(layer, qkv=qkv, out=cast(layer.out), networks=networks, **block(layer))


@functools.cache
def truth(edge: Edge, precision: str) -> torch.Tensor:
    """Logits and routing of the edge's corners in float64, by the model that ``precision`` makes of its weights."""
    kind = PRECISIONS[precision]
    if kind.operand == torch.float32:
        return exact(edge, corners_of)
    return flat(rounded_problem(problem_of(edge), kind.operand).evaluate_toggles(*coalitions_of(edge)))


@functools.cache
def limit(edge: Edge, precision: str) -> float:
    """What the arithmetic is allowed on these corners; the interpreter multiplies TF32 operands in float32."""
    if precision == "mixed":
        corners, found = corners_of(edge), []
        with mock.patch.object(Mixed, "scale"):
            for Mixed.scale in (1.0, 1.1, 1.2, 1.3, 1.4):
                found.append(allowed(edge, "mixed", corners, exact(edge, corners_of)))
        return max(found)
    return tolerance(edge, "fp32" if precision == "tf32" and not GPU else precision, corners_of)


def error_of(ours: Logits, edge: Edge, precision: str) -> float:
    return float((flat(ours).cpu() - truth(edge, precision)).abs().max())


def fused_engine(edge: Edge, precision: str = "fp16x2", **options) -> CudaEngine:
    return CudaEngine(problem_of(edge), device=DEVICE, precision=precision, **options)


SWITCH, LAST, DEEP = (
    sparse(Edge("tiny", (5, 3), (4, 3), hidden=16, heads=1, layers=layers), gate, networks, "reference")
    for gate, networks, layers in (("switch", 6, 2), ("gshard", 6, 1), ("gshard", 6, 3))
)


#: Every gate, with a capacity that binds and without one, in first, middle and last layers.
SPARSE_SHAPES = [
    SWITCH,
    DEEP,
    named("absent modality, switch of 12, capacity reference"),
    named("one layer, naive of 4, capacity none"),
    named("original, noisy of 3, capacity none"),
    sparse(Edge("no room", (2, 2), (2, 2), hidden=16, heads=1), "gshard", 12, "reference"),
    sparse(Edge("many networks", (2, 2), (2, 1), hidden=20, heads=1, layers=1), "switch", 20, "none"),
    # Every network has more slots than a tile has rows.
    Edge("both used", (9, 5), (8, 5), hidden=16, heads=1, layers=1, gate="naive", ffn_experts=2),
    named("MoE++"),
]


SMALL = {"hidden": 64, "heads": 2}


#: One token each; tiles of rows, queries and keys that are not full, or more than one; every number of heads; the
#: stages of the last kernel; one head of 256; three and four modalities, and one that is absent; both generations.
FUSED_SHAPES = [
    Edge("one token each", (1, 1), (1, 1), **SMALL),
    Edge("no masks, one head", (4, 5), None, hidden=64, heads=1),
    Edge("two query tiles", (40, 31), (37, 29), **SMALL),
    Edge("many key tiles", (19, 20), (18, 17), hidden=64, heads=1),
    Edge("four heads", (6, 7), (3, 5), hidden=128, heads=4),
    Edge("one head of 256", (3, 2), (3, 2), hidden=256, heads=1),
    Edge("absent modality", (4, 3, 6), (4, 0, 2), **SMALL),
    Edge("four modalities", (2, 3, 1, 4), (2, 3, 1, 2), **SMALL),
    Edge("one layer", (4, 3), (4, 2), layers=1, **SMALL),
    Edge("three layers", (4, 3), (4, 2), layers=3, **SMALL),
    Edge("original", (4, 4), None, generation="original", **SMALL),
    Edge("original, one layer", (4, 4, 4), None, generation="original", layers=1, **SMALL),
]

EXTENSION, MISSING = extension()
runs_triton = pytest.mark.skipif(
    not (GPU or triton_engine.interpreted()), reason="needs a GPU, or TRITON_INTERPRET=1 set before the tests started"
)
runs_fused = [pytest.mark.skipif(EXTENSION is None, reason=f"no extension: {MISSING}"), runs_triton]
