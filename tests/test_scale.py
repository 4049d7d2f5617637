"""Many processes: the same numbers as one, nothing finished lost when one dies or the disk fills."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from scale_worker import SAMPLES, N, explain_one, game_of

from flmoe_fast import ArgumentError, InteractionResult, interactions
from flmoe_fast.files import UNFINISHED, BusyError
from flmoe_fast.scale.dataset import ExplanationSet, StorageError
from flmoe_fast.scale.explain_many import explain_many
from flmoe_fast.scale.group import Group, SharedGame

WORKER = Path(__file__).parent / "scale_worker.py"


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(WORKER), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )


def same(one: InteractionResult, other: InteractionResult) -> bool:
    """Equal to the last bit."""
    (a, b), (c, d) = one.parts(), other.parts()
    return a.keys() == c.keys() and all(np.array_equal(a[k], c[k], equal_nan=True) for k in a) and b == d


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> ExplanationSet:
    """What a single process makes of all samples."""
    folder = tmp_path_factory.mktemp("alone")
    return explain_many(range(SAMPLES), explain_one, folder, chunk=3, format="safetensors", progress=False)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_gives_the_same(processes, alone, tmp_path):
    done = torchrun(processes, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    many = ExplanationSet(tmp_path / "many", "safetensors")
    assert sorted(many.samples()) == list(range(SAMPLES))
    assert all(same(many.result(i), alone.result(i)) for i in range(SAMPLES))
    assert not same(many.result(0), alone.result(1))
    index = pandas.read_csv(tmp_path / "many" / "_index.csv")
    assert index["sample"].tolist() == list(range(SAMPLES)) and index["seed"].tolist() == list(range(SAMPLES))
    for options in ({"contexts": 9}, {"budget": 300}, {"budget": 90, "method": "surrogate"}):
        expected = interactions(game_of(100), n=N, gap="strict", progress=False, **options)
        name = "-".join(map(str, options.values()))
        for rank in range(processes):
            assert same(InteractionResult.load(tmp_path / f"shared-{name}-{rank}.npz"), expected)


def test_a_killed_process_costs_its_unfinished_shard_only(alone, tmp_path):
    """Of two processes the second begins at sample 5, with shards of two; it is killed at its third sample, 7."""
    done = torchrun(2, tmp_path, 7)
    assert done.returncode != 0
    store = ExplanationSet(tmp_path / "many", "safetensors")
    finished = set(store.samples())
    assert {5, 6} <= finished and 7 not in finished
    computed = []

    def explain(number: int, sample: int) -> InteractionResult:
        computed.append(number)
        return explain_one(number, sample)

    store = explain_many(range(SAMPLES), explain, tmp_path / "many", format="safetensors", progress=False)
    assert computed == sorted(set(range(SAMPLES)) - finished)
    assert all(same(store.result(i), alone.result(i)) for i in range(SAMPLES))
    assert not list(store.folder.glob(UNFINISHED))


WAITING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed
from scale_worker import SAMPLES, explain_one
from flmoe_fast.scale.explain_many import explain_many

folder, rank = Path(sys.argv[2]), int(sys.argv[3])

def explain(number, sample):
    if rank == 1:  # holds its first sample until the other process has returned
        (folder / "begun").touch()
        while not (folder / "over").exists():
            time.sleep(0.01)
    return explain_one(number, sample)

explain_many(
    range(SAMPLES), explain, folder / "many", chunk=3, format="safetensors", rank=rank, size=2, progress=False
)
assert not torch.distributed.is_initialized()
"""


