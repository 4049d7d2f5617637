"""Games as tables of all 2^n values: transforms, indices and gaps of many tables at once.

A table's entry c is the value of the coalition that has player p iff bit p of c is set. With the Walsh functions
``chi_S(c) = (-1)^|S and c|`` a product kernel is diagonal, so a table of its sums over any points takes two transforms,
and so does a draw from its prior. With ``w_S`` the coefficients of a game and A some players,

    index(A) = (-2)^|A| sum over S containing A of w_S m(|S| - |A|),   m(k) = mean of (1 - 2 u)^k over the index's law,

since the derivative of a product of signs is the product of the others, which for players who are present with
probability u is ``(1 - 2 u)^k`` in the mean.
"""

from __future__ import annotations

import functools

import torch

from flmoe_fast.probes.gap import redundancy_gap
from flmoe_fast.probes.indices import rule

#: Bits that one step of a transform takes: a small matrix product moves less memory than as many sums.
STEP_BITS = 4
#: Members whose coefficients are summed at a time.
MEMBERS = 64


def walsh(tables: torch.Tensor) -> torch.Tensor:
    """Unnormalised Walsh-Hadamard transform of tables (D, 2^n) along their last axis; its own inverse over 2^n."""
    count, size = tables.shape
    bits, below = size.bit_length() - 1, 1
    while bits:
        step = min(STEP_BITS, bits)
        matrix = _signs(step).to(tables)
        split = tables.reshape(-1, 2**step, below)
        tables = split[..., 0] @ matrix if below == 1 else matrix @ split
        bits, below = bits - step, below << step
    return tables.reshape(count, size)


@functools.cache
def _signs(bits: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@functools.cache
def sizes(n: int) -> torch.Tensor:
    """Players of every coalition, LongTensor (2^n,)."""
    found = torch.zeros(1, dtype=torch.long)
    for _ in range(n):
        found = torch.cat([found, found + 1])
    return found


def codes(coalitions: torch.Tensor) -> torch.Tensor:
    """Places (C,) of coalitions (C, n) in a table."""
    return coalitions.long() @ (1 << torch.arange(coalitions.shape[1]))


def spectrum(rate: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (2^n,), over 2^n, of the product kernel with ``rate`` (n,): they sum to one."""
    found = torch.ones(1, dtype=torch.float64)
    for low in torch.exp(-rate).tolist():
        found = torch.cat([found * ((1 + low) / 2), found * ((1 - low) / 2)])
    return found


def table_indices(tables: torch.Tensor, members: torch.Tensor, name: str, order: int) -> torch.Tensor:
    """An index (M, D) of ``members`` (M, order) in tables (D, 2^n)."""
    size = tables.shape[1]
    n = size.bit_length() - 1
    nodes, weights = rule(name, order, n)
    moments = torch.stack([(weights * (1 - 2 * nodes) ** k).sum() for k in range(n - order + 1)])
    share = (-2.0) ** order * moments[(sizes(n) - order).clamp(min=0)] / size
    coefficients = (walsh(tables) * share).T
    code = torch.arange(size)[:, None]
    found = []
    for block in members.split(MEMBERS):
        mask = (1 << block).sum(1)
        found.append((code & mask == mask).double().T @ coefficients)
    return torch.cat(found)


def table_gaps(tables: torch.Tensor, pairs: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean gaps (P, D) over the contexts of every pair in tables (D, 2^n); NaN where nothing is defined."""
    count, size = tables.shape
    n = size.bit_length() - 1
    law = torch.tensor([1.0 / (n - 1)], dtype=torch.float64) / _binomials(n - 2)
    weight = law[sizes(n - 2)]
    found = []
    for i, j in pairs.sort(1).values.tolist():
        view = tables.view(count, 2 ** (n - 1 - j), 2, 2 ** (j - 1 - i), 2, 2**i)
        value, defined = redundancy_gap(
            kind, view[:, :, 1, :, 1], view[:, :, 0, :, 1], view[:, :, 1, :, 0], view[:, :, 0, :, 0]
        )
        total = value.reshape(count, -1) @ weight
        found.append(total if defined is None else total / (defined.reshape(count, -1).double() @ weight))
    return torch.stack(found)


def _binomials(n: int) -> torch.Tensor:
    found = torch.ones(1, dtype=torch.float64)
    for k in range(n):
        found = torch.cat([found, found[-1:] * (n - k) / (k + 1)])
    return found
