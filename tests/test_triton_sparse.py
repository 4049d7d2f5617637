"""Sparse feed-forward blocks in the Triton engine, against the reference and against their plain definition."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from edge_shapes import Edge, sparse
from parity import ARITHMETIC, allowed, flat
from test_triton_engine import (
    DEVICE,
    break_kernels,
    coalitions_of,
    engine,
    error_of,
    limit,
    named,
    poison,  # noqa: F401 - a fixture
    problem_of,
    pytestmark,  # noqa: F401 - the same condition
    quick_interpreter,  # noqa: F401 - a fixture
    rounded_problem,
)

from flmoe_fast import interactions
from flmoe_fast.engines import dispatch, torch_engine
from flmoe_fast.engines.triton_kernels import choice, combine, grouped, order
from flmoe_fast.engines.triton_kernels.configs import find
from flmoe_fast.engines.triton_kernels.precision import PRECISIONS
from flmoe_fast.model import sparse as sparse_blocks

#: Every gate, with a capacity that binds and without one, in first, middle and last layers.
SHAPES = [
    named("padded, switch of 12, capacity reference"),
    named("absent modality, switch of 12, capacity reference"),
    named("four modalities, noisy of 3, capacity none"),
    named("one token each, gshard of 10, capacity reference"),
    named("one layer, naive of 4, capacity none"),
    named("three layers, gshard of 10, capacity reference"),
    named("original, noisy of 3, capacity none"),
    named("players past a word, switch of 12, capacity reference"),
    sparse(Edge("no room", (2, 2), (2, 2), hidden=16, heads=1), "gshard", 12, "reference"),
    sparse(Edge("many networks", (3, 3), (3, 2), hidden=20, heads=1, layers=1), "switch", 35, "none"),
    Edge("both used", (4, 3), (4, 2), hidden=16, heads=1, layers=1, gate="naive", ffn_experts=2),
    named("MoE++"),
    named("MoE++, three modalities"),
]
SWITCH, LAST, DEEP = (
    sparse(Edge("tiny", (5, 3), (4, 3), hidden=16, heads=1, layers=layers), gate, networks, "reference")
    for gate, networks, layers in (("switch", 6, 2), ("gshard", 6, 1), ("gshard", 6, 3))
)
SPLIT = (SWITCH, LAST)


@pytest.mark.parametrize("edge", SHAPES, ids=lambda e: e.name)
def test_values_equal_the_reference(edge: Edge):
    """Contexts and toggles; the mixture is that of the experts."""
    found = engine(edge).evaluate_toggles(*coalitions_of(edge))
    assert error_of(found, edge, "fp32") <= limit(edge, "fp32")
    mixed = (found.weights[:, :, None] * found.experts).sum(1)
    size = (found.weights[:, :, None] * found.experts.abs()).sum(1)
    assert bool(((found.mixture - mixed).abs() <= len(found.weights[0]) * torch.finfo(torch.float64).eps * size).all())


@pytest.mark.parametrize("edge", SPLIT, ids=lambda e: e.name)
def test_split_operands_equal_the_reference(edge: Edge):
    """Against the model with its weights, but not its gates, rounded alike."""
    found = engine(edge, "fp16x2").evaluate_toggles(*coalitions_of(edge))
    assert error_of(found, edge, "fp16x2") <= limit(edge, "fp16x2")


def corners_of(edge: Edge) -> torch.Tensor:
    contexts, toggled = coalitions_of(edge)
    return (contexts[:, None] ^ toggled).flatten(0, 1)


@functools.cache
def gate_logits(edge: Edge, arithmetic: str | None) -> torch.Tensor:
    """What the reference's gates compare (N, X), in float64 or in float32 of an arithmetic."""
    seen = []
    real = sparse_blocks.largest

    def spy(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        # A switch gate compares probabilities; their logarithms differ as the logits do.
        seen.append((values.double().log() if edge.gate == "switch" else values.double()).flatten(0, -2))
        return real(values, count)

    with patch.object(sparse_blocks, "largest", spy):
        if arithmetic is None:
            edge.game(backend="reference").engine.evaluate(corners_of(edge))
        else:
            with ARITHMETIC[arithmetic][0]():
                edge.game(backend="reference", dtype=torch.float32).engine.evaluate(corners_of(edge))
    return torch.cat(seen)


def gaps(logits: torch.Tensor, slots: int) -> torch.Tensor:
    """How far the last chosen logit is above the first that is not, smallest over all tokens."""
    ordered = logits.sort(-1, descending=True)[0]
    return (ordered[:, slots - 1] - ordered[:, slots]).min() if slots < logits.shape[1] else torch.tensor(math.inf)


@pytest.mark.parametrize("edge", [e for e in SHAPES if e.gate], ids=lambda e: e.name)
def test_no_choice_hangs_on_rounding(edge: Edge):
    """Otherwise a value could jump, and its error would say nothing about the engine."""
    exact, found = gate_logits(edge, None), gate_logits(edge, "fp32")
    slots = edge.model().config.top_k
    ordered = exact.sort(-1, descending=True)[0]
    gap = ordered[:, slots - 1] - ordered[:, slots] if slots < exact.shape[1] else torch.tensor(math.inf)
    # Two logits can come closer by twice the error, and tolerances allow twice the error of the reference.
    assert bool((gap > 4 * (found - exact).abs().amax(-1)).all())


@pytest.mark.parametrize("edge", SPLIT, ids=lambda e: e.name)
def test_no_choice_hangs_on_rounding_of_split_operands(edge: Edge):
    """The same for the model with rounded weights, whose gates compare other numbers in another order."""
    seen = []
    choose = dispatch.choose

    def spy(logits, *rest):
        seen.append(logits.flatten(0, -2))
        return choose(logits, *rest)

    with patch.object(torch_engine, "choose", spy):
        rounded_problem(problem_of(edge), torch.float16).evaluate(corners_of(edge))
    error = (gate_logits(edge, "fp16x2") - gate_logits(edge, None)).abs().max()
    assert float(gaps(torch.cat(seen), edge.model().config.top_k)) > 4 * float(error)


@pytest.mark.parametrize("edge", (SWITCH, LAST, DEEP), ids=lambda e: e.name)
def test_the_capacity_of_these_shapes_binds(edge: Edge):
    """Otherwise the mistakes below could not be seen."""
    exact = flat(edge.game(backend="reference").engine.evaluate(corners_of(edge)))
    free = sparse(edge, edge.gate, edge.ffn_experts, "none")
    other = flat(free.game(backend="reference").engine.evaluate(corners_of(edge)))
    assert float((exact - other).abs().max()) > 100 * limit(edge, "fp32")


MISTAKES = {
    "a queue one too long": (SWITCH, order, "kept = m_s & (queue < room)", "kept = m_s & (queue <= room)"),
    "no capacity": (SWITCH, order, "kept = m_s & (queue < room)", "kept = m_s"),
    "counts without capacity": (LAST, choice, "tl.minimum(count, tl.load(room_ptr + modality))", "count"),
    "the modality's first token": (SWITCH, order, "* length * SLOTS + o_s", "* length * SLOTS + o_s - start"),
    "runs one too far": (SWITCH, order, "tl.cumsum(count, 0) - count,", "tl.cumsum(count, 0),"),
    "networks begin one too late": (SWITCH, order, "tl.cumsum(totals, 0) - totals", "tl.cumsum(totals, 0)"),
    "tile map off by one": (SWITCH, grouped, "(tl.cumsum(needed, 0) <= tile)", "(tl.cumsum(needed, 0) < tile)"),
    "matrix of another network": (SWITCH, grouped, "expert * networks + network", "expert * networks + 0 * network"),
    "rows not gathered": (SWITCH, grouped, "tl.load(order_ptr + place, mask=m_m, other=0) // SLOTS", "within"),
    "dropped slots read": (SWITCH, combine, "mask=there[:, None] & m_x", "mask=m_x"),
    "slots not added up": (DEEP, combine, "x += score[:, None]", "x = score[:, None]"),
    "scores of other networks": (SWITCH, choice, "if AMONG_ALL:", "if not AMONG_ALL:"),
    "gate without bias": (SWITCH, choice, "logits + bias[None, :]", "logits"),
    "gate of rows not normalised": (LAST, choice, "a = (a - mean[:, None]) * scale[:, None]", "a = a + 0.0"),
    "statistics not renewed": (SWITCH, combine, "tl.store(p_s, mean, mask=m_m)", "pass"),
    "pool without scores": (LAST, combine, "tl.sum(score[:, None] * rows, 0)", "tl.sum(rows, 0)"),
    "pool of another run": (LAST, combine, "+ tl.load(starts_ptr + run)", "+ 0 * tl.load(starts_ptr + run)"),
    "no down-projection's bias": (LAST, combine, "tl.where(o_e == 0, weight, 0.0)", "tl.where(o_e < 0, weight, 0.0)"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_seen(what: str, monkeypatch, tmp_path: Path):
    """Negative control: each kernel source, broken in one place, leaves the tolerance."""
    edge, *change = MISTAKES[what]
    break_kernels(*change, monkeypatch, tmp_path)
    contexts, toggled = coalitions_of(edge)
    ours = engine(edge)
    found = ours.plan(*ours.toggle_words(contexts, toggled), group=len(toggled)).run()
    assert not error_of(found, edge, "fp32") <= 3 * limit(edge, "fp32")  # a NaN is seen as well


def chosen_by_kernel(stream: torch.Tensor, weight: torch.Tensor, slots: int) -> tuple[torch.Tensor, ...]:
    """Choices, scores and counts of rows (E, L, H) as one coalition of one modality."""
    experts, length, width = stream.shape
    mean = stream.mean(-1, keepdim=True)
    statistics = torch.stack([mean, (stream - mean).square().sum(-1, keepdim=True)], dim=-1)
    chosen = torch.full((experts, length, slots), -7, dtype=torch.int32, device=DEVICE)
    scores = torch.full((experts, length, slots), torch.nan, device=DEVICE)
    counts = torch.full((experts, weight.shape[2], 1), -7, dtype=torch.int32, device=DEVICE)
    choice.choose(
        stream.to(DEVICE),
        statistics.to(DEVICE),
        weight.to(DEVICE),
        torch.zeros(experts, weight.shape[2], device=DEVICE),
        torch.tensor([0, length], dtype=torch.int32, device=DEVICE),
        torch.tensor([1000], dtype=torch.int32, device=DEVICE),
        chosen,
        scores,
        counts,
        length=length,
        block=width,
        among_all=False,
        config=find("choose", "fp32", "sm_80"),
    )
    return chosen.cpu(), scores.cpu(), counts.cpu()


def ties() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, more than a tile of them, and gates in which networks 1 and 3, and 2 and 4, cannot be told apart."""
    generator = torch.Generator().manual_seed(5)
    stream = torch.randn(2, 70, 16, generator=generator)
    weight = torch.randn(2, 16, 5, generator=generator)
    weight[..., 3], weight[..., 4] = weight[..., 1], weight[..., 2]
    return stream, weight


def test_equal_logits_go_to_the_lower_index():
    stream, weight = ties()
    chosen, scores, counts = chosen_by_kernel(stream, weight, 3)
    logits = torch.layer_norm(stream.double(), (16,)) @ weight.double()
    expected, weights = dispatch.choose(logits, "naive", 3)
    assert torch.equal(chosen.long(), expected)
    assert float((scores - weights).abs().max()) <= 32 * torch.finfo(torch.float32).eps
    for network in range(5):
        assert torch.equal(counts[:, network, 0].long(), (expected == network).sum((1, 2)))


def test_the_wrong_order_of_ties_is_seen(monkeypatch, tmp_path: Path):
    """Negative control: the higher index first."""
    right = "tl.min(tl.where(left == value[:, None], o_x[None, :], networks - 1), 1)"
    wrong = "tl.max(tl.where(left == value[:, None], o_x[None, :], 0), 1)"
    break_kernels(choice, right, wrong, monkeypatch, tmp_path)
    stream, weight = ties()
    expected, _ = dispatch.choose(torch.layer_norm(stream.double(), (16,)) @ weight.double(), "naive", 3)
    assert not torch.equal(chosen_by_kernel(stream, weight, 3)[0].long(), expected)


#: Coalitions, tokens of two modalities, networks and slots: queues longer than a block of slots.
QUEUES = 2, (150, 21), 5, 2


def sorted_by_kernel(chosen: torch.Tensor, room: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Order, places and totals of choices (E, C * L, k); memory that nobody writes holds -7."""
    count, tokens, networks, slots = QUEUES
    edges = torch.tensor([0, tokens[0], sum(tokens)], dtype=torch.int32, device=DEVICE)
    limits = torch.tensor(room, dtype=torch.int32, device=DEVICE)
    by_run = chosen.view(-1, count, sum(tokens), slots).split(tokens, dim=2)
    counts = torch.stack([(part.flatten(2)[..., None] == torch.arange(networks)).sum(2) for part in by_run], dim=2)
    counts = counts.clamp(max=torch.tensor(room)[:, None]).permute(0, 3, 1, 2).flatten(2).int().to(DEVICE)

    def unwritten(*shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=torch.int32, device=DEVICE)

    starts, totals = unwritten(*counts.shape), unwritten(*counts.shape[:2])
    order.scan(counts, starts, totals, config=find("scan", "fp32", "sm_80"))
    into, places = unwritten(len(chosen), chosen[0].numel()), unwritten(*chosen.shape)
    order.place(
        chosen.int().to(DEVICE),
        starts,
        totals,
        edges,
        limits,
        into,
        places,
        length=sum(tokens),
        config=find("place", "fp32", "sm_80"),
    )
    return into.cpu(), places.cpu(), totals.cpu()


def queues() -> torch.Tensor:
    count, tokens, networks, slots = QUEUES
    generator = torch.Generator().manual_seed(6)
    return torch.rand(2, count * sum(tokens), networks, generator=generator).argsort(-1)[..., :slots]


def sorted_plainly(chosen: torch.Tensor, room: tuple[int, int]) -> dispatch.Dispatch:
    count, tokens, networks, _ = QUEUES
    modality = torch.tensor([0] * tokens[0] + [1] * tokens[1]).repeat(count)
    block = torch.arange(count).repeat_interleave(sum(tokens)) * 2 + modality
    return dispatch.dispatch(chosen, networks, block, 2 * count, torch.tensor(room).repeat(count))


@pytest.mark.parametrize("room", [(1000, 1000), (40, 3)], ids=["room for all", "a capacity"])
def test_slots_are_sorted_as_defined(room: tuple[int, int]):
    """The order is the plain definition's to the last slot; what has no place says so."""
    chosen = queues()
    into, places, totals = sorted_by_kernel(chosen, room)
    expected = sorted_plainly(chosen, room)
    bounds = torch.tensor(expected.bounds)
    assert torch.equal(totals.flatten().long(), bounds.diff())
    each, networks = chosen[0].numel(), QUEUES[2]
    for expert in range(2):
        start, stop = expected.bounds[networks * expert], expected.bounds[networks * (expert + 1)]
        slots = expected.slot[start:stop] - each * expert
        assert torch.equal(into[expert, : stop - start].long(), slots)
        assert bool((into[expert, stop - start :] == -7).all())
        at = torch.full((each,), -1)
        at[slots] = torch.arange(stop - start)
        assert torch.equal(places[expert].flatten().long(), at)


def test_a_forgotten_block_of_slots_is_seen(monkeypatch, tmp_path: Path):
    """Negative control: a queue that starts again with every block."""
    break_kernels(order, "came += tl.sum(hot, 0)", "came += 0 * tl.sum(hot, 0)", monkeypatch, tmp_path)
    chosen, room = queues(), (40, 3)
    expected = sorted_plainly(chosen, room)
    into, _, _ = sorted_by_kernel(chosen, room)
    assert not torch.equal(into[0, : expected.bounds[QUEUES[2]]].long(), expected.slot[: expected.bounds[QUEUES[2]]])


@pytest.mark.parametrize("slots, networks, rows", [(1, 5, 4), (12, 3, 4), (13, 3, 4), (7, 7, 1), (3, 9, 64)])
def test_there_are_tiles_for_every_spread(slots: int, networks: int, rows: int):
    """No spread of the slots over the networks needs more tiles, and one needs nearly as many."""
    generator = torch.Generator().manual_seed(7)
    spreads = torch.randint(networks, (500, slots), generator=generator)
    counts = (spreads[..., None] == torch.arange(networks)).sum(1)
    counts = torch.cat([counts, torch.eye(networks, dtype=torch.long) * slots])
    # One slot in as many networks as there are slots for, the rest in the first.
    few = min(slots, networks)
    counts = torch.cat([counts, torch.tensor([[slots - few + 1] + [1] * (few - 1) + [0] * (networks - few)])])
    needed = (-(-counts // rows)).sum(1).max()
    assert grouped.most_tiles(slots, networks, rows) - 1 <= int(needed) <= grouped.most_tiles(slots, networks, rows)


def test_flops_count_every_product():
    """By hand for three layers of which the first and the last are sparse."""
    sizes = engine(DEEP).sizes
    tokens, hidden, wide, slots, networks = 7, 16, 32, 2, 6
    assert (sizes.length, sizes.hidden, sizes.wide, sizes.slots, sizes.networks) == (
        tokens,
        hidden,
        wide,
        slots,
        networks,
    )
    attention = 2 * tokens * hidden * 3 * hidden + 4 * tokens * tokens * hidden
    projections = 3 * 2 * tokens * hidden * hidden
    first_keys = 4 * tokens * 3 * hidden
    dense = 2 * 2 * tokens * hidden * wide
    gates = 2 * 2 * tokens * hidden * networks
    of_networks = 3 * slots * 2 * tokens * hidden * wide
    each = first_keys + projections + 2 * attention + dense + gates + of_networks
    context = 4 * 2 * tokens * (tokens - 3) * hidden
    assert sizes.flops(5, 2, 3) == 4 * (2 * context + 5 * each)


def test_a_probe_runs_on_the_engine():
    """An explanation of a sparse model through the public call; its choices are those of float64."""
    edge = SWITCH
    game = edge.game(dtype=torch.float32, backend="triton", device=DEVICE, heads=("mixture",), precision="fp32")
    result = interactions(game, pairs=[(0, 5)], contexts=2, progress=False)
    expected = interactions(edge.game(heads=("mixture",)), pairs=[(0, 5)], contexts=2, progress=False)
    assert result.backend == "triton"
    corners = corners_of(edge)
    exact = flat(edge.game(backend="reference").engine.evaluate(corners))
    most = 4 * allowed(edge, "fp32", corners, exact) * (1 + 4 * float(exact[:, :-4].abs().max()))
    assert float(abs(result.sii - expected.sii).max()) <= most


def test_every_precision_is_known():
    """Shapes above are for these arithmetics; a new one needs its own."""
    assert set(PRECISIONS) == {"fp16x2", "fp16", "tf32", "fp32", "bf16"}
