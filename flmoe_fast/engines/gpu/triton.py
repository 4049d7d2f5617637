"""The GPU engine: Triton kernels, a fixed number of launches for a chunk of thousands of coalitions.

What is exact to share is what the portable engine shares (see there): two possible rows a token in the first layer, and
its attention as sums over keys. The keys that are the same in all coalitions of a context are summed once per context,
for both states of every query; a coalition adds the few keys that vary, each in its own state. The last
down-projection, the mean and the classifier are one matrix applied to sums over tokens, or over the tokens of each
network where that block is sparse.

In sparse feed-forward blocks a token's choice of networks is a jump. Gates are multiplied in plain float32 in every
precision, so that their own rounding rarely changes a choice; where two logits are nearly equal it can, and so can the
rounding of the stream before them, which is that of the precision.

A :class:`~flmoe_fast.engines.gpu.plan.Plan` does all host work: which tokens vary, how coalitions are cut into chunks,
where scratch memory is. Running it launches kernels and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.coalitions import pack
from flmoe_fast.engines.engine import Corners, Reduction, Request, TokenEngine
from flmoe_fast.engines.gpu.chunk import layout
from flmoe_fast.engines.gpu.kernels.configs import arch_of
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.gpu.plan import Plan, most_contexts, outputs
from flmoe_fast.engines.gpu.weights import lay_out
from flmoe_fast.engines.portable import TorchEngine
from flmoe_fast.engines.prepared import PreparedSample
from flmoe_fast.engines.problem import Logits, TokenProblem

#: What ``precision="auto"`` means here: the least to multiply whose noise share stays far below 1 %.
AUTO_PRECISION = "mixed"
#: Largest supported head width, classes, tokens, width of a token and networks of a sparse block.
MOST_DEPTH, MOST_CLASSES, MOST_LENGTH, MOST_HIDDEN, MOST_NETWORKS = 256, 128, 8192, 1024, 256
#: Oldest architecture whose tensor cores have every arithmetic here.
LEAST_CAPABILITY = (8, 0)
#: Triton's interpreter runs one kernel at a time in a process.
_interpreter = threading.Lock()


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), on tensors of the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class TritonEngine(TokenEngine):
    """Evaluates coalitions of one :class:`TokenProblem` on an NVIDIA GPU.

    Parameters
    ----------
    problem : TokenProblem
    dtype : torch.float32
        Of the residual stream, norms, softmax and every sum.
    device : CUDA device
    memory : int
        Bytes of scratch memory. Results do not depend on it.
    precision : "auto", "fp16x2", "mixed", "fp16", "tf32", "fp32" or "bf16"
        Operands of matrix products. "fp16x2" rounds weights once to fp16 and keeps activations as two fp16 terms;
        "mixed", which "auto" is, does so but for queries and attention weights, which are one; see
        :class:`~flmoe_fast.engines.gpu.kernels.precision.Precision`.
    arch : str, optional
        Whose tile sizes to use: an architecture ("sm_90") or a device; by default the device's own.

    Raises
    ------
    ArgumentError
        The device, dtype or a size is not supported, or a weight does not fit the operand type.
    """

    name: ClassVar[str] = "triton"
    #: Tokens evaluated per call: what keeps every multiprocessor busy for long.
    block_tokens: ClassVar[int] = 1 << 22
    reduces: ClassVar[bool] = True
    more_exact = "precision='fp16x2' or 'fp32', or dtype=torch.float64"
    #: Operands of its products.
    precisions: ClassVar[Sequence[str]] = tuple(PRECISIONS)
    #: Scratch memory.
    default_memory: ClassVar[int] = 1 << 32
    instead: ClassVar[str] = "a supported GPU, dtype and model, or 'torch'"

    def __init__(
        self,
        problem: TokenProblem,
        *,
        device: torch.device | str = "cuda",
        precision: str = "auto",
        arch: str | None = None,
        **options: Any,
    ):
        one_of("precision", precision, ("auto", *self.precisions))
        self.precision = AUTO_PRECISION if precision == "auto" else precision
        super().__init__(problem, device=device, **options)
        if arch is None:
            arch = "sm_80"
            if self.device.type == "cuda":
                arch = arch_of(torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device))
        self.arch = arch
        self._rest()
        with self._alone():
            self.chunk = lay_out(PreparedSample(problem), self.name, self.precision, arch, self.device)

    def _rest(self) -> None:
        """What a copy makes anew."""
        self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)
        # Threads that share an engine share its workspace, and a device runs one chunk at a time anyway.
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_workspace", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rest()

    # ---- what can run here ------------------------------------------------------------------------------------------

    @classmethod
    def missing(cls, request: Request) -> str:
        device, dtype = request.device, request.dtype
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'flmoe-fast[triton]'"
        if device.type != "cuda" and not interpreted():
            return f"the device is {device}, and the kernels run on NVIDIA GPUs"
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return "torch finds no CUDA device"
            capability = torch.cuda.get_device_capability(device)
            if capability < LEAST_CAPABILITY:
                return f"{torch.cuda.get_device_name(device)} has compute capability {capability}, and 8.0 is needed"
        if dtype != torch.float32:
            return f"the dtype is {dtype}, and the engine computes in float32 and less"
        return ""

    @classmethod
    def unfit(cls, request: Request) -> str:
        problem = request.problem
        if problem is None:
            return ""
        config = problem.model.config
        reason = TorchEngine.unfit(request)
        if reason:
            return reason
        limits = (
            ("the head width", config.hidden // config.heads, MOST_DEPTH),
            ("the token width", config.hidden, MOST_HIDDEN),
            ("the number of classes", config.classes, MOST_CLASSES),
            ("the number of tokens", problem.length, MOST_LENGTH),
            ("the number of networks", config.ffn_experts or 0, MOST_NETWORKS),
        )
        return "; ".join(
            f"{what} is {is_}, and at most {most} is supported" for what, is_, most in limits if is_ > most
        )

    @classmethod
    def make(cls, request: Request) -> TritonEngine:
        arithmetic: dict[str, Any] = {"dtype": request.dtype, "precision": request.precision}
        return cls(request.known_problem, device=request.device, memory=request.memory, **arithmetic)

    @property
    def arithmetic(self) -> str:
        return self.precision

    def finer(self) -> Request | None:
        """Two terms of every activation, then float64."""
        if self.precision in ("fp16x2", "fp32"):
            return super().finer()
        return Request(self.dtype, self.device, self.problem, self.name, "fp16x2")

    def about(self) -> dict[str, Any]:
        return {"precision": self.precision, "configurations": self.arch}

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        if not len(coalitions):
            return outputs(self.chunk, 0)
        return self._run(*self.coalition_words(coalitions), group=len(coalitions))

    def evaluate_toggles(self, contexts: torch.Tensor, toggled: torch.Tensor) -> Logits:
        if not len(contexts) or not len(toggled):
            return outputs(self.chunk, 0)
        return self._run(*self.toggle_words(contexts, toggled), group=len(toggled))

    def coalition_words(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Presence words (C, ceil(L / 64)) of coalitions (C, n), and which tokens vary (L,) bool; on the CPU."""
        coalitions = coalitions.cpu()
        varies = torch.zeros(self.problem.length, dtype=torch.bool)
        varies[self.problem.players] = coalitions.any(0) & ~coalitions.all(0)
        return pack(self._tokens(coalitions, absent=True)), varies

    def toggle_words(self, contexts: torch.Tensor, toggled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Presence words (K * G, ceil(L / 64)) of ``contexts[k] ^ toggled[g]``, and which tokens are toggled (L,)."""
        contexts, toggled = contexts.cpu(), toggled.cpu()
        flips = self._tokens(toggled, absent=False)
        words = pack(self._tokens(contexts, absent=True))[:, None] ^ pack(flips)
        return words.flatten(0, 1), flips.any(0)

    def plan(self, words: torch.Tensor, varies: torch.Tensor, *, group: int, size: int | None = None) -> Plan:
        """Everything that evaluating ``words`` needs; ``group`` consecutive coalitions differ only where ``varies``."""
        size = min(self.fitting(group) if size is None else size, len(words))
        needed = max(self.bytes(count, group) for count in (size, len(words) % size or size))
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)  # never both at once
            self._workspace = torch.empty(needed, dtype=torch.uint8, device=self.device)
        constant, varying = (mask.nonzero()[:, 0].int().to(self.device) for mask in (~varies, varies))
        chunk = dataclasses.replace(self.chunk, constant=constant, varying=varying)
        return Plan(chunk, words.to(self.device), group, size, self._workspace)

    def bytes(self, count: int, group: int) -> int:
        """Bytes of scratch memory that ``count`` consecutive coalitions in contexts of ``group`` need."""
        return layout(self.chunk.spec, count, most_contexts(count, group)).bytes

    def fitting(self, group: int) -> int:
        """Coalitions whose scratch memory fits ``memory``, whole contexts of ``group`` where one fits; at least one."""

        def fits(count: int) -> bool:
            return self.bytes(count, group) <= self.memory

        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low - low % group if low >= group else low

    def reduce_corners(self, values: torch.Tensor, contexts: torch.Tensor, reduction: Reduction) -> Corners:
        from flmoe_fast.engines.gpu.kernels.corners import corners

        pairs, kind = reduction.pairs, reduction.kind
        shape = (len(contexts), len(pairs), values.shape[2])
        second, gap = (torch.empty(shape, dtype=torch.float64, device=self.device) for _ in range(2))
        defined = torch.empty(shape, dtype=torch.int8, device=self.device) if kind == "ratio" else None
        with self._alone():
            corners(
                values.to(self.device, torch.float64).contiguous(),
                contexts.cpu()[:, pairs.cpu()].to(torch.int8).to(self.device).contiguous(),
                reduction.single.to(self.device).contiguous(),
                second,
                gap,
                defined,
                kind=kind,
                least=reduction.least,
                config=self.chunk.spec.config("corners"),
            )
        return Corners(second, gap, None if defined is None else defined.bool())

    # ---- host side --------------------------------------------------------------------------------------------------

    def _alone(self) -> threading.Lock:
        """What a thread holds while it launches."""
        return self._lock if self.device.type == "cuda" else _interpreter

    def _run(self, words: torch.Tensor, varies: torch.Tensor, *, group: int) -> Logits:
        """Evaluate in chunks; when memory runs out, go on from there with half the chunk."""
        with self._alone():
            return self._finite(self._chunks(words, varies, group))

    def _chunks(self, words: torch.Tensor, varies: torch.Tensor, group: int) -> Logits:
        out = outputs(self.chunk, len(words))
        size, done = self.fitting(group), 0
        while done < len(words):
            try:
                # Contexts are counted from the start, so what is left keeps its place in them.
                plan = self.plan(words, varies, group=group, size=size)
                for start, part in plan.parts():
                    if start + part.coalitions > done:
                        plan.run_part(start, part, out)
                        done = start + part.coalitions
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise ArgumentError(
                        "memory",
                        f"too little for one coalition: {error}",
                        f"{self.bytes(1, 1):,} bytes of device memory beside the model",
                    ) from error
                self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)
                size = -(-min(size, len(words)) // 2)
        return out

    def _finite(self, logits: Logits) -> Logits:
        """The first look at a result, and the first wait for the device."""
        if not bool(torch.isfinite(logits.experts).all() & torch.isfinite(logits.weights).all()):
            raise ArgumentError(
                "precision",
                f"{self.precision!r}, in which some activation exceeds what {PRECISIONS[self.precision].operand} holds",
                "'tf32', 'bf16' or 'fp32' for this model",
            )
        return logits

    def _tokens(self, coalitions: torch.Tensor, absent: bool) -> torch.Tensor:
        """A bool matrix (C, L) over tokens from one over players; tokens that are no players take ``absent``."""
        tokens = torch.full((len(coalitions), self.problem.length), absent, dtype=torch.bool)
        tokens[:, self.problem.players] = coalitions
        return tokens
