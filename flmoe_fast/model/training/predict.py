"""Batched prediction, and scores on held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flmoe_fast.checks import integer
from flmoe_fast.model.metrics import score
from flmoe_fast.model.network import FLI2MoE, FLI2MoEOutput, eval_mode
from flmoe_fast.model.training.examples import Examples, Rows
from flmoe_fast.model.training.losses import check_targets, task_loss


def evaluate(model: FLI2MoE, held: Examples, batch_size: int = 256) -> dict[str, float]:
    """Task loss and scores of a model on held-out data, in eval mode; see :func:`flmoe_fast.model.metrics.score`."""
    found = predict(model, held.inputs, held.masks, batch_size)
    targets = held.targets.to(found.logits.device)
    check_targets(model, targets, len(found.logits))
    loss = float(task_loss(model, found.logits.double(), targets))
    return {"loss": loss, **score(found.logits, targets, model.config.task)}


def predict(
    model: FLI2MoE,
    inputs: Sequence[Tensor] | Mapping[str, Tensor],
    masks: Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
) -> FLI2MoEOutput:
    """Run the model over N samples in batches, in eval mode and without gradients.

    Parameters
    ----------
    model : FLI2MoE
        Its modules' train and eval modes are restored afterwards.
    inputs, masks
        See :class:`~flmoe_fast.model.training.examples.Examples`.
    batch_size : int
        Samples per forward; it has no influence on the result, since padding is not cut and samples do not compete for
        the capacity of sparse blocks.

    Returns
    -------
    FLI2MoEOutput
        Over all N samples, on the model's device.

    Raises
    ------
    ArgumentError
        Inputs that do not match the model or the masks.
    """
    batch_size = integer("batch_size", batch_size, least=1)
    rows = Rows(model, inputs, masks)
    device = next(model.parameters()).device
    with torch.no_grad(), eval_mode(model):
        batches = (rows.batch(index, device) for index in torch.arange(len(rows)).split(batch_size))
        outputs = [model(features, batch_masks, passes=len(features[0])) for features, batch_masks in batches]
    return FLI2MoEOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
