"""The fused CUDA kernels against the reference: emulated on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from edge_shapes import FUSED_EDGES, Edge, sparse

triton = pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from gpu_cases import DEVICE, EXTENSION, GPU, SMALL, runs_fused  # noqa: E402
from gpu_cases import fused_engine as engine  # noqa: E402
from parity import coalitions_of, problem_of  # noqa: E402

from flmoe_fast.checks import ArgumentError  # noqa: E402
from flmoe_fast.engines.engine import Request  # noqa: E402
from flmoe_fast.engines.gpu import cuda as cuda_engine  # noqa: E402
from flmoe_fast.engines.gpu import cuda_chunk, fastest  # noqa: E402
from flmoe_fast.engines.gpu import triton as triton_engine  # noqa: E402
from flmoe_fast.engines.gpu.cuda import CudaEngine  # noqa: E402
from flmoe_fast.engines.gpu.cuda_chunk import ONE_GROUP, TWO_GROUPS, Emulation  # noqa: E402

pytestmark = [*runs_fused, pytest.mark.usefixtures("poison", "quick_interpreter")]
TINY = Edge("tiny", (3, 2), (3, 1), **SMALL)
on_cpu = pytest.mark.skipif(GPU, reason="the emulator is for CPUs; a GPU has no planted mistakes")


@on_cpu
def test_blocks_and_order_of_threads_change_no_bit(monkeypatch):
    """Blocks of 64 rows, as on compute capability 8.0, of 128, as on 9.0, and threads that run in another order."""
    edge = Edge("two groups", (40, 31), (40, 29), **SMALL)
    coalitions = edge.coalitions(problem_of(edge).n)[[3, 7]]
    found = []
    for groups, backwards in ((TWO_GROUPS, False), (ONE_GROUP, False), (TWO_GROUPS, True)):
        monkeypatch.setattr(cuda_chunk, "emulation", Emulation(groups, backwards))
        found.append(engine(edge).evaluate(coalitions))
    for other in found[1:]:
        assert torch.equal(other.experts, found[0].experts) and torch.equal(other.weights, found[0].weights)


def test_chunks_change_no_bit():
    contexts, toggled = coalitions_of(TINY)
    made = engine(TINY)
    words, varies = made.toggle_words(contexts, toggled)
    whole = made.plan(words, varies, group=len(toggled)).run()
    parts = made.plan(words, varies, group=len(toggled), size=2).run()
    assert torch.equal(whole.experts, parts.experts) and torch.equal(whole.weights, parts.weights)


@pytest.mark.parametrize(("layers", "launches"), [(1, 3 + 4), (2, 4 + 4), (3, 6 + 4)])
def test_launches(layers: int, launches: int):
    """Context and coalition attention, chains and the last layer; then head, means and two routing layers."""
    edge = Edge("tiny", (3, 2), (3, 1), layers=layers, **SMALL)
    made = engine(edge)
    contexts, toggled = coalitions_of(edge)
    assert made.plan(*made.toggle_words(contexts, toggled), group=len(toggled)).launches == launches


def test_op_is_well_registered():
    made = engine(TINY)
    contexts, toggled = coalitions_of(TINY)
    plan = made.plan(*made.toggle_words(contexts[:1], toggled[:1]), group=1)
    arguments = plan.words, plan.chunk.tensors(), plan.workspace, plan.chunk.spec.text, [1, 0, 1]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.flmoe_fast.coalition_logits.default, arguments, test_utils=tests)


@functools.cache
def packed(inputs: int, outputs: int, hidden: int, wide: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of distinct halves, as bits, and its stages (count, 16-bit words)."""
    matrix = torch.arange(inputs * outputs, dtype=torch.int32).to(torch.int16).view(inputs, outputs)
    stages = torch.empty(matrix.numel() // (64 * hidden), 64 * hidden, dtype=torch.int16)
    EXTENSION.fused_pack(matrix.data_ptr(), stages.data_ptr(), inputs, outputs, hidden, wide)
    return matrix, stages


@pytest.mark.parametrize("hidden", (64, 128, 256))
@pytest.mark.parametrize("wide", (True, False), ids=("64 inputs", "64 outputs"))
def test_stages_hold_every_weight_where_the_hardware_expects_it(hidden: int, wide: bool):
    """128-byte swizzle: rows of 64 halves, whose sixteen-byte chunks are exchanged by the row's last three bits."""
    matrix, stages = packed(128, hidden, hidden, True) if wide else packed(hidden, 128, hidden, False)
    rows = hidden if wide else 64
    parts = matrix.split(64, dim=0 if wide else 1)
    for part, stage in zip(parts, stages):
        panels = part.T.unflatten(1, (-1, 64))  # (row, panel, 64)
        chunk = torch.arange(8)[None] ^ (torch.arange(rows)[:, None] % 8)  # where chunk c of a row is
        expected = torch.empty(panels.shape[1], rows, 8, 8, dtype=torch.int16)
        for panel in range(panels.shape[1]):
            expected[panel].scatter_(
                1, chunk[..., None].expand(-1, -1, 8), panels[:, panel].reshape(rows, 8, 8).contiguous()
            )
        assert torch.equal(stage, expected.flatten())


REFUSED = {
    "gate": (sparse(TINY, "switch", 4, "none"), "fp16x2", "for dense transformers, and the model has gate 'switch'"),
    "width": (Edge("narrow", (2, 2), (2, 2)), "fp16x2", "the width is 24 with heads of 8"),
    "heads": (Edge("heads", (2, 2), (2, 2), hidden=64, heads=4), "fp16x2", "with heads of 16"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_run_is_refused_by_name(what: str):
    edge, precision, message = REFUSED[what]
    with pytest.raises(ArgumentError, match=f"backend: got 'cuda', but .*{message}"):
        engine(edge, precision)


def test_a_precision_it_does_not_have_is_refused():
    with pytest.raises(ArgumentError, match="precision: got 'bf16'.*'fp16x2', 'mixed', 'fp16'"):
        engine(TINY, "bf16")


@on_cpu
def test_a_device_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(triton_engine, "interpreted", lambda: False)
    with pytest.raises(ArgumentError, match="backend: got 'cuda', but the device is cpu"):
        TINY.game(backend="cuda", dtype=torch.float32)


@on_cpu
def test_game_runs_on_it():
    """By name, with the mixture and the value of a game."""
    ours = TINY.game(backend="cuda", dtype=torch.float32)
    assert ours.backend == "cuda" and isinstance(ours.engine, CudaEngine)
    coalitions = TINY.coalitions(ours.n, 3)
    exact = TINY.game(backend="reference")(coalitions)
    # Rounding the weights to fp16 is a change of model: 2^-11 a weight, over some twenty products in a row.
    assert float((ours(coalitions) - exact).abs().max()) < 20 * 2.0**-11


def test_auto_takes_what_was_faster(monkeypatch):
    rows = [
        {"device": "GPU", "hidden": 256, "heads": 4, "tokens": 100, "precision": "fp16", "fastest": "triton"},
        {"device": "GPU", "hidden": 256, "heads": 4, "tokens": 500, "precision": "fp16", "fastest": "cuda"},
    ]
    monkeypatch.setattr(fastest, "_measured", lambda: rows)
    assert fastest.fastest("GPU", 256, 4, 400, "fp16") == "cuda"
    assert fastest.fastest("GPU", 256, 4, 120, "fp16") == "triton"
    for other in (("other", 256, 4), ("GPU", 128, 4), ("GPU", 256, 1)):
        assert fastest.fastest(*other, 400, "fp16") == "triton"
    assert fastest.fastest("GPU", 256, 4, 400, "fp16x2") == "triton"


def test_reason_names_the_extension(monkeypatch):
    monkeypatch.setattr(cuda_engine, "extension", lambda: (None, "not compiled here"))
    assert CudaEngine.why_not(Request(torch.float32, DEVICE, problem_of(TINY))) == "not compiled here"


@on_cpu
@pytest.mark.parametrize(
    ("cuda", "error", "reason"),
    [
        (False, "", "the extension has no CUDA kernels: built where there was no nvcc"),
        (True, "CUDA error 209", "the kernels do not load on GPU: fused_fit: CUDA error 209"),
        (True, "", "a block needs 231472 bytes of shared memory, and the device has 101376"),
    ],
)
def test_what_a_device_lacks_is_a_reason_and_no_error(cuda: bool, error: str, reason: str, monkeypatch):
    """So that "auto" goes on to the next engine."""

    class Extension:
        @staticmethod
        def info():
            return {"cuda": cuda, "without_cuda": "" if cuda else "built where there was no nvcc"}

        fused_supported = staticmethod(lambda hidden, depth: True)

        @staticmethod
        def fused_fit(hidden):
            if error:
                raise RuntimeError(f"fused_fit: {error}")
            return 0, 231472, 101376

    monkeypatch.setattr(cuda_engine, "extension", lambda: (Extension, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert CudaEngine.why_not(Request(torch.float32, torch.device("cuda"), problem_of(TINY))) == reason


def test_a_gpu_is_asked_for_every_fused_kernel():
    """Every width and head width, in a layer behind the first; and the last kernel without attention."""
    widths = [2**power for power in range(4, 11)]
    there = {(hidden, depth) for hidden in widths for depth in widths if EXTENSION.fused_supported(hidden, depth)}
    assert len(there) == 8
    assert {(edge.hidden, edge.hidden // edge.heads) for edge in FUSED_EDGES if edge.layers > 1} == there
    assert any(edge.layers == 1 for edge in FUSED_EDGES)
