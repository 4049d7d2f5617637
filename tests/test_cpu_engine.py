"""The native CPU engine at every instruction level of this machine against the reference."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from breaks import (
    IN_THE_ENGINE,
    IN_THE_MODEL,
    SPARSE_IN_THE_MODEL,
    give_room,
    mistake_scores,
    room_of_valid_tokens,
    swap_down,
)
from edge_shapes import EDGES, SPARSE_EDGES, Edge, sparse
from parity import (
    CONTEXTS,
    SPLIT_ROUNDING,
    SplitProducts,
    all_of,
    allowed,
    flat,
    routed,
    sparse_limit,
    toggles,
    tolerance,
    truth,
    two_terms,
)

from flmoe_fast import interactions
from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines import cpu
from flmoe_fast.engines.backends import backends
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.levels import LEVEL_VARIABLE, levels
from flmoe_fast.engines.prepared import prepared
from flmoe_fast.engines.problem import TokenProblem
from flmoe_fast.engines.stack import LOG2E
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.native import extension

EXTENSION, MISSING = extension()
pytestmark = pytest.mark.skipif(EXTENSION is None, reason=MISSING or "the extension is there")

ROOT = Path(__file__).resolve().parents[1]
LEVELS = [name for name, (_, missing) in levels().items() if not missing]
EXACT_LEVELS = [name for name in LEVELS if levels()[name][0] == "fp32"]

#: Shapes that matter to tiles, blocks and stacks, beside the table every engine is compared on.
SHAPES = [
    *EDGES,
    Edge("head of 32, tokens past a tile", (20, 17), (18, 17), hidden=64, heads=2),
    Edge("head of 64, two tiles of rows", (40, 1), (33, 1), hidden=128, heads=2),
    Edge("head of 128", (5, 4), (5, 4), hidden=128, heads=1),
    Edge("head of 8, width not a multiple of 16", (6, 5), (6, 5), hidden=40, heads=5),
    Edge("head of 20", (6, 5), (6, 5), hidden=20, heads=1, layers=3),
    Edge("past a block of keys and of rows", (150, 90), (150, 87), hidden=32, heads=1),
    Edge("original, past a block", (130, 130), None, hidden=16, heads=2, generation="original"),
]
SPARSE_NAMES = [
    "padded, switch of 12, capacity reference",
    "absent modality, switch of 12, capacity reference",
    "four modalities, noisy of 3, capacity none",
    "one token each, gshard of 10, capacity reference",
    "one layer, naive of 4, capacity none",
    "three layers, gshard of 10, capacity reference",
    "original, noisy of 3, capacity none",
]
#: Gates, capacities, and what matters to lists of rows: past a cell of networks, past a block of rows.
SPARSE_SHAPES = [
    *[edge for edge in SPARSE_EDGES if edge.name in SPARSE_NAMES],
    sparse(Edge("no room", (2, 2), (2, 2)), "gshard", 12, "reference"),
    sparse(Edge("networks past a cell", (3, 3), (3, 2), hidden=20, heads=1), "switch", 35, "none"),
    Edge("naive of 2, both used", (20, 17), (18, 17), hidden=64, heads=2, layers=1, gate="naive", ffn_experts=2),
    sparse(Edge("past a block of rows", (150, 90), (150, 87), hidden=32, heads=1, layers=1), "switch", 2, "none"),
]
SWITCH = SPARSE_SHAPES[0]
DEEP = next(edge for edge in SPARSE_SHAPES if edge.layers == 3)
PATHS = {
    "patterns": (1 << 40, 0),
    "as sized": (cpu.SHARED_TABLE_BYTES, cpu.KEYS_PER_GROUP),
    "direct": (-1, 0),
}
PRODUCTS = [(1, 32, 32), (15, 64, 32), (16, 32, 96), (17, 96, 64), (33, 256, 128), (70, 32, 64)]


@pytest.fixture(params=sorted(PATHS))
def path(request, monkeypatch):
    """Every way of doing layer-1 attention, forced by what the pattern sums may cost."""
    size, keys = PATHS[request.param]
    monkeypatch.setattr(cpu, "SHARED_TABLE_BYTES", size)
    monkeypatch.setattr(cpu, "KEYS_PER_GROUP", keys)
    return request.param


@functools.cache
def problem(edge: Edge) -> TokenProblem:
    return edge.game(dtype=torch.float32, backend="torch").problem


def engine(edge: Edge, level: str, **options) -> CpuEngine:
    return CpuEngine(problem(edge), level=level, **options)


def limit(edge: Edge, level: str) -> float:
    return tolerance(edge, levels()[level][0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("edge", SHAPES, ids=lambda e: e.name)
def test_values_equal_the_reference(edge: Edge, level: str, path: str):
    ours = engine(edge, level)
    samples, expected = truth(edge)
    values = [ours.evaluate(samples), ours.evaluate_toggles(samples[CONTEXTS], toggles(ours.problem.n))]
    error = (torch.cat([flat(v) for v in values]) - flat(expected)).abs().max()
    assert float(error) <= limit(edge, level)


@pytest.mark.parametrize("level", LEVELS)
def test_a_table_for_each_context(level: str, monkeypatch):
    """Too many varying tokens for one table of all contexts, few enough within each."""
    edge = next(e for e in SHAPES if e.name == "past a block of keys and of rows")
    ours = engine(edge, level)
    samples, expected = truth(edge)
    monkeypatch.setattr(cpu, "KEYS_PER_GROUP", 60)
    calls = []
    original = ours._pattern_sums
    monkeypatch.setattr(ours, "_pattern_sums", lambda *a: calls.append(original(*a)) or calls[-1])
    corners = flat(ours.evaluate_toggles(samples[CONTEXTS], toggles(ours.problem.n)))
    assert len(calls) == len(CONTEXTS) and all(c is not None for c in calls)
    error = (corners - flat(expected)[len(samples) :]).abs().max()
    assert float(error) <= limit(edge, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mistake", [*IN_THE_MODEL, *IN_THE_ENGINE])
def test_a_mistake_is_seen(mistake, level: str, path: str):
    """Negative control: each planted mistake moves values beyond the tolerance of the coarsest arithmetic."""
    edge = EDGES[2]
    broken = mistaken(edge, level, mistake, mistake in IN_THE_MODEL)
    samples, expected = truth(edge)
    error = (flat(broken.evaluate(samples)) - flat(expected)[: len(samples)]).abs().max()
    assert float(error) > 3 * tolerance(edge, "bf16x3")


def mistaken(edge: Edge, level: str, mistake, in_the_model: bool) -> CpuEngine:
    """An engine of a model of its own with a mistake planted."""
    one = edge.game(edge.model(), dtype=torch.float32, backend="torch").problem
    if in_the_model:
        mistake(prepared(one.model))
    found = CpuEngine(one, level=level)
    if not in_the_model:
        mistake(found)
    return found


def both(ours: CpuEngine, edge: Edge) -> torch.Tensor:
    """Plain coalitions, and the corners of some contexts."""
    coalitions = edge.coalitions(ours.problem.n)
    corners = ours.evaluate_toggles(coalitions[CONTEXTS], toggles(ours.problem.n))
    return torch.cat([flat(ours.evaluate(coalitions)), flat(corners)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("edge", SPARSE_SHAPES, ids=lambda e: e.name)
def test_sparse_values_equal_the_reference(edge: Edge, level: str, monkeypatch):
    """On every path of layer-1 attention."""
    ours = engine(edge, level)
    for size, keys in PATHS.values():
        monkeypatch.setattr(cpu, "SHARED_TABLE_BYTES", size)
        monkeypatch.setattr(cpu, "KEYS_PER_GROUP", keys)
        error = (both(ours, edge) - routed(edge, None, all_of)[0]).abs().max()
        assert float(error) <= sparse_limit(edge, levels()[level][0], all_of)


@pytest.mark.parametrize("edge", SPARSE_SHAPES, ids=lambda e: e.name)
def test_no_choice_hangs_on_rounding(edge: Edge):
    """Otherwise a value could jump, and its error would say nothing about the engine."""
    exact = routed(edge, None, all_of)[1]
    slots, networks = edge.model().config.top_k, exact.shape[1]
    ordered = exact.sort(-1, descending=True)[0]
    gap = ordered[:, slots - 1] - ordered[:, slots] if slots < networks else torch.tensor(math.inf)
    for arithmetic in {levels()[level][0] for level in LEVELS}:
        error = (routed(edge, arithmetic, all_of)[1] - exact).abs().amax(-1)
        # Two logits can come closer by twice the error, and tolerances allow twice the error of the reference.
        assert bool((gap > 4 * error).all())


SPARSE_MISTAKES = [(SWITCH, m) for m in (*SPARSE_IN_THE_MODEL, give_room, room_of_valid_tokens)]
SPARSE_MISTAKES += [(DEEP, m) for m in (swap_down, mistake_scores, give_room)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("edge, mistake", SPARSE_MISTAKES)
def test_a_mistake_in_sparse_blocks_is_seen(edge: Edge, mistake, level: str):
    """Negative control, as above."""
    broken = mistaken(edge, level, mistake, mistake in SPARSE_IN_THE_MODEL)
    error = (both(broken, edge) - routed(edge, None, all_of)[0]).abs().max()
    assert float(error) > 3 * sparse_limit(edge, "bf16x3", all_of)


@pytest.mark.parametrize("edge", EDGES[:3], ids=lambda e: e.name)
def test_one_bfloat16_term_is_seen(edge: Edge):
    """Negative control of the split arithmetic's tolerance: a single bfloat16 product exceeds it."""

    class OneTerm(SplitProducts):
        @staticmethod
        def product(a, b):
            return two_terms(a)[0] @ two_terms(b)[0]

    samples, expected = truth(edge)
    with OneTerm():
        coarse = flat(edge.game(backend="reference", dtype=torch.float32).engine.evaluate(samples))
    assert float((coarse - flat(expected)[: len(samples)]).abs().max()) > 3 * tolerance(edge, "bf16x3")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name", ["players past a word", "head of 32, tokens past a tile", "plain", SWITCH.name, DEEP.name]
)
def test_threads_chunks_and_order_change_no_bit(name: str, level: str, path: str):
    edge = next(e for e in (*SHAPES, *SPARSE_SHAPES) if e.name == name)
    samples = edge.coalitions(edge.game().n, count=17)
    values = flat(engine(edge, level).evaluate(samples))
    assert torch.equal(flat(engine(edge, level, memory=1).evaluate(samples)), values)
    order = torch.randperm(17)
    # Routing is the torch engine's and may add in another order; the experts are native.
    size = values.shape[1] - len(edge.model().interaction_experts)
    assert torch.equal(flat(engine(edge, level).evaluate(samples[order]))[:, :size], values[order][:, :size])
    torch.set_num_threads(3)
    try:
        threaded = flat(engine(edge, level).evaluate(samples))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(threaded[:, :size], values[:, :size])


