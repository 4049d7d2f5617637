"""Every shipped configuration of the Triton kernels, compiled ahead of time for GPUs that are not here.

``triton_budgets.json`` is what each was seen to need. ``python tests/test_triton_compile.py`` (make budgets) writes it
anew, and prints the table.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUDGETS = HERE / "triton_budgets.json"
ARCHS = ("sm_80", "sm_90", "sm_100")
#: Versions of triton and ptxas differ by a few registers.
SLACK = 1.1
pytest.importorskip("triton", reason="triton is not installed (it is part of the test extra)")

from flmoe_fast.engines.gpu.chunk import PLAIN  # noqa: E402
from flmoe_fast.engines.gpu.kernels import configs  # noqa: E402
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS  # noqa: E402


def missing_tool() -> str:
    """Which of the compiler's tools is not there; triton's own wheel carries them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    absent = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (tools / name).exists()]
    return f"this triton carries no {', '.join(absent)}" if absent else ""


pytestmark = pytest.mark.skipif(bool(missing_tool()), reason=missing_tool() or "all tools are there")


@functools.cache
def compiled(arch: str, *precisions: str) -> dict[str, dict[str, int]]:
    """What every kernel needs on an architecture: what is shipped for it, or everything in the precisions named.

    A number among them is the only head width.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # a kernel defined under the interpreter cannot be compiled
    command = [sys.executable, str(HERE / "aot.py"), arch, *precisions]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def violations(found: dict[str, int], budget: dict[str, int] | None, arch: str, name: str) -> list[str]:
    """What a kernel needs beyond its budget, or what the part does not have."""
    if budget is None:
        return [f"{name}: no budget; run make budgets"]
    wrong = [f"{name}: {found[what]} {what}" for what in ("stack", "spills") if found[what]]
    limit = configs.SHARED_BYTES[int(arch[3:])]
    if found["shared"] > limit:
        wrong.append(f"{name}: {found['shared']} bytes of shared memory, and {arch} has {limit}")
    for what in ("registers", "shared"):
        if found[what] > SLACK * budget[what]:
            wrong.append(f"{name}: {found[what]} {what}, and the budget is {budget[what]}")
    for what in ("wgmma", "mma"):
        if budget[what] and not found[what]:
            wrong.append(f"{name}: no {what} any more")
    if arch == "sm_90" and name.split("/")[0] not in PLAIN and not found["wgmma"]:
        wrong.append(f"{name}: no wgmma")
    return wrong


@pytest.mark.parametrize("arch", [pytest.param(a, marks=pytest.mark.long) if a != "sm_90" else a for a in ARCHS])
def test_every_shipped_configuration_is_within_budget(arch: str):
    budgets = json.loads(BUDGETS.read_text())[arch]
    found = compiled(arch)
    assert set(configs._file(arch)) <= set(found)
    assert set(found) == set(budgets)
    assert [line for name in found for line in violations(found[name], budgets[name], arch, name)] == []


@pytest.mark.long
@pytest.mark.parametrize("arch", ("sm_80", "sm_100"))
def test_what_has_no_file_fits_as_well(arch: str):
    """Default configurations of the precisions that nobody tuned, at the usual head width."""
    found = compiled(arch, "bf16", "tf32", "64")
    assert {f"{kernel}/{name}" for kernel in ("up", "sparse_down") for name in ("bf16", "tf32")} <= set(found)
    assert [line for name in found for line in violations(found[name], found[name], arch, name)] == []
    assert all(found[name]["mma"] for name in found if name.split("/")[0] not in PLAIN)


def test_excess_is_seen():
    """Negative control: each kind of excess is named."""
    budget = json.loads(BUDGETS.read_text())["sm_90"]["up/fp16x2"]
    assert violations(budget, budget, "sm_90", "up/fp16x2") == []
    excesses = {"spills": 2, "stack": 8, "registers": 2 * budget["registers"], "shared": 240_000, "wgmma": 0}
    for change in ({what: number} for what, number in excesses.items()):
        assert violations({**budget, **change}, budget, "sm_90", "up/fp16x2"), change
    assert violations(budget, None, "sm_90", "up/fp16x2")


def test_every_file_holds_known_entries_and_can_be_found():
    for arch in configs.shipped():
        for name, found in configs._file(arch).items():
            kernel, precision, *depth = name.split("/")
            assert kernel in (*configs.KERNELS, *configs.SPARSE_KERNELS)
            at = int(depth[0][1:]) if depth else 0
            assert configs.find(kernel, precision, arch, at) == configs.Config(**found)
    nearest = configs.find("up", "fp16", "sm_103")
    assert nearest == configs.find("up", "fp16", "sm_90") != configs.default("up", "fp16")  # sm_100 has no fp16
    # Less shared memory than any file was made for.
    assert (
        configs.find("up", "fp16x2", "sm_120")
        == configs.default("up", "fp16x2")
        != configs.find("up", "fp16x2", "sm_80")
    )
    assert configs.find("up", "bf16", "sm_90") == configs.default("up", "bf16")
    assert configs.find("up", "fp16x2", "sm_75") == configs.default("up", "fp16x2")
    assert configs.arch_of("NVIDIA H200", (9, 0)) == "sm_90"


def main() -> None:
    """Write the budgets, and print every kernel's needs, the configurations without a file among them."""
    budgets = {arch: compiled(arch) for arch in ARCHS}
    rows = [f"{json.dumps(t)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in b.items()) + "\n}"
            for t, b in budgets.items()]  # fmt: skip
    BUDGETS.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    everything = budgets | {f"{arch} (all)": compiled(arch, *PRECISIONS) for arch in ARCHS}
    columns = ("rows", "columns", "inner", "warps", "stages", "registers", "stack", "spills", "shared", "wgmma", "mma")
    print(f"{'arch':12}{'kernel':24}" + "".join(f"{name:>10}" for name in columns))
    for arch, found in everything.items():
        for name, needs in found.items():
            print(f"{arch:12}{name:24}" + "".join(f"{needs[column]:10}" for column in columns))


if __name__ == "__main__":
    main()
