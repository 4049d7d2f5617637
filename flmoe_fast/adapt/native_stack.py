"""Encoder stacks on the native CPU engine, where it can take them: pre-norm, exact GELU, absent tokens replaced."""

from __future__ import annotations

import torch

from flmoe_fast.adapt.layers import PackedEncoderLayer
from flmoe_fast.adapt.stack_engine import StackEngine, StackProblem, reaching
from flmoe_fast.engines import levels
from flmoe_fast.engines.cpu_model import NativeModel, NativeSample, Reading
from flmoe_fast.engines.stack import LOG2E, Stack

#: Tokens whose states come back: each costs a head of H (F + H) numbers.
MOST_READS = 2


def why_not(problem: StackProblem, stack: Stack, dtype: torch.dtype, device: torch.device) -> str:
    """What keeps the native engine from a stack; empty if nothing does."""
    missing = levels.missing(dtype, device)
    if missing:
        return missing
    if not stack.pre:
        return "its LayerNorms come after the sub-blocks"
    if len({norm.epsilon for layer in stack.layers for norm in (layer.norm1, layer.norm2)}) > 1:
        return "its LayerNorms have different epsilons"
    if stack.activation is not None:
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

    def __init__(self, problem: StackProblem, layers: tuple[PackedEncoderLayer, ...], memory: int, native: NativeModel):
        super().__init__(problem, layers, memory)
        self.level = native.level
        self.arithmetic = levels.levels()[self.level][0]
        stack, (stream, qkv) = native.stack, self.two_states
        residual = (stream.double() + stack.layers[0].out_bias) * native.scale  # (2, L', H)
        query, rest = qkv.split([stack.attended, 2 * stack.attended], dim=-1)
        self._projected = native.by_head(torch.cat([query * LOG2E, rest], dim=-1)[None]).contiguous()
        reading = Reading.of_tokens(self.reads, self.length, stack.layers[-1], native.scale)
        self._native = NativeSample(native, residual[None], reading)

    def about(self) -> dict[str, str]:
        """Level and arithmetic."""
        return {"level": self.level, "arithmetic": self.arithmetic}

    @property
    def more_exact(self) -> str:
        """How to get less rounding, for a person to read."""
        return super().more_exact if self.arithmetic == "fp32" else "backend='torch', or dtype=torch.float64"

    def evaluate(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H) of coalitions (C, n) bool, in the order of ``problem.reads``."""
        if not len(coalitions):
            return super().evaluate(coalitions)
        states = self._native.run(self._present(coalitions), self._projected, self.memory)  # (C, 1, R H)
        return states.view(len(coalitions), len(self.reads), -1).to(self.dtype)
