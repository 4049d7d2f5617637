"""An explanation as text: aligned tables that say what every number is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from flmoe_fast.checks import integer
from flmoe_fast.pipeline.explain import Explanation
from flmoe_fast.probes.result import InteractionResult

WIDTH = 118
GAP_MEANING = {
    "max": "cost of losing both beyond losing the worse one",
    "sum": "minus the second difference",
    "strict": "positive only where each stands in for the other",
    "ratio": "share of the joint cost saved while one of the two remains",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 2) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        aligned = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append((" " * indent + "   ".join(aligned)).rstrip())
    return "\n".join(lines)


def facts(rows: Sequence[tuple[str, str]], indent: int = 2, name_width: int = 12) -> str:
    """A name and a sentence a row, long sentences wrapped."""
    lines = []
    for name, text in rows:
        start = " " * indent + name.ljust(name_width) + " "
        lines.append(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)))
    return "\n".join(lines)


def report(explanation: Explanation, k: int = 5) -> str:
    """What was explained and spent, the ``k`` most important tokens of each modality, and the ``k`` top pairs.

    Pairs are ranked for the mixture, for the synergy expert and for the redundancy expert, as far as they are heads of
    the game.
    """
    k = integer("k", k, least=1)
    result = explanation.interactions
    parts = [_facts(explanation), _importance(explanation, k)]
    known = result.heads or ()
    heads: list[str | None] = [head for head in ("mixture", "synergy", "redundancy") if head in known] or [None]
    parts += [_pairs(result, head, k) for head in heads]
    return "\n\n".join(parts)


def _facts(explanation: Explanation) -> str:
    game, result, prediction = explanation.game, explanation.interactions, explanation.prediction
    first = result.heads[0] if result.heads else "the model"
    target = prediction["target"]
    target = f"class {target}" if isinstance(target, int) else "classes " + ", ".join(map(str, target))
    kind = {"prob": "probability", "logit": "logit"}.get(result.about["value"], "value")
    contexts = np.unique(result.contexts)
    each = str(contexts[0]) if len(contexts) == 1 else f"{contexts[0]} to {contexts[-1]}"
    ways = {"grid": f"in {each} contexts", "process": "by a process", "enumeration": "by enumeration"}
    method = result.about.get("method", "grid")
    how = ways.get(method, f"in {each} contexts and by a process" if "grid" in method else "by a surrogate")
    noise = float(np.max(result.noise_share))
    counts = " (" + " + ".join(f"{len(players)} {name}" for name, players in game.groups) + ")" if game.groups else ""
    device, dtype = result.about.get("device", "cpu"), result.about.get("dtype", "the model's own dtype")
    noise_text = f"{noise:.1e} of the variance of the second differences (noise share, worst head)"
    rows = [
        (
            "value",
            f"{kind} of {target} ({first}): {prediction['full']:.4f} with all players, "
            f"{prediction['empty']:.4f} with none",
        ),
        (
            "players",
            f"{game.n} tokens{counts}, of which {sum(map(len, explanation.candidates))} are candidates",
        ),
        ("probe", f"{len(result.pairs)} pairs {how}; {len(result.heads or (first,))} heads from the same evaluations"),
        (
            "evaluations",
            f"{result.evaluations:,} of the model, and {result.check_evaluations:,} in float64 to measure rounding",
        ),
        ("rounding", noise_text if np.isfinite(noise) else "not measured: the evaluations are float64 already"),
        (
            "time",
            f"{explanation.seconds:.2f} s on {device} (backend {result.backend}, {dtype})",
        ),
    ]
    return facts(rows)


def _importance(explanation: Explanation, k: int) -> str:
    frame = explanation.importance_dataframe()
    columns = [name for name in frame.columns if name not in ("player", "name")]
    shares = frame[columns] / frame[columns].sum()
    rows = []
    for _, players in explanation.game.groups or (("players", tuple(range(explanation.game.n))),):
        for p in shares.loc[list(players), columns[0]].nlargest(k).index:
            rows.append([frame["name"][p], *(f"{100 * shares[name][p]:.1f} %" for name in columns)])
    title = f"Tokens, the {k} most important of each modality: share of all players' importance, by column"
    return f"{title}\n{table(['token', *columns], rows)}"


def _pairs(result: InteractionResult, head: str | None, k: int) -> str:
    synergy, redundancy = result.order("sii", head)[:k], result.order("gap", head)[:k]

    def names(pairs: np.ndarray) -> list[str]:
        return [" x ".join(result.player_names[p] for p in pair) for pair in result.pairs[pairs]]

    def numbers(of: str, pairs: np.ndarray) -> list[str]:
        return with_errors(result.column(of, head)[pairs], result.column(f"{of}_stderr", head)[pairs])

    ranks = [str(rank) for rank in range(1, len(synergy) + 1)]
    columns = [ranks, names(synergy), numbers("sii", synergy)]
    columns += [names(redundancy), numbers("gap", redundancy), numbers("sii", redundancy)]
    header = ["", "most synergistic", "SII ± s.e.", "most redundant", f"{result.gap_kind} gap ± s.e.", "its SII ± s.e."]
    who = f"{head} expert" if head in ("synergy", "redundancy") else head or "the model"
    return f"Pairs, {who} ({result.gap_kind} gap: {GAP_MEANING[result.gap_kind]})\n{table(header, list(zip(*columns)))}"


def with_errors(values: np.ndarray, errors: np.ndarray) -> list[str]:
    """``+0.123 ± 0.045``: each value to two significant digits of its standard error, between 3 and 7 decimals."""
    texts = []
    for value, error in zip(values, errors):
        known = np.isfinite(error) and error > 0
        decimals = int(np.clip(1 - np.floor(np.log10(error)), 3, 7)) if known else 4
        texts.append(f"{value:+.{decimals}f} ± {error:.{decimals}f}")
    return texts
