"""Token importance: attention rollout, attention times gradient, integrated gradients (arXiv 2603.13326)."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.games.heads import predicted_target
from flmoe_fast.model.network import FLI2MoE, eval_mode

METHODS = ("attnXgrad", "attn", "ig")
#: Those that know attention heads.
BY_HEAD = ("attnXgrad", "attn")
#: Points of the integration path.
IG_STEPS = 16
#: Bytes of attention maps and gradients that a batch of samples may hold at a time.
MEMORY = 1 << 30


class Importance(NamedTuple):
    """Importance of every token of one sample, or of B samples with a leading axis.

    Attributes
    ----------
    experts : Tensor
        (E, L), one map per expert, in expert order; (B, E, L) for a batch.
    mixture : Tensor
        (L,), the aggregate over experts; (B, L) for a batch.
    segments : tuple of slice
        M slices of the token axis, one per modality.
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
    ig_steps: int = IG_STEPS,
) -> Importance:
    """Importance of each token of one sample, for each expert and for the mixture.

    Parameters
    ----------
    model, method, ig_steps
        See :func:`batch_importance`.
    features : sequence of Tensor
        M encoded modalities (1, T_m, H).
    masks : sequence of Tensor, optional
        M masks (1, T_m), or ``None``.
    target : int | Tensor, optional
        A class; for ``"multilabel"`` also a (C,) tensor of zeros and ones, whose positive logits are averaged (the
        largest logit where there is none). ``None``: the prediction.

    Returns
    -------
    Importance
        :class:`Importance`, in the features' dtype.

    Raises
    ------
    ArgumentError
        As :func:`batch_importance`, or more than one sample.
    """
    one_of("method", method, METHODS)
    model.check_inputs(features, masks)
    if features[0].shape[0] != 1:
        raise ArgumentError("features", f"{features[0].shape[0]} samples", "one sample")
    targets = None if target is None else [target]
    found = batch_importance(model, features, masks, targets=targets, method=method, ig_steps=ig_steps)
    return Importance(found.experts[0], found.mixture[0], found.segments)


def batch_importance(
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    *,
    targets: Sequence[int | Tensor] | None = None,
    method: str = "attnXgrad",
    ig_steps: int = IG_STEPS,
    memory: int = MEMORY,
) -> Importance:
    """Importance of each token of B samples, for each expert and for the mixture.

    Attention methods: every layer gives a relevance matrix over (query, key) tokens. With the identity added and rows
    scaled to sum 1, the layers are multiplied from first to last, and the mean over all query rows is the importance of
    the keys.

    ``"attn"``: the matrix is the attention, averaged over heads. The mixture is the sum of the experts' maps, each
    times its routing weight. The target has no influence.

    ``"attnXgrad"``: the matrix is ``relu(A) * relu(dS/dA)``, averaged over heads, where ``A`` is the softmax and
    ``S`` the target's logit of the mixture with the routing weights held constant. The gradients thus carry the
    routing weights already and the mixture is the plain sum of the experts' maps.

    ``"ig"``: the mean over the width of the absolute integrated gradients of ``S``, routing included, along the
    straight line from zero features, by the right Riemann sum. An expert's map is that of its share of ``S``, its
    routing weight times its logit; the shares' signed attributions sum to the mixture's, their absolute values do not.

    Parameters
    ----------
    model : FLI2MoE
        Evaluated in eval mode; modes, parameters and their ``grad`` are left as they are. Frozen parameters and
        ``torch.no_grad`` around the call are fine. Gradients are taken of nothing but what is needed.
    features : sequence of Tensor
        M encoded modalities (B, T_m, H).
    masks : sequence of Tensor, optional
        M masks (B, T_m), or ``None``. Padded queries count in the mean over rows.
    targets : Sequence[int | Tensor], optional
        B targets as for :func:`token_importance`, or ``None`` for the predictions.
    method : str
        ``"attnXgrad"``, ``"attn"`` or ``"ig"``.
    ig_steps : int
        Points of the integration path.
    memory : int
        Bytes of activations that are held at a time; samples are taken in as many batches as that needs.

    Returns
    -------
    Importance
        :class:`Importance`, in the features' dtype.

    Raises
    ------
    ArgumentError
        As :meth:`FLI2MoE.forward`, a bad target or method.
    """
    one_of("method", method, METHODS)
    return _in_batches(
        _integrated if method == "ig" else _attended, model, features, masks, targets, method, ig_steps, memory
    )


