"""Training with interaction losses, and batched prediction.

Each of the E = M + 2 experts sees the true features and then, for every modality, the features with that modality
replaced by Gaussian noise: (M + 1)(M + 2) passes per step. Uniqueness experts must notice the loss of their own
modality more than the loss of another, the synergy expert must notice every loss, the redundancy expert none.
The passes are defined one by one, and computed in one batch (:mod:`flmoe_fast.model.batched`) where that can be.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import numbers
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, finite, integer, one_of, shape
from flmoe_fast.files import replacing
from flmoe_fast.model.batched import batched_passes, can_batch
from flmoe_fast.model.metrics import score
from flmoe_fast.model.network import FLI2MoE, FLI2MoEOutput, eval_mode
from flmoe_fast.model.network_latents import collect_latents, linear_cka, network_similarity
from flmoe_fast.model.training_state import TrainingState

REGULARIZERS = (None, "rep-cos", "rep-barlow", "rep-cka")
PASSES = ("auto", "batched", "sequential")
#: What a training run may leave out or do otherwise, to see what it is worth.
ABLATIONS = (
    None,
    "no interaction loss",
    "less perturbed",
    "latent contrastive",
    "zero vector",
    "mean vector",
)
SELECTABLE = ("loss", "accuracy", "micro_f1", "macro_f1")

# Weights used where none is passed; rep-cka has no customary one.
_DEFAULT_WEIGHTS = {None: 0.0, "rep-cos": 3e-3, "rep-barlow": 10.0}
_BARLOW_WARM_UP = 4  # epochs of a linear rise from 0 to the full weight


class TrainingOutput(NamedTuple):
    """Result of :func:`training_forward`; the losses are differentiable.

    Attributes:
        loss: scalar, the task loss + interaction_weight * sum(interaction_losses) / (M + 2) + regularizer_weight *
            regularization + gate_weight * gate_loss.
        task_loss: scalar, cross entropy, binary cross entropy or smooth L1 of the mixture's logits.
        interaction_losses: (E,), one per expert.
        logits: (B, C) of the mixture, on the true features.
        expert_logits: (B, E, C), on the true features.
        weights: (B, E), routing weights.
        regularization: scalar, the unweighted regulariser, 0 without one.
        gate_loss: scalar, load-balancing loss of the sparse feed-forward blocks, summed over layers and averaged over
            experts and passes; 0 without such blocks.
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

    Args:
        model: in train mode for dropout; the mode is not changed.
        features: M encoded modalities (B, T_m, H).
        masks: M masks (B, T_m) or ``None``. Replacements replace padded tokens too, which the masks then hide.
        targets: (B,) integer classes, (B, C) zeros and ones for ``"multilabel"``, or (B, C) numbers for
            ``"regression"`` ((B,) where C = 1).
        generator: source of the noise, on the model's device. Draws are made expert by expert and, within an
            expert, modality by modality, each for a whole (B, T_m, H) tensor.
        regularizer: ``None``, ``"rep-cos"``, ``"rep-barlow"`` or ``"rep-cka"``: a penalty on the similarity of the
            experts' latents, averaged over expert pairs. For a single sparse transformer rep-cka compares the latents
            of the networks of its feed-forward blocks.
        regularizer_weight: its factor; default 3e-3 for rep-cos and 10 for rep-barlow, to be given for rep-cka.
        perturbed: modalities that are replaced, in increasing order; ``None`` for all, nothing for a step without
            interaction losses. The uniqueness loss of a modality that is not replaced is 0.
        replacements: M tensors (T_m, H) or (B, T_m, H) that stand for an absent modality, instead of Gaussian noise.
        detach: whether the interaction losses see the representations without their gradient.
        gate_gradient: whether the gate loss has a gradient. In the published mixtures it is a constant, so that gates
            are not balanced; there it has one only where a single transformer is trained.
        passes: ``"sequential"``, ``"batched"`` or ``"auto"``, batched where possible. Both give the same losses for the
            same generator up to rounding, as long as there is no dropout and no noise in gates.

    Returns:
        :class:`TrainingOutput`.

    Raises:
        ArgumentError: as :meth:`FLI2MoE.forward`, and for targets of a wrong shape, type or range.

    Source: I2MoE, ICML 2025 (losses on logits), arXiv 2603.13326 (losses on latents, not detached).
    """
    model.check_inputs(features, masks)
    _check_targets(model, targets, features[0].shape[0])
    regularizer_weight = _regularizer_weight(regularizer, regularizer_weight)
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
    measure = _regression_interaction if model.config.task == "regression" else interaction_loss
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
    if alone:
        regularization = network_similarity(networks, features[0])
    else:
        regularization = representation_penalty(regularizer, [own[0] for own in latents_by_pass])
    # Divided by M + 2 however many experts there are, so that fewer experts weigh no more.
    interaction = interaction_losses.sum() / (len(features) + 2)
    loss = task + model.config.interaction_weight * interaction + regularizer_weight * regularization
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
        logits, latents, balance = batched_passes(model, features, absent, replaced, masks)
        return [tuple(own) for own in logits], [tuple(own) for own in latents], balance.mean()
    runs, losses = [], []
    for expert, own in zip(model.interaction_experts, absent):
        runs.append([])
        for inputs in (features, *(_with(features, m, x) for m, x in zip(replaced, own))):
            balance = [features[0].new_zeros(1)]
            runs[-1].append(expert(inputs, masks, balance=balance))
            losses.append(torch.stack(balance).sum())
    logits, latents = ([[found[part] for found in run] for run in runs] for part in (0, 1))
    return logits, latents, torch.stack(losses).mean()


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


def task_loss(model: FLI2MoE, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy (with ``class_weights``, where configured), binary cross entropy or smooth L1 of (B, C)."""
    if model.config.task == "regression":
        return functional.smooth_l1_loss(logits, targets.to(logits.dtype).reshape(logits.shape))
    if model.config.task == "multilabel":
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    weights = model.config.class_weights
    weights = None if weights is None else torch.tensor(weights, dtype=logits.dtype, device=logits.device)
    return functional.cross_entropy(logits, targets.long(), weight=weights)


