"""What each network of a sparse feed-forward block makes of each sample, and how alike the networks are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flmoe_fast.model.sparse import SparseMLP


class NetworkLatents(NamedTuple):
    """One call of one sparse block: the tokens of one modality.

    Attributes
    ----------
    means : Tensor
        (X, B, H), mean output of each network over the tokens of each sample that it served, not weighted by their
        scores; 0 where it served none.
    present : Tensor
        (X, B) bool, where it served any.
    """

    means: Tensor
    present: Tensor


@contextlib.contextmanager
def collect_latents(model: nn.Module) -> Iterator[list[NetworkLatents]]:
    """Inside the ``with`` block, every call of a sparse block appends its latents, part of the graph, to the list.

    For batches of a single pass.
    """
    found: list[NetworkLatents] = []
    handles = []
    for block in (module for module in model.modules() if isinstance(module, SparseMLP)):
        chosen: list[Tensor] = []
        outputs: dict[int, Tensor] = {}

        def routed(_module, _arguments, routing, chosen=chosen):
            chosen[:] = [routing.chosen.flatten(0, 1)]

        def served(_module, arguments, rows, outputs=outputs):
            outputs[arguments[1]] = rows

        def called(_module, arguments, _result, chosen=chosen, outputs=outputs):
            found.append(_means(chosen[0], outputs, arguments[0].shape[0], arguments[0].shape[1]))

        handles += [block.gate.register_forward_hook(routed), block.experts.register_forward_hook(served)]
        handles.append(block.register_forward_hook(called))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _means(chosen: Tensor, outputs: dict[int, Tensor], samples: int, tokens: int) -> NetworkLatents:
    means, counts = [], []
    for network, rows in sorted(outputs.items()):
        sample = (chosen == network).nonzero()[:, 0] // tokens
        count = torch.bincount(sample, minlength=samples)
        total = rows.new_zeros(samples, rows.shape[-1]).index_add(0, sample, rows)
        means.append(total / count.clamp(min=1)[:, None])
        counts.append(count)
    return NetworkLatents(torch.stack(means), torch.stack(counts) > 0)


def network_similarity(records: list[NetworkLatents], like: Tensor) -> Tensor:
    """Linear CKA of the networks' latents, a scalar.

    Of every pair of networks over the samples that both served (two or more), averaged over pairs, then over calls;
    0, in the dtype and on the device of ``like``, where there is nothing to compare.
    """
    by_call = []
    for means, present in records:
        pairs = []
        for a, b in torch.combinations(torch.arange(len(means))).tolist():
            both = present[a] & present[b]
            if int(both.sum()) > 1:
                pairs.append(linear_cka(means[a][both], means[b][both]))
        if pairs:
            by_call.append(torch.stack(pairs).mean())
    return torch.stack(by_call).mean() if by_call else like.new_zeros(())


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of (B, D) and (B, D), a scalar."""
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    return (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm() + 1e-8)
