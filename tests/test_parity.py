"""Every engine against the reference, which runs the model as it is written, one coalition at a time.

One test a shape, and in it every engine that takes the shape, in every arithmetic and on every way it has of doing
layer-1 attention: what the reference says of a shape is then computed once. Planted mistakes are in test_breaks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from edge_shapes import BACKEND_EDGES, CPU_EDGES, CPU_SPARSE_EDGES, EDGES, SPARSE_EDGES, Edge, sparse
from parity import (
    CONTEXTS,
    CPU_WAYS,
    FP64,
    LEVELS,
    TORCH_WAYS,
    TRITON,
    all_of,
    corners_of,
    exact,
    flat,
    gaps,
    in_one_batch,
    named,
    needs_extension,
    needs_triton,
    no_choice_hangs_on_rounding,
    problem_of,
    relative,
    routed,
    toggles,
    tolerance,
)

from flmoe_fast.engines import cpu, portable, sparse_rows
from flmoe_fast.engines.choose import choose
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.engine import Request, TokenEngine
from flmoe_fast.engines.levels import levels

SWITCH = named("padded, switch of 12, capacity reference")
TRITON_EDGES: list[Edge] = []
if TRITON:
    import gpu_cases

    # What kernels distinguish; every precision, contexts and toggles, sparse blocks and longer sequences are below.
    TRITON_EDGES = [
        named(name)
        for name in (
            "no masks",
            "one token each",
            "absent modality",
            "four modalities",
            "one head of 256",
            "one layer",
            "three layers",
            "one routing layer",
            "three routing layers",
            "original, one head, one layer",
        )
    ]


@dataclass(frozen=True)
class Contender:
    """An engine in one arithmetic.

    Attributes
    ----------
    arithmetic : str or None
        What its tolerance is of; None for the promise in float64.
    ways : dict
        By name the constants of its module that force a way of doing layer-1 attention; numbers or functions of the
        engine.
    rows : list of int, optional
        Which of the coalitions it has time for; all by default.
    """

    name: str
    edges: tuple[Edge, ...]
    make: Callable[[Edge], TokenEngine]
    arithmetic: str | None
    ways: dict[str, dict[str, object]]
    rows: tuple[int, ...] | None = None

    def on_every_way(self, edge: Edge) -> Iterator[tuple[str, torch.Tensor]]:
        """Logits and routing (C, ...) on each way."""
        engine, coalitions = self.make(edge), all_of(edge)
        module = {"torch": portable, "cpu": cpu}.get(engine.name)
        n = engine.problem.n
        for way, constants in self.ways.items():
            values = {name: value(engine) if callable(value) else value for name, value in constants.items()}
            with patch.multiple(module, **values) if values else patch.dict({}):
                if self.rows is not None:
                    yield way, flat(engine.evaluate(coalitions[list(self.rows)])).cpu()
                    continue
                plain = engine.evaluate(coalitions[: -4 * len(CONTEXTS)])
                yield way, torch.cat([flat(plain), flat(engine.evaluate_toggles(coalitions[CONTEXTS], toggles(n)))])


def on_torch(dtype: torch.dtype) -> Callable[[Edge], TokenEngine]:
    return lambda edge: choose(Request(dtype, torch.device("cpu"), problem_of(edge), "torch"))[0]


def on_level(level: str) -> Callable[[Edge], TokenEngine]:
    return lambda edge: CpuEngine(problem_of(edge), level=level)


GATED = tuple(edge for edge in BACKEND_EDGES if edge.fusion == "interpretcc")
CONTENDERS = [
    Contender("torch, float64", (*EDGES, *SPARSE_EDGES, *BACKEND_EDGES[:2]), on_torch(torch.float64), None, TORCH_WAYS),
    Contender("torch, float32", (*EDGES, SWITCH, BACKEND_EDGES[0]), on_torch(torch.float32), "fp32", TORCH_WAYS),
    Contender("gated, float64", GATED, on_torch(torch.float64), None, {"": {}}),
    Contender("gated, float32", GATED[:1], on_torch(torch.float32), "fp32", {"": {}}),
    *(
        Contender(f"cpu, {level}", (*EDGES, *CPU_EDGES, *CPU_SPARSE_EDGES), on_level(level), arithmetic, CPU_WAYS)
        for level, (arithmetic, _) in levels().items()
        if level in LEVELS
    ),
]
if TRITON:
    # Half of the tokens vary between nobody and somebody.
    CONTENDERS.append(Contender("triton, fp32", tuple(TRITON_EDGES), gpu_cases.engine, "fp32", {"": {}}, rows=(0, 6)))
SHAPES = list(dict.fromkeys(edge for contender in CONTENDERS for edge in contender.edges))


@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("edge", SHAPES, ids=lambda e: e.name)
def test_values_equal_the_reference(edge: Edge):
    truth, wrong = exact(edge), []
    experts = len(problem_of(edge).model.interaction_experts)
    # The tolerances come from all coalitions at once, which is another way to run the same model.
    assert relative(in_one_batch(problem_of(edge), all_of(edge), torch.float64), truth) <= FP64
    for contender in CONTENDERS:
        if edge not in contender.edges:
            continue
        if edge.gate and contender.arithmetic:
            assert no_choice_hangs_on_rounding(edge, contender.arithmetic)
        for way, found in contender.on_every_way(edge):
            expected = truth if contender.rows is None else truth[list(contender.rows)]
            if contender.arithmetic is None:
                parts = zip(*(values.split([values.shape[1] - experts, experts], 1) for values in (found, expected)))
                fits = all(relative(*part) <= FP64 for part in parts)
            else:
                fits = float((found - expected).abs().max()) <= tolerance(edge, contender.arithmetic)
            wrong += [] if fits else [f"{contender.name} {way}: off by {relative(found, expected):.1e}"]
    assert wrong == []


@pytest.mark.parametrize(
    "edge", (SWITCH, *map(named, ("padded, gshard of 10, capacity reference",))), ids=lambda e: e.name
)
def test_the_capacity_of_these_shapes_binds(edge: Edge):
    """Otherwise parity would say nothing about it."""
    assert relative(exact(edge), exact(sparse(edge, edge.gate, edge.ffn_experts, "none"))) > 1e-3


# ---- GPU engines, interpreted or emulated where there is no GPU: contexts and toggles, in every precision ------------

#: Shape and precision, as far as the interpreter has time; bf16 it multiplies wrongly. A GPU runs them all on each.
CORNERS = {
    "padded": ("fp32", "mixed"),
    "tiny": ("tf32", "fp16x2", "fp16"),
    "original, one head, one layer": ("fp16x2",),
    "players past a word": ("fp16x2",),
}


@needs_triton
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("name", CORNERS)
def test_triton_equals_the_reference_in_every_precision(name: str):
    """Against the model with its weights rounded alike."""
    edge = gpu_cases.TINY if name == "tiny" else named(name)
    for precision in gpu_cases.PRECISIONS if gpu_cases.GPU else CORNERS[name]:
        found = gpu_cases.engine(edge, precision).evaluate_toggles(*gpu_cases.coalitions_of(edge))
        limit = gpu_cases.limit(edge, precision)
        assert gpu_cases.error_of(found, edge, precision) <= limit, precision
        if precision in ("mixed", "fp16"):  # negative control: one fp16 term, everywhere or of queries and weights only
            assert gpu_cases.error_of(found, edge, "fp16x2") > 3 * gpu_cases.limit(edge, "fp16x2"), precision
    if name == "padded":
        assert gpu_cases.limit(edge, "mixed") < gpu_cases.limit(edge, "fp16")


@needs_triton
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("edge", gpu_cases.SPARSE_SHAPES if TRITON else (), ids=lambda e: e.name)
def test_triton_mixes_sparse_experts(edge: Edge):
    """Contexts and toggles; the mixture is that of the experts."""
    assert not edge.gate or no_choice_hangs_on_rounding(edge, "fp32", corners_of)
    found = gpu_cases.engine(edge).evaluate_toggles(*gpu_cases.coalitions_of(edge))
    assert float((flat(found).cpu() - exact(edge, corners_of)).abs().max()) <= tolerance(edge, "fp32", corners_of)
    mixed = (found.weights[:, :, None] * found.experts).sum(1)
    size = (found.weights[:, :, None] * found.experts.abs()).sum(1)
    assert bool(((found.mixture - mixed).abs() <= len(found.weights[0]) * torch.finfo(torch.float64).eps * size).all())


@needs_triton
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("name", ("SWITCH", "LAST"))
def test_triton_rounds_sparse_weights_and_not_gates(name: str):
    """Against the model with its weights, but not its gates, rounded alike; and there, too, no choice hangs on that."""
    edge, seen, real = getattr(gpu_cases, name), [], sparse_rows.choose

    def spy(logits, *rest):
        seen.append(logits.flatten(0, -2))
        return real(logits, *rest)

    rounded = gpu_cases.rounded_problem(problem_of(edge), torch.float16)
    with patch.object(portable, "choose", spy):
        truth = flat(rounded.evaluate_toggles(*gpu_cases.coalitions_of(edge)))
    found = flat(gpu_cases.engine(edge, "fp16x2").evaluate_toggles(*gpu_cases.coalitions_of(edge))).cpu()
    limit = tolerance(edge, "fp16x2", corners_of)
    error = (routed(edge, "fp16x2", corners_of)[1] - routed(edge, None, corners_of)[1]).abs().max()
    assert float(gaps(edge, torch.cat(seen)).min()) > 4 * float(error)
    assert float((found - truth).abs().max()) <= limit
    assert float((found - exact(edge, corners_of)).abs().max()) > 3 * limit  # a rounded weight is seen


@needs_triton
@needs_extension
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("edge", gpu_cases.FUSED_SHAPES if TRITON else (), ids=lambda e: e.name)
def test_fused_kernels_equal_the_reference(edge: Edge):
    """Contexts and toggles, against the float64 model with its weights rounded to fp16."""
    found = gpu_cases.fused_engine(edge).evaluate_toggles(*gpu_cases.coalitions_of(edge))
    assert gpu_cases.error_of(found, edge, "fp16x2") <= gpu_cases.limit(edge, "fp16x2")


@needs_triton
@needs_extension
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("precision", ("mixed", "fp16"))
def test_fused_kernels_with_fewer_terms_equal_the_reference(precision: str):
    edge = gpu_cases.FUSED_SHAPES[4]
    found = gpu_cases.fused_engine(edge, precision).evaluate_toggles(*gpu_cases.coalitions_of(edge))
    assert gpu_cases.error_of(found, edge, precision) <= gpu_cases.limit(edge, precision)
    # Negative control of the tolerance of two terms.
    assert gpu_cases.error_of(found, edge, "fp16x2") > 3 * gpu_cases.limit(edge, "fp16x2")


# ---- what no engine's values may depend on ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("edge", (named("players past a word"), SWITCH), ids=lambda e: e.name)
def test_memory_and_order_of_coalitions_do_not_matter(edge: Edge, dtype: torch.dtype, most: float):
    """To the torch engine; the other engines' tests say that no bit changes."""
    request = Request(dtype, torch.device("cpu"), problem_of(edge), "torch")
    coalitions = edge.coalitions(request.known_problem.n, count=17)
    order = torch.randperm(17)
    for way in ("shared for all", "direct"):
        with patch.multiple(portable, **TORCH_WAYS[way]):
            engine, tiny = choose(request)[0], choose(replace(request, memory=1))[0]
            assert tiny.chunk == 1 and engine.chunk >= 17
            values = engine.evaluate(coalitions).experts
            assert relative(tiny.evaluate(coalitions).experts, values) <= most
            assert relative(engine.evaluate(coalitions[order]).experts, values[order]) <= most
            assert relative(engine.evaluate(coalitions.repeat(2, 1)).experts, values.repeat(2, 1, 1)) <= most


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if c.rows is None], ids=lambda c: c.name)
def test_no_coalitions_and_no_variation(contender: Contender):
    engine = contender.make(contender.edges[0])
    n = engine.problem.n
    nothing = engine.evaluate(torch.zeros(0, n, dtype=torch.bool))
    assert nothing.experts.shape == (0, *engine.evaluate(torch.ones(1, n, dtype=torch.bool)).experts.shape[1:])
    assert nothing.weights.shape == nothing.experts.shape[:2]
    same = engine.evaluate(torch.ones(3, n, dtype=torch.bool))
    assert torch.equal(same.experts[0], same.experts[1])