@pytest.mark.parametrize("level", LEVELS)
def test_exp2_and_gelu_are_as_exact_as_stated(level: str):
    x = torch.linspace(-125, 126, 2_000_001)
    y = torch.empty_like(x)
    EXTENSION.cpu_elementwise(level, "exp2", x.data_ptr(), y.data_ptr(), len(x))
    exact = x.double().exp2()
    assert float(((y.double() - exact) / exact).abs().max()) <= 2.5e-7

    x = torch.cat([torch.linspace(-30, 30, 2_000_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])])
    y = torch.empty_like(x)
    EXTENSION.cpu_elementwise(level, "gelu", x.data_ptr(), y.data_ptr(), len(x))
    exact = x.double() * 0.5 * torch.special.erfc(-x.double() / math.sqrt(2))
    assert float(((y.double() - exact).abs() / x.double().abs().clamp(min=1)).max()) <= 1.2e-7
    tanh_form = F.gelu(x.double(), approximate="tanh")
    assert float((tanh_form - exact).abs().max()) > 1e-4  # negative control: the other GELU is told apart


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m, k, n", PRODUCTS)
def test_products(level: str, m: int, k: int, n: int):
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), math.nan)
    EXTENSION.cpu_matmul(level, a.data_ptr(), b.data_ptr(), c.data_ptr(), m, k, n)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # Every addition rounds once; split operands take three products.
    rounding = k * torch.finfo(torch.float32).eps
    if levels()[level][0] == "bf16x3":
        rounding = 3 * rounding + SPLIT_ROUNDING
    assert float(((c - exact).abs() / size).max()) <= rounding


