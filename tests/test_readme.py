"""The README's Python runs as printed, from top to bottom, beside a demonstration's files."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import flmoe_fast
from flmoe_fast.data.digits import MODALITIES, PIXELS, two_view_digits
from flmoe_fast.data.sample import save_sample
from flmoe_fast.model.encoders import ProjectionEncoder

README = Path(__file__).parent.parent / "README.md"


def test_examples(tmp_path, monkeypatch):
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

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "out" / "pairs.png").stat().st_size > 1000
    assert (tmp_path / "out" / "explained" / "interactions.csv").exists()
    # What the text says about the voting game: 4 and 5 need each other; 0 to 3 stand in for one another.
    result = names["result"]
    assert result.pairs[result.order("sii")[0]].tolist() == [4, 5]
    assert result.pairs[result.order("gap")[:6]].max() == 3
    covered = (names["low"] <= names["exact"].sii) & (names["exact"].sii <= names["high"])
    assert covered.mean() > 0.8


def test_tables_are_those_of_the_results():
    from bench.tables import PAGES, filled

    for page in PAGES:
        text = page.read_text()
        assert filled(text) == text
    text = README.read_text()
    assert filled(text.replace("<!-- end -->", "| typed by hand |\n<!-- end -->", 1)) == text  # would be undone
