"""The C++ core's corner grid, reduction, routing, gates and tiles against the package's own Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from edge_shapes import EDGES

from flmoe_fast.coalitions import extension, pack, words_for
from flmoe_fast.engines import dispatch
from flmoe_fast.model import sparse
from flmoe_fast.probes.gap import GAPS, LEAST_JOINT_COST, redundancy_gap
from flmoe_fast.probes.grid import CornerGrid
from flmoe_fast.probes.run import second_difference

CSRC = Path(__file__).resolve().parent.parent / "csrc"
MODULE, MISSING = extension()
EPS = torch.finfo(torch.float64).eps
#: A gate's number in C++.
GATES = ("naive", "gshard", "switch", "noisy")

needs_native = pytest.mark.skipif(MODULE is None, reason=MISSING or "native is there")
needs_cuda_build = pytest.mark.skipif(
    MODULE is None or not MODULE.info()["cuda"], reason=MISSING or "built without CUDA kernels"
)
needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the tests")


class Core:
    """The functions on tensors: the host's on CPU tensors, the kernels on a GPU's."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def call(self, name: str, *arguments):
        """Call a function of the module; tensors go as addresses, None as null."""
        plain = [0 if a is None else a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        if self.device.type == "cuda":
            return getattr(MODULE, f"cuda_{name}")(*plain, torch.cuda.current_stream().cuda_stream)
        return getattr(MODULE, name)(*plain)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Memory with garbage in it."""
        return torch.full(shape, 77, dtype=dtype, device=self.device)

    def to(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self.device).contiguous() for tensor in tensors]

    def grid(self, grid: CornerGrid) -> tuple:
        return (*self.to(grid.pairs, grid.players, grid.single), len(grid.pairs), len(grid.players))

    def corner_words(self, grid: CornerGrid, contexts: torch.Tensor) -> torch.Tensor:
        count, n = contexts.shape
        (words,) = self.to(pack(contexts))
        out = self.empty(count, grid.evaluations, words_for(n), dtype=torch.int64)
        self.call("corner_words", *self.grid(grid), words, out, count, n)
        return out.cpu()

    def reduce(self, grid: CornerGrid, contexts: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        count, n = contexts.shape
        words, values = self.to(pack(contexts), values)
        shape = (count, len(grid.pairs), values.shape[2])
        second, gaps, moments = self.empty(*shape), self.empty(4, *shape), self.empty(2, *shape[1:])
        defined = self.empty(*shape, dtype=torch.uint8)
        arrays = [words, values, second, gaps, defined, moments]
        if self.device.type == "cuda":
            arrays.append(self.empty(2, -(-count // 32), *shape[1:]))
        self.call("reduce_corners", *self.grid(grid), *arrays, count, shape[2], n, LEAST_JOINT_COST)
        return [tensor.cpu() for tensor in (second, gaps, defined, moments)]

    def choose(self, gate: str, logits: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, networks = logits.shape
        chosen, scores = self.empty(rows, slots, dtype=torch.int64), self.empty(rows, slots, dtype=logits.dtype)
        bits = 8 * logits.dtype.itemsize
        self.call(f"gate_choose{bits}", GATES.index(gate), *self.to(logits), chosen, scores, rows, networks, slots)
        return chosen.cpu(), scores.cpu()

    def sort_slots(self, chosen: torch.Tensor, networks: int, starts: torch.Tensor, room: torch.Tensor | None):
        experts, rows, slots = chosen.shape
        blocks = len(starts) - 1
        first = self.empty(experts * networks * blocks + 1, dtype=torch.int64)
        sorted_, place = (self.empty(chosen.numel(), dtype=torch.int64) for _ in range(2))
        chosen, starts = self.to(chosen, starts)
        room = None if room is None else self.to(room)[0]
        self.call("sort_slots", chosen, starts, room, experts, rows, slots, networks, blocks, first, sorted_, place)
        return first.cpu(), sorted_.cpu(), place.cpu()

    def tiles(self, first: torch.Tensor, groups: int, blocks: int, height: int) -> torch.Tensor:
        rows, tiles = (self.empty(groups + 1, dtype=torch.int64) for _ in range(2))
        count = MODULE.most_tiles(int(first[-1]), groups, height)
        found = self.empty(count, 3, dtype=torch.int64)
        self.call("tile_map", *self.to(first), groups, blocks, height, rows, tiles, found, count)
        return found.cpu()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=needs_native),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda_build]),
    ]
)
def core(request) -> Core:
    return Core(request.param)


# ---- corner grids


def random_grid(n: int, pairs: int) -> CornerGrid:
    first = torch.randint(n, (pairs,))
    return CornerGrid.of(torch.stack([first, (first + torch.randint(1, n, (pairs,))) % n], dim=1), n)


@needs_native
def test_corners_are_numbered_alike():
    for n, pairs in ((2, 1), (65, 30), (516, 100)):
        grid = random_grid(n, pairs)
        players, single = torch.empty(2 * pairs, dtype=torch.int64), torch.empty(pairs, 2, dtype=torch.int64)
        count = MODULE.number_corners(grid.pairs.data_ptr(), pairs, players.data_ptr(), single.data_ptr())
        assert torch.equal(players[:count], grid.players)
        assert torch.equal(single, grid.single)
    rows, columns, pairs = torch.tensor([3, 1]), torch.tensor([5, 9, 4]), torch.empty(6, 2, dtype=torch.int64)
    MODULE.product_pairs(rows.data_ptr(), 2, columns.data_ptr(), 3, pairs.data_ptr())
    assert torch.equal(pairs, torch.cartesian_prod(rows, columns))


@pytest.mark.parametrize("n", [2, 64, 65, 130])
def test_corner_coalitions(core, n):
    grid, contexts = random_grid(n, 9), torch.rand(7, n) < 0.5
    expected = pack((contexts[:, None] ^ grid.toggled).flatten(0, 1)).unflatten(0, (7, -1))
    assert torch.equal(core.corner_words(grid, contexts), expected)
    assert not torch.equal(core.corner_words(grid, ~contexts), expected)


@pytest.mark.parametrize("contexts", [0, 1, 31, 33, 100])
def test_reduction_is_its_definition(core, contexts):
    """Second differences and gaps to the bit; moments to the rounding of their sums."""
    n, outputs = 70, 3
    grid = random_grid(n, 8)
    drawn = torch.rand(contexts, n) < 0.5
    values = torch.randn(contexts, grid.evaluations, outputs, dtype=torch.float64)
    values[:, 1] = values[:, 0]  # a player that does nothing
    second, gaps, defined, moments = core.reduce(grid, drawn, values)
    corners = grid.corners(drawn, values)
    expected = second_difference(corners)
    assert torch.equal(second, expected)
    for found, kind in zip(gaps, GAPS):
        gap, where = redundancy_gap(kind, *corners)
        assert torch.equal(found, gap), kind
        assert where is None or torch.equal(defined.bool(), where)
    if contexts:
        mean = expected.mean(0)
        squares = (expected - mean).square().sum(0)
        # Every step rounds the mean, and the deviation that it squares, by eps of the largest value.
        bound = 4 * contexts * EPS * float(expected.abs().max())
        assert float((moments[0] - mean).abs().max()) <= bound
        assert float((moments[1] - squares).abs().max()) <= bound * contexts * float(expected.abs().max())
        wrong = core.reduce(grid, ~drawn, values)[0]  # control: signs of single toggles turn around
        assert not torch.equal(wrong, expected)


# ---- routing

NAMES = ("plain", "no masks", "absent modality", "four modalities", "players past a word")
ROUTED = [edge for edge in EDGES if "routing" in edge.name or edge.name in NAMES]


@pytest.mark.parametrize("edge", ROUTED, ids=lambda edge: edge.name)
def test_routing_is_the_reference(core, edge):
    """Weights of the reference, to the rounding of the sums in float64; and the mixture of its logits."""
    engine, reference = edge.game(backend="torch").engine, edge.game(backend="reference").engine
    problem, packed = engine.problem, engine.packed
    base, step = engine._routing_base, engine._routing_step  # (M, H), (n, M, H)
    coalitions = edge.coalitions(problem.n)
    count, modalities, hidden = len(coalitions), *base.shape
    owner = step.abs().sum(2).argmax(1)
    assert torch.equal(owner, owner.sort().values)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(owner, minlength=modalities).cumsum(0)])
    own_step = step[torch.arange(len(step)), owner]
    layers = [core.to(weight.double(), bias.double()) for weight, bias in packed.routing]
    base, own_step, starts, words = core.to(base, own_step, starts, pack(coalitions))
    weights = core.empty(count, layers[-1][1].numel())
    core.call(
        "route", base, own_step, starts, problem.n, modalities, hidden, problem.masked, packed.temperature,
        [(weight.data_ptr(), bias.data_ptr(), bias.numel()) for weight, bias in layers], words, weights, count,
    )  # fmt: skip
    weights = weights.cpu()
    expected = reference.evaluate(coalitions)

    # What rounding can do to a score: gamma |x| |W|, passed on through |W|; a weight moves by twice that, relatively.
    x = engine._routing_base.abs() + step.abs().sum(0)
    error = (problem.n + 2) * EPS * x
    if problem.masked:  # a unit vector's numbers are at most one
        norm = (engine._routing_base + torch.einsum("cn,nmh->cmh", coalitions.double(), step)).norm(dim=-1).amin(0)
        error = (error.norm(dim=-1) / norm.clamp(min=1e-12) + (hidden + 4) * EPS)[:, None].expand_as(x)
        x = torch.ones_like(x)
    x, error = x.flatten(), error.flatten()
    for weight, bias in packed.routing:
        terms = len(x) + 2
        x, error = x @ weight.abs() + bias.abs(), error @ weight.abs()
        error = error + terms * EPS * x
    bound = 2 * float(error.max()) / packed.temperature + 8 * len(x) * EPS
    assert bound < 1e-9
    assert float((weights - expected.weights).abs().max()) <= 2 * bound
    assert float((weights.flip(0) - expected.weights).abs().max()) > 2 * bound  # control: another coalition's

    experts, logits_weights = core.to(expected.experts, expected.weights)
    mixtures = core.empty(count, experts.shape[2])
    core.call("mixture", experts, logits_weights, mixtures, *experts.shape)
    terms = expected.weights[:, :, None] * expected.experts
    limit = experts.shape[1] * EPS * terms.abs().sum(1)
    assert bool(((mixtures.cpu() - terms.sum(1)).abs() <= limit).all())


# ---- gates and tiles


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choices_are_the_engines(core, gate, dtype):
    for networks, slots in ((1, 1), (4, 2), (33, 3), (5, 5)):
        slots = 1 if gate == "switch" else slots
        ties = torch.randint(-2, 3, (40, networks)).to(dtype)
        for logits in (ties, torch.randn(40, networks, dtype=dtype)):
            chosen, scores = core.choose(gate, logits, slots)
            expected, exact = dispatch.choose(logits, gate, slots)
            assert torch.equal(chosen, expected)
            # Logits of a few units: an exponential is off by an ulp or two, and by what its argument was rounded to.
            assert float((scores - exact).abs().max()) <= (networks + 16) * torch.finfo(dtype).eps
            assert torch.equal(chosen, sparse.largest(logits, slots)[1])


@needs_native
def test_room_is_the_networks():
    for gate in ("switch", "gshard"):
        for training in (False, True):
            for tokens in (0, 1, 5, 10, 77, 516):
                for networks in (1, 3, 4, 16):
                    found = MODULE.slots_per_network(GATES.index(gate), tokens, networks, training)
                    assert found == sparse.slots_per_network(gate, tokens, networks, training)
    assert MODULE.slots_per_network(GATES.index("noisy"), 10, 4, False) < 0  # no limit


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("limited", [False, True])
def test_slots_are_sorted_as_by_the_engine(core, slots, limited):
    experts, networks = 3, 5
    for lengths in ([1], [4, 0, 7], [40, 31, 40, 31]):
        blocks, rows = len(lengths), sum(lengths)
        block = torch.arange(blocks).repeat_interleave(torch.tensor(lengths))
        starts = torch.tensor([0, *lengths]).cumsum(0)
        chosen = torch.rand(experts, rows, networks).argsort(-1)[..., :slots].contiguous()
        room = torch.randint(0, 9, (blocks,)) if limited else None
        sent = dispatch.dispatch(chosen, networks, block, blocks, room)
        first, found, place = core.sort_slots(chosen, networks, starts, room)
        assert torch.equal(first.diff(), sent.lengths)
        assert torch.equal(found[: int(first[-1])], sent.slot)
        assert first[::blocks].tolist() == sent.bounds
        inverse = torch.full((chosen.numel(),), -1)
        inverse[sent.slot] = torch.arange(len(sent.slot))
        assert torch.equal(place, inverse)
        if limited:  # and drops whom the model drops
            for b in range(blocks):
                part = slice(int(starts[b]), int(starts[b + 1]))
                kept = sparse.first_come(chosen[:, part], networks, int(room[b])) >= 0
                assert torch.equal(place.view(experts, rows, slots)[:, part] >= 0, kept)

        groups = experts * networks
        for height in (1, 3, 16):
            expected = [
                [group, start, min(height, stop - start)]
                for group, (begin, stop) in enumerate(zip(sent.bounds, sent.bounds[1:]))
                for start in range(begin, stop, height)
            ]
            tiles = core.tiles(first, groups, blocks, height).tolist()
            assert tiles[: len(expected)] == expected
            assert all(rows == 0 for _, _, rows in tiles[len(expected) :])


# ---- errors


@needs_native
def test_wrong_numbers_are_refused():
    grid, contexts = random_grid(5, 2), torch.rand(3, 5) < 0.5
    outside = CornerGrid(grid.pairs + 5, grid.toggled, grid.single, grid.players)
    core = Core("cpu")
    with pytest.raises(RuntimeError, match="reduce_corners: pairs has"):
        core.reduce(outside, contexts, torch.zeros(3, grid.evaluations, 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="sort_slots: chosen has 9"):
        core.sort_slots(torch.full((1, 2, 1), 9), 4, torch.tensor([0, 2]), None)
    with pytest.raises(RuntimeError, match="gate_choose: unknown gate 7"):
        MODULE.gate_choose32(7, 0, 0, 0, 0, 4, 1)
    with pytest.raises(RuntimeError, match="words is a null pointer"):
        MODULE.corner_words(*(a if isinstance(a, int) else a.data_ptr() for a in core.grid(grid)), 0, 0, 1, 5)


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_kernel_is_named():
    data = torch.zeros(64, dtype=torch.int64)
    at = data.data_ptr()
    for kernel, name, arguments in (
        ("corner_words", "cuda_corner_words", (at, at, at, 1, 2, at, at, 1, 5)),
        ("corner_reduce", "cuda_reduce_corners", (at, at, at, 1, 2, at, at, at, at, at, at, at, 1, 1, 5, 0.0)),
        ("coalition_route", "cuda_route", (at, at, at, 5, 1, 2, True, 1.0, [(at, at, 3)], at, at, 1)),
        ("coalition_mixture", "cuda_mixture", (at, at, at, 1, 2, 2)),
        ("gate_choose", "cuda_gate_choose32", (0, at, at, at, 1, 2, 1)),
        ("slot_place_runs", "cuda_sort_slots", (at, at, 0, 1, 1, 1, 2, 1, at, at, at)),
        ("tile_locate", "cuda_tile_map", (at, 1, 1, 4, at, at, at, 1)),
    ):
        with pytest.raises(RuntimeError, match=rf"{kernel}: CUDA error \d+ \(cudaError"):
            getattr(MODULE, name)(*arguments, 0)


# ---- planted bugs

#: Header, what to replace, by what, and the check of core_test that has to fail.
PLANTED = {
    "off by one in the tile map": (
        "tiles.h",
        "first_row[low] + (t - first_tile[low]) * height",
        "first_row[low] + (t - first_tile[low]) * height + 1",
        "tile map: row",
    ),
    "off by one in the search of a tile's group": (
        "tiles.h",
        "if (first_tile[middle] <= t) {",
        "if (first_tile[middle] < t) {",
        "tile map: ",
    ),
    "a network takes one slot too many": (
        "tiles.h",
        "slots.room[run % slots.block_count];",
        "slots.room[run % slots.block_count] + 1;",
        "first places of runs",
    ),
    "corners of single toggles swapped": (
        "corners.h",
        "if (toggle_first) return grid.single[2 * pair];",
        "if (toggle_first) return grid.single[2 * pair + 1];",
        "corner of pair",
    ),
    "runs of samples merged without their distance": ("reduce.h", "+ step * step *", "+ 0 * step *", "squares of"),
    "ties go to the higher network": ("gates.h", "logit > top[at - 1]", "logit >= top[at - 1]", "order of"),
}


@pytest.fixture(scope="module")
def compile_core(tmp_path_factory):
    """Build core_test from the sources with one text replaced, and run it: exit status and messages."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")

    def build(header: str, right: str, wrong: str) -> tuple[int, str]:
        folder = tmp_path_factory.mktemp("core")
        for source in [*CSRC.glob("*.h"), CSRC / "core_test.cpp"]:
            shutil.copy(source, folder)
        text = (folder / header).read_text()
        assert text.count(right) == 1, f"{header} has no {right!r}, or several"
        (folder / header).write_text(text.replace(right, wrong))
        program = folder / "core_test"
        command = [compiler, "-std=c++17", "-O0", "-ffp-contract=off", str(folder / "core_test.cpp")]
        subprocess.run([*command, "-o", str(program)], check=True)
        result = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
        return result.returncode, result.stdout + result.stderr

    return build


@needs_sources
def test_the_core_passes_its_own_test(compile_core):
    """What the planted bugs are compared with."""
    status, log = compile_core("tiles.h", "namespace flmoe {", "namespace flmoe {")
    assert status == 0 and "checks passed" in log


@needs_sources
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(compile_core, bug):
    header, right, wrong, check = PLANTED[bug]
    status, log = compile_core(header, right, wrong)
    assert status != 0 and check in log, log