def test_scores_that_spread_too_far_are_attended_directly():
    edge = EDGES[0]

    def steep(share: float = 1.0) -> FLI2MoE:
        """The same function for every ``share`` of a factor that moves from keys to queries."""
        model = edge.model()
        with torch.no_grad():
            for expert in model.interaction_experts:
                attention = expert.fusion_model.network[0].attn
                attention.q.weight *= 60 * share
                attention.kv.weight[: edge.hidden] /= share
        return model

    model = steep()
    samples = edge.coalitions(edge.game().n)
    exact = flat(edge.game(model, backend="reference").engine.evaluate(samples))
    ours = CpuEngine(edge.game(model, dtype=torch.float32).problem, level="portable")
    ours._pattern_sums = lambda *a: seen.append(CpuEngine._pattern_sums(ours, *a)) or seen[-1]
    seen = []
    error = (flat(ours.evaluate(samples)) - exact).abs().max()
    # A few large scores decide, so one run of the reference is one throw: of equivalent ones the worst counts.
    shares = (1.0, 1.1, 1.3, LOG2E, 1.7)
    assert float(error) <= max(allowed(edge, "fp32", samples, exact, model=steep(share)) for share in shares)
    assert seen == [None]


LONGEST = Edge("longest", (1500, 548), (1500, 548), hidden=8, heads=1)