def interaction_loss(interaction: int, anchor: Tensor, perturbed: Sequence[Tensor | None]) -> Tensor:
    """Interaction loss of one expert, a scalar.

    Args:
        interaction: below M uniqueness of that modality, M synergy and M + 1 redundancy.
        anchor: (B, D), representation of the true features.
        perturbed: M tensors (B, D), entry i with modality i replaced, ``None`` where it was not. The loss is 0 where
            nothing is left to compare.
    """
    count = len(perturbed)
    integer("interaction", interaction, least=0, most=count + 1)
    others = [point for i, point in enumerate(perturbed) if point is not None and i != interaction]
    if not others or (interaction < count and perturbed[interaction] is None):
        return anchor.new_zeros(())
    if interaction < count:
        return torch.stack([_triplet(anchor, near, perturbed[interaction]) for near in others]).mean()
    cosines = torch.stack([_cosine(anchor, other).mean() for other in others])
    return cosines.mean() if interaction == count else (1.0 - cosines).mean()


def _regression_interaction(interaction: int, anchor: Tensor, perturbed: Sequence[Tensor | None]) -> Tensor:
    """Interaction loss on the outputs of a regression expert (I2MoE, ICML 2025).

    Mean squared change in place of distances. Synergy has the sign of redundancy, as in the published model.
    """
    count = len(perturbed)
    others = [point for i, point in enumerate(perturbed) if point is not None and i != interaction]
    if not others or (interaction < count and perturbed[interaction] is None):
        return anchor.new_zeros(())
    change = torch.stack([functional.mse_loss(anchor, other) for other in others]).mean()
    return change - functional.mse_loss(anchor, perturbed[interaction]) if interaction < count else change


def _triplet(anchor: Tensor, near: Tensor, far: Tensor) -> Tensor:
    # The small shift keeps the gradient of the norm finite where both points coincide.
    to_near = (anchor - near + 1e-7).norm(dim=-1)
    to_far = (anchor - far + 1e-7).norm(dim=-1)
    return (to_near - to_far + 1.0).clamp(min=0.0).mean()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (functional.normalize(a, dim=-1, eps=1e-12) * functional.normalize(b, dim=-1, eps=1e-12)).sum(dim=-1)


