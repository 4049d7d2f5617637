"""For mkdocs: the site's first page is the README, with links as seen from there; other files are only named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

README = Path(__file__).parent.parent / "README.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the page."""
    text = README.read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\[([^\]]*)\]\((?:bench/|[A-Z])[^):]*\)", r"\1", text)  # files that are not pages
    files.append(File.generated(config, "index.md", content=text))
    return files
