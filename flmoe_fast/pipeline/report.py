"""An explanation as text: aligned tables that say what every number is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flmoe_fast.checks import integer
from flmoe_fast.pipeline.explain import Explanation
from flmoe_fast.probes.result import InteractionResult

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


def report(explanation: Explanation, k: int = 5) -> str:
    """What was explained and spent, the ``k`` most important tokens of each modality, and the ``k`` top pairs.

    Pairs are ranked for the mixture, for the synergy expert and for the redundancy expert, as far as they are heads of
    the game.
    """
    k = integer("k", k, least=1)
    result = explanation.interactions
    parts = [_facts(explanation), _importance(explanation, k)]
    heads = [head for head in ("mixture", "synergy", "redundancy") if head in result.heads] or [result.heads[0]]
    parts += [_pairs(result, head, k) for head in heads]
    return "\n\n".join(parts)


def _facts(explanation: Explanation) -> str:
    game, result, prediction = explanation.game, explanation.interactions, explanation.prediction
    first = result.heads[0]
    target = prediction["target"]
    target = f"class {target}" if isinstance(target, int) else "classes " + ", ".join(map(str, target))
    kind = {"prob": "probability", "logit": "logit"}[game.value]
    contexts = np.unique(result.contexts)
    each = str(contexts[0]) if len(contexts) == 1 else f"{contexts[0]} to {contexts[-1]}"
    noise = float(np.max(result.noise_share))
    counts = " + ".join(f"{len(players)} {name}" for name, players in game.groups)
    rows = [
        ("value", f"{kind} of {target} ({first}): {prediction['full']:.4f} with all players, {prediction['empty']:.4f} with none"),
        ("players", f"{game.n} tokens ({counts}), of which {sum(map(len, explanation.candidates))} are candidates"),
        ("probe", f"{len(result.pairs)} pairs in {each} contexts, {len(result.heads)} heads from the same evaluations"),
        ("evaluations", f"{result.evaluations:,} of the model, and {result.check_evaluations:,} in float64 to measure rounding"),
        ("rounding", f"{noise:.1e} of the variance of the second differences (noise share, worst head)"
         if np.isfinite(noise) else "not measured: the evaluations are float64 already"),
        ("time", f"{explanation.seconds:.2f} s on {game.device} (backend {result.backend}, {result.about['dtype']})"),
    ]
    return "\n".join(f"  {name:<12} {text}" for name, text in rows)


def _importance(explanation: Explanation, k: int) -> str:
    frame = explanation.importance_dataframe()
    columns = [name for name in frame.columns if name not in ("player", "name")]
    shares = frame[columns] / frame[columns].sum()
    rows = []
    for _, players in explanation.game.groups:
        for p in shares.loc[list(players), "mixture"].nlargest(k).index:
            rows.append([frame["name"][p], *(f"{100 * shares[name][p]:.1f} %" for name in columns)])
    title = f"Most important tokens: share of all players' importance, in the mixture and in each expert ({k} per modality)"
    return f"{title}\n{table(['token', *columns], rows)}"


def _pairs(result: InteractionResult, head: str, k: int) -> str:
    sii, sii_error = result.column("sii", head), result.column("sii_stderr", head)
    gap, gap_error = result.column("gap", head), result.column("gap_stderr", head)

    def name(pair: int) -> str:
        return " x ".join(result.player_names[p] for p in result.pairs[pair])

    def number(value: float, error: float) -> str:
        return f"{value:+.4f} ± {error:.4f}"

    synergy, redundancy = result.order("sii", head)[:k], result.order("gap", head)[:k]
    rows = [
        [f"{rank}", name(a), number(sii[a], sii_error[a]), name(b), number(gap[b], gap_error[b]), number(sii[b], sii_error[b])]
        for rank, (a, b) in enumerate(zip(synergy, redundancy), start=1)
    ]
    header = ["", "most synergistic", "SII ± s.e.", "most redundant", f"{result.gap_kind} gap ± s.e.", "its SII ± s.e."]
    who = "mixture" if head == "mixture" else f"{head} expert" if head in ("synergy", "redundancy") else head
    return f"Pairs, {who} (gap: {GAP_MEANING[result.gap_kind]})\n{table(header, rows)}"
