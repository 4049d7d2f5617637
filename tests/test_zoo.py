"""The table of models and the decoder's figures that pages show, and that a line of the table is made as it says."""

from __future__ import annotations

import pytest
from zoo import CASES

from bench import decoders, zoo
from bench.timing import read


def measured(name: str) -> list[dict]:
    found = read(name)
    assert found is not None
    return found[1]


def test_the_table_holds_what_pages_say():
    """Every case has a line, none crashes, what is on an engine is exact, and no choice is slower than batches."""
    rows = {row["model"]: row for row in measured("zoo")}
    assert list(rows) == list(CASES) and len(rows) >= 60
    for name, row in rows.items():
        assert row["path"] != "crash" and row["error"] <= 1e-10, name
        assert row["taken"] == "batches" or row["times_batched"]["median"] >= 1.0, name
        assert bool(row["reason"]) == (row["path"] == "batches"), name


def test_the_decoder_is_as_fast_as_pages_say():
    rows = measured("decoders")
    assert [row["width"] for row in rows] == [256, 512]
    for row in rows:
        assert row["times_batches"]["q1"] >= 5 and row["times_corners"]["q1"] >= 15 and row["error"] <= 1e-5
        assert row["tokens"]["median"] <= row["tokens_by_design"] == decoders.by_design(row["tokens_batches"] // 121)


@pytest.mark.parametrize(("name", "path"), [("MPNet", "encoder stack"), ("ConvBERT", "batches")])
def test_a_line(name, path):
    row = zoo.row(name, CASES[name], rounds=1)
    assert row["path"] == path and row["error"] <= 1e-10 and row["times_alone"]["rounds"] == 1
    assert ("convolution" in row["reason"]) == (path == "batches")


def test_a_model_that_crashes_is_in_the_table():
    broken = zoo.row("broken", CASES["BERT"].__class__("text", lambda: None, dict, lambda _: []), rounds=1)
    assert broken["path"] == "crash" and "**crash**" in str(zoo.table([broken])[1])
