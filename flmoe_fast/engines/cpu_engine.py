"""The native CPU engine: what differs per coalition runs in C++, cache-blocked and fused, in one call per chunk.

What is computed once per sample or per context is the torch engine's: the two states of every token, the routing, and
the layer-1 attention terms with one fixed maximum per query. Those terms are summed here by *pattern*: the varying
tokens are cut into groups, and every pattern of presence that a group shows among the coalitions gets its sum of
numerators and denominators once. A coalition's layer-1 attention is then one row per group, added up: only positive
terms in the denominator, as in the torch engine. On a corner grid of two modalities that is two rows.

Gates of sparse feed-forward blocks are multiplied in plain float32 at every level, so that their own rounding rarely
changes a choice. Where two logits are nearly equal it can, and so can the rounding of the stream before them, which is
larger at the amx level; a value then jumps.

The matrix products are microkernels of our own rather than a library's: an operand is split, normalised or packed as it
is produced and an activation function is applied before a product leaves the first-level cache, which no library's GEMM
offers, and the extension stays one small module that builds in seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flmoe_fast import coalitions as words
from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.engines.problem import Logits, TokenProblem
from flmoe_fast.engines.scratch import Scratch
from flmoe_fast.engines.torch_engine import TorchEngine
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.sparse import slots_per_network

#: Forces an instruction level: amx, avx512, avx2 or portable.
LEVEL_VARIABLE = "FLMOE_CPU_LEVEL"
#: Largest number of bytes that pattern sums may take before coalitions are attended one by one.
SHARED_TABLE_BYTES = 1 << 28
#: Keys whose direct attention costs as much as adding up one more group's patterns.
KEYS_PER_GROUP = 4
#: A group with more patterns than this is cut in two.
GROUP_PATTERNS = 32
#: Tokens whose presence fits one int64 code.
CODE_TOKENS = 62
#: Every matrix width is padded to whole cells.
CELL = 32
LOG2E = 1.4426950408889634


def levels() -> dict[str, tuple[str, str]]:
    """Instruction levels, best first: name to (arithmetic, what is missing or nothing)."""
    extension, missing = words.extension()
    if extension is None:
        return {}
    return {name: (arithmetic, missing) for name, arithmetic, missing in extension.cpu_levels()}


def best_level() -> str:
    """The level that runs unless one is asked for: ``FLMOE_CPU_LEVEL``, else the best this machine has."""
    usable = [name for name, (_, missing) in levels().items() if not missing]
    forced = os.environ.get(LEVEL_VARIABLE, "").strip().lower()
    if not forced:
        return usable[0]
    return _usable_level(LEVEL_VARIABLE, forced)


def _usable_level(argument: str, name: str) -> str:
    known = levels()
    usable = [level for level, (_, missing) in known.items() if not missing]
    if name not in usable:
        reason = f" ({known[name][1]})" if name in known else ""
        raise ArgumentError(argument, repr(name) + reason, "a level of this machine: " + ", ".join(usable))
    return name


def model_reason(config: FLI2MoEConfig) -> str:
    """What about a model keeps this engine from running it; empty if nothing does."""
    if config.fusion != "transformer":
        return f"the model's experts are no transformers (fusion {config.fusion!r})"
    return ""


def why_not(dtype: torch.dtype, device: torch.device, config: FLI2MoEConfig) -> str:
    """What keeps this engine from running games of that dtype, device and model; empty if nothing does."""
    reason = model_reason(config)
    if reason:
        return reason
    extension, missing = words.extension()
    if extension is None:
        return missing
    if device.type != "cpu":
        return f"the device is {device}"
    if dtype != torch.float32:
        return f"the dtype is {dtype}, and the engine computes in float32"
    return ""


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


@dataclass(frozen=True)
class PatternSums:
    """Layer-1 attention sums (P, E, h, L + J, d + 1) of every pattern: numerators, then the denominator."""

    table: torch.Tensor
    absent_row: torch.Tensor  # (L,) int32: the row with which a varying token asks where it is absent, else -1


class CpuEngine(TorchEngine):
    """Evaluates coalitions of one :class:`TokenProblem` in float32 on the CPU, on ``torch.get_num_threads()`` threads.

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

    def __init__(
        self,
        problem: TokenProblem,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory: int = 1 << 28,
        level: str | None = None,
    ):
        device = torch.device(device)
        reason = why_not(dtype, device, problem.model.config)
        if reason:
            expected = "the extension, a CPU device, torch.float32 and experts that are transformers"
            raise ArgumentError("backend", f"'cpu', but {reason}", expected)
        self.level = best_level() if level is None else _usable_level("level", level)
        self.arithmetic = levels()[self.level][0]
        super().__init__(problem, dtype=dtype, device=device, memory=integer("memory", memory, least=1))
        self._native = None

    # ---- public -----------------------------------------------------------------------------------------------------

    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        """Logits and routing of arbitrary coalitions ``(C, n)`` bool."""
        if not len(coalitions):
            return super().evaluate(coalitions)
        sums, pick = None, None
        varying, patterns = self._patterns(coalitions)
        if self._worth_sharing(varying, patterns):
            sums, pick = self._pattern_sums(self._tokens(coalitions[:1])[0], varying, patterns), patterns.pick
        return Logits(self._run(self._tokens(coalitions), sums, pick), self._route(coalitions))

    def evaluate_toggles(self, contexts: torch.Tensor, toggled: torch.Tensor) -> Logits:
        """Logits and routing of ``contexts[k] ^ toggled[g]`` for all k, g, in the order (k, g)."""
        everything = contexts[:, None] ^ toggled  # (K, G, n)
        if not len(contexts) or self._worth_sharing(*self._patterns(everything.flatten(0, 1))):
            return self.evaluate(everything.flatten(0, 1))
        parts = [self.evaluate(corners) for corners in everything]
        return Logits(torch.cat([p.experts for p in parts]), torch.cat([p.weights for p in parts]))

    # ---- layer-1 attention by patterns ------------------------------------------------------------------------------

    def _patterns(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, Patterns]:
        """The varying tokens (J,) as indices into valid, and their patterns.

        Groups are runs of consecutive varying tokens of one modality: on a corner grid rows and columns.
        """
        varies = coalitions.any(0) & ~coalitions.all(0)
        varying, order = self.players[varies].sort()
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

    def _worth_sharing(self, varying: torch.Tensor, patterns: Patterns) -> bool:
        experts, heads, _, length, depth = self.states.q.shape
        size = 4 * experts * heads * patterns.count * (length + len(varying)) * (depth + 1)
        return KEYS_PER_GROUP * len(patterns.groups) <= length and size <= SHARED_TABLE_BYTES

    def _pattern_sums(self, base: torch.Tensor, varying: torch.Tensor, patterns: Patterns) -> PatternSums | None:
        """Sums for coalitions that equal ``base`` (L,) bool outside ``varying``; None where scores spread too far."""
        weights = self._first_weights(base, varying)
        if weights is None:
            return None
        experts, heads, queries, _ = weights.rest.shape
        # The denominator is one more column of the values.
        constant = weights.rest @ F.pad(weights.values_rest, (0, 1), value=1.0)  # (E, h, Q, d + 1)
        values = F.pad(weights.values_vary, (0, 1), value=1.0)
        table = self._buffer("table", patterns.count, experts, heads, queries, values.shape[-1])
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
        return PatternSums(table, absent_row)

    # ---- the native part --------------------------------------------------------------------------------------------

    def _run(self, tokens: torch.Tensor, sums: PatternSums | None, pick: torch.Tensor | None) -> torch.Tensor:
        """Expert logits (C, E, K) float64 of coalitions given as token states (C, L)."""
        if self._native is None:
            self._native = Native(self)
        return self._native.run(tokens, sums, pick, self.memory)


