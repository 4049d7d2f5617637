"""One training forward with interaction losses.

Each of the E = M + 2 experts sees the true features and then, for every modality, the features with that modality
replaced by Gaussian noise: (M + 1)(M + 2) passes per step. Uniqueness experts must notice the loss of their own
modality more than the loss of another, the synergy expert must notice every loss, the redundancy expert none.
The passes are defined one by one, and computed in one batch (:mod:`flmoe_fast.model.training.batched`) where that can
be.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.batched import batched_passes, can_batch
from flmoe_fast.model.training.latents import collect_latents, network_similarity
from flmoe_fast.model.training.losses import (
    REGULARIZERS,
    check_targets,
    interaction_loss,
    regression_interaction,
    representation_penalty,
    task_loss,
)

PASSES = ("auto", "batched", "sequential")

# Weights used where none is passed; rep-cka has no customary one.
_DEFAULT_WEIGHTS = {None: 0.0, "rep-cos": 3e-3, "rep-barlow": 10.0}


class TrainingOutput(NamedTuple):
    """Result of :func:`training_forward`; the losses are differentiable.

    Attributes
    ----------
    loss : Tensor
        Scalar, the task loss + interaction_weight * sum(interaction_losses) / (M + 2) + regularizer_weight *
        regularization + gate_weight * gate_loss.
    task_loss : Tensor
        Scalar, cross entropy, binary cross entropy or smooth L1 of the mixture's logits.
    interaction_losses : Tensor
        (E,), one per expert.
    logits : Tensor
        (B, C) of the mixture, on the true features.
    expert_logits : Tensor
        (B, E, C), on the true features.
    weights : Tensor
        (B, E), routing weights.
    regularization : Tensor
        Scalar, the unweighted regulariser, 0 without one.
    gate_loss : Tensor
        Scalar, load-balancing loss of the sparse feed-forward blocks, summed over layers and averaged over experts and
        passes; 0 without such blocks.
    """

    loss: Tensor
    task_loss: Tensor
    interaction_losses: Tensor
    logits: Tensor
    expert_logits: Tensor
    weights: Tensor
    regularization: Tensor
    gate_loss: Tensor


def training_forward(
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    targets: Tensor,
    *,
    generator: torch.Generator | None = None,
    regularizer: str | None = None,
    regularizer_weight: float | None = None,
    perturbed: Sequence[int] | None = None,
    replacements: Sequence[Tensor] | None = None,
    detach: bool = False,
    gate_gradient: bool = True,
    passes: str = "auto",
) -> TrainingOutput:
    """One training forward with all perturbed passes.

    Parameters
    ----------
    model : FLI2MoE
        In train mode for dropout; the mode is not changed.
    features : sequence of Tensor
        M encoded modalities (B, T_m, H).
    masks : sequence of Tensor, optional
        M masks (B, T_m) or ``None``. Replacements replace padded tokens too, which the masks then hide.
    targets : Tensor
        (B,) integer classes, (B, C) zeros and ones for ``"multilabel"``, or (B, C) numbers for ``"regression"`` ((B,)
        where C = 1).
    generator : torch.Generator, optional
        Source of the noise, on the model's device. Draws are made expert by expert and, within an expert, modality by
        modality, each for a whole (B, T_m, H) tensor.
    regularizer : str, optional
        ``None``, ``"rep-cos"``, ``"rep-barlow"`` or ``"rep-cka"``: a penalty on the similarity of the experts' latents,
        averaged over expert pairs. For a single sparse transformer rep-cka compares the latents of the networks of its
        feed-forward blocks.
    regularizer_weight : float, optional
        Its factor; default 3e-3 for rep-cos and 10 for rep-barlow, to be given for rep-cka.
    perturbed : sequence of int, optional
        Modalities that are replaced, in increasing order; ``None`` for all, nothing for a step without interaction
        losses. The uniqueness loss of a modality that is not replaced is 0.
    replacements : sequence of Tensor, optional
        M tensors (T_m, H) or (B, T_m, H) that stand for an absent modality, instead of Gaussian noise.
    detach : bool
        Whether the interaction losses see the representations without their gradient.
    gate_gradient : bool
        Whether the gate loss has a gradient. In the published mixtures it is a constant, so that gates are not
        balanced; there it has one only where a single transformer is trained.
    passes : str
        ``"sequential"``, ``"batched"`` or ``"auto"``, batched where possible. Both give the same losses for the same
        generator up to rounding, as long as there is no dropout and no noise in gates.

    Returns
    -------
    TrainingOutput
        :class:`TrainingOutput`.

    Raises
    ------
    ArgumentError
        As :meth:`FLI2MoE.forward`, and for targets of a wrong shape, type or range.

    Source: I2MoE, ICML 2025 (losses on logits), arXiv 2603.13326 (losses on latents, not detached).
    """
    model.check_inputs(features, masks)
    check_targets(model, targets, features[0].shape[0])
    regularizer_weight = regularizer_factor(regularizer, regularizer_weight)
    one_of("passes", passes, PASSES)
    if passes == "batched" and not can_batch(model):
        raise ArgumentError("passes", "'batched' for experts of another kind", "'auto' or 'sequential'")
    replaced = _perturbed(model, perturbed)
    absent = [_replacements(features, replaced, replacements, generator) for _ in model.interaction_experts]

    # A sparse transformer on its own has no other experts to differ from, but its networks have each other.
    alone = regularizer == "rep-cka" and len(model.interaction_experts) == 1 and model.config.gate is not None
    with collect_latents(model) if alone else contextlib.nullcontext() as networks:
        logits_by_pass, latents_by_pass, gate_loss = _run_passes(model, features, masks, absent, replaced, passes)

    of_losses = logits_by_pass if _losses_on_logits(model) else latents_by_pass
    measure = regression_interaction if model.config.task == "regression" else interaction_loss
    losses = []
    for interaction, own in zip(model.config.interactions, of_losses):
        points: list[Tensor | None] = [None] * len(features)
        for m, point in zip(replaced, own[1:]):
            points[m] = point.detach() if detach else point
        anchor = own[0].detach() if detach else own[0]
        losses.append(anchor.new_zeros(()) if interaction is None else measure(interaction, anchor, points))

    weights = model.reweight(features, masks)
    expert_logits = torch.stack([own[0] for own in logits_by_pass], dim=1)
    logits = (weights[:, :, None] * expert_logits).sum(dim=1)
    interaction_losses = torch.stack(losses)
    task = task_loss(model, logits, targets)
    if networks is not None:
        regularization = network_similarity(networks, features[0])
    else:
        regularization = representation_penalty(regularizer, [own[0] for own in latents_by_pass])
    # Divided by M + 2 however many experts there are, so that fewer experts weigh no more.
    differing = interaction_losses.sum() / (len(features) + 2)
    loss = task + model.config.interaction_weight * differing + regularizer_weight * regularization
    loss = loss + model.config.gate_weight * (gate_loss if gate_gradient else gate_loss.detach())
    return TrainingOutput(loss, task, interaction_losses, logits, expert_logits, weights, regularization, gate_loss)


def _run_passes(
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    absent: Sequence[Sequence[Tensor]],
    replaced: Sequence[int],
    passes: str,
) -> tuple[list, list, Tensor]:
    """Logits and latents, E lists of 1 + P tensors each, and the gate loss."""
    if passes != "sequential" and can_batch(model):
        logits, latents, losses = batched_passes(model, features, absent, replaced, masks)
        return [tuple(own) for own in logits], [tuple(own) for own in latents], losses.mean()
    runs: list[list[tuple[Tensor, Tensor]]] = []
    gate_losses = []
    for expert, own in zip(model.interaction_experts, absent):
        runs.append([])
        for inputs in (features, *(_with(features, m, x) for m, x in zip(replaced, own))):
            balance = [features[0].new_zeros(1)]
            runs[-1].append(expert(inputs, masks, balance=balance))
            gate_losses.append(torch.stack(balance).sum())
    by_part = [[[found[part] for found in run] for run in runs] for part in (0, 1)]
    return by_part[0], by_part[1], torch.stack(gate_losses).mean()


def _losses_on_logits(model: FLI2MoE) -> bool:
    return model.config.generation == "original" or model.config.task == "regression"


def _perturbed(model: FLI2MoE, perturbed: Sequence[int] | None) -> tuple[int, ...]:
    """The modalities to replace; none where no expert has an interaction loss."""
    count = len(model.config.modalities)
    if all(interaction is None for interaction in model.config.interactions):
        return ()
    if perturbed is None:
        return tuple(range(count))
    chosen = tuple(integer(f"perturbed[{i}]", m, least=0, most=count - 1) for i, m in enumerate(perturbed))
    if list(chosen) != sorted(set(chosen)):
        raise ArgumentError("perturbed", chosen, "distinct modalities in increasing order")
    return chosen


def _replacements(
    features: Sequence[Tensor],
    replaced: Sequence[int],
    given: Sequence[Tensor] | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    if given is not None:
        return [given[m].expand_as(features[m]) for m in replaced]
    return [
        torch.randn(features[m].shape, generator=generator, dtype=features[m].dtype, device=features[m].device)
        for m in replaced
    ]


def _with(features: Sequence[Tensor], m: int, replacement: Tensor) -> list[Tensor]:
    return [*features[:m], replacement, *features[m + 1 :]]


def regularizer_factor(regularizer: str | None, weight: float | None) -> float:
    one_of("regularizer", regularizer, REGULARIZERS)
    if weight is None:
        if regularizer not in _DEFAULT_WEIGHTS:
            raise ArgumentError("regularizer_weight", None, f"a number for {regularizer}, which has no default weight")
        return _DEFAULT_WEIGHTS[regularizer]
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not (0 <= weight < math.inf):
        raise ArgumentError("regularizer_weight", repr(weight), "a finite number >= 0")
    return float(weight)
