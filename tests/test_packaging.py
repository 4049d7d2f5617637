"""What a release carries: the source distribution, the pure wheel, and files that repeat the version."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import flmoe_fast

ROOT = Path(__file__).parent.parent
#: Of the repository itself, not of the software.
LEFT_OUT = (".gitignore", ".github/", ".gitattributes", ".pre-commit-config.yaml")


def tracked() -> list[str]:
    """The repository's files."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [name for name in listed if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository's files in a folder of their own, since building leaves files behind."""
    folder = tmp_path_factory.mktemp("copy")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def setup(copy: Path, *command: str) -> str:
    """Run a setuptools command without the extension; its standard error."""
    environment = {**os.environ, "FLMOE_NATIVE": "off"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_source_distribution_is_complete(copy, tmp_path):
    setup(copy, "sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    missing = [name for name in tracked() if name not in inside and not name.startswith(LEFT_OUT)]
    assert not missing
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]


def test_wheel_without_the_extension_is_pure(copy, tmp_path):
    setup(copy, "bdist_wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"flmoe_fast-{flmoe_fast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        facts = next(packed.read(name).decode() for name in names if name.endswith("dist-info/WHEEL"))
    assert "Root-Is-Purelib: true" in facts
    assert "flmoe_fast/probes/interactions.py" in names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "csrc/"))]


def test_version_is_repeated_right():
    assert f"\nversion: {flmoe_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {flmoe_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def load(path: Path, name: str):
    """A module or package at a path, under a name of the caller's."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_kernels_load_from_anywhere(tmp_path):
    """As the kernels hub loads them: by path, under a name of its own, twice, without this package's own modules."""
    pytest.importorskip("triton", reason="the kernels need triton")
    hub = load(ROOT / ".ci" / "hub.py", "hub_of_the_kernels")
    built = hub.write(tmp_path / "hub")
    first, second = (load(built / "__init__.py", f"_kernels_{n}") for n in (1, 2))
    assert first.attention.__name__ == "_kernels_1.attention" != second.attention.__name__
    assert first.configs.FOLDER == built / "configs" and first.configs.shipped() == second.configs.shipped() != ()
    assert {path.stem for path in hub.SOURCES.glob("*.py")} == {path.stem for path in built.glob("*.py")}
    for name in [name for name in sys.modules if name.startswith(("_kernels_", "hub_of_the"))]:
        del sys.modules[name]
    settings = tomllib.loads((tmp_path / "hub" / "build.toml").read_text())
    assert settings["general"]["backends"] == ["cuda"] and "torch-noarch" in settings
    assert (tmp_path / "hub" / "torch-ext" / "flmoe_kernels" / "attention.py").is_file()


def test_a_kernel_that_needs_more_than_its_folder_is_refused(tmp_path, monkeypatch):
    hub = load(ROOT / ".ci" / "hub.py", "hub_of_the_kernels")
    (tmp_path / "configs").mkdir()
    (tmp_path / "wrong.py").write_text("from flmoe_fast.checks import integer\n")
    monkeypatch.setattr(hub, "SOURCES", tmp_path)
    with pytest.raises(SystemExit, match="wrong.py"):
        hub.write(tmp_path / "hub")
    del sys.modules["hub_of_the_kernels"]
