"""Whether a model says more about held-out samples than a guess that is the same for all of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn import functional

#: How sure a difference has to be.
LEVEL = 0.95


@dataclass(frozen=True)
class AgainstChance:
    """A model beside the best constant guess, which the training targets give.

    Attributes
    ----------
    samples : int
        Held-out samples of the comparison.
    accuracy, constant_accuracy : float
        Share of right predictions (of right labels, of right signs) of the model and of the guess.
    loss, constant_loss : float
        Mean cross entropy, binary cross entropy or squared error.
    better : bool
        Whether one of the two is surely better than the guess's: one-sided, paired over samples, at :data:`LEVEL`.
    """

    samples: int
    accuracy: float
    constant_accuracy: float
    loss: float
    constant_loss: float
    better: bool

    def to_dict(self) -> dict[str, float | int | bool]:
        """The numbers as JSON types."""
        return asdict(self)


def against_chance(logits: Tensor, targets: Tensor, seen: Tensor, task: str) -> AgainstChance:
    """Compare a model's predictions with the constant guess.

    Parameters
    ----------
    logits : Tensor (N, C)
        Of held-out samples.
    targets : Tensor
        Theirs: (N,) classes, (N, C) zeros and ones, or (N, C) numbers.
    seen : Tensor
        The targets that the model was trained on, from which the guess is made.
    task : "multiclass", "multilabel" or "regression"
    """
    logits = logits.double().cpu()
    targets, seen = targets.cpu(), seen.cpu()
    right, loss = _judged(logits, targets, task)
    constant_right, constant_loss = _judged(_guess(seen, task, logits.shape[1]).expand_as(logits), targets, task)
    better = _surely_positive(right - constant_right) or _surely_positive(constant_loss - loss)
    return AgainstChance(
        samples=len(logits),
        accuracy=float(right.mean()),
        constant_accuracy=float(constant_right.mean()),
        loss=float(loss.mean()),
        constant_loss=float(constant_loss.mean()),
        better=better,
    )


def chance_warning(found: AgainstChance | dict, part: str = "validation") -> str | None:
    """What to say about a model that is not surely better than the guess; None where it is."""
    found = found if isinstance(found, AgainstChance) else AgainstChance(**found)
    if found.better:
        return None
    return (
        f"on the {found.samples} samples of the {part} part the model is not surely better than the same guess for all "
        f"of them: accuracy {found.accuracy:.3f} against {found.constant_accuracy:.3f}, loss {found.loss:.3f} against "
        f"{found.constant_loss:.3f}; what it makes of its input may not be worth explaining"
    )


def _guess(seen: Tensor, task: str, count: int) -> Tensor:
    """Logits of the training shares, smoothed by one sample; for a regression the mean."""
    if task == "regression":
        return seen.double().reshape(len(seen), -1).mean(0)
    if task == "multilabel":
        share = (seen.double().sum(0) + 0.5) / (len(seen) + 1)
        return share.logit()
    counts = torch.bincount(seen.reshape(-1).long(), minlength=count).double()
    return ((counts + 1 / count) / (len(seen) + 1)).log()


def _judged(logits: Tensor, targets: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Whether each sample's prediction is right, and its loss, (N,) each."""
    if task == "regression":
        wanted = targets.double().reshape(logits.shape)
        return ((logits >= 0) == (wanted >= 0)).double().mean(1), (logits - wanted).square().mean(1)
    if task == "multilabel":
        wanted = targets.double()
        each = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return ((logits > 0) == wanted.bool()).double().mean(1), each.mean(1)
    wanted = targets.long()
    return (logits.argmax(1) == wanted).double(), functional.cross_entropy(logits, wanted, reduction="none")


def _surely_positive(gains: Tensor) -> bool:
    """Whether the mean of (N,) gains is above zero by Student's test; never for a single sample."""
    count = len(gains)
    if count < 2:
        return False
    error = float(gains.std()) / math.sqrt(count)
    return bool(gains.mean() > stdtrit(count - 1, LEVEL) * error)
