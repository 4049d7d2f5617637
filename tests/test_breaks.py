"""Negative controls of parity: every planted mistake (breaks.py) leaves the tolerance that the engine is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from breaks import (
    FAULTS,
    IN_THE_ENGINE,
    IN_THE_MODEL,
    KERNELS,
    PORTABLE_SPARSE,
    SPARSE_IN_THE_MODEL,
    SPARSE_KERNELS,
    break_kernels,
    give_room,
    mistake_scores,
    room_of_valid_tokens,
    swap_down,
)
from edge_shapes import EDGES, Edge
from parity import (
    CPU_WAYS,
    FP64,
    LEVELS,
    TORCH_WAYS,
    TRITON,
    SplitProducts,
    all_of,
    corners_of,
    exact,
    flat,
    named,
    needs_extension,
    needs_triton,
    problem_of,
    relative,
    tolerance,
    two_terms,
)

from flmoe_fast.engines import cpu, portable
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.engine import TokenEngine
from flmoe_fast.engines.portable import TorchEngine
from flmoe_fast.engines.prepared import prepared

if TRITON:
    import gpu_cases
PADDED = EDGES[2]
SWITCH = named("padded, switch of 12, capacity reference")
DEEP = named("three layers, gshard of 10, capacity reference")


def mistaken(edge: Edge, make: Callable[..., TokenEngine], mistake: Callable) -> TokenEngine:
    """An engine of a model of its own with a mistake planted."""
    model, in_the_model = edge.model(), mistake in (*IN_THE_MODEL, *SPARSE_IN_THE_MODEL)
    if in_the_model:
        mistake(prepared(model))
    engine = make(replace(problem_of(edge), model=model))
    if not in_the_model:
        mistake(engine)
    return engine


@pytest.mark.parametrize("mistake", (*IN_THE_MODEL, *IN_THE_ENGINE))
@pytest.mark.parametrize("way", TORCH_WAYS)
def test_a_mistake_in_the_torch_engine_is_seen(way: str, mistake: Callable):
    broken = mistaken(PADDED, lambda problem: TorchEngine(problem, dtype=torch.float64), mistake)
    constants = {name: value(broken) if callable(value) else value for name, value in TORCH_WAYS[way].items()}
    with patch.multiple(portable, **constants) if constants else patch.dict({}):
        assert relative(flat(broken.evaluate(all_of(PADDED))), exact(PADDED)) > 1e4 * FP64


@needs_extension
@pytest.mark.parametrize("mistake", (*IN_THE_MODEL, *IN_THE_ENGINE))
@pytest.mark.parametrize("way", ("patterns", "direct"))
@pytest.mark.parametrize("level", LEVELS)
def test_a_mistake_in_the_native_engine_is_seen(level: str, way: str, mistake: Callable):
    """Beyond the tolerance of the coarsest arithmetic."""
    broken = mistaken(PADDED, lambda problem: CpuEngine(problem, level=level), mistake)
    with patch.multiple(cpu, **CPU_WAYS[way]):
        error = (flat(broken.evaluate(all_of(PADDED))) - exact(PADDED)).abs().max()
    assert float(error) > 3 * tolerance(PADDED, "bf16x3")


@pytest.mark.parametrize("mistake", PORTABLE_SPARSE)
def test_a_mistake_in_sparse_blocks_of_the_torch_engine_is_seen(mistake: Callable, monkeypatch):
    engine = SWITCH.game().engine
    mistake(monkeypatch, engine)
    assert relative(flat(engine.evaluate(all_of(SWITCH))), exact(SWITCH)) > 1e4 * FP64


SPARSE_MISTAKES = [(SWITCH, mistake) for mistake in (*SPARSE_IN_THE_MODEL, give_room, room_of_valid_tokens)]
SPARSE_MISTAKES += [(DEEP, mistake) for mistake in (swap_down, mistake_scores, give_room)]


@needs_extension
@pytest.mark.parametrize("edge, mistake", SPARSE_MISTAKES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_mistake_in_sparse_blocks_of_the_native_engine_is_seen(level: str, edge: Edge, mistake: Callable):
    broken = mistaken(edge, lambda problem: CpuEngine(problem, level=level), mistake)
    error = (flat(broken.evaluate(all_of(edge))) - exact(edge)).abs().max()
    assert float(error) > 3 * tolerance(edge, "bf16x3")


def test_one_bfloat16_term_is_seen():
    """Of the split arithmetic's tolerance: a single bfloat16 product exceeds it."""

    class OneTerm(SplitProducts):
        @staticmethod
        def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return two_terms(a)[0] @ two_terms(b)[0]

    with OneTerm():
        coarse = flat(PADDED.game(backend="reference", dtype=torch.float32).engine.evaluate(all_of(PADDED)))
    assert float((coarse - exact(PADDED)).abs().max()) > 3 * tolerance(PADDED, "bf16x3")


