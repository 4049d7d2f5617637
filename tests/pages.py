"""Pages that are run: their Python blocks from top to bottom, and the outputs that they show."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

#: How far a shown number may be from one that another machine's rounding gives.
RELATIVE, ABSOLUTE = 0.02, 2e-4

BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def blocks(text: str) -> list[tuple[str, str | None]]:
    """The Python of a page, and what follows a block as its output."""
    return [(found[1], found[2]) for found in BLOCK.finditer(text)]


def run(page: Path, names: dict | None = None, write: bool = False) -> dict:
    """Run a page's code; what it defined. Outputs have to be those that the page shows, or are written into it."""
    names = {} if names is None else names
    text = page.read_text()
    for code, shown in blocks(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        if shown is not None and write:
            old = f"```python\n{code}```\n\n```text\n{shown}```"
            text = text.replace(old, f"```python\n{code}```\n\n```text\n{printed.getvalue()}```")
        elif shown is not None:
            assert alike(printed.getvalue(), shown), f"{page.name} prints\n{printed.getvalue()}and shows\n{shown}"
    if write:
        page.write_text(text)
    return names


def alike(printed: str, shown: str) -> bool:
    """Whether two texts say the same, up to rounding and to which path was the faster one on a machine."""
    first, second = (re.sub(r"backend '[^']*'", "", text).split() for text in (printed, shown))
    return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second))


def _same(first: str, second: str) -> bool:
    if first == second:
        return True
    try:
        a, b = (float(word.strip("(),[]")) for word in (first, second))
    except ValueError:
        return False
    return abs(a - b) <= max(ABSOLUTE, RELATIVE * max(abs(a), abs(b)))
