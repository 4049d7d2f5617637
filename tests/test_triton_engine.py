"""The Triton engine against the reference: in Triton's interpreter on the CPU, or as compiled where there is a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from edge_shapes import EDGES, Edge, sparse
from parity import coalitions_of, flat, named, problem_of
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from breaks import break_kernels  # noqa: E402
from gpu_cases import DEVICE, GPU, TINY, engine, limit, rounded_problem, runs_triton, truth  # noqa: E402

from flmoe_fast import interactions  # noqa: E402
from flmoe_fast.checks import ArgumentError  # noqa: E402
from flmoe_fast.engines.backends import backends  # noqa: E402
from flmoe_fast.engines.engine import Reduction  # noqa: E402
from flmoe_fast.engines.gpu import triton as triton_engine  # noqa: E402
from flmoe_fast.engines.gpu.chunk import Chunk, Part, layout, steps  # noqa: E402
from flmoe_fast.engines.gpu.kernels import (  # noqa: E402
    attention,
    choice,
    combine,
    grouped,
    head,
    linear,
    order,
    routing,
)
from flmoe_fast.engines.gpu.triton import TritonEngine  # noqa: E402
from flmoe_fast.engines.problem import Logits  # noqa: E402
from flmoe_fast.probes.gap import GAPS, LEAST_JOINT_COST, redundancy_gap  # noqa: E402
from flmoe_fast.probes.grid import CornerGrid  # noqa: E402
from flmoe_fast.probes.moments import unit_means  # noqa: E402
from flmoe_fast.probes.run import Run, corner_values  # noqa: E402

pytestmark = [runs_triton, pytest.mark.usefixtures("poison", "quick_interpreter")]
MODULES = (linear, attention, head, routing, choice, order, grouped, combine)
BANDS = 4096


#: Sparse blocks both before another layer and at the end, and room that does not suffice.
TINY_SPARSE = sparse(Edge("tiny", (3, 2), (3, 2), hidden=16, heads=1, layers=3), "gshard", 6, "reference")


@pytest.mark.parametrize("edge", (TINY, pytest.param(TINY_SPARSE, marks=pytest.mark.long)), ids=lambda e: e.name)
def test_chunks_and_order_change_no_bit(edge: Edge):
    contexts, toggled = coalitions_of(edge)
    ours = engine(edge)
    words, varies = ours.toggle_words(contexts, toggled)
    values = flat(ours.plan(words, varies, group=3).run())
    plan = ours.plan(words, varies, group=3, size=4)  # within a context, and across two
    varying = len(plan.chunk.varying)
    assert plan.parts() == [(0, (4, 2, 3, 0, varying)), (4, (2, 1, 3, 1, varying))]
    assert torch.equal(flat(plan.run()), values)
    shuffled = ours.evaluate_toggles(contexts[[1, 0]], toggled)
    assert torch.equal(flat(shuffled).unflatten(0, (2, 3)), values.unflatten(0, (2, 3))[[1, 0]])


@pytest.mark.parametrize("edge", (TINY, TINY_SPARSE), ids=lambda e: e.name)
def test_nothing_outside_the_arrays_is_touched(edge: Edge):
    """Inputs lie between NaNs, the scratch memory between sentinels, and so do its arrays among each other."""
    ours = engine(edge)
    words, varies = ours.coalition_words(coalitions_of(edge)[0])
    plan = ours.plan(words, varies, group=2)
    expected = flat(plan.run())

    def between_nans(tensor: torch.Tensor) -> torch.Tensor:
        none = torch.nan if tensor.is_floating_point() else -1
        buffer = torch.full((tensor.numel() + 2 * BANDS,), none, dtype=tensor.dtype, device=DEVICE)
        inner = buffer[BANDS:-BANDS].view(tensor.shape)
        return inner.copy_(tensor)

    plan.chunk = Chunk.of(plan.chunk.spec, list(map(between_nans, plan.chunk.tensors())))
    size = plan.workspace.numel()
    buffer = torch.full((size + 2 * BANDS,), 0x5A, dtype=torch.uint8, device=DEVICE)
    plan.workspace = buffer[BANDS : BANDS + size]
    assert torch.equal(flat(plan.run()), expected)
    untouched = torch.ones(len(buffer), dtype=torch.bool, device=DEVICE)
    places = layout(plan.chunk.spec, 2, 1)
    for step in steps(plan.chunk.spec, Part(2, 1)):
        for name, array in step.writes.items():
            at = BANDS + places.starts[name]
            untouched[at : at + array.bytes] = False
    assert bool((buffer[untouched] == 0x5A).all()) and int(untouched.sum()) > 2 * BANDS
    assert not bool((buffer[~untouched] == 0x5A).all())


def counted(made: TritonEngine, contexts: torch.Tensor, toggled: torch.Tensor, monkeypatch) -> tuple[int, int]:
    """Launches of one run of a plan, without running them, and what the plan says."""
    launches = []
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda kernel, programs, *a, **b: launches.append(programs))
    plan = made.plan(*made.toggle_words(contexts, toggled), group=len(toggled))
    plan.run()
    return len(launches), plan.launches


@pytest.mark.parametrize(
    "edge, most",
    [
        (named("plain"), 16),
        (named("four modalities"), 16),
        (named("three routing layers"), 16),
        (named("three layers"), 21),
        (named("one layer"), 11),
        (named("padded, switch of 12, capacity reference"), 17),
        (named("one layer, naive of 4, capacity none"), 13),
        (TINY_SPARSE, 27),
        (named("MoE++"), 7),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_launches_depend_on_no_number_of_anything(edge: Edge, most: int, monkeypatch):
    made = engine(edge)
    n = made.problem.n
    few = counted(made, torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool), monkeypatch)
    many = counted(made, torch.ones(50, n, dtype=torch.bool), torch.eye(n, dtype=torch.bool), monkeypatch)
    assert few == many and few[0] == few[1] <= most


class Operations(TorchDispatchMode):
    """Remembers every operation."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_running_a_plan_only_launches(monkeypatch):
    """No copy to the host, no waiting: apart from the op, only views and copies of its results into place."""
    made = engine(TINY)
    plan = made.plan(*made.coalition_words(torch.eye(made.problem.n, dtype=torch.bool)), group=3, size=2)
    for module in MODULES:
        monkeypatch.setattr(module, "launch", lambda *a, **b: None)
    with Operations() as mode:
        plan.run()
    assert mode.seen <= {"empty", "fill_", "slice", "copy_", "view", "select", "unsqueeze", "coalition_logits"}
    assert "coalition_logits" in mode.seen


