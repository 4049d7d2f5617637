"""What only a GPU can show of its engines, at the size of a real model. Skipped, with the reason, without one."""

from __future__ import annotations

import functools

import pytest
import torch
from edge_shapes import FUSED_EDGES, Edge, sparse

pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from gpu_cases import rounded_problem

from flmoe_fast import interactions
from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.backends import backends
from flmoe_fast.engines.gpu.chunk import layout
from flmoe_fast.engines.gpu.cuda import FUSED_PRECISIONS, CudaEngine
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.gpu.triton import TritonEngine
from flmoe_fast.engines.portable import TorchEngine
from flmoe_fast.probes.grid import CornerGrid

pytestmark = pytest.mark.gpu
LARGE = Edge("320 + 196 tokens", (320, 196), (320, 196), hidden=256, heads=4)
MEDIUM = Edge("90 + 70 tokens, three layers", (90, 80), (90, 70), hidden=128, heads=4, layers=3)
#: Every token uses both networks, so that no choice hangs on rounding, however coarse.
BOTH = Edge("160 + 150 tokens, both networks", (160, 150), (160, 150), hidden=256, heads=4, gate="naive", ffn_experts=2)
#: Sparse blocks before another layer and at the end, and queues longer than the room.
SPARSE = sparse(MEDIUM, "gshard", 8, "reference")
#: Of some 100,000 choices a few are between logits that rounding can turn: this share of values has none of those.
NEARLY = 0.95


@functools.cache
def problem(edge: Edge):
    return edge.game(edge.model(scale=0.02), backend="torch").problem


@functools.cache
def engine(edge: Edge, precision: str = "fp16x2", backend: str = "triton") -> TritonEngine:
    if backend == "cuda" and not backends()["cuda"].available:
        pytest.skip(backends()["cuda"].reason)
    made = CudaEngine if backend == "cuda" else TritonEngine
    return made(problem(edge), precision=precision)


@functools.cache
def grid(edge: Edge, side: int = 4) -> tuple[CornerGrid, torch.Tensor]:
    """A corner grid of two modalities, and two contexts."""
    n, first = problem(edge).n, edge.valid[0]
    pairs = torch.cartesian_prod(torch.arange(side), first + torch.arange(side))
    contexts = torch.rand(2, n, generator=torch.Generator().manual_seed(5)) < torch.tensor([[0.3], [0.8]])
    return CornerGrid.of(pairs, n), contexts


@functools.cache
def truth(edge: Edge, operand: torch.dtype) -> torch.Tensor:
    corners, contexts = grid(edge)
    return rounded_problem(problem(edge), operand, "cuda").evaluate_toggles(contexts, corners.toggled).experts.cpu()


@functools.cache
def limit(edge: Edge, precision: str, share: float = 1.0) -> float:
    """Twice the error of the torch engine in float32 and one rounding, times how much coarser the operands are.

    The error is the largest among a ``share`` of coalitions and experts.
    """
    corners, contexts = grid(edge)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        plain = TorchEngine(problem(edge), device="cuda").evaluate_toggles(contexts, corners.toggled).experts.cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    exact = truth(edge, torch.float32)
    error = (plain - exact).abs().amax(-1).flatten().quantile(share)
    error += torch.finfo(torch.float32).eps * exact.abs().max()
    return float(2 * 2.0 ** (24 - PRECISIONS[precision].bits) * error)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("edge", [LARGE, MEDIUM, BOTH], ids=lambda e: e.name)
def test_every_precision_equals_float64(edge: Edge, precision: str):
    corners, contexts = grid(edge)
    found = engine(edge, precision).evaluate_toggles(contexts, corners.toggled).experts.cpu()
    assert float((found - truth(edge, PRECISIONS[precision].operand)).abs().max()) <= limit(edge, precision)


