"""The import rule: a module imports from its own layer and from lower ones, never from a higher one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import flmoe_fast

PACKAGE = Path(flmoe_fast.__path__[0])
ROOT = Path(__file__).resolve().parents[1]

# Lowest first; names of one rung may import each other.
LAYERS = (
    ("_C",),
    ("native",),
    ("checks", "coalitions", "environment", "files"),
    ("model",),
    ("engines",),
    ("games",),
    ("probes",),
    ("adapt", "explainers", "scale"),
    ("pipeline",),
    ("data",),
    ("runs",),
    ("demo",),
    ("cli",),
)
RUNG = {name: rung for rung, names in enumerate(LAYERS) for name in names}


def imports(source: str, module: tuple[str, ...], is_package: bool) -> set[str]:
    """The layers that a module's source imports, at any depth; "" stands for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base: tuple[str, ...] = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                here = module if is_package else module[:-1]
                base = here[: len(here) - node.level + 1] + base
            # In `from flmoe_fast import x` the layer is x.
            paths = [(*base, alias.name) for alias in node.names] if base == ("flmoe_fast",) else [base]
        else:
            continue
        found |= {path[1] if len(path) > 1 else "" for path in paths if path[0] == "flmoe_fast"}
    return found


def violations(package: Path) -> list[str]:
    """Every import against the rule under a package folder, one line each."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        if not parts or parts == ("__main__",):  # the package's own __init__ may import anything
            continue
        name = file.relative_to(package)
        if parts[0] not in RUNG:
            wrong.append(f"{name} belongs to no layer: add {parts[0]!r} to LAYERS")
            continue
        for layer in sorted(imports(file.read_text(), ("flmoe_fast", *parts), is_package)):
            if layer not in RUNG:
                wrong.append(f"{name} imports {layer or 'flmoe_fast'!r}, which is no layer")
            elif RUNG[layer] > RUNG[parts[0]]:
                wrong.append(f"{name} imports {layer!r}, a higher layer than {parts[0]!r}")
    return wrong


def test_layers():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("model/a.py", "from flmoe_fast.checks import integer\nfrom . import b\nfrom ..model.c import d", 0),
        ("games/a.py", "import numpy\nfrom flmoe_fast import engines\nimport flmoe_fast.model.x", 0),
        ("__init__.py", "from flmoe_fast.cli import main", 0),
        ("model/a.py", "from flmoe_fast.engines import x", 1),
        ("model/a.py", "from ..engines import x", 1),
        ("model/__init__.py", "from ..games import x", 1),
        ("model/deep/a.py", "from ...cli import x", 1),
        ("checks.py", "def f():\n    from flmoe_fast import model, engines", 2),
        ("games/a.py", "import flmoe_fast.probes.grid", 1),
        ("games/a.py", "import flmoe_fast", 1),
        ("games/a.py", "from flmoe_fast import probe", 1),
        ("utils.py", "", 1),
    ],
)
def test_rule_finds_what_it_should(tmp_path, file, source, wrong):
    path = tmp_path / "flmoe_fast" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert len(violations(tmp_path / "flmoe_fast")) == wrong


def used(package: Path) -> set[str]:
    """Every name that the package's code says, but for where it is defined; words of short strings are names too."""
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80:
                found |= set(re.findall(r"\w+", node.value))
    return found


def test_every_function_of_the_extension_is_called_by_the_package():
    sources = [file for file in (ROOT / "csrc").rglob("*.cpp") if "pybind11" in file.read_text()]
    bound = {name for file in sources for name in re.findall(r'\.def\w*\(\s*"(\w+)"', file.read_text())}
    assert {"sample_contexts", "fused_chain", "run", "cpu_levels"} <= bound
    assert bound - used(PACKAGE) == set()


def test_every_function_and_class_is_reached():
    """By the package itself, or by users, who find it in the reference pages."""
    defined = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__")
    }
    for_users = set(re.findall(r"\w+", (ROOT / "docs" / "reference.py").read_text()))
    assert defined - used(PACKAGE) - for_users == set()