def test_nobody_waits_for_a_slow_process(alone, tmp_path):
    """One process takes up all but what the other one holds, and returns; the index comes with the last sample."""
    command = [sys.executable, "-c", WAITING, str(WORKER.parent), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    slow = subprocess.Popen([*command, "1"], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "begun").exists():
            assert slow.poll() is None, slow.stderr.read()
            time.sleep(0.01)
        quick = subprocess.run([*command, "0"], env=environment, capture_output=True, text=True, timeout=240)
        assert quick.returncode == 0, quick.stderr[-2000:]
        store, held = ExplanationSet(tmp_path / "many", "safetensors"), SAMPLES // 2
        assert sorted(store.samples()) == [i for i in range(SAMPLES) if i != held]
        assert not (store.folder / "_index.csv").exists()
        with pytest.raises(BusyError):  # somebody alone would think that nobody holds anything
            explain_many(range(SAMPLES), explain_one, store.folder, format="safetensors", progress=False)
        (tmp_path / "over").touch()
        assert slow.wait(240) == 0
    finally:
        slow.kill()
        slow.communicate()
    assert all(same(store.result(i), alone.result(i)) for i in range(SAMPLES))
    index = pandas.read_csv(store.folder / "_index.csv")
    assert index["sample"].tolist() == list(range(SAMPLES)) and not list((store.folder / ".claims").iterdir())


def test_a_sample_that_raises_keeps_those_before_it(tmp_path):
    def explain(number: int, sample: int) -> InteractionResult:
        if number == 2:
            raise ValueError("no such sample")
        return explain_one(number, sample)

    with pytest.raises(ValueError, match="no such sample"):
        explain_many(range(5), explain, tmp_path, chunk=4, format="safetensors", progress=False)
    assert sorted(ExplanationSet(tmp_path, "safetensors").samples()) == [0, 1]


FILL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from scale_worker import explain_one
from flmoe_fast.scale.explain_many import explain_many
if sys.argv[3] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
explain_many(range(6), explain_one, sys.argv[2], chunk=int(sys.argv[5]), format=sys.argv[4], progress=False)
"""


def fill(folder: Path, limit: int, format: str, chunk: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", FILL, str(WORKER.parent), str(folder), str(limit), format, str(chunk)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(format, alone, tmp_path):
    """The operating system refuses files beyond a size that the first shards keep to and the last would not."""
    small = ExplanationSet(tmp_path, format)
    size = small.add({0: alone.result(0)}).stat().st_size
    done = fill(tmp_path, size + size // 4, format, 3)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "the disk is full. 1 shards are complete; make room and run again" in line
    assert line.startswith("flmoe_fast.files.StorageError")
    assert sorted(ExplanationSet(tmp_path, format).samples()) == [0] and not list(tmp_path.glob(UNFINISHED))
    again = fill(tmp_path, 0, format, 3)
    assert again.returncode == 0, again.stderr[-1000:]
    assert sorted(ExplanationSet(tmp_path, format).samples()) == list(range(6))


def test_a_full_tmpfs(tmp_path):
    """The same on a real file system of 64 kB; needs the right to mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(44 * 1024))
        done = fill(tmp_path, 0, "safetensors", 1)
        assert done.returncode == 1 and "the disk is full" in done.stderr.strip().splitlines()[-1]
        kept = sorted(ExplanationSet(tmp_path, "safetensors").samples())
        assert 0 < len(kept) < 6 and not list(tmp_path.glob(UNFINISHED))
        ballast.unlink()
        assert fill(tmp_path, 0, "safetensors", 1).returncode == 0
        assert sorted(ExplanationSet(tmp_path, "safetensors").samples()) == list(range(6))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_tables_need_nothing_but_pandas(alone, tmp_path):
    explain_many(range(4), explain_one, tmp_path, chunk=2, progress=False)
    script = (
        "import sys, pandas\nframe = pandas.concat(map(pandas.read_parquet, sys.argv[2:]))\n"
        "index = pandas.read_csv(sys.argv[1])\nassert 'flmoe_fast' not in sys.modules\n"
        "print(len(frame), sorted(set(frame['sample'].tolist())), list(index['shard']))"
    )
    shards = sorted(map(str, tmp_path.glob("*.parquet")))
    command = [sys.executable, "-c", script, str(tmp_path / "_index.csv"), *shards]
    done = subprocess.run(command, capture_output=True, text=True)
    pairs = N * (N - 1) // 2
    names = [Path(s).name for s in shards]
    assert done.stdout.strip() == f"{4 * pairs * 2} [0, 1, 2, 3] {[n for n in names for _ in range(2)]}", done.stderr
    whole = pandas.read_parquet(tmp_path)
    assert len(whole) == 4 * pairs * 2
    frame = ExplanationSet(tmp_path).frame()
    expected = alone.frame()
    pandas.testing.assert_frame_equal(frame, expected[expected["sample"] < 4].reset_index(drop=True))


def test_shared_game_is_the_game():
    """A group of one exchanges nothing; names, heads and precision are the game's."""
    game = SharedGame(game_of(1), Group(), N)
    z = torch.rand(5, N) < 0.5
    assert torch.equal(game(z), game_of(1)(z)) and game.heads == ("output 0", "output 1") and game.precise() is None


def test_bad_input(tmp_path, alone):
    store = ExplanationSet(tmp_path, "safetensors")
    with pytest.raises(ArgumentError, match="results: got no results"):
        store.add({})
    with pytest.raises(ArgumentError, match="format: got 'csv'"):
        ExplanationSet(tmp_path, "csv")
    with pytest.raises(ArgumentError, match="samples: got generator"):
        explain_many((i for i in range(3)), explain_one, tmp_path, progress=False)
    with pytest.raises(ArgumentError, match="rank: got 1 with size None, expected both"):
        explain_many(range(3), explain_one, tmp_path, rank=1, progress=False)
    with pytest.raises(ArgumentError, match="rank: got 2"):
        explain_many(range(3), explain_one, tmp_path, rank=2, size=2, progress=False)
    with pytest.raises(ArgumentError, match="sample: got 77"):
        store.result(77)
    with pytest.raises(ArgumentError, match="which has no shards"):
        store.frame()
    path = store.add({3: alone.result(3)})
    with pytest.raises(ArgumentError, match="which are in"):
        store.add({3: alone.result(3)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArgumentError, match="expected a shard of a dataset"):
        store.samples()
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="was not written"):
            store.add({5: alone.result(5)})


def test_a_folder_keeps_to_its_settings(tmp_path):
    def some(count: int, settings: dict | None) -> list[int]:
        store = explain_many(
            range(count), explain_one, tmp_path, format="safetensors", settings=settings, progress=False
        )
        return sorted(store.samples())

    assert some(2, {"contexts": 4}) == [0, 1] and some(3, {"contexts": 4}) == [0, 1, 2]
    for other in ({"contexts": 5}, None, {}):
        with pytest.raises(ArgumentError, match="settings: got another"):
            some(4, other)
    assert sorted(ExplanationSet(tmp_path, "safetensors").samples()) == [0, 1, 2]
