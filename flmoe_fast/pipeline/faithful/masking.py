"""Pair-level masking: does the model need the tokens of its top pairs more than other tokens?

The tokens of the first P pairs of a ranking are made absent, and, as a control, random tokens: as many of each modality
as the pairs have, drawn several times over from all players or, harder, from the tokens of the ranked pairs. The drop
is the value with all players present minus the value without those tokens. Matching the numbers of tokens matters: P
pairs may share tokens, and masking more tokens costs more whichever they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.games.game import Game, as_game
from flmoe_fast.games.rounding import steady_outputs
from flmoe_fast.model.metrics import score
from flmoe_fast.probes.pairs import Pairs, resolve_pairs

if TYPE_CHECKING:
    import pandas

DEFAULT_BUDGETS = (1, 2, 4, 8)
UNIVERSES = ("players", "candidates")


@dataclass(frozen=True)
class MaskedPairs:
    """What masking did to the value of one sample, for O heads (O = 1 without heads).

    Attributes
    ----------
    most : tuple of B ints
        Numbers of top pairs that were masked.
    heads : tuple of O str, or None
    tokens : int64 (B, M)
        Distinct tokens masked in each modality (a game without modalities counts as one).
    full : float64 (O,)
        Value with every player present.
    top : float64 (B, O)
        Value without the tokens of the top pairs.
    random : float64 (B, R, O)
        Value without random tokens, for R repeats.
    full_logits, top_logits, random_logits : float64 (K,), (B, K), (B, R, K), or None
        The model's logits in the same evaluations, where the game has a model.
    """

    most: tuple[int, ...]
    heads: tuple[str, ...] | None
    tokens: np.ndarray
    full: np.ndarray
    top: np.ndarray
    random: np.ndarray
    full_logits: np.ndarray | None = None
    top_logits: np.ndarray | None = None
    random_logits: np.ndarray | None = None

    @property
    def top_drop(self) -> np.ndarray:
        """(B, O): value lost with the tokens of the top pairs."""
        return self.full - self.top

    @property
    def random_drop(self) -> np.ndarray:
        """(B, R, O): value lost with random tokens."""
        return self.full - self.random


def mask_pairs(
    game: Game | Callable,
    pairs_ranked: Pairs,
    *,
    n: int | None = None,
    most: Sequence[int] = DEFAULT_BUDGETS,
    repeats: int = 10,
    seed: int = 0,
    universe: str = "players",
) -> MaskedPairs:
    """Mask the tokens of the first pairs of a ranking, and matched random tokens, of one sample.

    Everything is one batch of ``1 + B (1 + repeats)`` coalitions. The random tokens of a repeat are nested: those of a
    larger number of pairs include those of a smaller one, as the top pairs do.

    Parameters
    ----------
    game : Game or callable
    pairs_ranked : (P, 2) players
        Best first, such as ``result.pairs[result.order("sii")]``.
    n : int, optional
        Number of players, for a callable that has no ``n``.
    most : B numbers of pairs to mask
    repeats : int
        Random draws per number of pairs.
    seed : int
        Of the random draws.
    universe : "players" or "candidates"
        What the random tokens are drawn from: all players, or the players of the ranked pairs.

    Returns
    -------
    MaskedPairs

    Raises
    ------
    ArgumentError
        Pairs outside the game, more pairs asked for than ranked, or numbers below 1.
    """
    game = as_game(game, n)
    pairs = resolve_pairs(game, pairs_ranked)
    budgets = tuple(integer(f"most[{b}]", count, least=1) for b, count in enumerate(most))
    if not budgets:
        raise ArgumentError("most", "nothing", "at least one number of pairs")
    if max(budgets) > len(pairs):
        raise ArgumentError("most", max(budgets), f"at most {len(pairs)}, the number of ranked pairs")
    repeats = integer("repeats", repeats, least=1)
    generator = torch.Generator().manual_seed(integer("seed", seed, least=0, most=2**64 - 1))
    one_of("universe", universe, UNIVERSES)

    groups = [torch.tensor(players, dtype=torch.long) for _, players in game.groups or (("", tuple(range(game.n))),)]
    if universe == "candidates":
        groups = [group[torch.isin(group, pairs)] for group in groups]
    shuffled = [[group[torch.randperm(len(group), generator=generator)] for group in groups] for _ in range(repeats)]
    tokens = torch.zeros(len(budgets), len(groups), dtype=torch.long)
    present = torch.ones(1 + len(budgets) * (1 + repeats), game.n, dtype=torch.bool)
    row = 1
    for b, count in enumerate(budgets):
        masked = pairs[:count].unique()
        present[row, masked] = False
        tokens[b] = torch.tensor([int(torch.isin(masked, group).sum()) for group in groups])
        for r, order in enumerate(shuffled, start=1):
            for group, size in zip(order, tokens[b].tolist()):
                present[row + r, group[:size]] = False
        row += 1 + repeats
    values, logits = steady_outputs(game, present)
    values = values[:, None] if values.dim() == 1 else values
    shape_of = (len(budgets), 1 + repeats)
    by_budget = values[1:].unflatten(0, shape_of).numpy()
    classes = None if logits is None else logits[1:].unflatten(0, shape_of).numpy()
    return MaskedPairs(
        most=budgets,
        heads=game.heads,
        tokens=tokens.numpy(),
        full=values[0].numpy(),
        top=by_budget[:, 0],
        random=by_budget[:, 1:],
        full_logits=None if logits is None else logits[0].numpy(),
        top_logits=None if classes is None else classes[:, 0],
        random_logits=None if classes is None else classes[:, 1:],
    )


@dataclass(frozen=True)
class MaskingCurve:
    """Drops of one head over N samples, by number of masked pairs; all arrays float64 (B,) unless it says otherwise.

    Attributes
    ----------
    most : tuple of B ints
    samples : int
        N.
    tokens
        Tokens masked, on average.
    top, top_stderr
        Mean drop with the top pairs, and its standard error over samples.
    random, random_stderr
        Mean drop with random tokens (averaged over the repeats of a sample first), and its standard error.
    difference, difference_stderr
        Mean of top minus random within a sample, and its standard error: the paired comparison.
    share
        Share of samples in which the top pairs cost more than the random tokens do on average.
    """

    most: tuple[int, ...]
    samples: int
    tokens: np.ndarray
    top: np.ndarray
    top_stderr: np.ndarray
    random: np.ndarray
    random_stderr: np.ndarray
    difference: np.ndarray
    difference_stderr: np.ndarray
    share: np.ndarray

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per number of masked pairs."""
        import pandas

        names = ("tokens", "top", "top_stderr", "random", "random_stderr", "difference", "difference_stderr", "share")
        columns = {name: getattr(self, name) for name in names}
        return pandas.DataFrame({"pairs": self.most, "samples": self.samples, **columns})