@needs_triton
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("what", KERNELS)
def test_a_broken_kernel_is_seen(what: str, monkeypatch, tmp_path: Path):
    """Each kernel's source, wrong in one place."""
    break_kernels(*KERNELS[what], monkeypatch, tmp_path)
    # The statistics are of several blocks only where a row is wider than a block.
    wide = Edge("wide", (3, 2), (3, 2), hidden=136, heads=1, layers=1)
    edge = {"statistics": wide, "context of a coalition": PADDED}.get(what, gpu_cases.TINY)
    precision = "fp16x2" if what == "small terms" else "fp32"
    contexts, toggled = gpu_cases.coalitions_of(edge)
    engine = gpu_cases.engine(edge, precision)
    found = engine.plan(*engine.toggle_words(contexts, toggled), group=len(toggled)).run()
    error = gpu_cases.error_of(found, edge, precision)
    assert not error <= 3 * gpu_cases.limit(edge, precision)  # a NaN is seen as well


@needs_triton
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("what", SPARSE_KERNELS)
def test_a_broken_kernel_of_sparse_blocks_is_seen(what: str, monkeypatch, tmp_path: Path):
    shape, *change = SPARSE_KERNELS[what]
    edge, some = getattr(gpu_cases, shape), [0, 4]
    break_kernels(*change, monkeypatch, tmp_path)
    engine = gpu_cases.engine(edge)
    found = engine.plan(*engine.coalition_words(corners_of(edge)[some]), group=2).run()
    error = (flat(found).cpu() - exact(edge, corners_of)[some]).abs().max()
    assert not float(error) <= 3 * tolerance(edge, "fp32", corners_of)  # a NaN is seen as well


@needs_triton
@pytest.mark.parametrize("name", ("SWITCH", "LAST", "DEEP"))
def test_the_capacity_of_these_shapes_binds(name: str):
    """Otherwise the mistakes above could not be seen."""
    edge = getattr(gpu_cases, name)
    free = exact(replace(edge, capacity="none"), corners_of)
    assert float((exact(edge, corners_of) - free).abs().max()) > 100 * tolerance(edge, "fp32", corners_of)


@needs_triton
@needs_extension
@pytest.mark.usefixtures("poison", "quick_interpreter")
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_the_fused_kernels_is_seen(what: str, monkeypatch):
    """Each missing wait, arrival or swizzle leaves the tolerance, or nobody can go on."""
    if gpu_cases.GPU:
        pytest.skip("the emulator is for CPUs; a GPU has no planted mistakes")
    from flmoe_fast.engines.gpu import cuda_chunk

    fault, message = FAULTS[what]
    monkeypatch.setattr(cuda_chunk, "emulation", cuda_chunk.Emulation(fault=fault))
    edge = Edge("tiny", (3, 2), (3, 1), **gpu_cases.SMALL)
    contexts, toggled = gpu_cases.coalitions_of(edge)
    engine = gpu_cases.fused_engine(edge)
    plan = engine.plan(*engine.toggle_words(contexts, toggled), group=len(toggled))
    if message is not None:
        with pytest.raises(RuntimeError, match=message):
            plan.run()
        return
    assert not gpu_cases.error_of(plan.run(), edge, "fp16x2") <= 3 * gpu_cases.limit(edge, "fp16x2")
