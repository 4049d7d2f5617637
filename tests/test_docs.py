"""The reference page is that of the docstrings, and the examples run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