def masking_curve(masked: Sequence[MaskedPairs], head: str | int | None = None) -> MaskingCurve:
    """Average over samples.

    Parameters
    ----------
    masked : N results of :func:`mask_pairs`
        At least two, all with the same ``most`` and heads.
    head : str or int, optional
        The first by default.

    Returns
    -------
    MaskingCurve

    Raises
    ------
    ArgumentError
        Fewer than two samples, samples that do not match, or an unknown head.
    """
    if len(masked) < 2:
        raise ArgumentError("masked", f"{len(masked)} samples", "at least two, for a standard error")
    first = masked[0]
    for i, sample in enumerate(masked):
        if (sample.most, sample.heads) != (first.most, first.heads):
            got = f"most {sample.most} and heads {sample.heads} in sample {i}"
            raise ArgumentError("masked", got, f"most {first.most} and heads {first.heads}, as in sample 0")
    column = _head(head, first)
    top = np.stack([sample.top_drop[:, column] for sample in masked])  # (N, B)
    random = np.stack([sample.random_drop[:, :, column].mean(1) for sample in masked])
    return MaskingCurve(
        first.most,
        len(masked),
        np.stack([sample.tokens.sum(1) for sample in masked]).mean(0),
        *_mean(top),
        *_mean(random),
        *_mean(top - random),
        (top > random).mean(0),
    )


def masking_scores(masked: Sequence[MaskedPairs], targets: torch.Tensor, task: str) -> pandas.DataFrame:
    """Accuracy and F1 of a model whose top pairs, or random tokens, are masked in every sample.

    Parameters
    ----------
    masked : N results of :func:`mask_pairs` for games of a model
    targets : Tensor (N,) or (N, C)
        True labels.
    task : "multiclass", "multilabel" or "regression"

    Returns
    -------
    pandas.DataFrame
        One row per number of masked pairs, 0 first: the scores of :func:`flmoe_fast.model.metrics.score` as
        ``<score>_top``, ``<score>_random`` and ``<score>_random_std``, the spread over the repeats.

    Raises
    ------
    ArgumentError
        Samples without logits, or not as many as targets.
    """
    import pandas

    if not masked or len(masked) != len(targets):
        raise ArgumentError("masked", f"{len(masked)} samples", f"{len(targets)}, one a target, and at least one")
    if any(sample.full_logits is None for sample in masked):
        raise ArgumentError("masked", "samples of games without a model", "samples of a TokenGame")

    def scores(name: str, *at: int) -> dict[str, float]:
        logits = [getattr(sample, f"{name}_logits")[at] for sample in masked]
        return score(torch.from_numpy(np.stack(logits)), targets, task)

    rows: list[dict[str, float]] = []
    whole = scores("full")
    start = {f"{name}_{kind}": value for name, value in whole.items() for kind in ("top", "random")}
    rows.append({"pairs": 0, **start, **{f"{name}_random_std": 0.0 for name in whole}})
    for b, count in enumerate(masked[0].most):
        row = {f"{name}_top": value for name, value in scores("top", b).items()}
        repeats = masked[0].random.shape[1]
        random = [scores("random", b, r) for r in range(repeats)]
        for name in whole:
            values = [one[name] for one in random]
            row[f"{name}_random"] = float(np.mean(values))
            row[f"{name}_random_std"] = float(np.std(values, ddof=1)) if repeats > 1 else 0.0
        rows.append({"pairs": count, **row})
    return pandas.DataFrame(rows)


def _head(head: str | int | None, sample: MaskedPairs) -> int:
    if isinstance(head, str):
        if sample.heads is None or head not in sample.heads:
            raise ArgumentError("head", repr(head), f"one of {sample.heads}" if sample.heads else "None, without heads")
        return sample.heads.index(head)
    return integer("head", 0 if head is None else head, least=0, most=len(sample.full) - 1)


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over samples (N, B) and its standard error, each (B,)."""
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))