def representation_penalty(regularizer: str | None, latents: Sequence[Tensor]) -> Tensor:
    """Similarity of the experts' latents, averaged over unordered expert pairs, a scalar.

    Args:
        regularizer: ``"rep-cos"``: mean squared cosine per sample. ``"rep-barlow"``: mean squared off-diagonal entry
            of the cross-correlation (D, D) over the batch. ``"rep-cka"``: linear centred kernel alignment. ``None``: 0.
        latents: E tensors (B, D).
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


@dataclasses.dataclass(frozen=True)
class Held:
    """Held-out data that a training run is judged by: inputs, masks and targets as for :func:`fit`."""

    inputs: Sequence | Mapping
    masks: Sequence | Mapping | None
    targets: Tensor


def fit(
    model: FLI2MoE,
    inputs: Sequence[Tensor] | Mapping[str, Tensor],
    masks: Sequence[Tensor] | Mapping[str, Tensor] | None,
    targets: Tensor,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float = 1e-4,
    seed: int = 0,
    regularizer: str | None = None,
    regularizer_weight: float | None = None,
    ablation: str | None = None,
    gate_gradient: bool = True,
    passes: str = "auto",
    validation: Held | None = None,
    select: str | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_steps: int | None = None,
    log: str | os.PathLike | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train with Adam on shuffled batches; encoders with trainable parameters are trained too.

    Args:
        model: trained in place and left in eval mode.
        inputs: per modality N samples, in order or by name: the encoders' inputs where the model has encoders,
            otherwise features (N, T_m, H). A tensor, or anything with a length that gives a tensor of rows for a
            tensor of row numbers, such as cached features on the disk. Batches are moved to the model's device.
        masks: M masks (N, T_m) or ``None``.
        targets: (N,) integer classes, (N, C) zeros and ones for ``"multilabel"``, or (N, C) numbers for
            ``"regression"``.
        epochs: passes over the data.
        batch_size: samples per step; the last batch of an epoch may be smaller.
        lr: learning rate of Adam.
        seed: fixes shuffling, noise and dropout; the global random state is left as it was.
        regularizer: see :func:`training_forward`. The weight of rep-barlow rises linearly over the first 5 epochs,
            from 0.
        regularizer_weight: see :func:`training_forward`.
        ablation: ``"no interaction loss"`` (one pass a step, as for an interaction weight of 0), ``"less perturbed"``
            (two modalities, drawn anew for every step, are replaced), ``"latent contrastive"`` (interaction losses
            without a gradient), ``"zero vector"`` or ``"mean vector"`` (what replaces a modality instead of noise; the
            mean is a running one over the steps so far). Other ablations are configurations: ``roles``, ``routing``.
        gate_gradient, passes: see :func:`training_forward`.
        validation: judged after every epoch, in eval mode; adds ``validation`` to the records.
        select: a number of the validation (``"loss"``, ``"accuracy"``, ``"micro_f1"``, ``"macro_f1"``): the model ends
            with the weights of the best epoch instead of the last.
        checkpoint: file with everything needed to go on. It is written after every epoch, and where it exists the run
            continues from it and ends with the numbers of an unbroken run.
        checkpoint_steps: also write it after this many steps within an epoch.
        log: ``.jsonl`` or ``.csv`` file with one record per epoch so far, rewritten after every epoch.
        progress: show a progress bar over the epochs.

    Returns:
        One dict per epoch: ``epoch`` (from 0), ``loss``, ``task_loss``, ``interaction_losses`` (list of E),
        ``regularization``, ``gate_loss``, ``accuracy`` (share of correct training predictions, for ``"multilabel"`` of
        correct labels, for ``"regression"`` of correct signs, in train mode), each the mean over samples,
        ``seconds``, and ``validation``, a dict of its numbers, where there is one.

    Raises:
        ArgumentError: inputs that do not match the model, the masks or the targets, or a checkpoint of another run.
        FloatingPointError: the loss of an epoch is not finite.
    """
    epochs, batch_size = integer("epochs", epochs, least=1), integer("batch_size", batch_size, least=1)
    seed = integer("seed", seed, least=0)
    if isinstance(lr, bool) or not isinstance(lr, numbers.Real) or not (0 < lr < math.inf):
        raise ArgumentError("lr", repr(lr), "a finite number > 0")
    weight = _regularizer_weight(regularizer, regularizer_weight)
    one_of("ablation", ablation, ABLATIONS)
    one_of("passes", passes, PASSES)
    if checkpoint_steps is not None:
        integer("checkpoint_steps", checkpoint_steps, least=1)
    if select is not None:
        one_of("select", select, SELECTABLE)
        if validation is None:
            raise ArgumentError("validation", None, f"held-out data to select by {select}")
    if log is not None and Path(log).suffix not in (".jsonl", ".csv"):
        raise ArgumentError("log", str(log), "a name ending in .jsonl or .csv")
    inputs, masks, count = _dataset(model, inputs, masks)
    _check_targets(model, targets, count)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ArgumentError("model", "a model without trainable parameters", "parameters with requires_grad")
    device = parameters[0].device
    run = TrainingState(
        model,
        torch.optim.Adam(parameters, lr=lr),
        device,
        seed,
        {
            "config": model.config.to_dict(),
            "samples": count,
            "batch_size": batch_size,
            "lr": float(lr),
            "seed": seed,
            "regularizer": regularizer,
            "regularizer_weight": weight,
            "ablation": ablation,
            "gate_gradient": bool(gate_gradient),
            "select": select,
        },
    )
    with _seeded(seed, device):
        if checkpoint is not None and Path(checkpoint).exists():
            run.load(checkpoint)
        bar = tqdm(total=epochs, initial=min(run.epoch, epochs), desc="training", unit="epoch", disable=not progress)
        with bar:
            while run.epoch < epochs:
                begin = time.perf_counter()
                warm = min(1.0, run.epoch / _BARLOW_WARM_UP) if regularizer == "rep-barlow" else 1.0
                model.train()
                for index in run.batches(count, batch_size):
                    features, batch_masks = _batch(model, inputs, masks, index, device)
                    wanted = targets[index.to(targets.device)].to(device)
                    out = training_forward(
                        model,
                        features,
                        batch_masks,
                        wanted,
                        generator=run.noise,
                        regularizer=regularizer,
                        regularizer_weight=warm * weight,
                        gate_gradient=gate_gradient,
                        passes=passes,
                        **_ablated(ablation, model, features, run),
                    )
                    run.optimizer.zero_grad(set_to_none=True)
                    out.loss.backward()
                    run.optimizer.step()
                    right = _share_right(model, out.logits, wanted)
                    scalars = [out.loss, out.task_loss, out.regularization, out.gate_loss, right]
                    scalars += out.interaction_losses
                    run.count(torch.stack(scalars).detach().double() * len(index))
                    if checkpoint is not None and checkpoint_steps and run.step % checkpoint_steps == 0:
                        run.seconds += time.perf_counter() - begin
                        run.save(checkpoint)
                        begin = time.perf_counter()
                loss, task, regularization, gate, accuracy, *interaction = (run.sums / count).tolist()
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss became {loss} in epoch {run.epoch}; a smaller lr may help"
                    )
                run.seconds += time.perf_counter() - begin
                record = {
                    "epoch": run.epoch,
                    "loss": loss,
                    "task_loss": task,
                    "interaction_losses": interaction,
                    "regularization": regularization,
                    "gate_loss": gate,
                    "accuracy": accuracy,
                    "seconds": run.seconds,
                }
                if validation is not None:
                    record["validation"] = evaluate(model, validation, batch_size=max(batch_size, 64))
                run.finish_epoch(record, select)
                if checkpoint is not None:
                    run.save(checkpoint)
                if log is not None:
                    write_log(log, run.history, model.config.expert_names)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.4f}")
    if select is not None:
        run.restore_best()
    model.eval()
    return run.history


