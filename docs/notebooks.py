"""Runs the notebooks and keeps their outputs: ``python docs/notebooks.py [NAME ...]``. Needs no Jupyter.

A cell's output is what it prints, then what its last expression shows: HTML where it has some, a picture for axes of
matplotlib, else its text.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

FOLDER = Path(__file__).parent / "notebooks"


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; its outputs as a notebook holds them."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": shown(value)})
    return outputs


def shown(value: object) -> dict[str, Any]:
    """A value by kind of text."""
    if isinstance(value, Axes):
        file = io.BytesIO()
        figure: Any = value.get_figure(root=True)
        figure.savefig(file, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
        return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": [value.get_title()]}
    text = {"text/plain": repr(value).splitlines(True)}
    as_html = getattr(value, "_repr_html_", None)
    return text if as_html is None else {"text/html": as_html().splitlines(True), **text}


def main() -> None:
    """Run the named notebooks, or all."""
    matplotlib.use("Agg")
    for path in sorted(FOLDER.glob("*.ipynb")):
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        notebook = json.loads(path.read_text())
        names: dict[str, Any] = {}
        for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
            cell["outputs"], cell["execution_count"] = run_cell("".join(cell["source"]), names), number + 1
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