@pytest.mark.parametrize("precision", FUSED_PRECISIONS)
@pytest.mark.parametrize("edge", [LARGE, MEDIUM, *FUSED_EDGES], ids=lambda e: e.name)
def test_fused_kernels_equal_float64(edge: Edge, precision: str):
    corners, contexts = grid(edge)
    found = engine(edge, precision, "cuda").evaluate_toggles(contexts, corners.toggled).experts.cpu()
    assert float((found - truth(edge, PRECISIONS[precision].operand)).abs().max()) <= limit(edge, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16x2"])
def test_sparse_blocks_equal_float64(precision: str):
    """In nearly every coalition and expert."""
    corners, contexts = grid(SPARSE)
    found = engine(SPARSE, precision).evaluate_toggles(contexts, corners.toggled).experts.cpu()
    error = (found - truth(SPARSE, PRECISIONS[precision].operand)).abs().amax(-1)
    most = limit(SPARSE, precision, NEARLY)
    assert float((error <= most).double().mean()) >= NEARLY
    free = engine(sparse(SPARSE, "gshard", 8, "none"), precision).evaluate_toggles(contexts, corners.toggled)
    other = (free.experts.cpu() - truth(SPARSE, PRECISIONS[precision].operand)).abs().amax(-1)
    assert float((other > most).double().mean()) >= NEARLY  # negative control: without capacity


def test_one_fp16_term_is_seen():
    """Negative control of the limit of two terms."""
    corners, contexts = grid(LARGE)
    found = engine(LARGE, "fp16").evaluate_toggles(contexts, corners.toggled).experts.cpu()
    assert float((found - truth(LARGE, torch.float16)).abs().max()) > limit(LARGE, "fp16x2")


BOTH_ENGINES = pytest.mark.parametrize(
    ("edge", "backend"), [(LARGE, "triton"), (SPARSE, "triton"), (LARGE, "cuda"), (MEDIUM, "cuda")],
    ids=lambda of: getattr(of, "name", of),
)  # fmt: skip


@BOTH_ENGINES
def test_the_same_bits_again_and_in_other_chunks(edge: Edge, backend: str):
    corners, contexts = grid(edge)
    made = engine(edge, backend=backend)
    words, varies = made.toggle_words(contexts, corners.toggled)
    first = made.plan(words, varies, group=corners.evaluations).run()
    again = made.plan(words, varies, group=corners.evaluations).run()
    parts = made.plan(words, varies, group=corners.evaluations, size=7).run()
    for other in (again, parts):
        assert torch.equal(first.experts, other.experts) and torch.equal(first.mixture, other.mixture)


@BOTH_ENGINES
def test_a_plan_does_not_wait_for_the_device(edge: Edge, backend: str):
    corners, contexts = grid(edge)
    made = engine(edge, backend=backend)
    plan = made.plan(*made.toggle_words(contexts, corners.toggled), group=corners.evaluations)
    plan.run()  # kernels are compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH_ENGINES
def test_a_plan_is_captured_in_a_graph_and_replayed_on_other_coalitions(edge: Edge, backend: str):
    corners, contexts = grid(edge)
    made = engine(edge, backend=backend)
    plan = made.plan(*made.toggle_words(contexts, corners.toggled), group=corners.evaluations)
    plan.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan.run()
    others, _ = made.toggle_words(~contexts, corners.toggled)
    plan.words.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    expected = made.evaluate_toggles(~contexts, corners.toggled)
    assert torch.equal(captured.experts, expected.experts) and torch.equal(captured.mixture, expected.mixture)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_arrays_past_two_billion_elements(backend: str):
    """A chunk whose Q, K and V have more elements than an int32 counts."""
    made = engine(LARGE, backend=backend)
    count = -(-(2**31) // (made.chunk.spec.experts * made.chunk.spec.length * 3 * made.chunk.spec.hidden)) + 40
    needed = layout(made.chunk.spec, count, 1).bytes
    if torch.cuda.mem_get_info()[0] < needed + (2 << 30):
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    coalitions = torch.rand(count, made.problem.n, generator=torch.Generator().manual_seed(1)) < 0.5
    words, varies = made.coalition_words(coalitions)
    whole = made.plan(words, varies, group=count, size=count).run()
    parts = made.plan(words, varies, group=count, size=64).run()
    assert torch.equal(whole.experts, parts.experts) and torch.equal(whole.weights, parts.weights)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_twenty_thousand_evaluations_of_516_players(backend: str):
    if not backends()[backend].available:
        pytest.skip(backends()[backend].reason)
    game = LARGE.game(LARGE.model(scale=0.02), dtype=torch.float32, backend=backend, device="cuda")
    rows, cols = range(10), range(320, 330)
    result = interactions(game, rows=rows, cols=cols, budget=20_000, progress=False)
    assert result.backend == backend and 19_000 < result.evaluations <= 20_000
    assert float(result.noise_share.max()) < 0.01


def test_auto_takes_a_gpu_engine():
    found = backends()["triton"]
    assert found.available, found.reason
    edge = MEDIUM
    game = edge.game(edge.model(scale=0.02), dtype=torch.float32, device="cuda")
    assert game.backend in ("triton", "cuda")
    assert edge.game(device="cuda").backend == "torch"  # float64


def test_mixed_devices_are_refused():
    made = engine(MEDIUM)
    plan = made.plan(*made.coalition_words(torch.ones(1, made.problem.n, dtype=torch.bool)), group=1)
    plan.constant = plan.constant.cpu()
    with pytest.raises((ArgumentError, RuntimeError), match="device"):
        plan.run()


def test_memory_that_does_not_suffice_halves_the_chunk():
    made = TritonEngine(problem(LARGE), memory=1 << 50)
    coalitions = torch.rand(64, made.problem.n, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = engine(LARGE).evaluate(coalitions)
    total = torch.cuda.mem_get_info()[1]
    held = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + layout(made.chunk.spec, 20, 1).bytes) / total))
    try:
        found = made.evaluate(coalitions)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(found.experts, expected.experts)
