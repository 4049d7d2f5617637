"""Losses of training: of the task, of every expert's interaction, and of the likeness of the experts' latents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flmoe_fast.checks import ArgumentError, finite, integer, one_of, shape
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.latents import linear_cka

REGULARIZERS = (None, "rep-cos", "rep-barlow", "rep-cka")


def task_loss(model: FLI2MoE, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy (with ``class_weights``, where configured), binary cross entropy or smooth L1 of (B, C)."""
    if model.config.task == "regression":
        return functional.smooth_l1_loss(logits, targets.to(logits.dtype).reshape(logits.shape))
    if model.config.task == "multilabel":
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    given = model.config.class_weights
    weights = None if given is None else torch.tensor(given, dtype=logits.dtype, device=logits.device)
    return functional.cross_entropy(logits, targets.long(), weight=weights)


def interaction_loss(interaction: int, anchor: Tensor, perturbed: Sequence[Tensor | None]) -> Tensor:
    """Interaction loss of one expert, a scalar.

    Parameters
    ----------
    interaction : int
        Below M uniqueness of that modality, M synergy and M + 1 redundancy.
    anchor : Tensor
        (B, D), representation of the true features.
    perturbed : Sequence[Tensor | None]
        M tensors (B, D), entry i with modality i replaced, ``None`` where it was not. The loss is 0 where nothing is
        left to compare.
    """
    count = len(perturbed)
    integer("interaction", interaction, least=0, most=count + 1)
    others = [point for i, point in enumerate(perturbed) if point is not None and i != interaction]
    own = perturbed[interaction] if interaction < count else None
    if not others or (interaction < count and own is None):
        return anchor.new_zeros(())
    if own is not None:
        return torch.stack([_triplet(anchor, near, own) for near in others]).mean()
    cosines = torch.stack([_cosine(anchor, other).mean() for other in others])
    return cosines.mean() if interaction == count else (1.0 - cosines).mean()


def regression_interaction(interaction: int, anchor: Tensor, perturbed: Sequence[Tensor | None]) -> Tensor:
    """Interaction loss on the outputs of a regression expert (I2MoE, ICML 2025).

    Mean squared change in place of distances. Synergy has the sign of redundancy, as in the published model.
    """
    count = len(perturbed)
    others = [point for i, point in enumerate(perturbed) if point is not None and i != interaction]
    own = perturbed[interaction] if interaction < count else None
    if not others or (interaction < count and own is None):
        return anchor.new_zeros(())
    change = torch.stack([functional.mse_loss(anchor, other) for other in others]).mean()
    return change if own is None else change - functional.mse_loss(anchor, own)


def _triplet(anchor: Tensor, near: Tensor, far: Tensor) -> Tensor:
    # The small shift keeps the gradient of the norm finite where both points coincide.
    to_near = (anchor - near + 1e-7).norm(dim=-1)
    to_far = (anchor - far + 1e-7).norm(dim=-1)
    return (to_near - to_far + 1.0).clamp(min=0.0).mean()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (functional.normalize(a, dim=-1, eps=1e-12) * functional.normalize(b, dim=-1, eps=1e-12)).sum(dim=-1)


def representation_penalty(regularizer: str | None, latents: Sequence[Tensor]) -> Tensor:
    """Similarity of the experts' latents, averaged over unordered expert pairs, a scalar.

    Parameters
    ----------
    regularizer : str, optional
        ``"rep-cos"``: mean squared cosine per sample. ``"rep-barlow"``: mean squared off-diagonal entry of the
        cross-correlation (D, D) over the batch. ``"rep-cka"``: linear centred kernel alignment. ``None``: 0.
    latents : sequence of Tensor
        E tensors (B, D).
    """
    one_of("regularizer", regularizer, REGULARIZERS)
    if regularizer is None or len(latents) < 2:
        return latents[0].new_zeros(())
    measure = {"rep-cos": _squared_cosine, "rep-barlow": _off_diagonal, "rep-cka": linear_cka}[regularizer]
    return torch.stack([measure(a, b) for a, b in itertools.combinations(latents, 2)]).mean()


def _squared_cosine(a: Tensor, b: Tensor) -> Tensor:
    return _cosine(a, b).square().mean()


def _off_diagonal(a: Tensor, b: Tensor) -> Tensor:
    a, b = ((z - z.mean(dim=0)) / (z.std(dim=0, correction=0) + 1e-5) for z in (a, b))
    correlation = a.T @ b / a.shape[0]
    diagonal = torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
    return correlation[~diagonal].square().mean()


def check_targets(model: FLI2MoE, targets: Tensor, count: int) -> None:
    if not isinstance(targets, Tensor):
        raise ArgumentError("targets", type(targets).__name__, "a torch.Tensor")
    classes = model.config.classes
    if model.config.task == "multilabel":
        shape("targets", targets, (count, classes), "(B, C)")
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise ArgumentError("targets", "values other than 0 and 1", "0 or 1 per label")
        return
    if model.config.task == "regression":
        if targets.numel() != count * classes or len(targets) != count:
            raise ArgumentError("targets", f"shape {tuple(targets.shape)}", f"(B, C) = ({count}, {classes})")
        finite("targets", targets)
        return
    shape("targets", targets, (count,), "(B,)")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ArgumentError("targets", targets.dtype, "integer classes")
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise ArgumentError("targets", f"classes {int(targets.min())} to {int(targets.max())}", f"0 to {classes - 1}")