class Native:
    """One engine's packed weights and constant arrays in the extension."""

    #: Slots of each modality's tokens that a network takes (M,) int32, where that is limited.
    room: torch.Tensor | None = None

    def __init__(self, engine: CpuEngine):
        extension, _ = words.extension()
        packed, problem, config = engine.packed, engine.problem, engine.config
        first = packed.layers[0]
        self.experts, self.hidden, _ = first.up.shape
        self.heads, self.classes = packed.heads, packed.head.shape[2]
        sparse = config.gate is not None
        self.depth = self.hidden // self.heads
        self.model = extension.CpuModel(
            level=engine.level,
            experts=self.experts,
            layers=len(packed.layers),
            length=problem.length,
            hidden=self.hidden,
            heads=self.heads,
            wide=config.ffn_multiple * self.hidden,
            classes=self.classes,
            modalities=len(problem.segments),
            residual=packed.residual,
            networks=config.ffn_experts if sparse else 0,
            slots=packed.slots,
            among_all=config.gate == "switch",
            ends=config.ffn_experts if packed.layers[-1].networks is not None else 1,
        )
        for index, layer in enumerate(packed.layers):
            bias = torch.stack([layer.q_bias, torch.zeros_like(layer.q_bias), torch.zeros_like(layer.q_bias)])
            last, networks = index == len(packed.layers) - 1, layer.networks
            dense = networks is None
            arrays = (
                self._by_head(_columns(layer.qkv), scale=True) if index else None,
                self._by_head(_columns(bias), scale=True) if index else None,
                self._by_head(layer.out.transpose(1, 2)).transpose(1, 2).contiguous(),
                layer.out_bias,
                layer.up if dense else None,
                layer.up_bias if dense else None,
                layer.down if dense and not last else None,
                layer.down_bias if dense and not last else None,
            )
            self._hand_over(self.model.set_layer, index, *arrays)
            if not dense:
                down = None if last else networks.down
                arrays = (networks.gate, networks.gate_bias, networks.up, networks.up_bias, down, networks.down_bias)
                self._hand_over(self.model.set_networks, index, *arrays)
        self.base = padded(engine.states.residual, rows=False)
        self.modality = torch.zeros(problem.length, dtype=torch.int32)
        for modality, (start, stop) in enumerate(problem.segments):
            self.modality[start:stop] = modality
        if config.slots_limit:
            room = [slots_per_network(config.gate, t, config.ffn_experts, False) for t in problem.padded_lengths]
            self.room = torch.tensor(room, dtype=torch.int32)
        self.head, self.head_bias = self._head(packed, problem)
        self.states_of = engine.states
        self.states: torch.Tensor | None = None
        self._scratch = Scratch()

    def run(
        self, tokens: torch.Tensor, sums: PatternSums | None, pick: torch.Tensor | None, memory: int
    ) -> torch.Tensor:
        """Expert logits (C, E, K) of token states (C, L), in chunks."""
        count, length = tokens.shape
        threads = torch.get_num_threads()
        stride = -(-self.model.workspace // 64) * 64
        workspace = self._scratch.tensor("workspace", threads * stride)
        if sums is None and self.states is None:
            self.states = self._projected()
        logits = torch.empty(count, self.experts, self.classes, dtype=torch.float64)
        present = tokens.to(torch.uint8)
        chunk = max(1, memory // (length + 8 * self.experts * self.classes))
        for start in range(0, count, chunk):
            self.model.run(
                table=0 if sums is None else sums.table.data_ptr(),
                pick=0 if sums is None else pick[start:].data_ptr(),
                absent_row=0 if sums is None else sums.absent_row.data_ptr(),
                groups=0 if sums is None else pick.shape[1],
                queries=0 if sums is None else sums.table.shape[3],
                states=self.states.data_ptr() if sums is None else 0,
                base=self.base.data_ptr(),
                present=present[start:].data_ptr(),
                modality=self.modality.data_ptr(),
                room=0 if self.room is None else self.room.data_ptr(),
                head=self.head.data_ptr(),
                head_bias=self.head_bias.data_ptr(),
                logits=logits[start:].data_ptr(),
                coalitions=min(chunk, count - start),
                threads=threads,
                workspace=workspace.data_ptr(),
                stride=stride,
            )
        return logits

    @staticmethod
    def _hand_over(setter: Callable[..., None], layer: int, *arrays: torch.Tensor | None) -> None:
        arrays = [None if a is None else padded(a) for a in arrays]
        setter(layer, *[0 if a is None else a.data_ptr() for a in arrays])

    def _by_head(self, matrix: torch.Tensor, scale: bool = False) -> torch.Tensor:
        """Columns (.., parts * H) with every head's padded to whole cells; ``scale`` gives scores base 2."""
        parts = matrix.unflatten(-1, (-1, self.heads, self.depth))
        if scale:
            parts = torch.cat([parts[..., :1, :, :] * LOG2E, parts[..., 1:, :, :]], dim=-3)
        return F.pad(parts, (0, -self.depth % CELL)).flatten(-3)

    def _projected(self) -> torch.Tensor:
        """Layer-1 q, k, v (E, 2, L, 3 * padded heads) of both states of every token."""
        states = self.states_of
        rows = torch.stack([states.q, states.k, states.v]).permute(1, 3, 4, 0, 2, 5).flatten(3)  # (E, 2, L, 3H)
        return self._by_head(rows, scale=True).contiguous()

    @staticmethod
    def _head(packed, problem) -> tuple[torch.Tensor, torch.Tensor]:
        """The classifier on pooled sums, in float64: (E, K, M, X F' + H') and (E, K); X = 1 if the last layer is dense.

        The last down-projections and the mean are part of it; a modality without tokens contributes nothing. So is the
        bias of a dense down-projection; those of a sparse block, which have scores, are in the sums.
        """
        counts = torch.tensor([stop - start for start, stop in problem.segments], dtype=torch.float64)
        share = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)[:, None]
        occupied = (counts > 0).double()
        layer = packed.layers[-1]
        head = packed.head.double().unflatten(1, (len(counts), -1)).permute(0, 3, 1, 2)  # (E, K, M, H)
        down = layer.down if layer.networks is None else layer.networks.down
        down = down.double().unflatten(0, (len(head), -1))  # (E, X, F, H)
        wide = _pad_last(torch.einsum("ekmh,exfh->ekmxf", head, down) * share[:, None]).flatten(3)
        bias = packed.head_bias.double()[:, 0]
        if layer.networks is None:
            bias = bias + torch.einsum("ekmh,eh,m->ek", head, layer.down_bias.double()[:, 0], occupied)
        return torch.cat([wide, _pad_last(head * share)], dim=-1).contiguous(), bias.contiguous()


def _columns(parts: torch.Tensor) -> torch.Tensor:
    """Q, K and V per head (3, E, h, X, d) as columns (E, X, 3 H)."""
    return parts.permute(1, 3, 0, 2, 4).flatten(2)


def _pad_last(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % CELL))


def padded(tensor: torch.Tensor, rows: bool = True) -> torch.Tensor:
    """A contiguous copy whose last axis, and the one before it unless it has one row, are whole cells."""
    below = -tensor.shape[-2] % CELL if rows and tensor.shape[-2] > 1 else 0
    return F.pad(tensor, (0, -tensor.shape[-1] % CELL, 0, below)).contiguous()
