"""The Triton kernels as a package of the kernels hub: ``python .ci/hub.py OUT``.

Writes what ``kernel-builder`` takes (``build.toml``, ``torch-ext/flmoe_kernels``) and, since nothing is compiled ahead,
what it would make of it (``build/torch-cuda``), which ``kernels.get_local_kernel`` loads. The sources are those of
``flmoe_fast/engines/gpu/kernels`` with imports relative, as the hub asks: a kernel is loaded from any path, beside
other versions of itself, and without flmoe_fast.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "flmoe_fast" / "engines" / "gpu" / "kernels"
NAME, VERSION = "flmoe-kernels", 1
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
pyext = ["py", "json"]
"""
#: The kernels' own folder, as their sources import from it.
OWN = re.compile(r"^(\s*)from flmoe_fast\.engines\.gpu\.kernels(\.\w+)? import ", re.MULTILINE)
MODULES = "attention, combine, configs, corners, grouped, head, linear, order, precision, routing"


def relative(source: str) -> str:
    """A module whose imports from its own folder are relative."""
    return OWN.sub(lambda found: f"{found[1]}from {found[2] or '.'} import ", source)


def write_package(folder: Path) -> None:
    """The kernels as a package that imports only torch, triton and itself."""
    folder.mkdir(parents=True)
    for path in sorted(SOURCES.glob("*.py")):
        text = relative(path.read_text())
        if "flmoe_fast" in re.sub(r'""".*?"""', "", text, flags=re.DOTALL):
            raise SystemExit(f"{path}: what the hub loads has nothing but torch, triton and its own folder")
        if path.name == "__init__.py":
            text += f"\nfrom . import {MODULES}\n\n__all__ = {MODULES.split(', ')!r}\n"
        (folder / path.name).write_text(text)
    shutil.copytree(SOURCES / "configs", folder / "configs")


def write(out: Path) -> Path:
    """The whole tree; the folder that is loaded."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "build.toml").write_text(BUILD)
    shutil.copy(ROOT / "LICENSE", out)
    write_package(out / "torch-ext" / NAME.replace("-", "_"))
    built = out / "build" / "torch-cuda"
    write_package(built)
    facts = {"name": NAME, "id": f"_{NAME.replace('-', '_')}_cuda_local", "version": VERSION, "license": "Apache-2.0"}
    (built / "metadata.json").write_text(
        json.dumps({**facts, "python-depends": [], "backend": {"type": "cuda"}}, indent=2) + "\n"
    )
    return built


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    print(write(parser.parse_args().out))
