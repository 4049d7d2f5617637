"""Commands that are killed, interrupted and let down by the system go on as if nothing was: trials of the soak."""

from __future__ import annotations

import dataclasses
import shutil
import signal

import pytest

from flmoe_fast.files import writing_to
from flmoe_fast.native import extension
from tests.commands import Commands
from tests.soak import kills
from tests.soak.kills import Break

SETTINGS = kills.SETTINGS.replace("samples = 4", "samples = 2").replace("samples = 64", "samples = 32")
SETTINGS = SETTINGS.replace("batch_size = 300", "batch_size = 500")
#: A report takes longer than these together; ``test_resume.py`` kills it.
STEPS = kills.STEPS[:3]
#: How a command has to end: what happens to it, and its status.
STATUS = {"kill": -signal.SIGKILL, "interrupt": 130, **dict.fromkeys(kills.FAULTS, 2)}


@pytest.fixture(scope="module")
def commands():
    with Commands() as made:
        yield made


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    return kills.undisturbed(commands, tmp_path_factory.mktemp("kills") / "undisturbed", SETTINGS, STEPS)


def planned(step, can_plant: bool) -> list[Break]:
    """Faults of the disk, an interrupt, two kills, and missing memory: each where something is left for the next."""
    breaks = [Break("interrupt", seconds=0.1 * step.seconds), Break("kill", 0), Break("kill", 1)]
    if can_plant:
        memory = Break("no memory", step.calls["ALLOCATION"] // 8)
        breaks = [Break("full disk", 2), Break("broken disk", 1), *breaks, memory]
    return breaks


@pytest.mark.parametrize("name", STEPS)
def test_a_broken_command_goes_on_as_if_nothing_was(name, commands, whole, tmp_path):
    breaks = planned(whole.steps[name], commands.can_plant)
    ended, wrong = kills.trial(commands, whole, name, breaks, tmp_path / "own")
    assert not wrong
    for how, one in zip(breaks, ended, strict=True):  # some libraries do without memory that they do not get
        assert one.status == STATUS[how.kind] or (how.kind == "no memory" and one.status == 0), how


#: Mistakes of a command, what happens to it, and what is wrong then.
MISTAKES = {
    "nothing is removed": ("Path.unlink = lambda *_, **__: None", Break("full disk", 3), "left ."),
    "the disk is not named": ("files._why = lambda _: 'no'", Break("full disk", 1), "said "),
    "a traceback": ("cli._EXPECTED = ()", Break("broken disk", 1), "ended with 1"),
    "memory is not expected to end": ("cli._is_of_memory = lambda _: False", Break("no memory", 2), "ended with 1"),
    "a long farewell": ("cli._stopped = lambda _: [n * n for n in range(20_000_000)] and 130",
                        Break("interrupt", seconds=0.05), "after Ctrl-C"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, commands, whole, tmp_path):
    """Negative controls."""
    planted, how, expected = MISTAKES[mistake]
    if how.kind in kills.FAULTS and not commands.can_plant:
        pytest.skip("faults are planted by a library that needs glibc and a C compiler")
    path, out = kills.place(tmp_path, "faithfulness")
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(out / "faithfulness")
    how = dataclasses.replace(how, planted="from flmoe_fast import cli, files\n" + planted)
    wrong = kills.broken(commands, "faithfulness", path, how)[1]
    assert len(wrong) == 1 and expected in wrong[0]


TORN = """
def torn(source, target):
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = torn
"""


def test_a_file_that_is_not_replaced_at_once_is_seen(commands, whole, tmp_path):
    """Negative control: a kill in the middle of writing leaves half a file."""
    assert kills.trial(commands, whole, "faithfulness", [Break("kill", 10**9, planted=TORN)], tmp_path / "own")[1]


def test_a_changed_number_is_seen(whole, tmp_path):
    """Negative control of the comparison."""
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    before = kills.digests(tmp_path / "run")
    path = tmp_path / "run" / "metrics.json"
    path.write_text(path.read_text().replace("1", "2", 1))
    after = kills.digests(tmp_path / "run")
    assert [name for name in before if after[name] != before[name]] == ["metrics.json"]


#: Every n-th allocation of making a game and calling it fails, and what is called next has to have its values.
SWEEP = """
sys.path.insert(0, str(ROOT / "tests"))
import torch
from edge_shapes import Edge
edge, coalitions = Edge("small", (20, 13), (18, 13), hidden=32, heads=2), torch.rand(40, 31) < 0.5
for backend in {backends}:
    values = lambda: edge.game(backend=backend, dtype=torch.float32)(coalitions)
    before = values()
    plant(ALLOCATION, 0)
    values()
    total, refused = seen(ALLOCATION), 0
    for at in range(1, total + 1, max(1, total // 8)):
        plant(ALLOCATION, at)
        try:
            found = values()
        except (MemoryError, RuntimeError) as problem:
            found, refused = before, refused + 1
            assert isinstance(problem, MemoryError) or "memory" in str(problem), problem
        plant(ALLOCATION, 0)
        assert torch.equal(found, before), at
    assert refused > 4 and torch.equal(values(), before), refused
"""


def test_an_engine_without_memory_says_so_and_stays_whole(commands):
    if not commands.can_plant:
        pytest.skip("faults are planted by a library that needs glibc and a C compiler")
    backends = ["torch", *(["cpu"] if extension()[0] is not None else [])]
    ended = commands.python(SWEEP.format(backends=backends))
    assert ended.status == 0, ended.said


@pytest.mark.parametrize("name", STEPS)
def test_a_command_says_who_else_writes(name, commands, whole):
    with writing_to(whole.folder / "run", "somebody"):
        ended = commands.run(name, kills.place(whole.folder, name)[0], "--no-progress")
    assert ended.status == 2 and "is being written by somebody, process" in ended.said.splitlines()[-1]