def _ablated(ablation: str | None, model: FLI2MoE, features: Sequence[Tensor], run: TrainingState) -> dict[str, Any]:
    """What an ablation changes in one step."""
    count = len(features)
    if ablation == "no interaction loss" or model.config.interaction_weight == 0:
        return {"perturbed": ()}
    if ablation == "less perturbed":
        return {"perturbed": sorted(torch.randperm(count, generator=run.choice)[:2].tolist())}
    if ablation == "latent contrastive":
        return {"detach": True}
    if ablation == "zero vector":
        return {"replacements": [torch.zeros_like(feature[0]) for feature in features]}
    if ablation == "mean vector":
        return {"replacements": run.running_means(features)}
    return {}


def evaluate(model: FLI2MoE, held: Held, batch_size: int = 256) -> dict[str, float]:
    """Task loss and scores of a model on held-out data, in eval mode; see :func:`flmoe_fast.model.metrics.score`."""
    found = predict(model, held.inputs, held.masks, batch_size)
    targets = held.targets.to(found.logits.device)
    _check_targets(model, targets, len(found.logits))
    loss = float(task_loss(model, found.logits.double(), targets))
    return {"loss": loss, **score(found.logits, targets, model.config.task)}


def write_log(path: str | os.PathLike, history: Sequence[Mapping[str, Any]], expert_names: Sequence[str]) -> None:
    """Write training records, one line an epoch: JSON, or a flat table for a name ending in ``.csv``."""
    with replacing(path, "w") as file:
        if Path(path).suffix == ".jsonl":
            file.writelines(json.dumps(record) + "\n" for record in history)
            return
        rows = []
        for record in history:
            flat = {key: value for key, value in record.items() if not isinstance(value, (list, dict))}
            named = zip(expert_names, record["interaction_losses"])
            flat |= {f"interaction_loss {name}": value for name, value in named}
            flat |= {f"validation {name}": value for name, value in record.get("validation", {}).items()}
            rows.append(flat)
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def predict(
    model: FLI2MoE,
    inputs: Sequence[Tensor] | Mapping[str, Tensor],
    masks: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
) -> FLI2MoEOutput:
    """Run the model over N samples in batches, in eval mode and without gradients.

    Args:
        model: its modules' train/eval modes are restored afterwards.
        inputs: per modality N samples, as for :func:`fit`.
        masks: M masks (N, T_m) or ``None``.
        batch_size: samples per forward; it has no influence on the result, since padding is not cut and samples do
            not compete for the capacity of sparse blocks.

    Returns:
        :class:`FLI2MoEOutput` over all N samples, on the model's device.

    Raises:
        ArgumentError: inputs that do not match the model or the masks.
    """
    batch_size = integer("batch_size", batch_size, least=1)
    inputs, masks, count = _dataset(model, inputs, masks)
    device = next(model.parameters()).device
    with torch.no_grad(), eval_mode(model):
        batches = (_batch(model, inputs, masks, index, device) for index in torch.arange(count).split(batch_size))
        outputs = [model(features, batch_masks, passes=len(features[0])) for features, batch_masks in batches]
    return FLI2MoEOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def _regularizer_weight(regularizer: str | None, weight: float | None) -> float:
    one_of("regularizer", regularizer, REGULARIZERS)
    if weight is None:
        if regularizer not in _DEFAULT_WEIGHTS:
            raise ArgumentError("regularizer_weight", None, f"a number for {regularizer}, which has no default weight")
        return _DEFAULT_WEIGHTS[regularizer]
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not (0 <= weight < math.inf):
        raise ArgumentError("regularizer_weight", repr(weight), "a finite number >= 0")
    return float(weight)


