"""Sparse feed-forward blocks in the Triton engine, against the reference and against their plain definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity import corners_of, exact, tolerance

pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from breaks import break_kernels
from gpu_cases import DEEP, DEVICE, SWITCH, engine, runs_triton

from flmoe_fast import interactions
from flmoe_fast.engines import sparse_rows
from flmoe_fast.engines.gpu.chunk import Part, flops
from flmoe_fast.engines.gpu.kernels import choice, grouped, order
from flmoe_fast.engines.gpu.kernels.configs import find

pytestmark = [runs_triton, pytest.mark.usefixtures("poison", "quick_interpreter")]


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
    expected, weights = sparse_rows.choose(logits, "naive", 3)
    assert torch.equal(chosen.long(), expected)
    assert float((scores - weights).abs().max()) <= 32 * torch.finfo(torch.float32).eps
    for network in range(5):
        assert torch.equal(counts[:, network, 0].long(), (expected == network).sum((1, 2)))


def test_the_wrong_order_of_ties_is_seen(monkeypatch, tmp_path: Path):
    """Negative control: the higher index first."""
    right = "tl.min(tl.where(left == value[:, None], o_x[None, :], networks - 1), 1)"
    wrong = "tl.max(tl.where(left == value[:, None], o_x[None, :], 0), 1)"
    break_kernels("choice", right, wrong, monkeypatch, tmp_path)
    stream, weight = ties()
    expected, _ = sparse_rows.choose(torch.layer_norm(stream.double(), (16,)) @ weight.double(), "naive", 3)
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
    counts = counts.clamp(max=torch.tensor(room)[:, None]).permute(0, 3, 1, 2).flatten(2).int().contiguous().to(DEVICE)

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


def sorted_plainly(chosen: torch.Tensor, room: tuple[int, int]) -> sparse_rows.Dispatch:
    count, tokens, networks, _ = QUEUES
    modality = torch.tensor([0] * tokens[0] + [1] * tokens[1]).repeat(count)
    block = torch.arange(count).repeat_interleave(sum(tokens)) * 2 + modality
    return sparse_rows.dispatch(chosen, networks, block, 2 * count, torch.tensor(room).repeat(count))


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
    break_kernels("order", "came += tl.sum(hot, 0)", "came += 0 * tl.sum(hot, 0)", monkeypatch, tmp_path)
    chosen, room = queues(), (40, 3)
    expected = sorted_plainly(chosen, room)
    into, _, _ = sorted_by_kernel(chosen, room)
    assert not torch.equal(into[0, : expected.bounds[QUEUES[2]]].long(), expected.slot[: expected.bounds[QUEUES[2]]])


@pytest.mark.parametrize("slots, networks, rows", [(1, 5, 4), (12, 3, 4), (13, 3, 4), (7, 7, 1), (3, 9, 64)])
def test_there_are_tiles_for_every_spread(slots: int, networks: int, rows: int):
    """No spread of the slots over the networks needs more tiles, and one needs as many."""
    generator = torch.Generator().manual_seed(7)
    spreads = torch.randint(networks, (500, slots), generator=generator)
    counts = (spreads[..., None] == torch.arange(networks)).sum(1)
    # One slot in as many networks as there are slots for, the rest in the first.
    few = min(slots, networks)
    counts = torch.cat([counts, torch.tensor([[slots - few + 1] + [1] * (few - 1) + [0] * (networks - few)])])
    assert int((-(-counts // rows)).sum(1).max()) == grouped.most_tiles(slots, networks, rows)


def test_flops_count_every_product():
    """By hand for three layers of which the first and the last are sparse."""
    sizes = engine(DEEP).chunk.spec
    tokens, hidden, wide, slots, networks = 7, 16, 32, 2, 6
    found = sizes.length, sizes.hidden, sizes.wide, sizes.slots, sizes.networks
    assert found == (tokens, hidden, wide, slots, networks)
    attention = 2 * tokens * hidden * 3 * hidden + 4 * tokens * tokens * hidden
    projections = 3 * 2 * tokens * hidden * hidden
    first_keys = 4 * tokens * 3 * hidden
    dense = 2 * 2 * tokens * hidden * wide
    gates = 2 * 2 * tokens * hidden * networks
    of_networks = 3 * slots * 2 * tokens * hidden * wide
    each = first_keys + projections + 2 * attention + dense + gates + of_networks
    context = 4 * 2 * tokens * (tokens - 3) * hidden
    assert flops(sizes, Part(5, 2, varying=3)) == 4 * (2 * context + 5 * each)


def test_a_probe_runs_on_the_engine():
    """An explanation of a sparse model through the public call; its choices are those of float64."""
    edge = SWITCH
    game = edge.game(dtype=torch.float32, backend="triton", device=DEVICE, heads=("mixture",), precision="fp32")
    result = interactions(game, pairs=[(0, 5)], contexts=2, progress=False)
    expected = interactions(edge.game(heads=("mixture",)), pairs=[(0, 5)], contexts=2, progress=False)
    assert result.backend == "triton"
    # Of four probabilities each, of a mixture whose weights and logits are off by no more than the limit.
    most = 4 * tolerance(edge, "fp32", corners_of) * (1 + 4 * float(exact(edge, corners_of)[:, :-4].abs().max()))
    assert float(abs(result.sii - expected.sii).max()) <= most
