"""Encoder stacks on the native CPU engine, where it can take them: pre-norm, exact GELU, absent tokens replaced."""

from __future__ import annotations

from typing import Any

import torch

from flmoe_fast.engines import levels
from flmoe_fast.engines.cpu_model import NativeModel, NativeSample, Reading
from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.problem import StackProblem
from flmoe_fast.engines.stack import LOG2E
from flmoe_fast.engines.torch_stack import TorchStack

#: Width up to which layers in float32 are faster here than in PyTorch, whose products of wide matrices are closer to
#: what the processor can do: at 192 equal, at 384 PyTorch takes 0.85 to 0.91 of the time, at 768 0.68 to 0.79.
NARROW = 256
#: Tokens whose states come back: each costs a head of H (F + H) numbers.
MOST_READS = 2


class CpuStack(levels.AtLevel, TorchStack):
    """A :class:`TorchStack` whose coalitions run in the native extension, in float32."""

    name = "cpu"
    instead = "'torch', or 'auto' to use what there is"

    def __init__(self, problem: StackProblem, **options: Any):
        super().__init__(problem, **options)
        stack, (stream, qkv) = problem.model.stack, self.two_states
        native = problem.model.kept((NativeModel, self.level), lambda: NativeModel(stack, self.level))
        residual = (stream.double() + stack.layers[0].out_bias) * native.scale  # (2, L', H)
        query, rest = qkv.split([stack.attended, 2 * stack.attended], dim=-1)
        self._projected = native.by_head(torch.cat([query * LOG2E, rest], dim=-1)[None]).contiguous()
        reading = Reading.of_tokens(self.reads, problem.length, stack.layers[-1], native.scale)
        self._native = NativeSample(native, residual[None], reading)

    @classmethod
    def missing(cls, request: Request[StackProblem]) -> str:
        """The extension, a CPU as the device, float32."""
        return levels.missing(request.dtype, request.device)

    @classmethod
    def unfit(cls, request: Request[StackProblem]) -> str:
        """What is not in the native layers, and tokens that are removed instead of replaced."""
        problem = request.problem
        if problem is None:
            return ""
        stack = problem.model.stack
        if not stack.pre:
            return "its LayerNorms come after the sub-blocks"
        if len({norm.epsilon for layer in stack.layers for norm in (layer.norm1, layer.norm2)}) > 1:
            return "its LayerNorms have different epsilons"
        if stack.activation is not None:
            return "its activation is not the exact GELU"
        if stack.gated or any(norm.rule != "layer" for layer in stack.layers for norm in (layer.norm1, layer.norm2)):
            return "its feed-forward blocks are gated, or its norms are no LayerNorms"
        if problem.places:
            return "its attention looks at where tokens are"
        if bool(problem.removed.any()) or problem.mixed is not None:
            return "absent tokens are not all replaced by states of their own"
        kept = problem.reaching
        if problem.allowed is not None and not bool(problem.allowed[kept][:, kept].all()):
            return "not all tokens attend to each other"
        if len(problem.reads) > MOST_READS:
            return f"the model's head reads {len(problem.reads)} tokens"
        return ""

    @classmethod
    def slower(cls, request: Request[StackProblem]) -> str:
        """Wide layers where the level multiplies float32."""
        width = 0 if request.problem is None else request.problem.model.stack.width
        if width <= NARROW or cls.missing(request) or levels.levels()[levels.usable_level()][0] != "fp32":
            return ""
        return f"in float32 PyTorch is faster on layers of width {width}"

    def evaluate(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H) of coalitions (C, n) bool, in the order of ``problem.reads``."""
        if not len(coalitions):
            return super().evaluate(coalitions)
        states = self._native.run(self._present(coalitions), self._projected, self.memory)  # (C, 1, R H)
        return states.view(len(coalitions), len(self.reads), -1).to(self.dtype)
