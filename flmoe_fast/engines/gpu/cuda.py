"""The fused CUDA kernels as an engine: two launches for the two layers of a model where the Triton engine has seven.

What a kernel multiplies with lies on its own "tape": the stages it copies to shared memory, byte for byte and in the
order of use (csrc/fused/traits.h). Everything else, planning and chunks included, is the Triton engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.gpu.triton import TritonEngine
from flmoe_fast.engines.gpu.weights import SLAB
from flmoe_fast.native import extension

#: Arithmetics of the fused kernels.
FUSED_PRECISIONS = ("fp16x2", "mixed", "fp16")


class CudaEngine(TritonEngine):
    """Evaluates coalitions of one :class:`TokenProblem` with the fused CUDA kernels.

    Parameters
    ----------
    problem, dtype, device, memory, arch
        As for :class:`~flmoe_fast.engines.gpu.triton.TritonEngine`.
    precision : "auto", "fp16x2", "mixed" or "fp16"
        "auto" is "mixed", as there.

    Raises
    ------
    ArgumentError
        The device, dtype, model or precision is not supported, or a weight does not fit fp16.
    """

    name: ClassVar[str] = "cuda"
    precisions: ClassVar[Sequence[str]] = FUSED_PRECISIONS
    instead: ClassVar[str] = "a supported GPU, dtype and model, or 'triton'"

    @classmethod
    def missing(cls, request: Request) -> str:
        module, lacking = extension()
        if module is None:
            return lacking
        on_device = request.device.type == "cuda"
        if on_device and not module.info()["cuda"]:
            return f"the extension has no CUDA kernels: {module.info()['without_cuda']}"
        reason = super().missing(request)
        if reason or not on_device or request.problem is None:
            return reason
        try:
            with torch.cuda.device(request.device):
                groups, needed, limit = module.fused_fit(request.problem.model.config.hidden)
        except RuntimeError as error:  # no code for this device among what was built, for one
            return f"the kernels do not load on {torch.cuda.get_device_name(request.device)}: {error}"
        return "" if groups else f"a block needs {needed} bytes of shared memory, and the device has {limit}"

    @classmethod
    def unfit(cls, request: Request) -> str:
        if request.precision not in ("auto", *FUSED_PRECISIONS):
            return f"the precision is {request.precision!r}, and the fused kernels compute in one of {FUSED_PRECISIONS}"
        if request.problem is None:
            return ""
        config = request.problem.model.config
        if config.gate is not None or config.fusion != "transformer":
            what = f"gate {config.gate!r}" if config.gate is not None else f"fusion {config.fusion!r}"
            return f"the fused kernels are for dense transformers, and the model has {what}"
        module, lacking = extension()
        if module is None:
            return lacking
        depth, wide = config.hidden // config.heads, config.hidden * config.ffn_multiple
        if not module.fused_supported(config.hidden, depth):
            return (
                f"the width is {config.hidden} with heads of {depth}, and the fused kernels are for 64, 128 or 256 "
                f"with one, two or four heads of at least 32"
            )
        if wide % SLAB:
            return f"the hidden width is {wide}, and the fused kernels take multiples of {SLAB}"
        return super().unfit(request)
