"""Writes docs/reference.md: the public names with their signatures and docstrings.

python docs/reference.py [--check]
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "reference.md"
#: Where users look beyond the names of the package itself, in the order of the page.
FURTHER = (
    "flmoe_fast.probes.surrogate.Surrogate",
    "flmoe_fast.probes.indices.IndexEstimate",
    "flmoe_fast.explainers.shapiq.ShapiqGame",
    "flmoe_fast.explainers.shapiq.ShapiqApproximator",
    "flmoe_fast.explainers.shapiq.from_shapiq",
    "flmoe_fast.explainers.captum.ShapleyInteractions",
    "flmoe_fast.explainers.shap.shap_pair",
    "flmoe_fast.explainers.shap.PlayerMasker",
    "flmoe_fast.pipeline.importance.players.player_importance",
    "flmoe_fast.scale.group.SharedGame",
    "flmoe_fast.scale.group.join",
)


def entry(path: str, item: object) -> str:
    """One name: heading, signature, docstring, and the public methods of a class."""
    parts = [f"## `{path}`", _signature(path.rpartition(".")[2], item), _text(item)]
    if inspect.isclass(item):
        for name, member in vars(item).items():
            member = inspect.unwrap(getattr(member, "__func__", member))
            if name.startswith("_") or not inspect.isfunction(member) or not member.__doc__:
                continue
            parts += [f"### `{name}`", _signature(name, member), _text(member)]
    return "\n\n".join(part for part in parts if part)


def _signature(name: str, item: object) -> str:
    try:
        text = str(inspect.signature(item))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are strings
    return f"```python\n{name}{text}\n```"


def _text(item: object) -> str:
    """A docstring; underlined sections become bold words, and reST roles plain code."""
    text = inspect.getdoc(item) or ""
    text = re.sub(r"^(\w[\w ]*)\n-{3,}$", r"**\1**\n", text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    # In a list of parameters the name stands alone and what it is is indented.
    return re.sub(r"^ {4}(\S)", r"  \1", re.sub(r"^(\S[^\n]*)\n(?= {4}\S)", r"- \1\n", text, flags=re.MULTILINE),
                  flags=re.MULTILINE)  # fmt: skip


def page() -> str:
    """The whole page."""
    package = importlib.import_module("flmoe_fast")
    entries = [entry(f"flmoe_fast.{name}", getattr(package, name)) for name in package.__all__]
    for path in FURTHER:
        module, _, name = path.rpartition(".")
        entries.append(entry(path, getattr(importlib.import_module(module), name)))
    head = "# Reference\n\nMade from the docstrings by `python docs/reference.py`."
    return "\n\n".join([head, *entries]) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE}: run python docs/reference.py")
    PAGE.write_text(page())
