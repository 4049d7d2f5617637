"""Training, written as the sequence of passes that defines the losses, and batched prediction.

Each of the E = M + 2 experts sees the true features and then, for every modality, the features with that modality
replaced by Gaussian noise: (M + 1)(M + 2) passes per step. Uniqueness experts must notice the loss of their own
modality more than the loss of another, the synergy expert must notice every loss, the redundancy expert none.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.model.network import FLI2MoE, FLI2MoEOutput, eval_mode

REGULARIZERS = (None, "rep-cos", "rep-barlow", "rep-cka")

# Weights used where none is passed; rep-cka has no customary one.
_DEFAULT_WEIGHTS = {None: 0.0, "rep-cos": 3e-3, "rep-barlow": 10.0}
_BARLOW_WARM_UP = 4  # epochs of a linear rise from 0 to the full weight


class TrainingOutput(NamedTuple):
    """Result of :func:`training_forward`; the losses are differentiable.

    Attributes:
        loss: scalar, the task loss + interaction_weight * mean(interaction_losses) + regularizer_weight *
            regularization.
        task_loss: scalar, cross entropy or binary cross entropy of the mixture's logits.
        interaction_losses: (E,), one per expert.
        logits: (B, C) of the mixture, on the true features.
        expert_logits: (B, E, C), on the true features.
        weights: (B, E), routing weights.
        regularization: scalar, the unweighted regulariser, 0 without one.
    """

    loss: Tensor
    task_loss: Tensor
    interaction_losses: Tensor
    logits: Tensor
    expert_logits: Tensor
    weights: Tensor
    regularization: Tensor


def training_forward(
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    targets: Tensor,
    *,
    generator: torch.Generator | None = None,
    regularizer: str | None = None,
    regularizer_weight: float | None = None,
) -> TrainingOutput:
    """One training forward with all perturbed passes.

    Args:
        model: in train mode for dropout; the mode is not changed.
        features: M encoded modalities (B, T_m, H).
        masks: M masks (B, T_m) or ``None``. Noise replaces padded tokens too, which the masks then hide.
        targets: (B,) integer classes, or (B, C) zeros and ones for ``"multilabel"``.
        generator: source of the noise, on the model's device. Draws are made expert by expert and, within an
            expert, modality by modality, each for a whole (B, T_m, H) tensor.
        regularizer: ``None``, ``"rep-cos"``, ``"rep-barlow"`` or ``"rep-cka"``: a penalty on the similarity of the
            experts' latents, averaged over expert pairs.
        regularizer_weight: its factor; default 3e-3 for rep-cos and 10 for rep-barlow, to be given for rep-cka.

    Returns:
        :class:`TrainingOutput`.

    Raises:
        ArgumentError: as :meth:`FLI2MoE.forward`, and for targets of a wrong shape, type or range.

    Source: I2MoE, ICML 2025 (losses on logits), arXiv 2603.13326 (losses on latents, not detached).
    """
    model.check_inputs(features, masks)
    _check_targets(model, targets, features[0].shape[0])
    regularizer_weight = _regularizer_weight(regularizer, regularizer_weight)
    on_latents = model.config.generation == "fl"

    expert_logits, latents, losses = [], [], []
    for e, expert in enumerate(model.interaction_experts):
        passes = [expert(features, masks)]
        for i, feature in enumerate(features):
            noise = torch.randn(feature.shape, generator=generator, dtype=feature.dtype, device=feature.device)
            passes.append(expert([*features[:i], noise, *features[i + 1 :]], masks))
        anchor, *perturbed = (latent if on_latents else logits for logits, latent in passes)
        losses.append(interaction_loss(e, anchor, perturbed))
        expert_logits.append(passes[0][0])
        latents.append(passes[0][1])

    weights = model.reweight(features, masks)
    stacked = torch.stack(expert_logits, dim=1)
    logits = (weights[:, :, None] * stacked).sum(dim=1)
    interaction_losses = torch.stack(losses)
    task = task_loss(model, logits, targets)
    regularization = representation_penalty(regularizer, latents)
    loss = task + model.config.interaction_weight * interaction_losses.mean() + regularizer_weight * regularization
    return TrainingOutput(loss, task, interaction_losses, logits, stacked, weights, regularization)


def task_loss(model: FLI2MoE, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy (with ``class_weights``, where configured) or binary cross entropy of (B, C) logits."""
    if model.config.task == "multilabel":
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    weights = model.config.class_weights
    weights = None if weights is None else torch.tensor(weights, dtype=logits.dtype, device=logits.device)
    return functional.cross_entropy(logits, targets.long(), weight=weights)


def interaction_loss(expert: int, anchor: Tensor, perturbed: Sequence[Tensor]) -> Tensor:
    """Interaction loss of one expert, a scalar.

    Args:
        expert: index; below M a uniqueness expert, M the synergy and M + 1 the redundancy expert.
        anchor: (B, D), representation of the true features.
        perturbed: M tensors (B, D), entry i with modality i replaced by noise.
    """
    count = len(perturbed)
    integer("expert", expert, least=0, most=count + 1)
    if expert < count:
        far = perturbed[expert]
        terms = [_triplet(anchor, near, far) for i, near in enumerate(perturbed) if i != expert]
        return torch.stack(terms).mean()
    cosines = torch.stack([_cosine(anchor, other).mean() for other in perturbed])
    return cosines.mean() if expert == count else (1.0 - cosines).mean()


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
    if regularizer is None:
        return latents[0].new_zeros(())
    measure = {"rep-cos": _squared_cosine, "rep-barlow": _off_diagonal, "rep-cka": _linear_cka}[regularizer]
    return torch.stack([measure(a, b) for a, b in itertools.combinations(latents, 2)]).mean()


