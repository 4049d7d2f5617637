"""Writes docs/reference/*.md: the public names with their signatures and docstrings.

python docs/reference.py [--check]
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "reference"
#: Where users look beyond the names of the package itself, in the order of their page.
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
    "flmoe_fast.pipeline.importance.captum.captum_importance",
    "flmoe_fast.pipeline.importance.concentration.concentration",
    "flmoe_fast.pipeline.importance.overlap.overlap",
    "flmoe_fast.pipeline.importance.patterns.map_measures",
    "flmoe_fast.pipeline.importance.patterns.collect",
    "flmoe_fast.pipeline.importance.patterns.Patterns",
    "flmoe_fast.pipeline.importance.patterns.pair_patterns",
    "flmoe_fast.pipeline.importance.patterns.compare_patterns",
    "flmoe_fast.pipeline.importance.tokens.head_importance",
    "flmoe_fast.pipeline.interaction_share.interaction_share",
    "flmoe_fast.pipeline.routing.routing_table",
    "flmoe_fast.pipeline.routing.routing_follows",
    "flmoe_fast.pipeline.routing.experts_alone",
    "flmoe_fast.model.encoders.VectorEncoder",
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


def pages() -> dict[str, str]:
    """Every page by its file's name: an index, one for each group of public names, and one beyond them."""
    package = importlib.import_module("flmoe_fast")
    about = dict(re.findall(r"^(\w+): (.+)$", package.__doc__ or "", re.MULTILINE))
    lines, found = ["# Reference", "", "Made from the docstrings by `python docs/reference.py`.", ""], {}
    groups = {name: {n: f"flmoe_fast.{n}" for n in members} for name, members in package.GROUPS.items()}
    groups["more"] = {path.rpartition(".")[2]: path for path in FURTHER}
    about["more"] = "what is not needed every day, and the explainers of other packages."
    for group, members in groups.items():
        entries = [entry(path, _item(path)) for path in members.values()]
        title = f"# {group.capitalize()}\n\n{about[group][0].upper()}{about[group][1:]}"
        found[f"{group}.md"] = "\n\n".join([title, *entries]) + "\n"
        lines += [f"## [{group.capitalize()}]({group}.md)", "", about[group], ""]
        lines += [f"- [`{name}`]({group}.md#{_anchor(path)}): {_first(_item(path))}" for name, path in members.items()]
        lines.append("")
    return {"index.md": "\n".join(lines), **found}


def _item(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _anchor(path: str) -> str:
    """What a heading of a name is called in a link, on GitHub and in the site alike."""
    return path.lower().replace(".", "")


def _first(item: object) -> str:
    return _text(item).partition("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    wanted = pages()
    if "--check" in sys.argv[1:]:
        kept = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
        sys.exit(0 if kept == wanted else f"{FOLDER}: run python docs/reference.py")
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
