"""Scores of predictions: accuracy and F1, or errors of a regression."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import f1_score
from torch import Tensor


def predicted_labels(logits: Tensor, task: str) -> np.ndarray:
    """Classes (N,) of logits (N, C), or for ``"multilabel"`` zeros and ones (N, C) at a probability of one half."""
    return (logits >= 0).long().cpu().numpy() if task == "multilabel" else logits.argmax(-1).cpu().numpy()


def right_predictions(logits: Tensor, targets: Tensor, task: str) -> np.ndarray:
    """Whether each of N samples is predicted right, float64 (N,); their mean is the accuracy of :func:`score`."""
    if task == "regression":
        found, wanted = logits.double().cpu(), targets.double().cpu().reshape(logits.shape)
        return ((found >= 0) == (wanted >= 0)).double().mean(1).numpy()
    right = predicted_labels(logits, task) == targets.cpu().numpy()
    return (right.all(1) if right.ndim == 2 else right).astype(float)


def score(logits: Tensor, targets: Tensor, task: str) -> dict[str, float]:
    """Scores of predictions.

    Parameters
    ----------
    logits : Tensor
        (N, C).
    targets : Tensor
        (N,) classes, (N, C) zeros and ones for ``"multilabel"``, (N, C) or (N,) numbers for ``"regression"``.
    task : str
        ``"multiclass"``, ``"multilabel"`` or ``"regression"``.

    Returns
    -------
    dict from str to float
        ``accuracy`` (for ``"multilabel"`` the share of samples with every label right, for ``"regression"`` of outputs
        with the right sign), and ``micro_f1`` and ``macro_f1``, or ``mae`` for a regression.
    """
    accuracy = float(right_predictions(logits, targets, task).mean())
    if task == "regression":
        found, wanted = logits.double().cpu(), targets.double().cpu().reshape(logits.shape)
        return {"accuracy": accuracy, "mae": float((found - wanted).abs().mean())}
    labels, truth = predicted_labels(logits, task), targets.cpu().numpy()
    return {
        "accuracy": accuracy,
        "micro_f1": float(f1_score(truth, labels, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_score(truth, labels, average="macro", zero_division=0.0)),
    }
