"""The GPU engine: Triton kernels, a fixed number of launches for a chunk of thousands of coalitions.

What is exact to share is what the torch engine shares (see there): two possible rows a token in the first layer, and
its attention as sums over keys. The keys that are the same in all coalitions of a context are summed once per context,
for both states of every query; a coalition adds the few keys that vary, each in its own state. The last
down-projection, the mean and the classifier are one matrix applied to sums over tokens, or over the tokens of each
network where that block is sparse.

In sparse feed-forward blocks a token's choice of networks is a jump. Gates are multiplied in plain float32 in every
precision, so that their own rounding rarely changes a choice; where two logits are nearly equal it can, and so can the
rounding of the stream before them, which is that of the precision.

A :class:`Plan` does all host work: which tokens vary, how coalitions are cut into chunks, where scratch memory is.
Running it launches kernels and nothing else.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from dataclasses import dataclass

import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.coalitions import pack
from flmoe_fast.engines import torch_engine
from flmoe_fast.engines.packed import PackedLayer, PackedModel
from flmoe_fast.engines.problem import Logits, TokenProblem
from flmoe_fast.engines.triton_kernels.configs import find, target_of
from flmoe_fast.engines.triton_kernels.precision import PRECISIONS
from flmoe_fast.engines.triton_ops import SCORE_COLUMNS, Sizes, project_states, sizes_of
from flmoe_fast.model.sparse import slots_per_network

#: What ``precision="auto"`` means here: the least to multiply whose noise share stays far below 1 %.
AUTO_PRECISION = "mixed"
#: Bytes of scratch memory unless told otherwise.
DEFAULT_MEMORY = 1 << 32
#: Largest supported head width, classes, tokens, width of a token and networks of a sparse block.
MOST_DEPTH, MOST_CLASSES, MOST_LENGTH, MOST_HIDDEN, MOST_NETWORKS = 256, 128, 8192, 1024, 256
#: Room of a network without capacity.
UNLIMITED = 2**31 - 1
#: Oldest architecture whose tensor cores have every arithmetic here.
LEAST_CAPABILITY = (8, 0)
LOG2E = 1.0 / math.log(2.0)
#: Triton's interpreter runs one kernel at a time in a process.
_interpreter = threading.Lock()


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), on tensors of the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def model_reason(problem: TokenProblem) -> str:
    """What about a model or a sample keeps this engine from running it; empty if nothing does."""
    config = problem.model.config
    reason = torch_engine.why_not(problem)
    if reason:
        return reason
    limits = (
        ("the head width", config.hidden // config.heads, MOST_DEPTH),
        ("the token width", config.hidden, MOST_HIDDEN),
        ("the number of classes", config.classes, MOST_CLASSES),
        ("the number of tokens", problem.length, MOST_LENGTH),
        ("the number of networks", config.ffn_experts if config.gate else 0, MOST_NETWORKS),
    )
    return "; ".join(f"{what} is {is_}, and at most {most} is supported" for what, is_, most in limits if is_ > most)


def why_not(dtype: torch.dtype, device: torch.device, problem: TokenProblem | None = None) -> str:
    """What keeps this engine from running games of that dtype on that device; empty if nothing does."""
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
    return "" if problem is None else model_reason(problem)


@dataclass(frozen=True)
class Weights:
    """A packed model and a sample's first layer, as the op takes them."""

    states: torch.Tensor  # (planes, E, 2 L, 3 H)
    residual: torch.Tensor  # (E, 2, L, H) fp32
    layers: tuple[torch.Tensor, ...]
    routing: tuple[torch.Tensor, ...]
    added: bool  # whether attention is added to the stream (not in the original generation)
    temperature: float
    networks: tuple[torch.Tensor, ...] = ()  # of sparse blocks: room (M,), then of every layer its gate and its bias
    slots: int = 0  # networks that a token goes to
    among_all: bool = False  # whether scores are probabilities among all networks


@dataclass(frozen=True)
class Corners:
    """Corners of K contexts, reduced per pair and output; everything float64 on the device.

    Attributes
    ----------
    second : Tensor (K, P, O)
        Second differences.
    gap : Tensor (K, P, O)
        Redundancy gaps of the kind asked for; an undefined ratio is zero.
    defined : Tensor (K, P, O) bool, or None
        Where the ratio is defined; None for the other kinds.
    """

    second: torch.Tensor
    gap: torch.Tensor
    defined: torch.Tensor | None


