"""The native CPU engine: what differs per coalition runs in C++, cache-blocked and fused, in one call per chunk.

What is computed once per sample or per context is :mod:`flmoe_fast.engines.first_layer`'s: the two states of every
token, the routing, and the layer-1 attention terms with one fixed maximum per query. Those terms are summed here by
*pattern*: the varying tokens are cut into groups, and every pattern of presence that a group shows among the coalitions
gets its sum of numerators and denominators once. A coalition's layer-1 attention is then one row per group, added up:
only positive terms in the denominator, as in the torch engine. On a corner grid of two modalities that is two rows.

Gates of sparse feed-forward blocks are multiplied in plain float32 at every level, so that their own rounding rarely
changes a choice. Where two logits are nearly equal it can, and so can the rounding of the stream before them, which is
larger at the amx level; a value then jumps.

The matrix products are microkernels of our own rather than a library's: an operand is split, normalised or packed as it
is produced and an activation function is applied before a product leaves the first-level cache, which no library's GEMM
offers, and the extension stays one small module that builds in seconds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from flmoe_fast.engines import levels
from flmoe_fast.engines.cpu_model import NativeModel, NativeSample, PatternSums, Reading
from flmoe_fast.engines.engine import Request, TokenEngine
from flmoe_fast.engines.first_layer import Routing, TwoStates
from flmoe_fast.engines.prepared import prepared_sample
from flmoe_fast.engines.problem import Logits, TokenProblem
from flmoe_fast.engines.scratch import Scratch
from flmoe_fast.engines.stack import LOG2E

#: Largest number of bytes that pattern sums may take before coalitions are attended one by one.
SHARED_TABLE_BYTES = 1 << 28
#: Keys whose direct attention costs as much as adding up one more group's patterns.
KEYS_PER_GROUP = 4
#: A key's weight, or its part of a pattern, computed here costs as much as that many keys of native attention.
COST_OF_SHARING = 6
#: A group with more patterns than this is cut in two.
GROUP_PATTERNS = 32
#: Tokens whose presence fits one int64 code.
CODE_TOKENS = 62


@dataclass(frozen=True)
class Patterns:
    """The varying tokens in groups, and what coalitions look like within each.

    ``groups`` holds per group its columns (g,) among the varying tokens and the presence patterns (P_g, g) that occur;
    ``pick`` (C, G) int32 numbers each coalition's pattern of each group, counted over all groups.
    """

    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    pick: torch.Tensor

    @property
    def count(self) -> int:
        return sum(len(patterns) for _, patterns in self.groups)


class CpuEngine(levels.AtLevel, TokenEngine):
    """Evaluates coalitions of one :class:`TokenProblem` in float32 on the CPU, on threads of its own.

    Parameters
    ----------
    problem : TokenProblem
    dtype : torch.float32
    device : CPU device
    memory : int
        Bytes that the masks and logits of one native call may take. Results do not depend on it, nor on the threads.
    level : "amx", "avx512", "avx2" or "portable", optional
        Instruction level; by default ``FLMOE_CPU_LEVEL``, else the best the machine has. ``amx`` multiplies bfloat16
        pairs (two terms an operand, about 16 bits) with float32 sums, the others float32.
    """

    name = "cpu"
    instead = "the extension, a CPU device, torch.float32 and experts that are transformers"

    def __init__(self, problem: TokenProblem, **options: Any):
        super().__init__(problem, **options)
        self.sample = prepared_sample(problem)
        self._scratch = Scratch()

    @functools.cached_property
    def states(self) -> TwoStates:
        """What the first layer makes of both states of every token; computed when it is first asked for."""
        return TwoStates.of(self.sample, torch.float32, torch.device("cpu"))

    @functools.cached_property
    def routing(self) -> Routing:
        """The routing of the sample; computed when it is first asked for."""
        return Routing.of(self.sample, torch.device("cpu"))

    @property
    def noise(self) -> dict[str, float]:
        return self.sample.model.kept("noise", dict)

    @classmethod
    def missing(cls, request: Request) -> str:
        """The extension, a CPU as the device, float32."""
        return levels.missing(request.dtype, request.device)

    @classmethod
    def unfit(cls, request: Request) -> str:
        """Experts that are no transformers, and limited capacity with padding before valid tokens."""
        if request.problem is None:
            return ""
        fusion = request.problem.model.config.fusion
        if fusion != "transformer":
            return f"the model's experts are no transformers (fusion {fusion!r})"
        return request.problem.misplaced_padding

    # ---- public -----------------------------------------------------------------------------------------------------

    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        """Logits and routing of arbitrary coalitions ``(C, n)`` bool."""
        coalitions = coalitions.cpu()
        if not len(coalitions):
            experts, _, _, classes = self.sample.model.head.shape
            nothing = torch.zeros(0, experts, classes, dtype=torch.float64)
            return Logits(nothing, nothing.sum(-1))
        tokens, first = self.problem.presence(coalitions), None
        varying, patterns = self._patterns(coalitions)
        shared, direct = self._costs(varying, patterns)
        if shared <= direct:
            first = self._pattern_sums(tokens[0], varying, patterns)
        logits = self._native.run(tokens, self._projected if first is None else first, self.memory)
        return Logits(logits, self.routing.weights(coalitions))

    def evaluate_toggles(self, contexts: torch.Tensor, toggled: torch.Tensor) -> Logits:
        """Logits and routing of ``contexts[k] ^ toggled[g]`` for all k, g, in the order (k, g)."""
        everything = contexts.cpu()[:, None] ^ toggled.cpu()  # (K, G, n)
        if len(contexts) < 2:
            return self.evaluate(everything.flatten(0, 1))
        # What varies between contexts too is much, and has many patterns; within one it is few players.
        together = min(self._costs(*self._patterns(everything.flatten(0, 1))))
        if together <= len(contexts) * min(self._costs(*self._patterns(everything[0]))):
            return self.evaluate(everything.flatten(0, 1))
        parts = [self.evaluate(corners) for corners in everything]
        return Logits(torch.cat([p.experts for p in parts]), torch.cat([p.weights for p in parts]))

    # ---- layer-1 attention by patterns ------------------------------------------------------------------------------

    def _patterns(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, Patterns]:
        """The varying tokens (J,) as indices into valid, and their patterns.

        Groups are runs of consecutive varying tokens of one modality: on a corner grid rows and columns.
        """
        varies = coalitions.any(0) & ~coalitions.all(0)
        varying, order = self.problem.players[varies].sort()
        bits = coalitions[:, varies][:, order].long()
        starts = torch.tensor([start for start, _ in self.problem.segments])
        modality = torch.bucketize(varying, starts, right=True)
        cuts = [0, *((modality[1:] != modality[:-1]).nonzero()[:, 0] + 1).tolist(), len(varying)]
        ranges = [
            (low, min(low + CODE_TOKENS, stop))
            for start, stop in zip(cuts, cuts[1:])
            for low in range(start, stop, CODE_TOKENS)
        ]
        groups, picks, count = [], [], 0
        while ranges:
            start, stop = ranges.pop(0)
            width = torch.arange(stop - start)
            codes, pick = (bits[:, start:stop] << width).sum(1).unique(return_inverse=True)
            if len(codes) > GROUP_PATTERNS and stop - start > 1:
                middle = (start + stop) // 2
                ranges[:0] = [(start, middle), (middle, stop)]
                continue
            groups.append((start + width, (codes[:, None] >> width & 1).bool()))
            picks.append(pick + count)
            count += len(codes)
        if not groups:  # all coalitions are the same: one pattern of nobody
            groups = [(varying, torch.ones(1, 0, dtype=torch.bool))]
            picks = [torch.zeros(len(coalitions), dtype=torch.long)]
        return varying, Patterns(tuple(groups), torch.stack(picks, 1).int().contiguous())

    def _costs(self, varying: torch.Tensor, patterns: Patterns) -> tuple[float, float]:
        """What layer-1 attention costs with shared sums and without, in keys for all queries of a coalition."""
        length, stack = self.problem.length, self.sample.model.stack
        queries, groups = length + len(varying), len(patterns.groups)
        size = 4 * stack.count * patterns.count * queries * (stack.attended + stack.heads)
        shown = sum(shown.numel() for _, shown in patterns.groups)
        shared = len(patterns.pick) * KEYS_PER_GROUP * groups + COST_OF_SHARING * queries * (queries + shown) / length
        return shared if size <= SHARED_TABLE_BYTES else math.inf, len(patterns.pick) * length

    def _pattern_sums(self, base: torch.Tensor, varying: torch.Tensor, patterns: Patterns) -> PatternSums | None:
        """Sums for coalitions that equal ``base`` (L,) bool outside ``varying``; None where scores spread too far."""
        weights = self.states.weights(base, varying)
        if weights is None:
            return None
        experts, heads, queries, _ = weights.rest.shape
        # The denominator is one more column of the values.
        constant = weights.rest @ F.pad(weights.values_rest, (0, 1), value=1.0)  # (E, h, Q, d + 1)
        values = F.pad(weights.values_vary, (0, 1), value=1.0)
        shape = patterns.count, experts, heads, queries, values.shape[-1]
        table = self._scratch.tensor("table", *shape, dtype=torch.float32)
        done = 0
        for members, shown in patterns.groups:
            columns = members + shown * len(varying)  # (P_g, g)
            chosen = weights.vary[..., columns].permute(3, 0, 1, 2, 4)  # (P_g, E, h, Q, g)
            into = table[done : done + len(shown)]
            torch.matmul(chosen, values[:, :, columns].permute(2, 0, 1, 3, 4), out=into)
            if not done:
                into += constant
            done += len(shown)
        length = len(base)
        absent_row = torch.full((length,), -1, dtype=torch.int32)
        absent_row[varying] = torch.arange(length, queries, dtype=torch.int32)
        return PatternSums(table, patterns.pick, absent_row)

    # ---- the native part --------------------------------------------------------------------------------------------

    @functools.cached_property
    def _native(self) -> NativeSample:
        sample, states = self.sample, self.states
        model = sample.model.kept((NativeModel, self.level), lambda: NativeModel(sample.model.stack, self.level))
        modality = torch.bucketize(
            torch.arange(self.problem.length), torch.tensor([start for start, _ in self.problem.segments]), right=True
        )
        means = sample.model.kept(CpuEngine, lambda: Reading.head_of_sums(sample.model.wide_head, sample.model.head))
        head = means * sample.shares[:, None]
        reading = Reading((modality - 1).int(), head, sample.head_bias.contiguous())
        return NativeSample(model, states.residual, reading, sample.room)

    @functools.cached_property
    def _projected(self) -> torch.Tensor:
        """Layer-1 Q, K and V of both states of every token, for coalitions that share no sums."""
        states = self.states
        rows = torch.stack([states.q * LOG2E, states.k, states.v])  # (3, E, h, 2, L, d)
        return self._native.model.by_head(rows.permute(1, 3, 4, 0, 2, 5).flatten(3)).contiguous()
