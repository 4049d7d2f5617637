"""Encoder stacks on the native CPU engine, where it can take them: pre-norm, exact GELU, absent tokens replaced.

The native engine pools tokens by modality and applies one linear head to the pooled sums. Here every token that the
model's own head reads is a modality of its own, and the linear head returns its final state.

Its LayerNorms have one epsilon, 1e-5. A stream scaled by c has the norms of the stream itself with 1e-5 / c^2 in place
of 1e-5; so c = sqrt(1e-5 / epsilon), applied to everything that is added to the stream, makes it any other epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from flmoe_fast import coalitions as words
from flmoe_fast.adapt.layers import LayerParts, PackedEncoderLayer
from flmoe_fast.adapt.stack_engine import StackEngine, StackProblem, reaching
from flmoe_fast.engines import cpu_engine
from flmoe_fast.engines.cpu_engine import CELL, best_level, levels
from flmoe_fast.engines.scratch import Scratch

#: Epsilon of the native engine's LayerNorms.
EPSILON = 1e-5
#: Tokens whose states come back: each costs a head of H (F + H) numbers.
MOST_READS = 2


def why_not(problem: StackProblem, parts: Sequence[LayerParts], dtype: torch.dtype, device: torch.device) -> str:
    """What keeps the native engine from a stack; empty if nothing does."""
    extension, missing = words.extension()
    if extension is None:
        return missing
    if device.type != "cpu" or dtype != torch.float32:
        return f"the dtype is {dtype} on {device}, and the engine computes in float32 on the CPU"
    if not all(part.pre for part in parts):
        return "its LayerNorms come after the sub-blocks"
    if len({part.norm1[2] for part in parts} | {part.norm2[2] for part in parts}) > 1:
        return "its LayerNorms have different epsilons"
    if any(PackedEncoderLayer.activation_of(part) is not torch.ops.aten.gelu_ for part in parts):
        return "its activation is not the exact GELU"
    if bool(problem.removed.any()) or problem.mixed is not None:
        return "absent tokens are not all replaced by states of their own"
    kept = reaching(problem.reads, problem.allowed, len(problem.owner))
    if problem.allowed is not None and not bool(problem.allowed[kept][:, kept].all()):
        return "not all tokens attend to each other"
    if len(problem.reads) > MOST_READS:
        return f"the model's head reads {len(problem.reads)} tokens"
    return ""


class NativeStackEngine(StackEngine):
    """A :class:`StackEngine` whose coalitions run in the native extension, in float32."""

    def __init__(
        self,
        problem: StackProblem,
        layers: tuple[PackedEncoderLayer, ...],
        memory: int,
        parts: Sequence[LayerParts],
    ):
        super().__init__(problem, layers, memory)
        self.level = best_level()
        self.arithmetic = levels()[self.level][0]
        self._native = _NativeStack(self, parts)

    def evaluate(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H) of coalitions (C, n) bool, in the order of ``problem.reads``."""
        if not len(coalitions):
            return super().evaluate(coalitions)
        states = self._native.run(self._present(coalitions), None, None, self.memory)  # (C, 1, R H)
        return states.view(len(coalitions), len(self.reads), -1).to(self.dtype)


class _NativeStack(cpu_engine.Native):
    """A stack's packed weights and constant arrays in the extension, as one expert."""

    def __init__(self, engine: NativeStackEngine, parts: Sequence[LayerParts]):
        extension, _ = words.extension()
        hidden, wide = engine.layers[0].up.shape
        self.heads, self.depth = parts[0].heads, engine.layers[0].width // parts[0].heads
        self.experts, self.classes = 1, len(engine.reads) * hidden
        scale = math.sqrt(EPSILON / parts[0].norm1[2])
        self.model = extension.CpuModel(
            level=engine.level,
            experts=1,
            layers=len(parts),
            length=engine.length,
            hidden=hidden,
            heads=self.heads,
            wide=wide,
            classes=self.classes,
            modalities=len(engine.reads) + 1,
            residual=True,
        )
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            # Scaling in float64 leaves one rounding to float32.
            layer = PackedEncoderLayer.of(part, torch.float64, torch.device("cpu"))
            arrays = (
                self._by_head(layer.qkv, scale=True) if index else None,
                self._by_head(layer.qkv_bias[None], scale=True) if index else None,
                self._by_head(layer.out.T).T * scale,
                layer.out_bias[None] * scale,
                layer.up,
                layer.up_bias[None],
                None if last else layer.down * scale,
                None if last else layer.down_bias[None] * scale,
            )
            arrays = [None if a is None else cpu_engine.padded(a[None].float()) for a in arrays]
            self.model.set_layer(index, *[0 if a is None else a.data_ptr() for a in arrays])
            if index == 0:
                stream = (engine.states[0].double() + layer.out_bias) * scale
                self.base = cpu_engine.padded(stream[None].float(), rows=False)
        self.states = self._by_head(engine.states[1], scale=True)[None].contiguous()
        self.modality = torch.full((engine.length,), len(engine.reads), dtype=torch.int32)
        self.modality[engine.reads] = torch.arange(len(engine.reads), dtype=torch.int32)
        self.head, self.head_bias = _head(layer, len(engine.reads), scale)
        self._scratch = Scratch()


def _head(last: PackedEncoderLayer, reads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """From pooled sums to states, float64: (1, R H, R + 1, F' + H') and (1, R H); the last modality is nobody's."""
    wide, hidden = last.down.shape
    state = torch.cat(
        [F.pad(last.down.T, (0, -wide % CELL)), F.pad(torch.eye(hidden).double() / scale, (0, -hidden % CELL))], dim=1
    )
    head = torch.zeros(reads, hidden, reads + 1, state.shape[1], dtype=torch.float64)
    for read in range(reads):
        head[read, :, read] = state
    return head.flatten(0, 1)[None].contiguous(), last.down_bias.repeat(reads)[None].contiguous()
