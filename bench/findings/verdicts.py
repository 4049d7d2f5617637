"""What becomes of each claim, decided by one rule from the committed rows.

A claim is about a difference that is measured once a seed. It holds where every seed agrees and the mean is at least
two standard errors away from zero; it does not hold here where the mean is not even one away, or on the other side;
between the two, or where only some of several measurements hold, it holds partly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from bench.cells import Table, over_seeds
from bench.findings.digits import APART, BASE, METHODS, NO_LOSS, PLAIN, VARIANTS
from bench.findings.shares import PLAIN as PLAIN_NETWORK
from bench.findings.shares import PUBLISHED
from bench.timing import read

HOLDS, PARTLY, NOT = "holds", "holds partly", "does not hold here"


def judged(differences: Sequence[float]) -> str:
    """The rule, for differences that are positive where the claim is right."""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    if min(differences) > 0 and mean >= 2 * error:
        return HOLDS
    return NOT if mean <= error else PARTLY


def together(verdicts: Sequence[str]) -> str:
    """One verdict of several measurements."""
    if all(one == HOLDS for one in verdicts):
        return HOLDS
    return NOT if all(one == NOT for one in verdicts) else PARTLY


def verdict_lines(rows: list[dict]) -> Table:
    """Every claim that rows are there for."""
    claims = (_concentrated, _specific, _pairs, _masking, _apart, _published, _planted, _regularised, _routed)
    lines = [line for claim in claims if (line := claim(rows))]
    return ["claim", "measured", "verdict"], lines, "The rule is in `bench/findings/verdicts.py`; spread over seeds."


def _digits(rows: list[dict], variant: str) -> dict[int, dict]:
    own = (row for row in rows if row["experiment"] == "digits")
    return {row["settings"]["seed"]: row for row in own if row["settings"]["variant"] == variant}


def _paired(rows: list[dict], first: str, second: str, value: Callable[[dict], float]) -> list[float]:
    """A value of one variant minus that of another, seed by seed."""
    one, two = _digits(rows, first), _digits(rows, second)
    return [value(one[seed]) - value(two[seed]) for seed in sorted(one.keys() & two.keys())]


def _concentrated(rows: list[dict]) -> list[str] | None:
    found = {m: _paired(rows, BASE, PLAIN, lambda row, m=m: row[m]["gini of mixture"][0]) for m in METHODS}
    if not all(found.values()):
        return None
    said = ", ".join(f"{over_seeds(values, 3, '+')} by {method}" for method, values in found.items())
    claim = "The mixture's importance is more concentrated than a dense Transformer's"
    return [claim, f"Gini {said}", together([judged(values) for values in found.values()])]


def _specific(rows: list[dict]) -> list[str] | None:
    name, said, verdicts = "rank correlation", [], []
    cases = [(PLAIN, ("attnXgrad",), "than heads"), (NO_LOSS, METHODS, "than without losses")]
    cases.append((APART, METHODS, "than separate models"))
    for other, methods, words in cases:
        for method in methods:
            less = _paired(rows, other, BASE, lambda row, m=method: row[m][name][0])
            if not less:
                return None
            said.append(f"{over_seeds(less, 2, '+')} {words} ({method})")
            verdicts.append(judged(less))
    return ["Experts' maps agree less", f"rank correlation lower by {', '.join(said)}", together(verdicts)]


def _pairs(rows: list[dict]) -> list[str] | None:
    more = _paired(rows, BASE, NO_LOSS, lambda row: row["pairs"]["specificity"][0])
    if not more:
        return None
    said = f"specificity {over_seeds(more, 2, '+')} against no interaction loss"
    return ["Experts rank different pairs, beyond the noise of the estimate", said, judged(more)]


def _masking(_: list[dict]) -> list[str] | None:
    found = read("digits")
    if not found:
        return None
    said, verdicts = [], []
    for ranking in ("SII", "strict gap"):
        own = [100 * r["masking"][ranking]["difference"][1] for r in found[1] if r["model"] == BASE]
        said.append(f"{over_seeds(own, 1, '+')} % by {ranking}")
        verdicts.append(judged(own))
    claim = "Masking top pairs hurts more than masking as many random tokens"
    return [claim, f"two pairs: {', '.join(said)}", together(verdicts)]


def _apart(_: list[dict]) -> list[str] | None:
    found = read("hdxor")
    if not found:
        return None
    said, verdicts = [], []
    for count in (2, 3):
        by_kind = {
            kind: [r for r in found[1] if (r["modalities"], r["setting"]) == (count, kind)]
            for kind in ("synergy", "redundancy")
        }
        for name, more, less in (
            ("modality_sii", "synergy", "redundancy"),
            ("modality_strict_gap", "redundancy", "synergy"),
        ):
            values = [a[name]["mean"] - b[name]["mean"] for a, b in zip(by_kind[more], by_kind[less])]
            short = "SII" if name == "modality_sii" else "strict gap"
            said.append(f"{short} {over_seeds(values, 2, '+')} ({count} modalities)")
            verdicts.append(judged(values))
    return ["Synergy and redundancy are told apart", f"of their own data more: {', '.join(said)}", together(verdicts)]


def _published(rows: list[dict]) -> list[str] | None:
    inside, total = 0, 0
    counts: set[str] = set()
    for (count, kind), (value, spread) in PUBLISHED.items():
        own = [r["global"] for r in rows if r["experiment"] == "shares" and _is(r, count, kind)]
        if len(own) > 1 and count < 4:
            total += 1
            counts.add(str(count))
            inside += abs(statistics.fmean(own) - value) <= 2 * math.hypot(spread, statistics.stdev(own))
    if not total:
        return None
    claim = "The published network, trained here, has the published InterSHAP"
    verdict = HOLDS if inside == total else PARTLY if inside else NOT
    return [
        claim,
        f"{inside} of {total} figures of {' and '.join(sorted(counts))} modalities within two spreads",
        verdict,
    ]


def _is(row: dict, count: int, kind: str) -> bool:
    about = row["settings"]
    return (about["model"], about["modalities"], about["setting"].rstrip("0")) == (PLAIN_NETWORK, count, kind)


def _planted(rows: list[dict]) -> list[str] | None:
    said, verdicts = [], []
    for rule, by in (("synergy", "sii"), ("redundancy", "gap")):
        own = [r for r in rows if r["experiment"] == "planted" and r["settings"]["rule"] == rule]
        if not own:
            return None
        firsts = [100 * row[f"first_by_{by}"] for row in own]
        said.append(f"{rule} {over_seeds(firsts, 0)} % by {'SII' if by == 'sii' else 'strict gap'}")
        sure = all(row["accuracy"] > 0.95 for row in own)
        enough = statistics.fmean(firsts) >= 80
        verdicts.append(HOLDS if sure and enough else PARTLY if enough or statistics.fmean(firsts) > 40 else NOT)
    return [
        "A planted pair of a word and a picture's part is ranked first in 80 % of samples",
        ", ".join(said),
        together(verdicts),
    ]


def _regularised(rows: list[dict]) -> list[str] | None:
    said, verdicts = [], []
    for name in (name for name in VARIANTS if name.startswith("rep-")):
        for gap in ("comprehensiveness", "sufficiency"):
            change = _paired(rows, name, BASE, lambda row, g=gap: 100 * row[g])
            if not change:
                return None
            said.append(f"{name} {over_seeds(change, 1, '+')} % {gap}")
            verdicts.append(judged(change))
    return ["Regularisers widen the faithfulness gaps", ", ".join(said), together(verdicts)]


def _routed(_: list[dict]) -> list[str] | None:
    found = read("hdxor")
    if not found:
        return None
    said, verdicts = [], []
    for kind, expert in (("synergy", "synergy"), ("redundancy", "redundancy"), ("uniqueness0", "uniqueness: m0")):
        values = []
        for seed in sorted({row["seed"] for row in found[1]}):
            own = [r["routing"][expert] for r in found[1] if (r["seed"], r["setting"]) == (seed, kind)]
            other = [r["routing"][expert] for r in found[1] if r["seed"] == seed and r["setting"] != kind]
            values.append(statistics.fmean(own) - statistics.fmean(other))
        said.append(f"{kind.rstrip('0')} {over_seeds(values, 2, '+')}")
        verdicts.append(judged(values))
    claim = "Routing gives more weight to the expert of the data's kind"
    return [claim, f"its weight on its own data minus on others': {', '.join(said)}", together(verdicts)]


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"findings_verdicts": ("findings", verdict_lines)}
