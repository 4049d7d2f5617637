"""Routing: how much a mixture listens to each expert, whether that follows the samples, and what each expert can alone.

Weights that are the same for all samples are an average, whatever they are called. Whether they follow something that
is known of the samples, such as their class or the kind of interaction that decides them, is how much of the weights'
variance lies between its values; chance alone puts some of it there, which shuffling shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas
import torch

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.model.metrics import right_predictions

#: How often samples are shuffled to see what chance does.
SHUFFLES = 200
MIXTURE = "mixture"
#: The mean of all experts' logits, as if there were no routing.
AVERAGE = "plain average"


def routing_table(
    weights: np.ndarray, expert_names: Sequence[str], kinds: Sequence[str] | None = None
) -> pandas.DataFrame:
    """Distribution of the routing weights, a row a kind of sample and expert.

    Parameters
    ----------
    weights : (N, E)
        Of N samples, each row summing to one.
    expert_names : sequence of E str
    kinds : sequence of N str, optional
        What is known of each sample; one kind, ``"all"``, without it.

    Returns
    -------
    DataFrame
        ``kind``, ``samples``, ``expert``, ``mean``, ``stderr`` (of the mean, over samples), ``standard deviation``,
        ``least``, ``lower quartile``, ``median``, ``upper quartile``, ``most`` and ``largest in %`` of samples.
    """
    weights, names, labels = _checked(weights, expert_names, kinds)
    rows = []
    for kind in dict.fromkeys(labels.tolist()):
        own = weights[labels == kind]
        spread = own.std(0, ddof=1) if len(own) > 1 else np.full(len(names), math.nan)
        quarters = np.percentile(own, [0, 25, 50, 75, 100], axis=0)
        first = np.bincount(own.argmax(1), minlength=len(names)) / len(own)
        for e, name in enumerate(names):
            row = {"kind": kind, "samples": len(own), "expert": name, "mean": own[:, e].mean()}
            row |= {"stderr": spread[e] / math.sqrt(len(own)), "standard deviation": spread[e]}
            levels = ("least", "lower quartile", "median", "upper quartile", "most")
            rows.append({**row, **dict(zip(levels, quarters[:, e])), "largest in %": 100 * first[e]})
    return pandas.DataFrame(rows)


def routing_follows(
    weights: np.ndarray, kinds: Sequence[str], *, shuffles: int = SHUFFLES, seed: int = 0
) -> dict[str, float]:
    """Whether routing weights follow the kinds of samples.

    Parameters
    ----------
    weights : (N, E)
    kinds : sequence of N str
        At least two different ones.
    shuffles : int
        Permutations of the kinds to compare with.
    seed : int

    Returns
    -------
    dict from str to float
        ``between``: the share of the weights' total variance that lies between the means of the kinds, from 0 to 1 (0
        where weights never vary). ``chance``: its mean over shuffled kinds. ``p``: the share of shuffles that reach it,
        counting the data itself, so that it is never 0. ``spread``: the standard deviation of weights over samples,
        root mean square over experts: following is little use where this is next to nothing.

    Raises
    ------
    ArgumentError
        A single kind, or as many kinds as samples.
    """
    names = [str(e) for e in range(np.asarray(weights).shape[-1])]
    weights, _, labels = _checked(weights, names, kinds)
    found, numbers = np.unique(labels, return_inverse=True)
    if not 2 <= len(found) < len(labels):
        raise ArgumentError("kinds", f"{len(found)} kinds of {len(labels)} samples", "two or more, some of them twice")
    centred = weights - weights.mean(0)
    total = float((centred**2).sum())
    counts = np.bincount(numbers)

    def between(order: np.ndarray) -> float:
        sums = np.stack([np.bincount(order, column) for column in centred.T], axis=1)
        return float((sums**2 / counts[:, None]).sum() / total) if total > 1e-20 * len(weights) else 0.0

    random = np.random.default_rng(integer("seed", seed, least=0))
    own = between(numbers)
    drawn = np.array([between(random.permutation(numbers)) for _ in range(integer("shuffles", shuffles, least=1))])
    return {
        "between": own,
        "chance": float(drawn.mean()),
        "p": float((1 + (drawn >= own).sum()) / (1 + len(drawn))),
        "spread": math.sqrt(total / weights.size),
    }


def experts_alone(
    expert_logits: np.ndarray,
    weights: np.ndarray,
    targets: np.ndarray,
    expert_names: Sequence[str],
    task: str = "multiclass",
) -> pandas.DataFrame:
    """Each expert alone against the mixture, and the mixture without each.

    Parameters
    ----------
    expert_logits : (N, E, C)
    weights : (N, E)
    targets : (N,) classes, (N, C) labels or numbers
    expert_names : sequence of E str
    task : "multiclass", "multilabel" or "regression"

    Returns
    -------
    DataFrame
        A row for the mixture, for the plain average of the experts' logits, and for every expert: ``model``,
        ``accuracy`` (as :func:`~flmoe_fast.model.metrics.score` has it), ``difference`` to the mixture's, ``stderr`` of
        the difference over samples (paired), and of experts ``without it``: the accuracy of the mixture of the others,
        with their weights scaled to sum to one; NaN where nothing is left.
    """
    weights, names, _ = _checked(weights, expert_names, None)
    logits, truth = np.asarray(expert_logits, float), torch.as_tensor(np.asarray(targets))
    if logits.ndim != 3 or logits.shape[:2] != weights.shape or len(truth) != len(logits):
        got = f"shape {logits.shape} for {len(truth)} targets"
        raise ArgumentError("expert_logits", got, f"(N, E, C), with (N, E) = {weights.shape}")

    def right(mixed: np.ndarray) -> np.ndarray:
        return right_predictions(torch.from_numpy(mixed), truth, task)

    def mixed(shares: np.ndarray) -> np.ndarray:
        return np.einsum("ne,nec->nc", shares, logits)

    base = right(mixed(weights))
    models = {MIXTURE: base, AVERAGE: right(logits.mean(1))}
    models |= {name: right(logits[:, e]) for e, name in enumerate(names)}
    rows = []
    for name, own in models.items():
        change = own - base
        error = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        row = {"model": name, "accuracy": own.mean(), "difference": change.mean(), "stderr": error}
        rows.append({**row, "without it": math.nan})
        if name in names:
            others = weights.copy()
            others[:, names.index(name)] = 0.0
            left = others.sum(1, keepdims=True)
            if len(names) > 1 and (left > 0).all():
                rows[-1]["without it"] = right(mixed(others / left)).mean()
    return pandas.DataFrame(rows)


def _checked(
    weights: np.ndarray, names: Sequence[str], kinds: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    values = np.asarray(weights, float)
    if values.ndim != 2 or values.shape[1] != len(names) or not len(values):
        raise ArgumentError("weights", f"shape {values.shape}", f"(N, E) = (any, {len(names)}), N >= 1")
    labels = np.array(["all"] * len(values) if kinds is None else [str(kind) for kind in kinds])
    if len(labels) != len(values):
        raise ArgumentError("kinds", f"{len(labels)} kinds", f"one for each of {len(values)} samples")
    return values, tuple(names), labels
