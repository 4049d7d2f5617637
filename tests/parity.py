"""What every engine is compared with: the reference's values, and the tolerance that an arithmetic earns.

A tolerance is twice the error that the reference itself makes when it computes its products as the engine does, plus
one rounding of the result: nothing is chosen by hand. "fp32" adds the terms of a product one after the other, as any
blocked matrix product does; the plain reference multiplies single rows, for which BLAS keeps many partial sums, and is
several times more exact than a matrix product can be.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from edge_shapes import BACKEND_EDGES, CPU_EDGES, EDGES, SPARSE_EDGES, Edge
from torch.overrides import TorchFunctionMode

from flmoe_fast.engines.levels import levels
from flmoe_fast.engines.problem import Logits, TokenProblem
from flmoe_fast.engines.reference import ReferenceEngine
from flmoe_fast.model import sparse as sparse_blocks
from flmoe_fast.native import missing

CONTEXTS = [0, 5, 11]
FP64 = 1e-10  # promised relative difference of values in float64
#: Instruction levels of the native engine that this machine has.
LEVELS = [name for name, (_, lacking) in levels().items() if not lacking]
#: Whether the GPU engines can be imported.
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed (it is part of the test extra)")
needs_extension = pytest.mark.skipif(bool(missing()), reason=missing() or "the extension is there")

#: By name the constants of an engine's module that force a way of doing layer-1 attention: numbers, or functions of it.
TORCH_WAYS = {
    "shared for all": {"SHARED_TABLE_BYTES": 1 << 40},
    "as sized": {},
    "direct": {"SHARED_TABLE_BYTES": 0},
    # As large problems use it: the limit is too small for all players, not for the toggled.
    "a table for each context": {"SHARED_TABLE_BYTES": lambda engine: engine._table_bytes(min(2, engine.problem.n))},
}
CPU_WAYS = {
    "patterns": {"SHARED_TABLE_BYTES": 1 << 40, "KEYS_PER_GROUP": 0, "COST_OF_SHARING": 0},
    "as sized": {},
    "direct": {"SHARED_TABLE_BYTES": -1},
}
#: Relative error of one product of two operands split into two bfloat16 terms (8 bits each): what the second terms miss
#: of either operand, and the product of second terms that is left out.
SPLIT_ROUNDING = 3 * 2.0**-18


def toggles(n: int) -> torch.Tensor:
    """Nobody, first, last, both."""
    toggled = torch.zeros(4, n, dtype=torch.bool)
    toggled[1, 0] = toggled[2, -1] = toggled[3, 0] = toggled[3, -1] = True
    return toggled


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def flat(logits: Logits) -> torch.Tensor:
    """Logits and routing in one tensor (C, ...)."""
    return torch.cat([logits.experts.flatten(1), logits.weights], dim=1)


class Products(TorchFunctionMode):
    """Every matrix product goes through :meth:`product`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = (*args, *(kwargs or {}).values())
            out = self.product(x, weight.t())
            return out + bias[0] if bias and bias[0] is not None else out
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            return self.of_activations(*args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def of_activations(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Products of attention: queries and keys, weights and values."""
        return self.product(a, b)


class InOrder(Products):
    """Terms of a product are added one after the other in float32."""

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype != torch.float32:  # the head and the routing are float64 in every engine
            return a @ b
        columns, rows = a.split(1, -1), b.split(1, -2)
        total = columns[0] * rows[0]
        for column, row in zip(columns[1:], rows[1:]):
            total.addcmul_(column, row)
        return total


def two_terms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 tensor as the sum of two bfloat16 numbers, as far as that goes."""
    hi = x.bfloat16().float()
    return hi, (x - hi).bfloat16().float()


class SplitProducts(Products):
    """Both operands are split into two bfloat16 terms; three products, float32 sums."""

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        (a_hi, a_lo), (b_hi, b_lo) = two_terms(a), two_terms(b)
        return a_lo @ b_hi + a_hi @ b_lo + a_hi @ b_hi


class TwoHalves(Products):
    """Both operands are split into two fp16 terms; three products, float32 sums."""

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        (a_hi, a_lo), (b_hi, b_lo) = ((x.half(), (x - x.half()).half()) for x in (a, b))
        return InOrder.product(
            torch.cat([a_lo, a_hi, a_hi], dim=-1).float(), torch.cat([b_hi, b_lo, b_hi], dim=-2).float()
        )


class Mixed(TwoHalves):
    """Queries and attention weights are rounded to fp16, everything else is split into two fp16 terms.

    The largest error hangs on few roundings: other ``scale`` give others of the same size.
    """

    scale = 1.0

    def of_activations(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.product((a * self.scale).half().float() / self.scale, b)


class OneHalf(Products):
    """Both operands are rounded to fp16; float32 sums."""

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.half().float() @ b.half().float()


class OneBrain(Products):
    """Both operands are rounded to bfloat16; float32 sums."""

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.bfloat16().float() @ b.bfloat16().float()


class TensorFloat(Products):
    """Both operands are rounded to the ten stored bits of TF32; float32 sums."""

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = (((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b))
        return a @ b


ARITHMETIC = {
    "fp32": (InOrder, torch.finfo(torch.float32).eps),
    "bf16x3": (SplitProducts, SPLIT_ROUNDING),
    "fp16x2": (TwoHalves, 3 * 2.0**-22),
    "mixed": (Mixed, 3 * 2.0**-22),
    "fp16": (OneHalf, 2.0**-11),
    "tf32": (TensorFloat, 2.0**-11),
    "bf16": (OneBrain, 2.0**-8),
}


@torch.no_grad()
def in_one_batch(
    problem: TokenProblem, coalitions: torch.Tensor, dtype: torch.dtype, off: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """What the reference engine says (C, ...), from its model and all coalitions at once, features times ``off``.

    For arithmetic whose products are emulated call by call, where a batch saves most of the time; what an engine is
    compared with comes from the reference engine itself.
    """
    players = problem.valid[problem.players]
    features = problem.features.repeat(len(coalitions), 1, 1)
    features[:, players] = torch.where(coalitions[:, :, None], problem.features[players], problem.fills[players])
    mask = torch.zeros(features.shape[:2], dtype=torch.bool)
    mask[:, problem.valid] = True
    model = copy.deepcopy(problem.model).eval().to(dtype)
    said = model(
        (features * off).to(dtype).split(problem.padded_lengths, 1),
        mask.split(problem.padded_lengths, 1) if problem.masked else None,
        passes=len(coalitions),
    )
    return flat(Logits(said.expert_logits, said.weights)).double()


def allowed(edge: Edge, arithmetic: str, coalitions: torch.Tensor, exact: torch.Tensor, **model) -> float:
    """Largest error of any logit or weight that an engine of that arithmetic may show on these coalitions.

    ``exact`` (C, ...) is what the reference says in float64.
    """
    with ARITHMETIC[arithmetic][0]():
        found = in_one_batch(edge.game(backend="torch", **model).problem, coalitions, torch.float32)
    return bound(found, exact, arithmetic)


def bound(found: torch.Tensor, exact: torch.Tensor, arithmetic: str) -> float:
    """Twice the error of ``found``, the reference in that arithmetic, plus one rounding."""
    return float(2 * ((found - exact).abs().max() + ARITHMETIC[arithmetic][1] * exact.abs().max()))


def named(name: str) -> Edge:
    return next(edge for edge in (*EDGES, *SPARSE_EDGES, *BACKEND_EDGES, *CPU_EDGES) if edge.name == name)


@functools.cache
def problem_of(edge: Edge) -> TokenProblem:
    """The sample of an edge as engines take it; for all to read, none to change."""
    return edge.game(target=1, backend="torch").problem


@functools.cache
def coalitions_of(edge: Edge) -> tuple[torch.Tensor, torch.Tensor]:
    """Two contexts and what is toggled in them; the empty and the full coalition are among the corners."""
    n = problem_of(edge).n
    contexts = edge.coalitions(n, 3)[[0, 1]]
    toggled = toggles(n)[[0, 1, 3]]
    toggled[2] = ~contexts[1] ^ (torch.arange(n) % 2 == 0) if n > 4 else True
    return contexts, toggled


def corners_of(edge: Edge) -> torch.Tensor:
    """The corners of :func:`coalitions_of`."""
    contexts, toggled = coalitions_of(edge)
    return (contexts[:, None] ^ toggled).flatten(0, 1)


def all_of(edge: Edge) -> torch.Tensor:
    """Coalitions of every size, and the corners of some of them as contexts."""
    coalitions = edge.coalitions(problem_of(edge).n)
    corners = (coalitions[CONTEXTS][:, None] ^ toggles(coalitions.shape[1])).flatten(0, 1)
    return torch.cat([coalitions, corners])


@functools.cache
def routed(
    edge: Edge, arithmetic: str | None = None, which: Callable[[Edge], torch.Tensor] = all_of
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's values (C, ...) on some coalitions, and logits (N, X) of every gate and token.

    In float64, or in float32 of an arithmetic.
    """
    problem, coalitions = problem_of(edge), which(edge)
    seen: list[torch.Tensor] = []
    real = sparse_blocks.largest

    def spy(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        # A switch gate compares probabilities; their logarithms differ as the logits do.
        seen.append(values.double().log() if edge.gate == "switch" else values.double())
        return real(values, count)

    with patch.object(sparse_blocks, "largest", spy):
        if arithmetic is None:
            values = flat(ReferenceEngine(problem).evaluate(coalitions))
        else:
            with ARITHMETIC[arithmetic][0]():
                values = in_one_batch(problem, coalitions, torch.float32)
    # Of all coalitions at once (C, tokens, X), or of one after the other (1, tokens, X): the same order.
    return values, torch.cat(seen, 1).flatten(0, 1) if seen else torch.zeros(0, 0)


def exact(edge: Edge, which: Callable[[Edge], torch.Tensor] = all_of) -> torch.Tensor:
    """Logits and routing (C, ...) by the reference in float64."""
    return routed(edge, None, which)[0]


def tolerance(edge: Edge, arithmetic: str, which: Callable[[Edge], torch.Tensor] = all_of) -> float:
    """What an arithmetic is allowed on these coalitions."""
    return bound(routed(edge, arithmetic, which)[0], exact(edge, which), arithmetic)


def gaps(edge: Edge, logits: torch.Tensor) -> torch.Tensor:
    """How far each token's last chosen logit (N,) of its gate is above the first that is not."""
    slots = problem_of(edge).model.config.top_k
    ordered = logits.sort(-1, descending=True)[0]
    beyond = ordered[:, slots] if slots < logits.shape[1] else torch.tensor(-torch.inf)
    return ordered[:, slots - 1] - beyond


def no_choice_hangs_on_rounding(edge: Edge, arithmetic: str, which: Callable[[Edge], torch.Tensor] = all_of) -> bool:
    """Whether every gate of a sparse model chooses alike in that arithmetic.

    Otherwise a value could jump, and its error would say nothing about an engine.
    """
    logits = routed(edge, None, which)[1]
    error = (routed(edge, arithmetic, which)[1] - logits).abs().amax(-1)
    # Two logits can come closer by twice the error, and tolerances allow twice the error of the reference.
    return bool((gaps(edge, logits) > 4 * error).all())
