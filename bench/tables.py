"""Fill the tables of README.md and of the pages under docs from the files under bench/results.

    python -m bench.tables [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``--check`` changes nothing and fails if a table
is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from bench import peers_tables
from bench.timing import read

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("measured", "accuracy", "precision")))


def _machine(head: dict) -> str:
    machine = head["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"Measured on {where}, torch {machine['torch']}, {head['date']}."


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _range(values: dict, digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f}–{values['q3']:.{digits}f})"


TABLES: dict[str, Callable[[], str]] = {}


def results(name: str) -> Callable:
    """Make a function of a results file's rows, which returns the tables and a note, the table of its name, as text.

    Nothing is shown of a file that is not there, or where the function returns nothing.
    """

    def register(tables: Callable[[list[dict]], tuple[str, str] | None]) -> Callable[[], str]:
        def text() -> str:
            found = read(name)
            shown = found and tables(found[1])
            if not shown:
                return "not measured"
            return f"{shown[0]}\n\n{_machine(found[0])} {shown[1]}".rstrip()

        TABLES[tables.__name__] = text
        return text

    return register


for _name, (_results, _table) in peers_tables.TABLES.items():

    def _peers(rows: list[dict], table: Callable[[list[dict]], peers_tables.Table] = _table) -> tuple[str, str] | None:
        columns, lines, note = table(rows)
        return (_markdown(columns, lines), note) if lines else None

    _peers.__name__ = _name
    results(_results)(_peers)


@results("cpu-engine")
def cpu(rows: list[dict]) -> tuple[str, str]:
    """Speed on the CPU, and what rounding is worth, of every candidate."""
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
    return _markdown(columns, table), note


@results("cpu-noise")
def noise(rows: list[dict]) -> tuple[str, str]:
    """Rounding noise of every arithmetic of the CPU."""
    table = [[row["candidate"], f"{row['noise_share']:.1e}"] for row in rows]
    some = rows[0]
    note = (
        f"A model trained on {some['model']}, held-out accuracy {some['accuracy']:.1%}; {some['samples']} samples, "
        f"{some['contexts']} contexts each."
    )
    return _markdown(["arithmetic", "noise share"], table), note


@results("contexts")
def contexts(rows: list[dict]) -> tuple[str, str]:
    """Seconds to draw and pack context coalitions, C++ against NumPy."""
    table = [
        [
            row["mode"] + (", antithetic" if row["antithetic"] else ""),
            f"{row['contexts']:,}",
            _range(row["native_seconds"], 2),
            _range(row["numpy_seconds"], 2),
        ]
        for row in rows
    ]
    columns = ["mode", "contexts", "seconds, C++", "seconds, NumPy"]
    return _markdown(columns, table), f"{rows[0]['players']} players, one core; the same bits."


@results("memory")
def memory(rows: list[dict]) -> tuple[str, str]:
    """Peak memory of a long run."""
    [row] = rows
    columns = ["players", "evaluations", "peak memory", "seconds", "noise share"]
    cells = [
        str(row["players"]),
        f"{row['evaluations']:,}",
        f"{row['gb_peak']:.2f} GB",
        f"{row['seconds']:.0f}",
        f"{row['noise_share']:.1e}",
    ]
    return _markdown(columns, [cells]), ""


@results("hdxor")
def hdxor(rows: list[dict]) -> tuple[str, str]:
    """What the probes say about data whose interactions are known."""
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
    return _markdown(columns, table), note


@results("digits")
def digits(rows: list[dict]) -> tuple[str, str]:
    """Faithfulness and masking beside a dense Transformer."""
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
    return f"{faithful}\n\n{_markdown(columns, table)}", note


@results("pipeline")
def pipeline(rows: list[dict]) -> tuple[str, str]:
    """Times of a training step and of a sample's faithfulness."""
    table = []
    for row in rows:
        ratio = row.get("times_sequential") or row.get("times_loop")
        what = row["what"] + (f", dropout {row['dropout']}" if "dropout" in row else "")
        times = f"{ratio['median']:.1f}x" if ratio else ""
        table.append([row["shape"], what, row["candidate"], _range(row["ms"], 1), times])
    columns = ["shape", "", "", "ms", "times as fast"]
    return _markdown(columns, table), "Medians and quartiles; one run, candidates in turns."