def _check_targets(model: FLI2MoE, targets: Tensor, count: int) -> None:
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


def _dataset(
    model: FLI2MoE,
    inputs: Sequence[Tensor] | Mapping[str, Tensor],
    masks: Sequence[Tensor] | Mapping[str, Tensor] | None,
) -> tuple[list[Tensor], list[Tensor] | None, int]:
    inputs = _per_modality(model, "inputs", inputs)
    masks = None if masks is None else _per_modality(model, "masks", masks)
    count = len(inputs[0])
    for name, tensors in (("inputs", inputs), ("masks", masks or [])):
        for m, tensor in enumerate(tensors):
            if len(tensor) != count or count == 0:
                expected = f"as many as inputs[0] ({count}), and at least one"
                raise ArgumentError(f"{name}[{m}]", f"{len(tensor)} samples", expected)
    return inputs, masks, count


def _per_modality(model: FLI2MoE, name: str, values: Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    names = model.config.modalities
    if isinstance(values, Mapping):
        if set(values) != set(names):
            raise ArgumentError(name, f"keys {sorted(map(str, values))}", f"exactly the keys {names}")
        values = [values[modality] for modality in names]
    if not isinstance(values, (list, tuple)) or len(values) != len(names):
        size = f" of {len(values)}" if hasattr(values, "__len__") else ""
        raise ArgumentError(name, type(values).__name__ + size, f"a list of {len(names)} tensors, for {names}")
    for m, value in enumerate(values):
        rows = value.dim() > 0 if isinstance(value, Tensor) else hasattr(value, "__len__")
        if not rows or not hasattr(value, "__getitem__"):
            raise ArgumentError(f"{name}[{m}]", type(value).__name__, "a tensor with one row per sample")
    return list(values)


def _batch(
    model: FLI2MoE, inputs: list[Tensor], masks: list[Tensor] | None, index: Tensor, device: torch.device
) -> tuple[list[Tensor], list[Tensor] | None]:
    rows = [
        (value[index.to(value.device)] if isinstance(value, Tensor) else value[index]).to(device) for value in inputs
    ]
    batch_masks = None if masks is None else [mask[index.to(mask.device)].to(device) for mask in masks]
    return (model.encode(rows) if model.encoders else rows), batch_masks


def _share_right(model: FLI2MoE, logits: Tensor, targets: Tensor) -> Tensor:
    if model.config.task == "regression":
        right = (logits >= 0) == (targets.reshape(logits.shape) >= 0)
    elif model.config.task == "multilabel":
        right = (logits > 0) == targets.bool()
    else:
        right = logits.argmax(dim=-1) == targets
    return right.to(logits.dtype).mean()


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    # Dropout draws from the global generator of its device, and only from there.
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
