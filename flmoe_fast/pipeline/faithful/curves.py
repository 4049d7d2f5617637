"""Faithfulness of an importance map: what is lost without its most important tokens, and what they keep alone.

For every percentage K, the K % most important candidate tokens of each modality are replaced by their fill
(comprehensiveness: value lost), or all other candidates are (sufficiency: value lost with only these left). Both are
compared with as many random tokens. The area over the curve (AOPC) is the mean over all samples and percentages, or the
area under the curve of means divided by its width. A faithful map has a high comprehensiveness and a low sufficiency;
gaps are differences to random tokens, counted so that more is better. (arXiv 2603.13326, ERASER)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.files import replacing
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.games.rounding import steady_outputs
from flmoe_fast.model.metrics import score
from flmoe_fast.pipeline.importance.concentration import percentages, top_count

if TYPE_CHECKING:
    import pandas

DEFAULT_PERCENTS = (5.0, 10.0, 15.0, 20.0, 25.0)
AOPC_MODES = ("mean", "auc")
#: Columns of the tables of faithfulness, in order.
COLUMNS = (
    "K_percent",
    "orig_acc",
    "orig_micro_f1",
    "orig_macro_f1",
    "comprehensiveness_prob_mean_identified",
    "sufficiency_prob_mean_identified",
    "comprehensiveness_prob_mean_random",
    "sufficiency_prob_mean_random",
    "aopc_comprehensiveness_prob_identified",
    "aopc_sufficiency_prob_identified",
    "aopc_comprehensiveness_prob_random",
    "aopc_sufficiency_prob_random",
    "comprehensiveness_prob_gap",
    "sufficiency_prob_gap",
    "aopc_comprehensiveness_prob_gap",
    "aopc_sufficiency_prob_gap",
)


@dataclass(frozen=True)
class Faithfulness:
    """Drop curves of one sample, for K percentages, R random repeats, M modalities and O heads (O = 1 without heads).

    Attributes
    ----------
    percents : tuple of K floats
    heads : tuple of O str, or None
    tokens : int64 (K, M)
        Tokens selected in each modality.
    full : float64 (O,)
        Value with every player present.
    without, only : float64 (K, O)
        Value without the selected tokens, and with only them (other players absent).
    random_without, random_only : float64 (K, R, O)
        The same for random tokens, as many of each modality.
    logits : float64 (C,), or None
        The model's logits with every player present.
    """

    percents: tuple[float, ...]
    heads: tuple[str, ...] | None
    tokens: np.ndarray
    full: np.ndarray
    without: np.ndarray
    only: np.ndarray
    random_without: np.ndarray
    random_only: np.ndarray
    logits: np.ndarray | None = None

    @property
    def comprehensiveness(self) -> np.ndarray:
        """(K, O): value lost without the selected tokens."""
        return self.full - self.without

    @property
    def sufficiency(self) -> np.ndarray:
        """(K, O): value lost with only the selected tokens."""
        return self.full - self.only

    @property
    def random_comprehensiveness(self) -> np.ndarray:
        """(K, R, O)"""
        return self.full - self.random_without

    @property
    def random_sufficiency(self) -> np.ndarray:
        """(K, R, O)"""
        return self.full - self.random_only


def selected_tokens(importance: torch.Tensor, percent: float) -> torch.Tensor:
    """Numbers of the ``max(1, ceil(n percent / 100))`` largest of n importances; of equal ones the first."""
    return importance.argsort(descending=True, stable=True)[: top_count(len(importance), percent)]


def faithfulness(
    game: Game | Callable,
    importance: torch.Tensor | np.ndarray | Sequence[float],
    *,
    n: int | None = None,
    percents: Sequence[float] = DEFAULT_PERCENTS,
    repeats: int = 10,
    seed: int = 0,
) -> Faithfulness:
    """Drop curves of an importance map on one sample, in one batch of ``1 + 2 K (1 + repeats)`` coalitions.

    Parameters
    ----------
    game : Game or callable
        Its players are the candidate tokens, its target and fill are those of the measurement.
    importance : (n,) finite numbers
        One per player, such as ``found.mixture[game.tokens]`` for a map of :func:`token_importance`.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    percents : K numbers in (0, 100]
        Of the players of every modality, rounded up.
    repeats : int
        Random draws per percentage, without replacement; 0 for none.
    seed : int
        Of the random draws.

    Returns
    -------
    Faithfulness

    Raises
    ------
    ArgumentError
        Importances that do not match the players or are not finite, or percentages out of range.
    """
    game = as_game(game, n)
    scores = torch.as_tensor(importance, dtype=torch.float64).detach().cpu()
    shape("importance", scores, (game.n,), "(n,)")
    if not bool(torch.isfinite(scores).all()):
        raise ArgumentError("importance", "numbers that are not finite", "one finite number per player")
    shares = percentages("percents", percents)
    if not shares or list(shares) != sorted(set(shares)):
        raise ArgumentError("percents", tuple(percents), "distinct percentages in increasing order")
    repeats = integer("repeats", repeats, least=0)
    generator = torch.Generator().manual_seed(integer("seed", seed, least=0, most=2**64 - 1))
    groups = [torch.tensor(players, dtype=torch.long) for _, players in game.groups or (("", tuple(range(game.n))),)]

    chosen, tokens = [], torch.zeros(len(shares), len(groups), dtype=torch.long)
    for k, share in enumerate(shares):
        best = [group[selected_tokens(scores[group], share)] for group in groups]
        tokens[k] = torch.tensor([len(part) for part in best])
        chosen.append(torch.cat(best))
        for _ in range(repeats):
            drawn = [
                group[torch.randperm(len(group), generator=generator)[: len(own)]] for group, own in zip(groups, best)
            ]
            chosen.append(torch.cat(drawn))
    selected = torch.zeros(len(chosen), game.n, dtype=torch.bool)
    for row, players in zip(selected, chosen):
        row[players] = True
    values, logits = steady_outputs(game, torch.cat([torch.ones(1, game.n, dtype=torch.bool), ~selected, selected]))
    values = values[:, None] if values.dim() == 1 else values
    without, only = (part.unflatten(0, (len(shares), 1 + repeats)).numpy() for part in values[1:].split(len(chosen)))
    return Faithfulness(
        percents=shares,
        heads=game.heads,
        tokens=tokens.numpy(),
        full=values[0].numpy(),
        without=without[:, 0],
        only=only[:, 0],
        random_without=without[:, 1:],
        random_only=only[:, 1:],
        logits=None if logits is None else logits[0].numpy(),
    )


def aopc(percents: Sequence[float], values: np.ndarray, mode: str = "mean") -> float:
    """Aggregate drops (N, K) of N samples over K percentages.

    ``"mean"``: mean of all values. ``"auc"``: trapezoidal area under the means over samples, divided by the range of
    the percentages; with a single percentage its mean. NaNs are left out; NaN if nothing is left.
    """
    one_of("mode", mode, AOPC_MODES)
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).any():
        return float("nan")
    if mode == "mean":
        return float(np.nanmean(values))
    means = np.nanmean(values, axis=0)
    if len(means) == 1:
        return float(means[0])
    return float(np.trapezoid(means, percents) / (percents[-1] - percents[0]))


def faithfulness_table(
    samples: Sequence[Faithfulness],
    targets: torch.Tensor | None = None,
    task: str = "multiclass",
    *,
    head: str | int | None = None,
    mode: str = "mean",
) -> pandas.DataFrame:
    """Average the drop curves of N samples of one model.

    Parameters
    ----------
    samples : N results of :func:`faithfulness`
        All with the same percentages and heads.
    targets : Tensor (N,) or (N, C), optional
        True labels, for the scores of the unmasked model; without them, or without logits, those are NaN.
    task : "multiclass", "multilabel" or "regression"
    head : str or int, optional
        The first by default.
    mode : "mean" or "auc"
        See :func:`aopc`.

    Returns
    -------
    pandas.DataFrame
        One row per percentage with the columns :data:`COLUMNS`. Random drops are averaged over the repeats of a sample
        first. Comprehensiveness gaps are identified minus random, sufficiency gaps random minus identified.
    """
    import pandas

    column, percents = _common(samples, head)
    scores = dict.fromkeys(("accuracy", "micro_f1", "macro_f1"), float("nan"))
    logits = [sample.logits for sample in samples if sample.logits is not None]
    if targets is not None and len(logits) == len(samples):
        if len(targets) != len(samples):
            raise ArgumentError("targets", f"{len(targets)} targets", f"one for each of {len(samples)} samples")
        scores |= score(torch.from_numpy(np.stack(logits)), targets, task)
    found = {}
    for name in ("comprehensiveness", "sufficiency"):
        drops = np.stack([getattr(sample, name)[:, column] for sample in samples])  # (N, K)
        random = np.stack([_mean_repeats(getattr(sample, f"random_{name}")[:, :, column]) for sample in samples])
        found[name] = {"identified": drops, "random": random}
    table: dict[str, Any] = {
        "K_percent": percents,
        "orig_acc": scores["accuracy"],
        "orig_micro_f1": scores["micro_f1"],
        "orig_macro_f1": scores["macro_f1"],
    }
    for which in ("identified", "random"):
        for name, both in found.items():
            table[f"{name}_prob_mean_{which}"] = _nanmean(both[which])
            table[f"aopc_{name}_prob_{which}"] = aopc(percents, both[which], mode)
    for name, sign in (("comprehensiveness", 1.0), ("sufficiency", -1.0)):
        means = table[f"{name}_prob_mean_identified"] - table[f"{name}_prob_mean_random"]
        area = table[f"aopc_{name}_prob_identified"] - table[f"aopc_{name}_prob_random"]
        table[f"{name}_prob_gap"], table[f"aopc_{name}_prob_gap"] = sign * means, sign * area
    return pandas.DataFrame(table)[list(COLUMNS)]


def faithfulness_errors(samples: Sequence[Faithfulness], head: str | int | None = None) -> pandas.DataFrame:
    """Standard errors over samples of the mean drops in :func:`faithfulness_table`.

    Returns
    -------
    DataFrame
        ``K_percent`` and ``<comprehensiveness or sufficiency>_prob_stderr_<identified or random>``; NaN for one sample.
    """
    import pandas

    column, percents = _common(samples, head)
    table: dict[str, Any] = {"K_percent": percents}
    for name in ("comprehensiveness", "sufficiency"):
        drops = {
            "identified": [getattr(sample, name)[:, column] for sample in samples],
            "random": [_mean_repeats(getattr(sample, f"random_{name}")[:, :, column]) for sample in samples],
        }
        for which, own in drops.items():
            spread = np.std(own, axis=0, ddof=1) if len(samples) > 1 else np.full(len(percents), math.nan)
            table[f"{name}_prob_stderr_{which}"] = spread / math.sqrt(len(samples))
    return pandas.DataFrame(table)


def paired_gaps(samples: Sequence[Faithfulness], head: str | int | None = None) -> dict[str, tuple[float, float]]:
    """Mean AOPC gap of ``"comprehensiveness"`` and ``"sufficiency"``, and its standard error over samples.

    Within a sample, identified minus random (for sufficiency random minus identified), averaged over percentages.
    """
    column, _ = _common(samples, head)
    gaps = {}
    for name, sign in (("comprehensiveness", 1.0), ("sufficiency", -1.0)):
        own = np.array(
            [
                sign * (getattr(s, name)[:, column] - getattr(s, f"random_{name}")[:, :, column].mean(1)).mean()
                for s in samples
            ]
        )
        gaps[name] = (float(own.mean()), float(own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else math.nan)
    return gaps


def write_tables(
    tables: Sequence[pandas.DataFrame], folder: str | os.PathLike, name: str, *, suffix: str = ""
) -> tuple[Path, Path]:
    """Write the mean and the spread of several runs' tables, as the published evaluation does.

    ``<name>_imoe_masking_per_modality_mean_std_raw<suffix>.csv`` has ``<column>_mean`` and ``<column>_std`` (over runs,
    with R - 1 in the denominator; 0 for one run) of every column but the percentage; ``..._pretty<suffix>.csv`` has
    ``mean±std`` in per cent.

    Parameters
    ----------
    tables : R tables of :func:`faithfulness_table`, of the same percentages
    folder
        Made where it does not exist.
    name : str
        Of the data set.
    suffix : str
        Such as ``"_val"`` or ``"_test"``.

    Returns
    -------
    (Path, Path)
        The two files.
    """
    import pandas

    if not tables or any(list(t["K_percent"]) != list(tables[0]["K_percent"]) for t in tables):
        raise ArgumentError("tables", f"{len(tables)} tables", "at least one, all of the same percentages")
    columns = [column for column in COLUMNS if column != "K_percent"]
    stacked = np.stack([table[columns].to_numpy(float) for table in tables])  # (R, K, columns)
    mean = stacked.mean(0)
    std = stacked.std(0, ddof=1) if len(tables) > 1 else np.where(np.isnan(mean), 0.0, 0.0)
    percents = tables[0][["K_percent"]].reset_index(drop=True)
    raw = pandas.concat(
        [
            percents,
            pandas.DataFrame(mean, columns=[f"{column}_mean" for column in columns]),
            pandas.DataFrame(std, columns=[f"{column}_std" for column in columns]),
        ],
        axis=1,
    )
    texts = [[f"{100 * m:.2f}±{100 * s:.2f}" for m, s in zip(*row)] for row in zip(mean, std)]
    pretty = pandas.concat([percents, pandas.DataFrame(texts, columns=columns)], axis=1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def written(kind: str, table: pandas.DataFrame) -> Path:
        path = folder / f"{name}_imoe_masking_per_modality_mean_std_{kind}{suffix}.csv"
        with replacing(path, "w") as file:
            table.to_csv(file, index=False)
        return path

    return written("raw", raw), written("pretty", pretty)


def _common(samples: Sequence[Faithfulness], head: str | int | None) -> tuple[int, tuple[float, ...]]:
    """Column of the head and the percentages, which all samples must share."""
    if not samples:
        raise ArgumentError("samples", "nothing", "at least one sample")
    first = samples[0]
    for i, sample in enumerate(samples):
        if (sample.percents, sample.heads) != (first.percents, first.heads):
            got = f"percents {sample.percents} and heads {sample.heads} in sample {i}"
            raise ArgumentError("samples", got, f"percents {first.percents} and heads {first.heads}, as in sample 0")
    if isinstance(head, str):
        if first.heads is None or head not in first.heads:
            raise ArgumentError("head", repr(head), f"one of {first.heads}" if first.heads else "None, without heads")
        return first.heads.index(head), first.percents
    return integer("head", 0 if head is None else head, least=0, most=len(first.full) - 1), first.percents


def _mean_repeats(values: np.ndarray) -> np.ndarray:
    """(K, R) -> (K,), NaN without repeats."""
    return values.mean(1) if values.shape[1] else np.full(len(values), np.nan)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over samples (N, K) -> (K,) without NaNs; NaN where there is nothing else."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(0)
    count = known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
