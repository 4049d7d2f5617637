"""The stages of the GPU benchmark, rehearsed without a GPU: each runs, may be cut off, and what it had is there."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from bench import gpu_stages
from bench.gpu_stages import Stage

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