def head_importance(
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    *,
    targets: Sequence[int | Tensor] | None = None,
    method: str = "attnXgrad",
    memory: int = MEMORY,
) -> Importance:
    """Importance of each token of B samples for each attention head of a plain transformer.

    What :func:`batch_importance` is for the experts of a mixture, so that one can be held against the other. A head's
    map is the rollout with this head alone in the last layer and the mean over heads in the layers below, since heads
    of different layers have nothing to do with each other.

    Parameters
    ----------
    model : FLI2MoE
        With a single expert, such as ``roles=("dense",)``.
    features, masks, targets, memory
        See :func:`batch_importance`.
    method : str
        ``"attnXgrad"`` or ``"attn"``; integrated gradients know no heads.

    Returns
    -------
    Importance
        ``experts`` are the h heads, (B, h, L); ``mixture`` is the map of all of them, (B, L), the same as that of
        :func:`batch_importance`.

    Raises
    ------
    ArgumentError
        As :func:`batch_importance`, or more than one expert.
    """
    one_of("method", method, BY_HEAD)
    if model.config.experts != 1:
        raise ArgumentError("model", f"{model.config.experts} experts", "a plain transformer, a single expert")
    return _in_batches(_by_head, model, features, masks, targets, method, 1, memory)


def _in_batches(
    measure: Callable,
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    targets: Sequence[int | Tensor] | None,
    method: str,
    ig_steps: int,
    memory: int,
) -> Importance:
    ig_steps, memory = integer("ig_steps", ig_steps, least=1), integer("memory", memory, least=1)
    model.check_inputs(features, masks)
    if model.config.fusion == "interpretcc" and method != "ig":
        raise ArgumentError("method", repr(method), "'ig' for InterpretCC experts, which attend to nothing")
    count = len(features[0])
    if targets is not None and len(targets) != count:
        raise ArgumentError("targets", f"{len(targets)} targets", f"one for each of {count} samples")
    config, length = model.config, sum(feature.shape[1] for feature in features)
    floats = config.experts * config.layers * (2 * config.heads * length + 8 * config.hidden) * length
    size = max(1, memory // (floats * features[0].element_size() * (ig_steps if method == "ig" else 1)))
    parts = []
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        for start in range(0, count, size):
            rows = slice(start, start + size)
            some = [
                _leaf(feature[rows], None if masks is None else masks[m][rows]) for m, feature in enumerate(features)
            ]
            kept = None if masks is None else [mask[rows] for mask in masks]
            own = None if targets is None else targets[rows]
            parts.append(measure(model, some, kept, own, method, ig_steps))
    experts, mixture = (torch.cat(part) for part in zip(*parts))
    return Importance(experts, mixture, sequence_segments([feature.shape[1] for feature in features]))


def _leaf(feature: Tensor, mask: Tensor | None) -> Tensor:
    """A copy to take gradients of, with zeros for padding.

    It makes the graph reach every attention map even if all parameters are frozen.
    """
    feature = feature.detach().clone()
    if mask is not None:
        feature = feature.masked_fill(~mask.bool()[:, :, None], 0.0)
    return feature.requires_grad_()


def _relevance(
    model: FLI2MoE, leaves: list[Tensor], masks: list[Tensor] | None, targets: Sequence | None, method: str
) -> tuple[list[list[Tensor]], Tensor]:
    """By expert and layer what every head's queries take from keys, (B, h, L, L); and the routing weights (B, E)."""
    maps: list[list[Tensor]] = [[] for _ in model.interaction_experts]
    alone = {"passes": len(leaves[0])}  # samples do not compete for the capacity of sparse blocks
    runs = [expert(leaves, masks, kept, **alone) for expert, kept in zip(model.interaction_experts, maps, strict=True)]
    weights = model.reweight(leaves, masks).detach()
    logits = (weights[:, :, None] * torch.stack([run[0] for run in runs], dim=1)).sum(dim=1)
    if method == "attn":
        return [[attention.detach() for attention in kept] for kept in maps], weights
    score = (logits * target_weights(logits.detach(), targets, model.config.task)).sum()
    gradients = iter(torch.autograd.grad(score, [attention for kept in maps for attention in kept]))
    return [[a.detach().relu() * next(gradients).relu() for a in kept] for kept in maps], weights


def _attended(
    model: FLI2MoE, leaves: list[Tensor], masks: list[Tensor] | None, targets: Sequence | None, method: str, _: int
) -> tuple[Tensor, Tensor]:
    relevance, weights = _relevance(model, leaves, masks, targets, method)
    rolled = [rolled_out([matrix.mean(dim=1) for matrix in layers]) for layers in relevance]
    experts = torch.stack([matrix.mean(dim=1) for matrix in rolled], dim=1)
    return experts, (weights[:, :, None] * experts).sum(dim=1) if method == "attn" else experts.sum(dim=1)


def _by_head(
    model: FLI2MoE, leaves: list[Tensor], masks: list[Tensor] | None, targets: Sequence | None, method: str, _: int
) -> tuple[Tensor, Tensor]:
    (layers,), _weights = _relevance(model, leaves, masks, targets, method)
    below = [matrix.mean(dim=1) for matrix in layers[:-1]]
    heads = [rolled_out([*below, matrix]).mean(dim=1) for matrix in layers[-1].unbind(1)]
    whole = rolled_out([*below, layers[-1].mean(dim=1)]).mean(dim=1)
    return torch.stack(heads, dim=1), whole


def _integrated(
    model: FLI2MoE, leaves: list[Tensor], masks: list[Tensor] | None, targets: Sequence | None, _: str, steps: int
) -> tuple[Tensor, Tensor]:
    count = len(leaves[0])
    with torch.no_grad():
        wanted = target_weights(model(leaves, masks, passes=count).logits, targets, model.config.task)
    alphas = torch.arange(1, steps + 1, dtype=leaves[0].dtype, device=leaves[0].device) / steps
    path = [(alphas[:, None, None, None] * leaf.detach()).flatten(0, 1) for leaf in leaves]  # (steps * B, T, H)
    masks = None if masks is None else [mask.repeat(steps, 1) for mask in masks]
    wanted = wanted.repeat(steps, 1)
    shares = []
    for e, expert in enumerate(model.interaction_experts):
        # A copy of the path for every expert, and routing anew on each, keep the experts' gradients apart.
        own = [part.clone().requires_grad_() for part in path]
        value = (expert(own, masks, passes=len(own[0]))[0] * wanted).sum(dim=1)
        score = (model.reweight(own, masks)[:, e] * value).sum()
        shares.append(torch.cat(torch.autograd.grad(score, own), dim=1).unflatten(0, (steps, count)).mean(dim=0))
    attributions = torch.stack(shares, dim=1) * torch.cat([leaf.detach() for leaf in leaves], dim=1)[:, None]
    return attributions.abs().mean(dim=-1), attributions.sum(dim=1).abs().mean(dim=-1)


def target_weights(logits: Tensor, targets: Sequence[int | Tensor] | None, task: str) -> Tensor:
    """(B, C): what the logits of each sample are multiplied by and summed to its score."""
    weights = torch.zeros_like(logits)
    for row, own in enumerate(logits):
        classes = target_classes(own, None if targets is None else targets[row], task)
        weights[row, classes] = 1.0 / len(classes)
    return weights


def target_classes(logits: Tensor, target: float | Tensor | None, task: str) -> Tensor:
    """Indices of the classes whose logits are averaged into the explained score.

    Parameters
    ----------
    logits : Tensor
        (C,) of the mixture.
    target : int | Tensor, optional
        See :func:`token_importance`. The prediction of a ``"multilabel"`` model is every class with a probability of at
        least 1/2, or the most probable one.
    task : str
        ``"multiclass"`` or ``"multilabel"``.

    Returns
    -------
    Tensor
        (K,) int64, K >= 1.
    """
    classes = logits.shape[-1]
    if target is None:
        target = predicted_target(logits, task)
    if isinstance(target, Tensor) and target.dim() == 0:
        return target_classes(logits, target.item(), task)
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


def rolled_out(layers: Sequence[Tensor]) -> Tensor:
    """Relevance matrices (B, L, L) of queries and keys, first layer first, multiplied: (B, L, L)."""

    def step(matrix: Tensor) -> Tensor:
        matrix = matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return matrix / matrix.sum(dim=-1, keepdim=True).clamp(min=1e-12)

    return functools.reduce(lambda rolled, matrix: matrix @ rolled, map(step, layers))


def sequence_segments(lengths: Sequence[int]) -> tuple[slice, ...]:
    starts = [sum(lengths[:m]) for m in range(len(lengths))]
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