def _times(ratio: dict) -> str:
    return f"{ratio['median']:.1f}x ({ratio['q1']:.1f}–{ratio['q3']:.1f})"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _seeds(values: list[float], digits: int, sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{_mean(values):{sign}.{digits}f} ± {spread:.{digits}f}"


@results("adapt")
def adapt(rows: list[dict]) -> tuple[str, str]:
    """Other people's models on the engine against themselves."""
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
    return _markdown(columns, table), note


@results("mixes")
def mixes(rows: list[dict]) -> tuple[str, str]:
    """Noise share by which activations have a second fp16 term, a column a model."""
    models = sorted({(-row["accuracy"], row["epochs"]) for row in rows})
    shares = {(row["mix"], row["epochs"]): row["noise_share"] for row in rows}
    names = sorted({row["mix"] for row in rows}, key=lambda name: shares[name, models[0][1]])
    table = [[name, *(f"{shares[name, epochs]:.1e}" for _, epochs in models)] for name in names]
    columns = ["activations in two float16 terms", *(f"model at {-100 * found:.1f} %" for found, _ in models)]
    note = f"{rows[0]['model']}; {rows[0]['samples']} samples, {rows[0]['contexts']} contexts each."
    return _markdown(columns, table), note


@results("gpu")
def gpu(rows: list[dict]) -> tuple[str, str]:
    """Milliseconds of an explanation on a GPU, per candidate."""
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
    return _markdown(columns, table), note


@results("explainers")
def explainers(rows: list[dict]) -> tuple[str, str]:
    """captum and shapiq with and without this package."""
    table = []
    for row in rows:
        what = row["explainer"]
        if "perturbations_per_eval" in row:
            what += f", {row['perturbations_per_eval']} perturbations a pass"
        table.append([what, "its function, batched", _times(row["times_faster"]), f"{row['largest_difference']:.0e}"])
        if "times_faster_on_engine" in row:
            apart = f"{row['largest_difference_on_engine']:.0e}"
            table.append([what, "its model, on the engine", _times(row["times_faster_on_engine"]), apart])
        else:
            table[-1][1] = "its game, on the engine"
    columns = ["explainer", "given to this package", "times as fast", "largest difference"]
    return _markdown(
        columns, table
    ), "Medians and quartiles of ratios; the same model, coalitions and seeds in one run."


def filled(text: str) -> str:
    """``text`` with every marked table generated anew."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def headline() -> str:
    """What a reader sees first: three ratios with their spread, each with the file that it is from."""
    rows = []
    head, found = read("cpu-engine") or ({}, [])
    fast = [row for row in found if row["shape"] == "mmimdb" and row["candidate"].startswith("native")]
    if fast:
        best = max(fast, key=lambda row: row["times_naive_per_pair_sample"]["median"])
        ratio = _times(best["times_naive_per_pair_sample"])
        rows.append(
            [ratio, "as fast as one coalition at a time, for a sample of every pair: FL-I2MoE, 516 tokens, CPU"]
        )
        rows[-1].append("cpu-engine")
    _, found = read("explainers") or ({}, [])
    drop = [row for row in found if row.get("perturbations_per_eval") == 32 and "times_faster_on_engine" in row]
    if drop:
        ratio = _times(drop[0]["times_faster_on_engine"])
        rows.append([ratio, "as fast as captum's Shapley values with batches of 32, the same numbers", "explainers"])
    _, found = read("adapt") or ({}, [])
    clip = [row for row in found if row["case"] == "clip" and row["candidate"] == "engine"]
    if clip:
        ratio = _times(clip[0]["times_first"])
        rows.append([ratio, "as fast as CLIP itself on a grid of words and patches, the same numbers", "adapt"])
    if not rows:
        return "not measured"
    table = [[f"**{ratio}**", what, f"[{name}](bench/results/{name}.jsonl)"] for ratio, what, name in rows]
    return f"{_markdown(['median (quartiles)', '', 'file'], table)}\n\n{_machine(head)}"


TABLES["headline"] = headline


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
