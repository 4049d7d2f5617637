"""The fused CUDA kernels as an engine: two launches for the two layers of a model where the Triton engine has seven.

What a kernel multiplies with lies on its own "tape": the stages it copies to shared memory, byte for byte and in the order
of use (csrc/fused/traits.h). Everything else, planning and chunks included, is the Triton engine's.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.coalitions import extension
from flmoe_fast.engines import cuda_ops, triton_engine
from flmoe_fast.engines.problem import TokenProblem
from flmoe_fast.engines.triton_engine import AUTO_PRECISION, Plan, TritonEngine, Weights
from flmoe_fast.engines.triton_ops import FIRST_WEIGHTS, HEAD_WEIGHTS, LATER_WEIGHTS

#: Arithmetics of the fused kernels.
FUSED_PRECISIONS = ("fp16x2", "mixed", "fp16")
#: Inputs or outputs of one stage of weights: the hidden width is a multiple.
SLAB = 64


def model_reason(problem: TokenProblem, precision: str = "auto") -> str:
    """What about a model, a sample or a precision keeps this engine from running it; empty if nothing does."""
    config = problem.model.config
    if config.gate is not None or config.fusion != "transformer":
        what = f"gate {config.gate!r}" if config.gate is not None else f"fusion {config.fusion!r}"
        return f"the fused kernels are for dense transformers, and the model has {what}"
    if precision not in ("auto", *FUSED_PRECISIONS):
        return f"the precision is {precision!r}, and the fused kernels compute in one of {FUSED_PRECISIONS}"
    module, missing = extension()
    if module is None:
        return missing
    depth, wide = config.hidden // config.heads, config.hidden * config.ffn_multiple
    if not module.fused_supported(config.hidden, depth):
        return (
            f"the width is {config.hidden} with heads of {depth}, and the fused kernels are for 64, 128 or 256 with one, "
            f"two or four heads of at least 32"
        )
    if wide % SLAB:
        return f"the hidden width is {wide}, and the fused kernels take multiples of {SLAB}"
    return triton_engine.model_reason(problem)


def why_not(
    dtype: torch.dtype, device: torch.device, problem: TokenProblem | None = None, precision: str = "auto"
) -> str:
    """What keeps this engine from running games of that dtype on that device; empty if nothing does."""
    reason = triton_engine.why_not(dtype, device)
    if reason:
        return reason
    module, missing = extension()
    if module is None:
        return missing
    if device.type == "cuda" and not module.info()["cuda"]:
        return "the extension was built without CUDA kernels"
    if problem is None:
        return ""
    reason = model_reason(problem, precision)
    if not reason and device.type == "cuda":
        with torch.cuda.device(device):
            groups, needed, limit = module.fused_fit(problem.model.config.hidden)
        if not groups:
            reason = f"a block needs {needed} bytes of shared memory, and the device has {limit}"
    return reason


class CudaEngine(TritonEngine):
    """Evaluates coalitions of one :class:`TokenProblem` with the fused CUDA kernels.

    Parameters
    ----------
    problem, dtype, device, memory
        As for :class:`~flmoe_fast.engines.triton_engine.TritonEngine`.
    precision : "auto", "fp16x2", "mixed" or "fp16"
        "auto" is "mixed", as there.

    Raises
    ------
    ArgumentError
        The device, dtype, model or precision is not supported, or a weight does not fit fp16.
    """

    name = "cuda"

    def __init__(
        self,
        problem: TokenProblem,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cuda",
        memory: int | None = None,
        precision: str = "auto",
        target: str | None = None,
    ):
        one_of("precision", precision, ("auto", *FUSED_PRECISIONS))
        reason = why_not(dtype, torch.device(device), problem, precision)
        if reason:
            raise ArgumentError("backend", f"'cuda', but {reason}", "a supported GPU, dtype and model, or 'triton'")
        precision = AUTO_PRECISION if precision == "auto" else precision
        super().__init__(problem, dtype=dtype, device=device, memory=memory, precision=precision, target=target)

    def evaluate_part(
        self, plan: Plan, words: torch.Tensor, contexts: int, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, routing and mixture of one chunk."""
        packed = self.weights
        return torch.ops.flmoe_fast.fused_coalitions(
            words,
            plan.constant,
            plan.varying,
            packed.states,
            packed.residual,
            self.segments,
            list(packed.layers),
            list(packed.routing),
            plan.workspace,
            self.heads,
            plan.group,
            offset,
            contexts,
            packed.added,
            self.problem.masked,
            packed.temperature,
            self.target,
            self.precision,
        )

    def _sizes(self) -> cuda_ops.FusedSizes:
        w = self.weights
        return cuda_ops.fused_sizes(
            w.residual, self.segments, w.layers, w.routing, self.heads, self.target, self.precision
        )

    def _weights(self) -> Weights:
        """The Triton engine's, with the matrices of a layer on a tape (E, bytes) and its biases behind it."""
        weights = super()._weights()
        *layers, w_wide, w_stream, bias = weights.layers
        packed = []
        for at in range(0, len(layers), LATER_WEIGHTS):
            matrices, biases = layers[at : at + LATER_WEIGHTS : 2], layers[at + 1 : at + LATER_WEIGHTS : 2]
            packed += [self._tape([matrix.cpu() for matrix in matrices]), *biases]
        assert len(layers) % LATER_WEIGHTS == FIRST_WEIGHTS and HEAD_WEIGHTS == 3
        return replace(weights, layers=(*packed, w_wide, w_stream, bias))

    def _tape(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """Output projection (E, H, H) and up (E, H, F); before the last layer down (E, F, H) and Q, K, V (E, H, 3 H)."""
        tapes = []
        for out, up, *rest in zip(*matrices):
            stages = [_stages(out, wide=True)]
            hidden = _stages(up, wide=False)
            if rest:
                down, qkv = rest
                # Up and down in turn: 64 hidden activations leave the registers before the next are computed.
                hidden = torch.stack([hidden, _stages(down, wide=True)], dim=1).flatten(0, 1)
            stages.append(hidden)
            if rest:
                stages += [_stages(part, wide=True) for part in qkv.chunk(3, dim=1)]
            tapes.append(torch.cat(stages).flatten())
        return torch.stack(tapes).to(self.device)


def _stages(matrix: torch.Tensor, wide: bool) -> torch.Tensor:
    """A matrix (inputs, outputs) of halves as stages (count, bytes): 64 inputs each if ``wide``, else 64 outputs each."""
    matrix = matrix.contiguous()
    inputs, outputs = matrix.shape
    hidden, count = (outputs, inputs // SLAB) if wide else (inputs, outputs // SLAB)
    stages = torch.empty(count, 2 * hidden * SLAB, dtype=torch.uint8)
    extension()[0].fused_pack(matrix.data_ptr(), stages.data_ptr(), inputs, outputs, hidden, wide)
    return stages
