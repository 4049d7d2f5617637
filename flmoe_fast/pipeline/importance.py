"""Token importance from attention: rollout, and attention weighted by its gradient (arXiv 2603.13326)."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.games.heads import predicted_target
from flmoe_fast.model.network import FLI2MoE, eval_mode

METHODS = ("attnXgrad", "attn")


class Importance(NamedTuple):
    """Importance of every token of one sample.

    Attributes:
        experts: (E, L), one map per expert, in expert order.
        mixture: (L,), the aggregate over experts.
        segments: M slices of the token axis, one per modality.
    """

    experts: Tensor
    mixture: Tensor
    segments: tuple[slice, ...]


def token_importance(
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    *,
    target: int | Tensor | None = None,
    method: str = "attnXgrad",
) -> Importance:
    """Importance of each token of one sample, for each expert and for the mixture.

    Every layer gives a relevance matrix over (query, key) tokens. With the identity added and rows scaled to sum 1,
    the layers are multiplied from last to first, and the mean over all query rows is the importance of the keys.

    ``"attn"``: the matrix is the attention, averaged over heads. The mixture is the sum of the experts' maps, each
    times its routing weight. The target has no influence.

    ``"attnXgrad"``: the matrix is ``relu(A) * relu(dS/dA)``, averaged over heads, where ``A`` is the softmax and
    ``S`` the target's logit of the mixture with the routing weights held constant. The gradients thus carry the
    routing weights already and the mixture is the plain sum of the experts' maps.

    Args:
        model: evaluated in eval mode; modes, parameters and their ``grad`` are left as they are. Frozen parameters
            and ``torch.no_grad`` around the call are fine.
        features: M encoded modalities (1, T_m, H).
        masks: M masks (1, T_m), or ``None``. Padded queries count in the mean over rows.
        target: a class; for ``"multilabel"`` also a (C,) tensor of zeros and ones, whose positive logits are
            averaged (the largest logit where there is none). ``None``: the prediction.
        method: ``"attnXgrad"`` or ``"attn"``.

    Returns:
        :class:`Importance`, in the features' dtype.

    Raises:
        ArgumentError: as :meth:`FLI2MoE.forward`, more than one sample, a bad target or method.
    """
    one_of("method", method, METHODS)
    model.check_inputs(features, masks)
    if features[0].shape[0] != 1:
        raise ArgumentError("features", f"{features[0].shape[0]} samples", "one sample")
    if model.config.fusion == "interpretcc":
        raise ArgumentError("model", "InterpretCC experts", "experts with attention; interactions() needs none")
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        # Leaves that require gradients make the graph reach every attention map even if all parameters are frozen.
        leaves = [feature.detach().clone().requires_grad_() for feature in features]
        maps: list[list[Tensor]] = [[] for _ in model.interaction_experts]
        runs = [expert(leaves, masks, kept) for expert, kept in zip(model.interaction_experts, maps, strict=True)]
        weights = model.reweight(leaves, masks)[0].detach()
        logits = (weights[:, None] * torch.cat([run[0] for run in runs])).sum(dim=0)
        if method == "attn":
            relevance = [[attention.detach() for attention in kept] for kept in maps]
        else:
            score = logits[target_classes(logits.detach(), target, model.config.task)].mean()
            gradients = iter(torch.autograd.grad(score, [attention for kept in maps for attention in kept]))
            relevance = [[(a.detach().relu() * next(gradients).relu()) for a in kept] for kept in maps]
    experts = torch.stack([_rollout([matrix[0].mean(dim=0) for matrix in layers]) for layers in relevance])
    mixture = (weights[:, None] * experts).sum(dim=0) if method == "attn" else experts.sum(dim=0)
    return Importance(experts, mixture, _segments([feature.shape[1] for feature in features]))


def target_classes(logits: Tensor, target: int | Tensor | None, task: str) -> Tensor:
    """Indices of the classes whose logits are averaged into the explained score.

    Args:
        logits: (C,) of the mixture.
        target: see :func:`token_importance`. The prediction of a ``"multilabel"`` model is every class with a
            probability of at least 1/2, or the most probable one.
        task: ``"multiclass"`` or ``"multilabel"``.

    Returns:
        (K,) int64, K >= 1.
    """
    classes = logits.shape[-1]
    if target is None:
        target = predicted_target(logits, task)
    if isinstance(target, Tensor) and target.dim() == 0:
        target = target.item()
    if isinstance(target, numbers.Number):
        return torch.tensor([integer("target", target, least=0, most=classes - 1)], device=logits.device)
    if task != "multilabel" or not isinstance(target, Tensor):
        expected = "a class" + (" or a (C,) tensor of zeros and ones" if task == "multilabel" else "")
        raise ArgumentError("target", type(target).__name__, expected)
    shape("target", target, (classes,), "(C,)")
    if not bool(((target == 0) | (target == 1)).all()):
        raise ArgumentError("target", "values other than 0 and 1", "0 or 1 per class")
    positive = target.to(logits.device).nonzero()[:, 0]
    return positive if len(positive) else logits.argmax(dim=-1, keepdim=True)


def normalize_importance(values: Tensor, segments: Sequence[slice], candidates: Tensor | None = None) -> Tensor:
    """Scale importances to [0, 1] within each modality.

    Args:
        values: (..., L).
        segments: slices of the token axis, one per modality.
        candidates: (L,), nonzero for the tokens that count (valid ones, without a text's start token). The others
            are neither scaled nor looked at for the range. ``None``: all count.

    Returns:
        (..., L), a new tensor. A modality whose importances are all equal becomes 0.
    """
    length = values.shape[-1]
    keep = torch.ones(length, dtype=torch.bool, device=values.device) if candidates is None else candidates.bool()
    shape("candidates", keep, (length,), "(L,)")
    scaled = values.clone()
    for segment in segments:
        chosen = torch.arange(length, device=values.device)[segment][keep[segment]]
        if len(chosen) == 0:
            continue
        part = values[..., chosen]
        low, high = part.amin(dim=-1, keepdim=True), part.amax(dim=-1, keepdim=True)
        scaled[..., chosen] = (part - low) / (high - low).clamp(min=1e-12)
    return scaled


def _rollout(layers: Sequence[Tensor]) -> Tensor:
    """L x L relevance matrices, first layer first -> (L,)."""
    rolled = None
    for matrix in layers:
        matrix = matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        rolled = matrix if rolled is None else matrix @ rolled
    return rolled.mean(dim=0)


def _segments(lengths: Sequence[int]) -> tuple[slice, ...]:
    starts = [sum(lengths[:m]) for m in range(len(lengths))]
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
