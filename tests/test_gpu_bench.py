"""The GPU benchmark's own code, run on a CPU in Triton's interpreter with a clock that stands in for the device's."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from bench import gpu, shapes, tables, timing, tune
from flmoe_fast.engines.gpu.kernels.configs import KERNELS, Config
from flmoe_fast.engines.gpu.triton import interpreted

pytestmark = [
    pytest.mark.skipif(
        not interpreted(), reason="needs TRITON_INTERPRET=1; with a GPU the benchmark itself is run instead"
    ),
    pytest.mark.usefixtures("quick_interpreter"),
]
TINY = shapes.Shape("tiny", ("a", "b"), (2, 1), 16, 1, 2, 2, "multiclass")


@pytest.fixture
def no_device(monkeypatch, tmp_path):
    clock = itertools.count(1)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "seconds_of", lambda run: (run(), next(clock) / 1e3)[1])
    monkeypatch.setattr(gpu, "PRECISIONS", {"fp16": gpu.PRECISIONS["fp16"]})
    for name, value in {"SIDE": 1, "CONTEXTS": 1, "NOISE_SIDE": 1, "NOISE_CONTEXTS": 2, "MATRIX": 16}.items():
        monkeypatch.setattr(gpu, name, value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)


def test_rows_are_written_and_shown(no_device, tmp_path):
    kept = []
    rows = gpu.measure(TINY, rounds=2, rates=(1e12, 1e12), limit=60.0, keep=kept.append)
    assert [len(part) for part in kept] == [0, 2, 3, 4, 5, 5, 5] and kept[-1] == rows
    names = [row["candidate"] for row in rows]
    assert names == ["naive loop", "batched SDPA fp32", "batched SDPA fp16", "torch engine fp32", "triton fp16"]
    ours = rows[-1]
    assert ours["launches"] == ours["launches_per_chunk"] * ours["chunks"] == 13
    assert 0 < ours["noise_share"] < 1 and rows[3]["noise_share"] < ours["noise_share"]
    assert rows[0]["scaled"] is False  # this explanation is no larger than the part that is timed
    timing.write("gpu", [{"machine_rates": True, "matmul_flops": 1e12, "copy_bytes": 1e12}, *rows])
    shown = tables.text("gpu")
    assert shown.count("| tiny |") == 5 and "triton fp16" in shown
    assert all(json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines())


def test_not_measured_where_there_is_no_file(no_device):
    assert tables.text("gpu") == "not measured"


def test_which_engine_was_faster_is_kept_by_device(monkeypatch, tmp_path):
    """One shape that both engines ran, one that only Triton did; what is known of other devices stays."""
    file = tmp_path / "fastest.json"
    file.write_text(json.dumps([{"device": "other"}, {"device": "this", "tokens": 1}]))
    monkeypatch.setattr(gpu, "FILE", file)
    monkeypatch.setattr(gpu, "SHAPES", {"tiny": TINY, "both": TINY})

    def row(shape: str, candidate: str, median: float) -> dict:
        return {"shape": shape, "candidate": candidate, "ms_per_1000": {"median": median}}

    rows = [row("both", "triton fp16", 3.0), row("both", "cuda fp16", 2.0), row("tiny", "triton fp16", 1.0)]
    found = gpu.fastest([{"machine_rates": True}, *rows], "this")
    gpu.keep_fastest(found, "this")
    key = {"device": "this", "hidden": 16, "heads": 1, "tokens": 3, "precision": "fp16", "fastest": "cuda"}
    assert json.loads(file.read_text()) == [{"device": "other"}, key]


def test_tuner_keeps_what_is_faster_and_can_run(no_device, monkeypatch):
    """Of two other tiles for one kernel, one is faster and one does not compile."""
    monkeypatch.setattr(tune, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(tune, "ROUNDS", 1)
    faster, broken = Config(32, 64, 32, 4, 2), Config(48, 64, 32, 4, 2)  # tiles are powers of two
    monkeypatch.setattr(tune, "candidates", lambda kernel, used: [broken, faster] if kernel == "up" else [])
    seconds = iter((3.0, 1.0))
    monkeypatch.setattr(gpu, "seconds_of", lambda run: next(seconds))
    kept, trial = [], tune.Trial("tiny", "fp16", 1, "sm_90")
    trial.tune(KERNELS, float("inf"), lambda *found: kept.append(found))
    assert [kernel for kernel, _, _ in kept] == list(KERNELS)
    assert [(tried, best) for kernel, tried, best in kept if kernel == "up"] == [(2, 1.0)]
    found = trial.entries()
    assert found["up/fp16"] == faster
    assert {name.split("/")[0] for name in found} == set(KERNELS)


def test_tuner_stops_when_its_time_is_up(no_device, monkeypatch):
    """A kernel some of whose candidates were not tried is not called done."""
    monkeypatch.setattr(tune, "SHAPES", {"tiny": TINY})
    kept = []
    tune.Trial("tiny", "fp16", 1, "sm_90").tune(["up"], float("-inf"), lambda *found: kept.append(found))
    assert kept == []


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr("sys.argv", ["bench.gpu", "times"])
    with pytest.raises(SystemExit):
        gpu.main()
