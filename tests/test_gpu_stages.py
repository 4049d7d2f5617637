"""The stages of the GPU benchmark, rehearsed without a GPU: each runs, may be cut off, and what it had is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from bench import gpu, gpu_stages
from bench.gpu_stages import Stage
from flmoe_fast.native import extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A workplace with a copy of the sources, made once."""
    work = tmp_path_factory.mktemp("work")
    gpu_stages.mirror(ROOT, work / "copy")
    for built in (ROOT / "flmoe_fast").glob("_C*"):
        os.link(built, work / "copy" / "flmoe_fast" / built.name)
    return work


def rehearse(stage: Stage, work: Path, monkeypatch, tmp_path: Path, **variables: str) -> int:
    """Run one stage of stand-ins for its commands; its exit status."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    see = gpu_stages.environment(work / "copy", work, "90a") | variables | {"OMP_NUM_THREADS": "1"}
    return gpu_stages.perform([stage], work / "copy", work, see, "90a")


def in_rehearsal(name: str) -> Stage:
    """A stage whose modules of the benchmark run without a GPU."""
    stage = gpu_stages.stages("90a")[name]
    pretend = [(sys.executable, "tests/rehearsal.py", *command[2:]) for command in stage.commands if "-m" in command]
    return Stage(name, stage.seconds, tuple(pretend[:1]))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_times_are_cut_off_and_resumed(work, monkeypatch, tmp_path, capfd):
    """The first call is interrupted at the fifth candidate; the second goes on, a third has nothing left to do."""
    result = tmp_path / "out" / "gpu.jsonl"
    # Two rates of the machine take twenty timings.
    status = rehearse(in_rehearsal("times"), work, monkeypatch, tmp_path, FLMOE_REHEARSAL_CUT="24")
    assert status != 0
    names = [row["candidate"] for row in rows(result) if "candidate" in row]
    assert names == ["naive loop", "batched SDPA fp32", "batched SDPA fp16"]
    assert not any("complete" in row for row in rows(result))
    assert "times: " in capfd.readouterr().out.splitlines()[-1]  # failures come last
    assert rehearse(in_rehearsal("times"), work, monkeypatch, tmp_path) == 0
    found = [row for row in rows(result) if "candidate" in row]
    assert [row["candidate"] for row in found][-1] == "triton fp16" and len(found) == 5
    assert all(row["complete"] for row in found)
    before = result.read_text()
    assert rehearse(in_rehearsal("times"), work, monkeypatch, tmp_path, FLMOE_REHEARSAL_CUT="1") == 0
    assert result.read_text() == before
    assert "===== times" in (tmp_path / "out" / "logs.txt").read_text()


def test_what_is_compiled_has_rows_of_its_own(work, monkeypatch, tmp_path):
    assert rehearse(in_rehearsal("compiled"), work, monkeypatch, tmp_path) == 0
    found = [row for row in rows(tmp_path / "out" / "gpu.jsonl") if "torch.compile" in row.get("candidate", "")]
    assert found and all(row["complete"] for row in found)


@pytest.mark.long
def test_kernels_are_cut_off_and_resumed(work, monkeypatch, tmp_path):
    """What the first engine took is there, and is not taken again."""
    result, stage = tmp_path / "out" / "gpu_kernels.jsonl", in_rehearsal("kernels")
    assert rehearse(stage, work, monkeypatch, tmp_path, FLMOE_REHEARSAL_CUT="50") != 0  # 20 for the rates, 26 an engine
    first = rows(result)
    assert {row.get("candidate") for row in first} == {None, "triton mixed"}
    assert len(first) == 1 + 13 and all(row["ms"]["median"] > 0 for row in first[1:])
    assert rehearse(stage, work, monkeypatch, tmp_path) == 0
    found = rows(result)
    assert found[: len(first)] == first and {row["candidate"] for row in found[len(first) :]} == {"triton fp16"}
    assert len(found) == 1 + 2 * 13


@pytest.mark.long
def test_tuning_is_cut_off_and_resumed(work, monkeypatch, tmp_path, capfd):
    """A kernel all of whose candidates were tried is not tried again."""
    result, stage = tmp_path / "out" / "gpu_tune.jsonl", in_rehearsal("tune")
    assert rehearse(stage, work, monkeypatch, tmp_path, FLMOE_REHEARSAL_CUT="3") != 0
    assert [(row["precision"], row["kernel"], row["tried"]) for row in rows(result)] == [("fp16x2", "qkv", 1)]
    assert rehearse(stage, work, monkeypatch, tmp_path) == 0
    every = [(precision, kernel) for precision in ("fp16x2", "fp16") for kernel in gpu_stages.TUNED]
    assert [(row["precision"], row["kernel"]) for row in rows(result)] == every
    assert (tmp_path / "out" / "rehearsal.json").exists()  # the device's configurations
    before = result.read_text()
    assert rehearse(stage, work, monkeypatch, tmp_path, FLMOE_REHEARSAL_CUT="1") == 0
    assert result.read_text() == before


@pytest.mark.long
def test_the_sanitized_run_reaches_every_kernel(work, monkeypatch, tmp_path):
    """Here the narrowest of the fused widths alone."""
    widths = sorted(int(source.stem.removeprefix("width_")) for source in (ROOT / "csrc").rglob("width_*.cu"))
    assert [width for width, _, _ in gpu.FUSED] == widths
    assert rehearse(in_rehearsal("sanitize"), work, monkeypatch, tmp_path) == 0
    expected = ["tiny triton fp16 done", "digits-fused-64 triton fp16 done"]
    if extension()[0]:
        expected.append("digits-fused-64 cuda fp16 done")
    log = (work / "logs" / "sanitize.log").read_text().splitlines()
    assert log == [*expected, "digits-gshard triton fp16 done"]


def test_an_interrupt_leaves_what_there_is(tmp_path):
    """Ctrl-C in a stage: its output is collected, the next stage does not begin, and the summary says so."""
    program = """
