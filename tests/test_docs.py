"""The reference page is that of the docstrings, and the examples run as they are."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flmoe_fast

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    source = (ROOT / "examples" / name).read_text()
    arguments = [str(tmp_path)] if "sys.argv[1]" in source else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_reference_is_up_to_date():
    command = [sys.executable, ROOT / "docs" / "reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pages_name_what_exists():
    """Every file and module that a page mentions in code is there."""
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        for path in re.findall(r"`((?:bench|docs|examples|flmoe_fast)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name}: {module}"


def test_public_names_are_told_in_one_way():
    """The groups, the package's docstring and what a type checker sees name the same things; each is there."""
    told = dict(re.findall(r"^(\w+): [^\n]+\n((?:    [^\n]+\n)+)", flmoe_fast.__doc__, re.MULTILINE))
    assert {group: re.findall(r"\w+", names) for group, names in told.items()} == {
        group: list(names) for group, names in flmoe_fast.GROUPS.items()
    }
    tree = ast.parse(Path(flmoe_fast.__file__).read_text())
    seen = {a.asname: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    seen.pop(None)
    assert seen == {name: module for names in flmoe_fast.GROUPS.values() for name, module in names.items()}
    for name in flmoe_fast.__all__:
        assert getattr(flmoe_fast, name).__name__ == name
