"""Fill the tables of README.md and docs/accuracy.md from the files under bench/results.

    python -m bench.tables [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``--check`` changes nothing and fails if a table
is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

from bench.timing import read

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "accuracy.md")


def _machine(head: dict) -> str:
    machine = head["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"Measured on {where}, torch {machine['torch']}, {head['date']}."


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _range(values: dict, digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f}–{values['q3']:.{digits}f})"


def cpu() -> str:
    """Speed on the CPU, and what rounding is worth, of every candidate."""
    found = read("cpu-engine")
    if found is None:
        return "not measured"
    head, rows = found
    _, rounding = read("cpu-noise") or ({}, [])
    noise = {row["candidate"]: row["noise_share"] for row in rounding}
    rows = [row for row in rows if "ms_per_coalition" in row]
    most = max(row["threads"] for row in rows)
    table = [
        [
            row["shape"],
            row["candidate"],
            _range(row["ms_per_coalition"], 2),
            f"{row['times_naive']['median']:.1f}x",
            f"{row['times_naive_per_pair_sample']['median']:.1f}x",
            f"{row['times_batched_fp32']['median']:.1f}x",
            f"{row['scaling_from_one_thread']['median']:.2f}x" if row["scaling_from_one_thread"] else "",
            f"{row['share_of_gemm_rate']['median']:.0%}" if "share_of_gemm_rate" in row else "",
            f"{noise[row['candidate']]:.1e}" if row["candidate"] in noise else "",
        ]
        for row in rows
        if row["threads"] == most
    ]
    columns = ["shape", "", "ms per coalition", "against naive", "the same per pair-sample", "against batched fp32"]
    columns += [f"{most} threads against 1", "share of GEMM rate", "noise share"]
    note = "Medians and quartiles. Products are counted as in the arithmetic used, against PyTorch's own GEMM."
    if rounding:
        note += f" Noise: {rounding[0]['model']}, held-out accuracy {rounding[0]['accuracy']:.1%}."
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def accuracy() -> str:
    """nMSE at equal evaluations."""
    found = read("accuracy")
    if found is None:
        return "not measured"
    head, rows = found
    rows = [row for row in rows if "estimator" in row]
    budgets = sorted({row["budget"] for row in rows})
    named: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        named.setdefault((row["value"], row["estimator"]), {})[row["budget"]] = row["nmse"]
    table = [[value, name, *(f"{by[b]:.3f}" for b in budgets)] for (value, name), by in named.items()]
    some = rows[0]
    columns = ["value", "estimator", *(f"{b:,}" for b in budgets)]
    games = f"{some['games']} games x {some['seeds']} seeds, 16 tokens, 64 cross-modal pairs"
    note = f"nMSE against enumeration (0 is exact, 1 is what all zeros would score), mean over {games}."
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def coverage() -> str:
    """Coverage of the 95 % intervals."""
    found = read("accuracy")
    if found is None:
        return "not measured"
    head, rows = found
    rows = [row for row in rows if "coverage_budget" in row]
    table = [
        [
            row["value"],
            "adaptive" if row["adaptive"] else "uniform",
            f"{row['coverage_budget']:,}",
            f"{100 * row['coverage_sii']:.1f} %",
            f"{100 * row['coverage_max']:.1f} %",
            f"{100 * row['coverage_strict']:.1f} %",
        ]
        for row in rows
    ]
    columns = ["value", "allocation", "evaluations", "SII", "gap (max)", "gap (strict)"]
    note = f"{rows[0]['games']} games x {rows[0]['seeds']} seeds x 64 pairs."
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def memory() -> str:
    """Peak memory of a long run."""
    found = read("memory")
    if found is None:
        return "not measured"
    head, [row] = found
    columns = ["players", "evaluations", "peak memory", "seconds", "noise share"]
    cells = [
        str(row["players"]),
        f"{row['evaluations']:,}",
        f"{row['gb_peak']:.2f} GB",
        f"{row['seconds']:.0f}",
        f"{row['noise_share']:.1e}",
    ]
    return f"{_markdown(columns, [cells])}\n\n{_machine(head)}"


def hdxor() -> str:
    """What the probes say about data whose interactions are known."""
    found = read("hdxor")
    if found is None:
        return "not measured"
    head, rows = found
    table = []
    for count in sorted({row["modalities"] for row in rows}):
        for setting in ("synergy", "redundancy", "uniqueness0"):
            own = [row for row in rows if (row["modalities"], row["setting"]) == (count, setting)]
            if not own:
                continue
            routing = [_mean([row["routing"][name] for row in own]) for name in own[0]["routing"]]
            table.append(
                [
                    str(count),
                    setting.rstrip("0"),
                    str(len(own)),
                    _seeds([100 * row["accuracy"] for row in own], 1),
                    _seeds([row["modality_sii"]["mean"] for row in own], 3, "+"),
                    _seeds([row["modality_strict_gap"]["mean"] for row in own], 3),
                    _seeds([1e3 * row["token_sii"]["mean"] for row in own], 1, "+"),
                    _seeds([1e3 * row["token_strict_gap"]["mean"] for row in own], 1),
                    _seeds([row["inter_shap"] for row in own], 1),
                    f"{own[0]['published_inter_shap']}",
                    " / ".join(f"{value:.2f}" for value in routing),
                ]
            )
    columns = ["modalities", "data", "seeds", "accuracy, %", "SII of modalities", "strict gap", "SII of tokens x 1000"]
    columns += ["strict gap x 1000", "InterSHAP, %", "published", "routing: uniqueness of each, synergy, redundancy"]
    some = rows[0]
    note = (
        f"Mean ± spread over seeds, of {some['probed']} test samples each. A token is one of {some['groups']} groups "
        "of columns a modality; means over all cross-modal pairs. InterSHAP is the share of interactions, which are "
        "half of the SII, in the absolute values of a sample; the published figures are those of another network."
    )
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def digits() -> str:
    """Faithfulness and masking beside a dense Transformer."""
    found = read("digits")
    if found is None:
        return "not measured"
    head, rows = found
    table = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model in models:
        own = [row for row in rows if row["model"] == model]
        for method in own[0]["faithfulness"]:
            cells = [_seeds([100 * row["accuracy"] for row in own], 1)]
            for kind in ("comprehensiveness", "sufficiency"):
                for which in ("identified", "random", "gap"):
                    cells.append(_seeds([100 * row["faithfulness"][method][f"mean {kind} {which}"] for row in own], 1))
            table.append([model, method, *cells])
    columns = [
        "model",
        "importance",
        "accuracy, %",
        "comprehensiveness",
        "random",
        "gap",
        "sufficiency",
        "random",
        "gap",
    ]
    faithful = _markdown(columns, table)
    table = []
    for model in models:
        own = [row for row in rows if row["model"] == model]
        for ranking in own[0]["masking"]:
            parts = [row["masking"][ranking] for row in own]
            budgets = range(len(parts[0]["pairs"]))
            cells = [_seeds([100 * part["difference"][b] for part in parts], 1, "+") for b in budgets]
            table.append([model, ranking, *cells])
    columns = ["model", "pairs ranked by", *(f"{most} masked" for most in rows[0]["masking"]["SII"]["pairs"])]
    note = (
        f"Mean ± spread over {len({row['seed'] for row in rows})} seeds, {rows[0]['images']} held-out images each; "
        "AOPC over 5 to 25 % of the tokens, and the probability lost with the top pairs minus that with random tokens, "
        "in %."
    )
    return f"{faithful}\n\n{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def pipeline() -> str:
    """Times of a training step and of a sample's faithfulness."""
    found = read("pipeline")
    if found is None:
        return "not measured"
    head, rows = found
    table = []
    for row in rows:
        ratio = row.get("times_sequential") or row.get("times_loop")
        what = row["what"] + (f", dropout {row['dropout']}" if "dropout" in row else "")
        times = f"{ratio['median']:.1f}x" if ratio else ""
        table.append([row["shape"], what, row["candidate"], _range(row["ms"], 1), times])
    columns = ["shape", "", "", "ms", "times as fast"]
    return f"{_markdown(columns, table)}\n\n{_machine(head)} Medians and quartiles; one run, candidates in turns."


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _seeds(values: list[float], digits: int, sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{_mean(values):{sign}.{digits}f} ± {spread:.{digits}f}"


def adapt() -> str:
    """Other people's models on the engine against themselves."""
    found = read("adapt")
    if found is None:
        return "not measured"
    head, rows = found
    table = [
        [
            row["case"] + (f", {row['layers']} layers" if "layers" in row else ""),
            row["candidate"],
            _range(row["ms"], 2),
            f"{row['times_first']['median']:.1f}x",
            "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    columns = ["model", "", "ms", "speed", "difference"]
    note = (
        "Milliseconds per coalition, per call for the experts; medians and quartiles, speed against the first of each "
        "model. Difference: the largest between engine and model relative to the largest value, in float64 for whole "
        "models, in float32 against grouped_mm for the experts."
    )
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def gpu() -> str:
    """Milliseconds of an explanation on a GPU, per candidate."""
    found = read("gpu")
    if found is None:
        return "not measured"
    head, rows = found
    [machine] = [row for row in rows if "machine_rates" in row]
    table = [
        [
            row["shape"],
            row["candidate"],
            _range(row["ms_per_1000"], 2),
            f"{row['ms_per_explanation']['median']:,.0f}{' (scaled)' if row['scaled'] else ''}",
            f"{row['times_naive']['median']:,.0f}x",
            f"{row['times_pytorch_fp32']['median']:.1f}x",
            "" if row["noise_share"] is None else f"{row['noise_share']:.1e}",
            f"{row['share_of_matmul_rate']['median']:.0%}" if "share_of_matmul_rate" in row else "",
        ]
        for row in rows
        if "candidate" in row
    ]
    columns = ["shape", "", "ms per 1,000 coalitions", "ms per explanation", "against naive"]
    columns += ["against best fp32 PyTorch", "noise share", "of matmul rate"]
    product, copy = machine["matmul_flops"] / 1e12, machine["copy_bytes"] / 1e12
    note = (
        "An explanation is 10 x 10 pairs in 64 contexts (7,744 coalitions); (scaled) from a part of it. "
        f"Matrix products in fp16 run at {product:.0f} TFLOP/s there, copies at {copy:.1f} TB/s."
    )
    return f"{_markdown(columns, table)}\n\n{_machine(head)} {note}"


def peers() -> str:
    """nMSE at equal evaluations on several kinds of games, against shapiq's estimators."""
    found = read("peers")
    if found is None:
        return "not measured"
    head, rows = found
    rows = [row for row in rows if "estimator" in row]
    budgets = sorted({row["budget"] for row in rows})
    named: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        cell = f"{row['nmse']:.3g}" if "nmse" in row else f"refuses: {row['refuses']}"
        named.setdefault((row["kind"], row["estimator"]), {})[row["budget"]] = cell
    table = [[kind, name, *(by.get(b, "not measured") for b in budgets)] for (kind, name), by in sorted(named.items())]
    counts = sorted({f"{row['games']} x {row['seeds']}" for row in rows})
    columns = ["game", "estimator", *(f"{b:,}" for b in budgets)]
    return f"{_markdown(columns, table)}\n\n{_machine(head)} Mean over games x seeds: {', '.join(counts)}."


def intervals() -> str:
    """Coverage of the surrogate's 95 % intervals."""
    found = read("peers")
    rows = [row for row in found[1] if "coverage_budget" in row] if found is not None else []
    if not rows:
        return "not measured"

    def percent(row: dict, of: str) -> str:
        share = row.get(f"coverage_{of}")
        return "" if share is None else f"{100 * share:.1f} %"

    table = [
        [row["kind"], f"{row['coverage_budget']:,}", *(percent(row, of) for of in ("sii", "max", "strict"))]
        for row in rows
    ]
    note = f"{rows[0]['games']} games x {rows[0]['seeds']} seeds x 64 pairs."
    columns = ["game", "evaluations", "SII", "gap (max)", "gap (strict)"]
    return f"{_markdown(columns, table)}\n\n{_machine(found[0])} {note}"


TABLES = {
    "adapt": adapt,
    "gpu": gpu,
    "cpu": cpu,
    "accuracy": accuracy,
    "coverage": coverage,
    "memory": memory,
    "hdxor": hdxor,
    "digits": digits,
    "pipeline": pipeline,
    "peers": peers,
    "intervals": intervals,
}


def filled(text: str) -> str:
    """``text`` with every marked table generated anew."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Fill the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text()
        if not check:
            page.write_text(filled(text))
        elif filled(text) != text:
            sys.exit(f"{page.name}: a table differs from bench/results; run python -m bench.tables")


if __name__ == "__main__":
    main()