import sys
from pathlib import Path
from bench.gpu_stages import Stage, perform
work = Path(sys.argv[1])
(work / "copy").mkdir()
slow = "import time; print('so far', flush=True); time.sleep(60)"
stages = [Stage(name, 60, ((sys.executable, "-c", slow),)) for name in ("slow", "next")]
sys.exit(perform(stages, work / "copy", work, {}, "90a"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "OUT": str(tmp_path / "out"), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = [process.stdout.readline()]
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 130 and said[0] == "so far\n"
    assert [line for line in said if "interrupted" in line] == ["slow       interrupted, 0 s"]
    assert (tmp_path / "out" / "logs.txt").read_text() == "===== slow\nso far\n"


def test_a_stage_ends_when_its_time_is_up(work, monkeypatch, tmp_path, capfd):
    """It is interrupted, and what it printed before is kept; a failure of another kind is shown by its line."""
    slow = "import time; print('so far', flush=True); time.sleep(60)"
    started = time.monotonic()
    assert rehearse(Stage("slow", 1, ((sys.executable, "-c", slow),)), work, monkeypatch, tmp_path) != 0
    assert time.monotonic() - started < 30
    assert "so far" in (tmp_path / "out" / "logs.txt").read_text()
    assert "stopped after 1 s" in capfd.readouterr().out
    lines = "print('ERROR SUMMARY: 3 errors'); print('more', flush=True); raise SystemExit(9)"
    assert rehearse(Stage("wrong", 60, ((sys.executable, "-c", lines),)), work, monkeypatch, tmp_path) == 9
    assert capfd.readouterr().out.splitlines()[-1] == "wrong: ERROR SUMMARY: 3 errors"


def test_the_build_says_when_it_has_no_cuda(monkeypatch):
    class Module:
        @staticmethod
        def info():
            return {"cuda": False, "without_cuda": "built where there was no nvcc"}

    monkeypatch.setattr("flmoe_fast.native.extension", lambda: (Module, ""))
    with pytest.raises(SystemExit, match="CUDA is missing from the build: built where there was no nvcc"):
        gpu_stages.built("90a")


def test_the_copy_follows_the_checkout(tmp_path):
    """Sources are replaced and removed, what a stage wrote and what was built stays."""
    root, copy = tmp_path / "root", tmp_path / "copy"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "a.h").write_text("one")
    (root / "setup.py").write_text("build")
    result = root / gpu_stages.WRITTEN[0]
    result.parent.mkdir(parents=True)
    result.write_text("old")
    gpu_stages.mirror(root, copy)
    state = gpu_stages.build_state(copy, "90a")
    (copy / gpu_stages.WRITTEN[0]).write_text("measured")
    (copy / "flmoe_fast").mkdir()
    (copy / "flmoe_fast" / "_C.so").write_text("built")
    gpu_stages.mirror(root, copy)
    assert (copy / gpu_stages.WRITTEN[0]).read_text() == "measured"
    assert gpu_stages.build_state(copy, "90a") == state != gpu_stages.build_state(copy, "80")
    (root / "csrc" / "a.h").rename(root / "csrc" / "b.h")
    gpu_stages.mirror(root, copy)
    assert not (copy / "csrc" / "a.h").exists() and (copy / "flmoe_fast" / "_C.so").exists()
    assert gpu_stages.build_state(copy, "90a") != state


def test_every_stage_ends_within_nine_minutes():
    known = gpu_stages.stages("90a")
    assert all(stage.seconds + gpu_stages.GRACE < 540 for stage in known.values())
    assert all(name in known for names in gpu_stages.LISTS.values() for name in names)