def op_arguments(made: TritonEngine, count: int = 2) -> tuple:
    plan = made.plan(*made.coalition_words(torch.eye(made.problem.n, dtype=torch.bool)[:count]), group=count)
    return plan.words, plan.chunk.tensors(), plan.workspace, plan.chunk.spec.text, [plan.group, 0, 1]


def test_op_is_well_registered():
    arguments = op_arguments(engine(TINY, "fp16x2"), 1)
    torch.library.opcheck(torch.ops.flmoe_fast.coalition_logits.default, arguments)


def test_op_compiles_in_one_graph():
    arguments = op_arguments(engine(TINY), 1)

    def program(words):
        experts, weights, mixture = torch.ops.flmoe_fast.coalition_logits(words, *arguments[1:])
        return (experts * weights[..., None]).sum(1) - mixture

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments[0]), program(arguments[0]))


def test_fake_cuda_tensors():
    """The op's shapes are known without a GPU and without running anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = op_arguments(engine(TINY))
    with FakeTensorMode():

        def fake(x):
            if isinstance(x, list):
                return [fake(y) for y in x]
            return torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x

        found = torch.ops.flmoe_fast.coalition_logits(*map(fake, arguments))
        assert [x.shape for x in found] == [(2, 4, 5), (2, 4), (2, 5)] and found[0].device.type == "cuda"


def test_memory_running_out_halves_the_chunk(monkeypatch):
    contexts, toggled = coalitions_of(TINY)
    ours = engine(TINY)
    expected = flat(ours.evaluate_toggles(contexts, toggled))
    run, sizes = triton_engine.Plan.run_part, []

    def scarce(self, start, part, out):
        if part.coalitions > 2:
            raise torch.OutOfMemoryError("no memory")
        sizes.append((start, start + part.coalitions))
        return run(self, start, part, out)

    monkeypatch.setattr(triton_engine.Plan, "run_part", scarce)
    assert torch.equal(flat(ours.evaluate_toggles(contexts, toggled)), expected)
    assert sizes == [(0, 2), (2, 4), (4, 6)]

    def never(self, *rest):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(triton_engine.Plan, "run_part", never)
    with pytest.raises(ArgumentError, match=r"memory: got too little for one coalition: no memory, .*\d+ bytes"):
        ours.evaluate(contexts)


def test_memory_bounds_the_chunk():
    made = engine(named("plain"))
    for memory in (1, 100_000, 10_000_000):
        made.memory = memory
        for group in (1, 7, 121):
            size = made.fitting(group)
            assert size == 1 or made.bytes(size, group) <= memory
            assert size < group or size % group == 0


def test_no_coalitions_and_no_variation():
    made = engine(TINY)
    assert made.evaluate(torch.zeros(0, 3, dtype=torch.bool)).experts.shape == (0, 4, 5)
    same = made.evaluate(torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(same.experts[0], same.experts[1])


def test_game_runs_on_the_engine():
    """An explanation through the public call, with its noise measured against float64."""
    edge = TINY
    game = edge.game(dtype=torch.float32, backend="triton", device=DEVICE, heads=("mixture",))
    assert game.backend == "triton" and game.about()["precision"] == "mixed"
    result = interactions(game, pairs=[(0, 2)], contexts=2, progress=False)
    plain = edge.game(heads=("mixture",))
    plain.engine = rounded_problem(problem_of(edge), torch.float16)
    expected = interactions(plain, pairs=[(0, 2)], contexts=2, progress=False)
    assert result.backend == "triton" and expected.sii.shape == result.sii.shape
    # Of four probabilities each, of a mixture whose weights and logits are off by no more than the limit.
    experts = truth(edge, "mixed")[:, :-4]
    assert float(abs(result.sii - expected.sii).max()) <= 4 * limit(edge, "mixed") * (1 + 4 * experts.abs().max())


@pytest.fixture(scope="module")
def grid():
    """A grid of three pairs on four players, in six contexts, with two outputs."""
    generator = torch.Generator().manual_seed(3)
    grid = CornerGrid.of(torch.tensor([[0, 3], [1, 3], [0, 2]]), 6)
    contexts = torch.rand(6, 6, generator=generator) < 0.5
    values = torch.randn(6, grid.evaluations, 2, generator=generator, dtype=torch.float64)
    values[:, 2] = values[:, 0]  # a player that does nothing
    return grid, contexts, values


def reduced(grid: CornerGrid, contexts: torch.Tensor, values: torch.Tensor, kind: str = "sum"):
    reduction = Reduction(grid.pairs, grid.single, kind, LEAST_JOINT_COST)
    return engine(TINY).reduce_corners(values, contexts, reduction)


@pytest.mark.parametrize("kind", GAPS)
def test_corner_reduction_equals_its_definition(kind: str, grid):
    made, contexts, values = grid
    found = reduced(*grid, kind)
    v = made.corners(contexts, values)
    assert torch.equal(found.second.cpu(), v[0] - v[1] - v[2] + v[3])
    expected, defined = redundancy_gap(kind, *v)
    assert float((found.gap.cpu() - expected).abs().max()) <= 4 * torch.finfo(torch.float64).eps * float(
        values.abs().max()
    )
    assert (found.defined is None) == (defined is None)
    if defined is not None:
        assert torch.equal(found.defined.cpu(), defined) and 0 < int(defined.sum()) < defined.numel()


@pytest.fixture
def evaluated_once(monkeypatch):
    """The engine keeps what it said of contexts: the interpreter takes seconds for them."""

    def evaluate(self, contexts: torch.Tensor, toggled: torch.Tensor):
        asked = str((contexts.tolist(), toggled.tolist()))
        if asked not in KEPT:
            KEPT[asked] = really(self, contexts, toggled)
        return KEPT[asked]

    really = TritonEngine.evaluate_toggles
    monkeypatch.setattr(TritonEngine, "evaluate_toggles", evaluate)


KEPT: dict[str, Logits] = {}


@pytest.mark.usefixtures("evaluated_once")
@pytest.mark.parametrize("kind", GAPS)
def test_probes_reduce_on_the_device(kind: str, monkeypatch):
    """What a probe draws is what PyTorch makes of the same values, and only samples leave the device."""
    game = TINY.game(dtype=torch.float32, backend="triton", device=DEVICE)
    grid = CornerGrid.of(torch.tensor([[0, 2], [1, 2]]), game.n)
    run = Run(game, kind, 0, False, (), 0)
    with monkeypatch.context() as patch:
        patch.setattr(type(game), "corner_values", None)  # not to be used
        drawn = run.draw(grid, torch.arange(2), 4)
    v = grid.corners(drawn.contexts, corner_values(game, drawn.contexts, grid))
    assert torch.equal(drawn.second, v[0] - v[1] - v[2] + v[3])
    gap, defined = redundancy_gap(kind, *v)
    eps = torch.finfo(torch.float64).eps  # of numbers between -2 and 2
    assert float((drawn.gap.total - unit_means(gap, drawn.per_unit)).abs().max()) <= 8 * eps
    assert (drawn.gap.defined is None) == (defined is None)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("both - only_first - only_other + neither", "both - only_first + only_other - neither"),
        ("tl.where(has_other, nobody, other), tl.where(has_other, first", "tl.where(has_other, nobody, first), "
         "tl.where(has_other, other"),
    ],
    ids=["sign of the second difference", "corners confused"],
)  # fmt: skip
def test_a_broken_corner_reduction_is_seen(right: str, wrong: str, grid, monkeypatch, tmp_path: Path):
    contexts, values = grid[1:]
    break_kernels("corners", right, wrong, monkeypatch, tmp_path)
    v = grid[0].corners(contexts, values)
    assert float((reduced(*grid).second.cpu() - (v[0] - v[1] - v[2] + v[3])).abs().max()) > 0.1


def test_requests_that_cannot_be_met_are_errors(monkeypatch):
    edge = EDGES[0]
    with pytest.raises(ArgumentError, match="backend: got 'triton', but the dtype is torch.float64"):
        edge.game(backend="triton", dtype=torch.float64, device=DEVICE)
    with pytest.raises(ArgumentError, match="precision: got 'fp16' with backend 'torch'"):
        edge.game(backend="torch", precision="fp16")
    with pytest.raises(ArgumentError, match="precision: got 'fp8', expected one of 'auto', 'fp16x2'"):
        engine(edge, "fp8")
    wide = Edge("head of 512", (1, 1), (1, 1), hidden=512, heads=1, layers=1)
    with pytest.raises(ArgumentError, match="the head width is 512, and at most 256 is supported"):
        engine(wide)
    with pytest.raises(ArgumentError, match="backend: got 'triton', but InterpretCC has no token sequence"):
        engine(named("InterpretCC"))
    with pytest.raises(ArgumentError, match="the number of networks is 300, and at most 256 is supported"):
        engine(sparse(TINY, "naive", 300, "none"))
    model = edge.model()
    with torch.no_grad():
        model.interaction_experts[0].fusion_model.network[0].attn.proj.weight.mul_(1e9)
    heavy = edge.game(model, backend="torch").problem
    with pytest.raises(ArgumentError, match="precision: got 'mixed' with a weight of .*, expected 'tf32'"):
        TritonEngine(heavy, device=DEVICE)
    monkeypatch.setattr(triton_engine, "interpreted", lambda: False)
    with pytest.raises(ArgumentError, match="backend: got 'triton', but the device is cpu"):
        TritonEngine(problem_of(edge), device="cpu")


def test_activations_beyond_fp16_are_an_error():
    edge = TINY
    model = edge.model()
    with torch.no_grad():
        for expert in model.interaction_experts:
            expert.fusion_model.network[0].mlp.network[0].bias.fill_(1e5)
    with pytest.raises(ArgumentError, match="precision: got 'fp16', in which some activation exceeds"):
        TritonEngine(edge.game(model, backend="torch").problem, device=DEVICE, precision="fp16").evaluate(
            torch.ones(1, 3, dtype=torch.bool)
        )


def test_op_refuses_wrong_tensors(monkeypatch):
    words, *rest = op_arguments(engine(TINY))
    with pytest.raises(ArgumentError, match="words: got torch.int32, expected torch.int64"):
        torch.ops.flmoe_fast.coalition_logits(words.int(), *rest)
    rest[1] = rest[1][:16]
    with pytest.raises(ArgumentError, match="workspace: got 16 bytes, expected at least"):
        torch.ops.flmoe_fast.coalition_logits(words, *rest)


def test_backends_say_what_is_missing():
    found = backends()["triton"]
    assert found.available == (GPU and torch.cuda.get_device_capability() >= (8, 0))
    assert found.available or "CUDA device" in found.reason
    assert EDGES[0].game(dtype=torch.float32, device="cpu").backend != "triton"


def test_package_does_not_import_triton():
    code = "import sys, flmoe_fast; from flmoe_fast import TokenGame; assert 'triton' not in sys.modules"
    import subprocess

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