def _squared_cosine(a: Tensor, b: Tensor) -> Tensor:
    return _cosine(a, b).square().mean()


def _off_diagonal(a: Tensor, b: Tensor) -> Tensor:
    a, b = ((z - z.mean(dim=0)) / (z.std(dim=0, correction=0) + 1e-5) for z in (a, b))
    correlation = a.T @ b / a.shape[0]
    diagonal = torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
    return correlation[~diagonal].square().mean()


def _linear_cka(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    return (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm() + 1e-8)


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
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train with Adam on shuffled batches; encoders with trainable parameters are trained too.

    Args:
        model: trained in place and left in eval mode.
        inputs: per modality N samples, in order or by name: the encoders' inputs where the model has encoders,
            otherwise features (N, T_m, H). Batches are moved to the model's device.
        masks: M masks (N, T_m) or ``None``.
        targets: (N,) integer classes, or (N, C) zeros and ones for ``"multilabel"``.
        epochs: passes over the data.
        batch_size: samples per step; the last batch of an epoch may be smaller.
        lr: learning rate of Adam.
        seed: fixes shuffling, noise and dropout; the global random state is left as it was.
        regularizer: see :func:`training_forward`. The weight of rep-barlow rises linearly over the first 5 epochs,
            from 0.
        regularizer_weight: see :func:`training_forward`.
        progress: show a progress bar over the epochs.

    Returns:
        One dict per epoch: ``epoch`` (from 0), ``loss``, ``task_loss``, ``interaction_losses`` (list of E),
        ``regularization``, ``accuracy`` (share of correct training predictions, for ``"multilabel"`` of correct
        labels, in train mode), each the mean over samples, and ``seconds``.

    Raises:
        ArgumentError: inputs that do not match the model, the masks or the targets.
        FloatingPointError: the loss of an epoch is not finite.
    """
    epochs, batch_size = integer("epochs", epochs, least=1), integer("batch_size", batch_size, least=1)
    seed = integer("seed", seed, least=0)
    if isinstance(lr, bool) or not isinstance(lr, numbers.Real) or not (0 < lr < math.inf):
        raise ArgumentError("lr", repr(lr), "a finite number > 0")
    weight = _regularizer_weight(regularizer, regularizer_weight)
    inputs, masks, count = _dataset(model, inputs, masks)
    _check_targets(model, targets, count)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ArgumentError("model", "a model without trainable parameters", "parameters with requires_grad")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    device = parameters[0].device
    order_source = torch.Generator().manual_seed(seed)
    noise_source = torch.Generator(device).manual_seed(seed)
    history = []
    with _seeded(seed, device):
        bar = tqdm(range(epochs), desc="training", unit="epoch", disable=not progress)
        for epoch in bar:
            begin = time.perf_counter()
            warm = min(1.0, epoch / _BARLOW_WARM_UP) if regularizer == "rep-barlow" else 1.0
            sums = None
            model.train()
            for index in torch.randperm(count, generator=order_source).split(batch_size):
                features, batch_masks = _batch(model, inputs, masks, index, device)
                wanted = targets[index.to(targets.device)].to(device)
                out = training_forward(
                    model,
                    features,
                    batch_masks,
                    wanted,
                    generator=noise_source,
                    regularizer=regularizer,
                    regularizer_weight=warm * weight,
                )
                optimizer.zero_grad(set_to_none=True)
                out.loss.backward()
                optimizer.step()
                right = _share_right(model, out.logits, wanted)
                scalars = torch.stack([out.loss, out.task_loss, out.regularization, right, *out.interaction_losses])
                scaled = scalars.detach().double() * len(index)
                sums = scaled if sums is None else sums + scaled
            loss, task, regularization, accuracy, *interaction = (sums / count).tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss became {loss} in epoch {epoch}; a smaller lr may help")
            history.append(
                {
                    "epoch": epoch,
                    "loss": loss,
                    "task_loss": task,
                    "interaction_losses": interaction,
                    "regularization": regularization,
                    "accuracy": accuracy,
                    "seconds": time.perf_counter() - begin,
                }
            )
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.4f}")
    model.eval()
    return history


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
        batch_size: samples per forward; it has no influence on the result, since padding is not cut.

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
        outputs = [model(features, batch_masks) for features, batch_masks in batches]
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
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise ArgumentError(f"{name}[{m}]", type(value).__name__, "a tensor with one row per sample")
    return list(values)


def _batch(
    model: FLI2MoE, inputs: list[Tensor], masks: list[Tensor] | None, index: Tensor, device: torch.device
) -> tuple[list[Tensor], list[Tensor] | None]:
    rows = [value[index.to(value.device)].to(device) for value in inputs]
    batch_masks = None if masks is None else [mask[index.to(mask.device)].to(device) for mask in masks]
    return (model.encode(rows) if model.encoders else rows), batch_masks


def _share_right(model: FLI2MoE, logits: Tensor, targets: Tensor) -> Tensor:
    right = (logits > 0) == targets.bool() if model.config.task == "multilabel" else logits.argmax(dim=-1) == targets
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