@functools.cache
def longest(arithmetic: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One coalition of 2,048 tokens, what the reference says, and how far an arithmetic may be off."""
    samples = LONGEST.coalitions(2048, count=3)[1:2]
    exact = flat(LONGEST.game(backend="reference").engine.evaluate(samples))
    return samples, exact, allowed(LONGEST, arithmetic, samples, exact)


@pytest.mark.parametrize("level", LEVELS)
def test_two_thousand_tokens(level: str):
    """The longest sequences, both ways of doing layer-1 attention."""
    samples, exact, most = longest(levels()[level][0])
    ours = engine(LONGEST, level)
    alone = flat(ours.evaluate(samples))
    corners = flat(ours.evaluate_toggles(samples, toggles(2048)))
    assert float((alone - exact).abs().max()) <= most
    assert float((corners[:1] - exact).abs().max()) <= most
    assert float((corners[3] - corners[0]).abs().max()) > 3 * most  # negative control: two tokens matter


def test_no_coalitions_and_no_variation():
    game = EDGES[0].game(dtype=torch.float32)
    assert game.backend == "cpu"
    assert game(torch.zeros(0, game.n, dtype=torch.bool)).shape == (0, len(game.heads))
    same = game(torch.ones(3, game.n, dtype=torch.bool))
    assert torch.equal(same[0], same[1])


def test_grid_patterns_are_rows_and_columns():
    """A corner grid of two modalities is two groups, each with its players one by one and nobody."""
    edge = next(e for e in EDGES if e.name == "players past a word")
    ours = engine(edge, LEVELS[0])
    rows, cols = torch.arange(6), 40 + torch.arange(5)
    grid = torch.zeros(1 + 6 + 5 + 30, ours.problem.n, dtype=torch.bool)
    grid[1 + torch.arange(6), rows] = True
    grid[7 + torch.arange(5), cols] = True
    pairs = torch.cartesian_prod(rows, cols)
    grid[12 + torch.arange(30), pairs[:, 0]] = grid[12 + torch.arange(30), pairs[:, 1]] = True
    context = torch.rand(ours.problem.n) < 0.5
    varying, patterns = ours._patterns(context ^ grid)
    assert len(varying) == 11
    assert [len(p) for _, p in patterns.groups] == [7, 6]


def test_workspace_does_not_grow_with_coalitions():
    ours = engine(EDGES[0], LEVELS[0])
    ours.evaluate(EDGES[0].coalitions(ours.problem.n, 3))
    before = ours._native._scratch._kept["workspace"].numel()
    ours.evaluate(EDGES[0].coalitions(ours.problem.n, 3000))
    assert ours._native._scratch._kept["workspace"].numel() == before > 0


def test_backend_is_chosen_and_shown():
    edge = EDGES[0]
    assert edge.game(dtype=torch.float32).backend == "cpu"
    assert edge.game().backend == "torch"  # float64
    about = edge.game(dtype=torch.float32).about()
    assert about["level"] in LEVELS and about["arithmetic"] in ("fp32", "bf16x3")
    assert backends()["cpu"].available and "portable" in backends()["cpu"].details
    game = SWITCH.game(dtype=torch.float32)
    assert game.backend == "cpu" and "reason" not in game.about() and game.precise().backend == "torch"


def test_requests_that_cannot_be_met_are_errors():
    with pytest.raises(ArgumentError, match="backend: got 'cpu', but the dtype is torch.float64"):
        EDGES[0].game(dtype=torch.float64, backend="cpu")
    with pytest.raises(ArgumentError, match="level: got 'sse9', expected a level of this machine: .*portable"):
        engine(EDGES[0], "sse9")


@pytest.mark.parametrize("level", LEVELS)
def test_environment_forces_a_level(level: str, monkeypatch):
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    assert EDGES[0].game(dtype=torch.float32).engine.level == level
    monkeypatch.setenv(LEVEL_VARIABLE, "mmx")
    with pytest.raises(ArgumentError, match="FLMOE_CPU_LEVEL: got 'mmx', expected a level of this machine: .*portable"):
        EDGES[0].game(dtype=torch.float32)


def test_levels_below_the_best_are_reported_honestly():
    """The list is best first, ends with portable, and the native calls refuse what the machine lacks."""
    names = list(levels())
    assert names == ["amx", "avx512", "avx2", "portable"] and names[-1] in LEVELS
    with pytest.raises(RuntimeError, match="level 'neon' cannot run: this machine and build have .*portable"):
        EXTENSION.cpu_elementwise("neon", "exp2", 0, 0, 0)


def test_native_calls_refuse_nonsense():
    with pytest.raises(RuntimeError, match="every size must be positive"):
        EXTENSION.CpuModel("portable", 1, 1, 0, 1, 16, True)
    with pytest.raises(RuntimeError, match="every size must be positive"):
        EXTENSION.CpuModel("portable", 1, 1, 8, 1, 16, True).workspace(length=0, modalities=2)
    with pytest.raises(RuntimeError, match="multiple of heads"):
        EXTENSION.CpuModel("portable", 1, 1, 8, 3, 16, True)
    with pytest.raises(RuntimeError, match="slots must be between 1 and networks"):
        EXTENSION.CpuModel("portable", 1, 1, 8, 2, 16, True, networks=3, slots=4)
    with pytest.raises(RuntimeError, match="ends must be 1 or networks"):
        EXTENSION.CpuModel("portable", 1, 1, 8, 2, 16, True, networks=3, slots=2, ends=2)
    with pytest.raises(RuntimeError, match="the model has no sparse layers"):
        EXTENSION.CpuModel("portable", 1, 1, 8, 2, 16, True).set_networks(0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="multiples of 32"):
        EXTENSION.cpu_matmul("portable", 0, 0, 0, 1, 31, 32)


def test_without_the_extension_auto_takes_torch():
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "flmoe_fast._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, "tests")
import torch
from breaks import (
    IN_THE_ENGINE,
    IN_THE_MODEL,
    SPARSE_IN_THE_MODEL,
    forget_gate_bias,
    give_room,
    mistake_scores,
    room_of_valid_tokens,
    swap_down,
)
from edge_shapes import EDGES
from flmoe_fast.engines.backends import backends
print(EDGES[0].game(dtype=torch.float32).backend, backends()["cpu"].available, bool(backends()["cpu"].reason))
try:
    EDGES[0].game(dtype=torch.float32, backend="cpu")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "torch False True"
    assert second.startswith("backend: got 'cpu', but ")


@pytest.mark.parametrize("level", LEVELS)
def test_second_differences_are_hardly_noise(level: str, monkeypatch):
    """The engine's own measure of rounding noise, on a model with differing experts, is far below one per cent."""
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    edge = next(e for e in SHAPES if e.name == "head of 32, tokens past a tile")
    game = edge.game(edge.model(scale=0.05), dtype=torch.float32)
    result = interactions(game, pairs=[(0, 19), (1, 20), (2, 25)], budget=200, progress=False)
    assert result.backend == "cpu"
    assert float(result.noise_share.max()) < 0.01
