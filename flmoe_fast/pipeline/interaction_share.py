"""InterSHAP: the share of interactions in what a model does, from the values of all coalitions of its modalities.

A modality's main effect is its Shapley value without its interactions, each of which is shared by the two modalities
(the k-SII of order 1); the share is that of the absolute interactions in the sum of the absolute main effects and
interactions. It has two averages over a data set, which differ much: that of the effects, whose signs cancel (the
global one, which is what is usually published), and that of the samples' shares (the local one).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.probes.exact import exact_index


class InteractionShare(NamedTuple):
    """Shares from 0 to 1, NaN where nothing has an effect.

    Attributes
    ----------
    overall : float
        Of the effects averaged over samples ("global InterSHAP").
    local : float
        The mean over samples of each sample's share ("local InterSHAP").
    by_sample : float64 (N,)
    main : float64 (n, N)
        Main effect of every modality in every sample.
    pairs : float64 (n (n - 1) / 2, N)
        SII of every two modalities.
    """

    overall: float
    local: float
    by_sample: np.ndarray
    main: np.ndarray
    pairs: np.ndarray


def interaction_share(values: torch.Tensor, n: int) -> InteractionShare:
    """InterSHAP of N samples.

    Parameters
    ----------
    values : Tensor (2^n, N)
        Of all coalitions, coalition c having modality p iff bit p of c is set, as
        :func:`~flmoe_fast.probes.exact.enumerate_values` gives them for a game whose heads are samples. In the
        published measure the value is the probability of the class predicted for the whole sample, and absent
        modalities are replaced by those of random samples, whose probabilities are averaged.
    n : int
        Modalities, two or more.

    Raises
    ------
    ArgumentError
        Not the values of all coalitions.

    Source: Wenderoth, Hemker, Simidjievski, Jamnik: "Measuring Cross-Modal Interactions in Multimodal Models" (AAAI
    2025), equations 5 to 11.
    """
    n = integer("n", n, least=2)
    if values.dim() != 2 or len(values) != 2**n or not values.shape[1]:
        raise ArgumentError("values", f"shape {tuple(values.shape)}", f"(2^n, N) = ({2**n}, any)")
    values = values.double()
    main = exact_index(values, n, torch.arange(n)[:, None], "k-SII", 1).numpy()
    pairs = exact_index(values, n, torch.combinations(torch.arange(n)), "SII", 2).numpy()

    def share(own: np.ndarray, shared: np.ndarray) -> np.ndarray:
        parts = np.abs(shared).sum(0), np.abs(own).sum(0)
        whole = parts[0] + parts[1]
        return np.divide(parts[0], whole, where=whole > 0, out=np.full(whole.shape, np.nan))

    by_sample = share(main, pairs)
    known = by_sample[np.isfinite(by_sample)]
    overall = share(main.mean(1, keepdims=True), pairs.mean(1, keepdims=True))
    local = float(known.mean()) if len(known) else float("nan")
    return InteractionShare(float(overall[0]), local, by_sample, main, pairs)
