"""The pages: their code runs and prints what they show, their links lead somewhere, their tables are generated."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import matplotlib
import pages
import pytest
import torch

import flmoe_fast
from flmoe_fast.data.digits import MODALITIES, PIXELS, two_view_digits
from flmoe_fast.data.sample import save_sample
from flmoe_fast.model.encoders import ProjectionEncoder
from flmoe_fast.runs import settings

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
WITH_CODE = [page for page in PAGES if pages.blocks(page.read_text()) and "reference" not in page.parts]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def titled(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def demonstrated(tmp_path, monkeypatch):
    """A folder with what a demonstration leaves in out/demo, of an untrained model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "demo").mkdir(parents=True)
    digits = two_view_digits()[1]
    config = flmoe_fast.FLI2MoEConfig(MODALITIES, 8, 2, 1, 10, reweight_hidden=8)
    model = flmoe_fast.FLI2MoE(config, {name: ProjectionEncoder(PIXELS, 8) for name in MODALITIES})
    with torch.no_grad():
        model.set_feature_means(model.encode(digits.inputs))
    flmoe_fast.save_checkpoint(model, "out/demo/model.safetensors")
    halves, masks = ([part[0] for part in parts] for parts in (digits.inputs, digits.masks))
    save_sample("out/demo/sample.npz", inputs=dict(zip(MODALITIES, halves)), masks=dict(zip(MODALITIES, masks)))
    return tmp_path


@pytest.mark.parametrize("page", WITH_CODE, ids=titled)
def test_code_runs_and_prints_what_is_shown(page, demonstrated):
    found = pages.run(page)
    if page.name == "README.md":  # what the text says about the committee
        assert found["result"]["Ada", "Bob"].sii_interval[0] > 0 > found["result"]["Cy", "Di"].sii_interval[1]
        assert found["result"]["Cy", "Di"].gap_interval[0] > 0
    if page.name == "sparse-experts.md":
        assert (demonstrated / "out" / "explained" / "interactions.csv").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=titled)
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] for cell in cells if cell.get("metadata", {}).get("shows"))
    names: dict = {}
    for source in code:
        exec(compile(source, str(notebook), "exec"), names)
    assert names["holds"]  # what the notebook says at its end


def test_outputs_that_differ_are_noticed():
    assert pages.alike("SII +0.5012 (backend 'a b')\n", "SII +0.5013 (backend 'c')\n")
    assert not pages.alike("SII +0.50\n", "SII +0.60\n") and not pages.alike("a x b\n", "a x c\n")


def test_readme_is_short_and_shows_something():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert text.index("![") < text.index("## Install") and "```text\n" in text
    assert (ROOT / "docs" / "picture.png").stat().st_size < 250_000


def anchors(text: str) -> set[str]:
    """What headings are called in links."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def dead_links(page: Path) -> list[str]:
    """Links of a page to files, or places in pages, that are not there."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (place and target.suffix == ".md" and place not in anchors(target.read_text())):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=titled)
def test_links_lead_somewhere(page):
    assert not dead_links(page)


def test_dead_links_are_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `title`\n[here](#a-title) [no](#nothing) [gone](other.md)\n```\n[code](x.md)\n```\n")
    assert dead_links(page) == ["#nothing", "other.md"]


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w./-]+\.(?:md|ipynb))$", text, re.MULTILINE)
    there = {str(page.relative_to(ROOT / "docs")) for page in [*PAGES[1:], *NOTEBOOKS] if page.name != "README.md"}
    assert set(listed) - {"index.md"} == there


def test_every_key_of_a_run_is_told():
    text = (ROOT / "docs" / "guides" / "runs.md").read_text()
    sections = {title: body for title, body in re.findall(r"^### \[(\w+)\]\n(.*?)(?=^#|\Z)", text, re.M | re.DOTALL)}
    kinds = {"training": settings.TrainingSettings, "explain": settings.ExplainSettings}
    for name, kind in (kinds | {"faithfulness": settings.FaithfulnessSettings}).items():
        told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", sections[name], re.MULTILINE))
        assert list(told) == [field.name for field in fields(kind)]
        for field in fields(kind):
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert field.default is not MISSING
            assert told[field.name] == ("" if default is None else f"`{json.dumps(default)}`"), field.name
    config = {field.name for field in fields(flmoe_fast.FLI2MoEConfig)}
    of_data = {"modalities", "classes", "task", "num_tokens"}
    assert config - of_data <= set(re.findall(r"`(\w+)`", sections["model"]))


def test_tables_are_those_of_the_results():
    from bench.tables import PAGES as TABLED
    from bench.tables import filled

    for page in TABLED:
        text = page.read_text()
        assert filled(text) == text, page.name
    text = TABLED[0].read_text()
    assert filled(text.replace("<!-- end -->", "| typed by hand |\n<!-- end -->", 1)) == text  # would be undone
