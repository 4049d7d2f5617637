"""The native CPU engine at every instruction level of this machine against the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edge_shapes import EDGES, Edge
from parity import (
    CONTEXTS,
    CPU_WAYS,
    LEVELS,
    all_of,
    allowed,
    exact,
    flat,
    named,
    needs_extension,
    problem_of,
    toggles,
    tolerance,
)

from flmoe_fast import interactions
from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines import cpu
from flmoe_fast.engines.backends import backends
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.levels import LEVEL_VARIABLE, levels
from flmoe_fast.engines.stack import LOG2E
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.native import extension
from flmoe_fast.probes.grid import CornerGrid

EXTENSION, _ = extension()
pytestmark = needs_extension

ROOT = Path(__file__).resolve().parents[1]
SWITCH = named("padded, switch of 12, capacity reference")
DEEP = named("three layers, gshard of 10, capacity reference")


def engine(edge: Edge, level: str, **options) -> CpuEngine:
    return CpuEngine(problem_of(edge), level=level, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_a_table_for_each_context(level: str, monkeypatch):
    """Too many varying tokens for one table of all contexts, few enough within each."""
    edge = named("past a block of keys and of rows")
    ours, contexts = engine(edge, level), all_of(edge)[CONTEXTS]
    monkeypatch.setattr(cpu, "KEYS_PER_GROUP", 60)
    monkeypatch.setattr(cpu, "COST_OF_SHARING", 0)
    calls = []
    original = ours._pattern_sums
    monkeypatch.setattr(ours, "_pattern_sums", lambda *a: calls.append(original(*a)) or calls[-1])
    corners = flat(ours.evaluate_toggles(contexts, toggles(ours.problem.n)))
    assert len(calls) == len(CONTEXTS) and all(c is not None for c in calls)
    error = (corners - exact(edge)[-len(corners) :]).abs().max()
    assert float(error) <= tolerance(edge, levels()[level][0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("edge", (named("players past a word"), SWITCH, DEEP), ids=lambda e: e.name)
def test_threads_chunks_and_order_change_no_bit(edge: Edge, level: str, monkeypatch):
    samples = edge.coalitions(problem_of(edge).n, count=17)
    order = torch.randperm(17)
    for way in ("patterns", "direct"):
        for name, value in CPU_WAYS[way].items():
            monkeypatch.setattr(cpu, name, value)
        values = engine(edge, level).evaluate(samples)
        assert torch.equal(flat(engine(edge, level, memory=1).evaluate(samples)), flat(values))
        # Routing is PyTorch's and may add in another order; the experts are native.
        assert torch.equal(engine(edge, level).evaluate(samples[order]).experts, values.experts[order])
        torch.set_num_threads(3)
        try:
            assert torch.equal(engine(edge, level).evaluate(samples).experts, values.experts)
        finally:
            torch.set_num_threads(1)


def test_scores_that_spread_too_far_are_attended_directly(monkeypatch):
    edge = EDGES[0]
    for name, value in CPU_WAYS["patterns"].items():
        monkeypatch.setattr(cpu, name, value)

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
    expected = flat(edge.game(model, backend="reference").engine.evaluate(samples))
    ours = CpuEngine(edge.game(model, dtype=torch.float32).problem, level="portable")
    ours._pattern_sums = lambda *a: seen.append(CpuEngine._pattern_sums(ours, *a)) or seen[-1]
    seen = []
    error = (flat(ours.evaluate(samples)) - expected).abs().max()
    # A few large scores decide, so one run of the reference is one throw: of equivalent ones the worst counts.
    shares = (1.0, 1.1, 1.3, LOG2E, 1.7)
    assert float(error) <= max(allowed(edge, "fp32", samples, expected, model=steep(share)) for share in shares)
    assert seen == [None]


LONGEST = Edge("longest", (1500, 548), (1500, 548), hidden=8, heads=1)


def two_thousand(edge: Edge) -> torch.Tensor:
    """One coalition."""
    return edge.coalitions(2048, count=3)[1:2]


@pytest.mark.parametrize("level", LEVELS)
def test_two_thousand_tokens(level: str):
    """The longest sequences, both ways of doing layer-1 attention."""
    samples, expected = two_thousand(LONGEST), exact(LONGEST, two_thousand)
    most, ours = tolerance(LONGEST, levels()[level][0], two_thousand), engine(LONGEST, level)
    alone = flat(ours.evaluate(samples))
    corners = flat(ours.evaluate_toggles(samples, toggles(2048)))
    assert float((alone - expected).abs().max()) <= most
    assert float((corners[:1] - expected).abs().max()) <= most
    assert float((corners[3] - corners[0]).abs().max()) > 3 * most  # negative control: two tokens matter


def test_grid_patterns_are_rows_and_columns():
    """A corner grid of two modalities is two groups, each with its players one by one and nobody."""
    edge = named("players past a word")
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


def test_sums_are_shared_only_where_that_is_less_work(monkeypatch):
    """By a corner grid, within each of its contexts; not by a coalition or two, nor by many with nothing in common."""
    edge = named("past a block of keys and of rows")
    ours = engine(edge, LEVELS[0])
    calls = []
    monkeypatch.setattr(ours, "_pattern_sums", lambda *a: calls.append(len(a[2].pick)))
    several = edge.coalitions(ours.problem.n, 10)
    for few in (several[:1], several[:2], several):
        ours.evaluate(few)
    assert not calls
    pairs = torch.cartesian_prod(torch.arange(4), 150 + torch.arange(4))
    toggled = CornerGrid.of(pairs, ours.problem.n).toggled
    ours.evaluate_toggles(several[4:6], toggled)
    assert calls == [25, 25]


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
        EXTENSION.CpuModel("neon", 1, 1, 8, 1, 16, True)


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
    edge = named("head of 32, tokens past a tile")
    game = edge.game(edge.model(scale=0.05), dtype=torch.float32)
    result = interactions(game, pairs=[(0, 19), (1, 20), (2, 25)], budget=200, progress=False)
    assert result.backend == "cpu"
    assert float(result.noise_share.max()) < 0.01