@dataclass
class Plan:
    """Chunks of coalitions ready to run: everything is on the device, sized, and checked.

    :meth:`run` may be called again after ``words`` were overwritten in place, and can be captured in a CUDA graph.

    Attributes
    ----------
    words : LongTensor (C, ceil(L / 64))
        Presence of every token in every coalition, bit by bit.
    constant, varying : IntTensor
        Tokens that are the same in all coalitions of a context, and those that are not.
    group : int
        Coalitions per context.
    chunk : int
        Coalitions evaluated together.
    """

    engine: TritonEngine
    words: torch.Tensor
    constant: torch.Tensor
    varying: torch.Tensor
    group: int
    chunk: int
    workspace: torch.Tensor

    @property
    def launches(self) -> int:
        """Kernel launches of all chunks."""
        return self.engine.sizes.launches() * -(-len(self.words) // self.chunk)

    def parts(self) -> list[tuple[int, int, int, int]]:
        """(start, stop, contexts, offset) of every chunk; the offset is the first coalition's place in its context."""
        parts = []
        for start in range(0, len(self.words), self.chunk):
            stop = min(start + self.chunk, len(self.words))
            first = start // self.group
            parts.append((start, stop, (stop - 1) // self.group - first + 1, start - first * self.group))
        return parts

    def flops(self) -> int:
        """Multiplications and additions in matrix products, each counted once whatever the precision."""
        sizes, varying = self.engine.sizes, len(self.varying)
        return sum(sizes.flops(stop - start, contexts, varying) for start, stop, contexts, _ in self.parts())

    def run(self) -> Logits:
        """Logits, routing and mixture, float64 on the device, without waiting for it."""
        out = self.engine.outputs(len(self.words))
        for start, stop, contexts, offset in self.parts():
            self.run_part(start, stop, contexts, offset, out)
        return out

    def run_part(self, start: int, stop: int, contexts: int, offset: int, out: Logits) -> None:
        """Evaluate coalitions start..stop into their rows of ``out``."""
        found = self.engine.evaluate_part(self, self.words[start:stop], contexts, offset)
        out.experts[start:stop], out.weights[start:stop], out.mixture[start:stop] = found


class TritonEngine:
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
        :class:`~flmoe_fast.engines.triton_kernels.precision.Precision`.

    Raises
    ------
    ArgumentError
        The device, dtype or a size is not supported, or a weight does not fit the operand type.
    """

    name = "triton"

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
        device = torch.device(device)
        reason = why_not(dtype, device, problem)
        if reason:
            raise ArgumentError("backend", f"'triton', but {reason}", "a supported GPU, dtype and model, or 'torch'")
        one_of("precision", precision, ("auto", *PRECISIONS))
        self.precision = AUTO_PRECISION if precision == "auto" else precision
        self.problem = problem
        self.dtype = dtype
        self.device = device
        self.memory = DEFAULT_MEMORY if memory is None else integer("memory", memory, least=1)
        self.heads = problem.model.config.heads
        if target is None:
            target = "sm_80"
            if device.type == "cuda":
                target = target_of(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        self.target = target
        edges = [start for start, _ in problem.segments] + [problem.length]
        self.segments = torch.tensor(edges, dtype=torch.int32, device=device)
        self.weights = self._weights()
        self.sizes = self._sizes()
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)
        # Threads that share an engine share its workspace, and a device runs one chunk at a time anyway.
        self._alone = _interpreter if device.type != "cuda" else threading.Lock()

    # ---- public -----------------------------------------------------------------------------------------------------

    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        """Logits and routing of arbitrary coalitions ``(C, n)`` bool."""
        if not len(coalitions):
            return self.outputs(0)
        return self._run(*self.coalition_words(coalitions), group=len(coalitions))

    def evaluate_toggles(self, contexts: torch.Tensor, toggled: torch.Tensor) -> Logits:
        """Logits and routing of ``contexts[k] ^ toggled[g]`` for all k, g, in the order (k, g)."""
        if not len(contexts) or not len(toggled):
            return self.outputs(0)
        return self._run(*self.toggle_words(contexts, toggled), group=len(toggled))

    def evaluate_part(
        self, plan: Plan, words: torch.Tensor, contexts: int, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, routing and mixture of one chunk of a plan; see :meth:`Plan.parts`."""
        packed = self.weights
        return torch.ops.flmoe_fast.coalition_logits(
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
            list(packed.networks),
            packed.slots,
            packed.among_all,
        )

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

    def plan(self, words: torch.Tensor, varies: torch.Tensor, *, group: int, chunk: int | None = None) -> Plan:
        """Everything that evaluating ``words`` needs; ``group`` consecutive coalitions differ only where ``varies``."""
        chunk = self.chunk(group) if chunk is None else chunk
        chunk = min(chunk, len(words))
        needed = max(self.sizes.bytes(c, self._contexts(c, group)) for c in (chunk, len(words) % chunk or chunk))
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)  # never both at once
            self._workspace = torch.empty(needed, dtype=torch.uint8, device=self.device)
        keys = [mask.nonzero()[:, 0].int().to(self.device) for mask in (~varies, varies)]
        return Plan(self, words.to(self.device), *keys, group, chunk, self._workspace)

    def chunk(self, group: int) -> int:
        """Coalitions whose scratch memory fits ``memory``, whole contexts of ``group`` where one fits; at least one."""

        def fits(count: int) -> bool:
            return self.sizes.bytes(count, self._contexts(count, group)) <= self.memory

        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low - low % group if low >= group else low

    def outputs(self, count: int) -> Logits:
        """Uninitialised logits (count, E, K), routing weights (count, E) and mixture (count, K)."""
        experts, classes = self.sizes.experts, self.sizes.classes
        shapes = (count, experts, classes), (count, experts), (count, classes)
        return Logits(*(torch.empty(*shape, dtype=torch.float64, device=self.device) for shape in shapes))

    def reduce_corners(
        self,
        values: torch.Tensor,
        contexts: torch.Tensor,
        pairs: torch.Tensor,
        single: torch.Tensor,
        kind: str,
        least: float,
    ) -> Corners:
        """Second differences and gaps of the ``values`` (K, G, O) that a corner grid's coalitions have.

        ``contexts`` (K, n) bool, ``pairs`` (P, 2) players and ``single`` (P, 2), the corners in which one of them is
        toggled; corner 0 is the context, the last P toggle both. ``kind`` is "max", "sum", "strict" or "ratio"; joint
        costs up to ``least`` define no ratio.
        """
        from flmoe_fast.engines.triton_kernels.corners import corners

        shape = (len(contexts), len(pairs), values.shape[2])
        second, gap = (torch.empty(shape, dtype=torch.float64, device=self.device) for _ in range(2))
        defined = torch.empty(shape, dtype=torch.int8, device=self.device) if kind == "ratio" else None
        with self._alone:
            corners(
                values.to(self.device, torch.float64).contiguous(),
                contexts.cpu()[:, pairs.cpu()].to(torch.int8).to(self.device).contiguous(),
                single.to(self.device).contiguous(),
                second,
                gap,
                defined,
                kind=kind,
                least=least,
                config=find("corners", "fp32", self.target),
            )
        return Corners(second, gap, None if defined is None else defined.bool())

    # ---- host side --------------------------------------------------------------------------------------------------

    @staticmethod
    def _contexts(count: int, group: int) -> int:
        """Most contexts that ``count`` consecutive coalitions touch."""
        return 1 if group == 1 and count == 1 else -(-count // group) + (1 if count % group else 0)

    def _run(self, words: torch.Tensor, varies: torch.Tensor, *, group: int) -> Logits:
        """Evaluate in chunks; when memory runs out, go on from there with half the chunk."""
        with self._alone:
            return self._finite(self._chunks(words, varies, group))

    def _chunks(self, words: torch.Tensor, varies: torch.Tensor, group: int) -> Logits:
        out = self.outputs(len(words))
        chunk, done = self.chunk(group), 0
        while done < len(words):
            try:
                # Contexts are counted from the start, so what is left keeps its place in them.
                plan = self.plan(words, varies, group=group, chunk=chunk)
                for start, stop, contexts, offset in plan.parts():
                    if stop > done:
                        plan.run_part(start, stop, contexts, offset, out)
                        done = stop
            except torch.OutOfMemoryError as error:
                if chunk == 1:
                    raise ArgumentError(
                        "memory",
                        f"too little for one coalition: {error}",
                        f"{self.sizes.bytes(1, 1):,} bytes of device memory beside the model",
                    ) from error
                self._workspace = torch.empty(0, dtype=torch.uint8, device=self.device)
                chunk = -(-min(chunk, len(words)) // 2)
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

    # ---- what is computed once per sample ---------------------------------------------------------------------------

    def _sizes(self) -> Sizes:
        w = self.weights
        return sizes_of(
            w.residual, self.segments, w.layers, w.routing, self.heads, self.target, self.precision, w.networks, w.slots
        )

    def _weights(self) -> Weights:
        problem, kind = self.problem, PRECISIONS[self.precision]
        # Folded in float64, then rounded once.
        packed = PackedModel.of(problem.model, problem.padded_lengths, torch.float64, torch.device("cpu"))
        experts = len(packed.head)

        def operand(tensor: torch.Tensor) -> torch.Tensor:
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not largest <= torch.finfo(kind.operand).max:
                raise ArgumentError("precision", f"{self.precision!r} with a weight of {largest:.3g}", "'tf32'")
            return tensor.to(self.device, kind.operand).contiguous()

        def single(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device, torch.float32).contiguous()

        both = torch.stack([problem.fills, problem.features])[:, problem.valid]
        x = (both[None] + packed.positions[:, None, problem.valid]).expand(experts, -1, -1, -1)  # (E, 2, L, H)
        qkv, qkv_bias = _projections(packed.layers[0])
        states = project_states(single(x.flatten(1, 2)), operand(qkv), single(qkv_bias), self.target, self.precision)

        layers = []
        for layer, following in zip(packed.layers, (*packed.layers[1:], None)):
            layers += [operand(layer.out), single(layer.out_bias[:, 0])]
            block = layer.networks or layer
            layers += [operand(block.up), single(block.up_bias[:, 0])]
            if following is not None:
                layers += [operand(block.down), single(block.down_bias[:, 0])]
                qkv, qkv_bias = _projections(following)
                layers += [operand(qkv), single(qkv_bias)]
        layers += [single(part) for part in self._head(packed)]
        absent, step = self._routing()
        network = [part for weight, bias in packed.routing for part in (weight[None], bias[None])]
        return Weights(
            states=states,
            residual=single(x if packed.residual else torch.zeros_like(x)),
            layers=tuple(layers),
            routing=tuple(single(part) for part in (absent, step, *network)),
            added=packed.residual,
            temperature=packed.temperature,
            networks=self._gates(packed),
            slots=packed.slots,
            among_all=problem.model.config.gate == "switch",
        )

    def _gates(self, packed: PackedModel) -> tuple[torch.Tensor, ...]:
        """Slots that a network takes of each modality (M,) int32, and every layer's gate (E, H, X) and bias (E, X).

        In float32 whatever the precision; without any numbers for a layer whose block is dense. Nothing where all are.
        """
        config = self.problem.model.config
        if not config.sparse_layers:
            return ()
        room = [UNLIMITED] * len(self.problem.padded_lengths)
        if config.slots_limit:
            count, padded = config.ffn_experts, self.problem.padded_lengths
            room = [slots_per_network(config.gate, tokens, count, training=False) for tokens in padded]
        found = [torch.tensor(room, dtype=torch.int32, device=self.device)]
        none = torch.zeros(0, 0, 0, dtype=torch.float64)
        for layer in packed.layers:
            gate, bias = (none, none) if layer.networks is None else (layer.networks.gate, layer.networks.gate_bias)
            found += [part.to(self.device, torch.float32).contiguous() for part in (gate, bias)]
        return tuple(found)

    def _shares(self) -> torch.Tensor:
        """One over each modality's number of tokens (M,), zero where it has none."""
        counts = torch.tensor([stop - start for start, stop in self.problem.segments], dtype=torch.float64)
        return torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)

    def _head(self, packed: PackedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The classifier on sums of hidden activations (E, M, F, K) and of the stream (E, M, H, K), and its bias.

        Sums of a sparse block are apart for its networks, and have the sum of the scores behind them, which is what
        the bias of a network is multiplied with: (E, M * X, F + SCORE_COLUMNS, K).
        """
        share = self._shares()
        layer, head = packed.layers[-1], packed.head.unflatten(1, (len(share), -1))  # (E, M, H, K)
        bias = packed.head_bias[:, 0] + torch.einsum("emhk,eh,m->ek", head, layer.down_bias[:, 0], (share > 0).double())
        if layer.networks is not None:
            down, shift = (
                part.unflatten(0, (len(head), -1)) for part in (layer.networks.down, layer.networks.down_bias)
            )
            extra = shift.new_zeros(*shift.shape[:2], SCORE_COLUMNS - 1, shift.shape[3])
            rows = torch.cat([down, shift, extra], dim=2)  # (E, X, F + SCORE_COLUMNS, H)
            return (
                torch.einsum("exfh,emhk,m->emxfk", rows, head, share).flatten(1, 2),
                head * share[:, None, None],
                bias,
            )
        wide = torch.einsum("efh,emhk,m->emfk", layer.down, head, share)
        return wide, head * share[:, None, None], bias

    def _routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean features with every token absent (M, H), and what each token's presence adds (L, H)."""
        problem = self.problem
        features, fills = problem.features[problem.valid].clone(), problem.fills[problem.valid]
        absent = features.clone()
        absent[problem.players] = fills[problem.players]
        share = self._shares()
        lengths = [stop - start for start, stop in problem.segments]
        means = torch.stack([part.sum(0) for part in absent.split(lengths)]) * share[:, None]
        each = share.repeat_interleave(torch.tensor(lengths))
        return means, (features - absent) * each[:, None]


def _projections(layer: PackedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Q, K and V of all heads as columns (E, H, 3 H) and their shift (E, 3 H); scores come out in base 2."""
    scale = torch.tensor([LOG2E, 1.0, 1.0], dtype=torch.float64)[:, None, None, None, None]
    qkv = (layer.qkv * scale).permute(1, 3, 0, 2, 4).flatten(2)  # (E, H, 3 H)
    shift = LOG2E * layer.q_bias[:, :, 0].flatten(1)
    return qkv, torch.cat([shift, torch.zeros_like(shift), torch.zeros_like(shift)], dim=1)
