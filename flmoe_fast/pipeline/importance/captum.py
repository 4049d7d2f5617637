"""Importance by captum's own attribution methods (extra ``captum``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_fast.checks import ArgumentError
from flmoe_fast.environment import require
from flmoe_fast.model.network import FLI2MoE, eval_mode
from flmoe_fast.pipeline.importance.tokens import Importance, sequence_segments, target_weights


def captum_importance(
    model: FLI2MoE,
    features: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    *,
    attribution: str = "IntegratedGradients",
    targets: Sequence[int | Tensor] | None = None,
    **options: Any,
) -> Importance:
    """Importance of every token by a method of ``captum.attr``: the mean over the width of absolute attributions.

    Parameters
    ----------
    model : FLI2MoE
        Evaluated in eval mode.
    features : sequence of M tensors (B, T_m, H)
        Encoded modalities.
    masks : sequence of M tensors (B, T_m), or None
    attribution : str
        A class of ``captum.attr`` that attributes the output of a function to its inputs and needs nothing else to be
        made, such as ``"IntegratedGradients"``, ``"InputXGradient"``, ``"Saliency"``, ``"GradientShap"``,
        ``"FeatureAblation"`` or ``"ShapleyValueSampling"``.
    targets : sequence of B, optional
        As for :func:`batch_importance`.
    **options
        Of the method's ``attribute``, such as ``n_steps`` or ``baselines``.

    Returns
    -------
    Importance
        (B, E, L) of every expert's share of the score (its routing weight times its logit), and (B, L) of the mixture's
        score.

    Raises
    ------
    ArgumentError
        captum has no such method.
    MissingExtra
        captum is not installed.
    """
    methods = require("captum.attr", "captum")
    kind = getattr(methods, attribution, None) if isinstance(attribution, str) else None
    if not isinstance(kind, type) or not hasattr(kind, "attribute"):
        raise ArgumentError("attribution", repr(attribution), "the name of an attribution class of captum.attr")
    model.check_inputs(features, masks)
    with torch.no_grad(), eval_mode(model):
        wanted = target_weights(model(features, masks).logits, targets, model.config.task)

    def attributed(expert: int | None) -> Tensor:
        def score(*inputs: Tensor) -> Tensor:
            # Some methods evaluate several versions of the batch at once, sample by sample.
            times = len(inputs[0]) // len(wanted)
            own = None if masks is None else [mask.repeat(times, 1) for mask in masks]
            out = model(inputs, own)
            logits = out.logits if expert is None else out.weights[:, expert, None] * out.expert_logits[:, expert]
            return (logits * wanted.repeat(times, 1)).sum(1)

        found = kind(score).attribute(tuple(leaves), **options)
        return torch.cat([part.detach().abs().mean(-1) for part in found], dim=1)

    leaves = []
    for m, feature in enumerate(features):
        keep = torch.ones(feature.shape[:2], dtype=torch.bool) if masks is None else masks[m].bool()
        leaves.append(feature.detach().masked_fill(~keep[:, :, None].to(feature.device), 0.0).requires_grad_())
    with eval_mode(model), torch.enable_grad():
        experts = torch.stack([attributed(e) for e in range(model.config.experts)], dim=1)
        mixture = attributed(None)
    return Importance(experts, mixture, sequence_segments([feature.shape[1] for feature in features]))
