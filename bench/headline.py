"""The first figures that a reader sees: three ratios with their spread, each with the file that it is from."""

from __future__ import annotations

from bench.cells import Table, times
from bench.timing import read


def headline(rows: list[dict]) -> Table:
    """Of the CPU engine's ``rows``, and of the results of explainers and of other people's models."""
    candidates = (
        (
            "cpu-engine",
            _best_native(rows),
            "a coalition at a time, for a sample of every pair of an FL-I2MoE, 516 tokens",
        ),
        ("explainers", _captum(_rows("explainers")), "captum's Shapley values in batches of 32; the same numbers"),
        ("adapt", _clip(_rows("adapt")), "CLIP itself, one word and patch mask after another; the same numbers"),
    )
    lines = [
        [f"**{times(ratio)}**", f"as fast as {what}", f"[{name}](bench/results/{name}.jsonl)"]
        for name, ratio, what in candidates
        if ratio
    ]
    return ["median (quartiles)", "", "file"], lines, ""


def _rows(name: str) -> list[dict]:
    found = read(name)
    return found[1] if found else []


def _best_native(rows: list[dict]) -> dict | None:
    ratios = [
        row["times_naive_per_pair_sample"]
        for row in rows
        if row["shape"] == "mmimdb" and row["candidate"].startswith("native")
    ]
    return max(ratios, key=lambda ratio: ratio["median"], default=None)


def _captum(rows: list[dict]) -> dict | None:
    ratios = [row.get("times_faster_on_engine") for row in rows if row.get("perturbations_per_eval") == 32]
    return next(iter(ratios), None)


def _clip(rows: list[dict]) -> dict | None:
    ratios = [row["times_first"] for row in rows if row["case"] == "clip" and row["candidate"] == "engine"]
    return next(iter(ratios), None)


TABLES = {"headline": ("cpu-engine", headline)}
