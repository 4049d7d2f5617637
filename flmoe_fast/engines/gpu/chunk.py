"""A chunk of coalitions as data: what it reads, the steps it takes, and the op that runs them.

A :class:`Chunk` holds every tensor of a model and a sample that the kernels read, a :class:`Spec` the numbers that fix
the launches. From the two, :func:`steps` lists what is launched, in order; the number of launches, the scratch memory,
the multiplications and the run itself all come from that one list.

One call of ``torch.ops.flmoe_fast.coalition_logits`` is one chunk, so that what PyTorch spends on calling it does not
matter, and so that ``torch.compile``, FakeTensor and CUDA graphs see a single opaque, pure function with one declared
scratch buffer. The steps do not depend on the numbers of experts, coalitions or tokens; nothing is copied to the host
and nothing is allocated but the results. Triton is imported by the first real call.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.gpu.kernels.configs import Config, find
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS, Precision
from flmoe_fast.engines.gpu.workspace import Array, Layout

#: Kernels whose products are small or none, in fp32 whatever the precision.
PLAIN = ("hidden", "head", "mean_features", "gate", "choose", "scan", "place", "combine", "pool", "corners")
#: Columns behind the pooled activations of a sparse block: the sum of the scores, and zeros that keep rows aligned.
SCORE_COLUMNS = 16
#: Kernels that leave LayerNorm statistics behind.
PRODUCERS = ("project", "down", "project_last")

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """Numbers of a model, a sample and an arithmetic that fix the steps of a chunk."""

    engine: str  # whose steps: "triton" or "cuda"
    arch: str  # whose tiles: an architecture ("sm_90") or a device
    precision: str
    experts: int
    layers: int
    length: int
    hidden: int
    heads: int
    wide: int
    classes: int
    modalities: int
    routing: tuple[int, ...]  # widths of the routing network's layers
    normalised: bool  # whether the routing network reads unit vectors
    temperature: float
    added: bool  # whether attention is added to the stream (not in the original generation)
    sparse: tuple[bool, ...] = ()  # which layers' feed-forward blocks are; empty where none is
    networks: int = 0  # of a sparse feed-forward block
    slots: int = 0  # networks that a token goes to
    among_all: bool = False  # whether scores are probabilities among all networks

    @cached_property
    def text(self) -> str:
        """All of it as one string, which is what the op takes; :meth:`of` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    @functools.cache
    def of(text: str) -> Spec:
        """The inverse of :attr:`text`."""
        numbers = json.loads(text)
        return Spec(**numbers | {"routing": tuple(numbers["routing"]), "sparse": tuple(numbers["sparse"])})

    @property
    def kind(self) -> Precision:
        """The arithmetic."""
        return PRECISIONS[self.precision]

    @property
    def depth(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward block is sparse."""
        return bool(self.sparse) and self.sparse[layer]

    def config(self, kernel: str) -> Config:
        """Tiles of one kernel."""
        attention = kernel in ("context", "first", "later")
        precision = "fp32" if kernel in PLAIN else self.precision
        return find(kernel, precision, self.arch, self.depth if attention else 0)

    def block(self) -> int:
        """Columns of one block of LayerNorm statistics of the stream: those of a tile of the kernels that leave it."""
        blocks = {self.config(kernel).columns for kernel in PRODUCERS}
        if len(blocks) > 1:
            raise ArgumentError(
                f"configuration of {self.arch}", f"columns {sorted(blocks)}", f"one number for {PRODUCERS}"
            )
        return blocks.pop()


@dataclass(frozen=True)
class Layer:
    """Weights of one encoder layer of all E experts; without numbers where there is nothing to multiply.

    The Triton kernels read matrices, the fused CUDA kernels a tape of the same matrices instead.
    """

    out: torch.Tensor  # (E, H, H)
    out_bias: torch.Tensor  # (E, H) fp32
    up: torch.Tensor  # (E, H, F), or (E * X, H, F) of a sparse block
    up_bias: torch.Tensor  # (E, F) or (E * X, F) fp32
    down: torch.Tensor  # (E, F, H) or (E * X, F, H); none in the last layer
    down_bias: torch.Tensor  # (E, H) or (E * X, H) fp32
    qkv: torch.Tensor  # (E, H, 3 H) of the next layer; none in the last
    qkv_bias: torch.Tensor  # (E, 3 H) fp32
    gate: torch.Tensor  # (E, H, X) fp32 of a sparse block
    gate_bias: torch.Tensor  # (E, X) fp32
    tape: torch.Tensor  # (E, bytes) uint8


@dataclass(frozen=True)
class Chunk:
    """Everything that a chunk reads but its coalitions."""

    spec: Spec
    constant: torch.Tensor  # (keys,) int32: tokens that are the same in all coalitions of a context
    varying: torch.Tensor  # (keys,) int32: tokens that are not
    states: torch.Tensor  # (planes, E, 2 L, 3 H): first layer's Q, K, V of every token absent, then present
    residual: torch.Tensor  # (E, 2, L, H) fp32: what the first layer's attention is added to
    segments: torch.Tensor  # (M + 1,) int32: first token of every modality, and their number
    head_wide: torch.Tensor  # (E, G, F, K) fp32: classifier on sums of the last hidden activations
    head_stream: torch.Tensor  # (E, M, H, K) fp32: the same on sums of the stream
    head_bias: torch.Tensor  # (E, K) fp32
    absent: torch.Tensor  # (M, H) fp32: mean features with every token absent
    step: torch.Tensor  # (L, H) fp32: what a token's presence adds to them
    room: torch.Tensor  # (M,) int32: slots that a network of a sparse block takes of a modality; else none
    layers: tuple[Layer, ...]
    router: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (1, in, out) and (1, out) fp32 of every routing layer

    def tensors(self) -> list[torch.Tensor]:
        """All tensors in a fixed order; :meth:`of` is the inverse."""
        found = [getattr(self, name) for name in _SINGLE]
        found += [getattr(layer, name) for layer in self.layers for name in _OF_LAYER]
        return found + [part for linear in self.router for part in linear]

    @staticmethod
    def of(spec: Spec, tensors: Sequence[torch.Tensor]) -> Chunk:
        """A chunk of the tensors that :meth:`tensors` gave."""
        rest = iter(tensors)
        single = {name: next(rest) for name in _SINGLE}
        layers = tuple(Layer(*(next(rest) for _ in _OF_LAYER)) for _ in range(spec.layers))
        return Chunk(spec, **single, layers=layers, router=tuple((next(rest), next(rest)) for _ in spec.routing))


_OF_LAYER = tuple(field.name for field in fields(Layer))
_SINGLE = tuple(field.name for field in fields(Chunk) if field.name not in ("spec", "layers", "router"))


class Part(NamedTuple):
    """Which coalitions a chunk has: ``group`` successive ones are a context, ``offset`` of the first was before."""

    coalitions: int
    contexts: int
    group: int = 1
    offset: int = 0
    varying: int = 0  # tokens that vary within a context

    def rows(self, spec: Spec) -> int:
        """Tokens of all coalitions."""
        return self.coalitions * spec.length


@dataclass(frozen=True)
class Run:
    """A chunk in flight, as a step sees it."""

    chunk: Chunk
    words: torch.Tensor  # (C, ceil(L / 64)) int64
    part: Part
    arrays: dict[str, torch.Tensor]  # by name: what this step writes, and what steps before it wrote
    results: Results


@dataclass(frozen=True)
class Step:
    """One launch.

    Attributes
    ----------
    kernel : str
        What its tiles and budgets go by.
    writes : mapping of Array
        Scratch arrays that it writes, by name.
    launch : function of a Run
    flops : int
        Multiplications and additions in its matrix products, each counted once whatever the precision. Those of the
        head and the routing network, a thousandth, are not counted, and sparse blocks as if every slot found room.
    """

    kernel: str
    writes: Mapping[str, Array]
    launch: Callable[[Run], None]
    flops: int = 0


def steps(spec: Spec, part: Part) -> list[Step]:
    """What evaluating a chunk launches, in order."""
    if spec.engine == "cuda":
        from flmoe_fast.engines.gpu import cuda_chunk

        return cuda_chunk.steps(spec, part)
    from flmoe_fast.engines.gpu import triton_chunk

    return triton_chunk.steps(spec, part)


def layout(spec: Spec, coalitions: int, contexts: int) -> Layout:
    """Scratch memory of a chunk."""
    return Layout(step.writes for step in steps(spec, Part(coalitions, contexts)))


def flops(spec: Spec, part: Part) -> int:
    """Multiplications and additions of a chunk, see :class:`Step`."""
    return sum(step.flops for step in steps(spec, part))


def _check(words: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
    """Refuse what the kernels would read wrongly: another dtype, strides, or memory of another device."""
    if words.dtype != torch.int64:
        raise ArgumentError("words", words.dtype, "torch.int64")
    for tensor in (words, *others):
        if tensor.device != words.device:
            raise ArgumentError("words", f"{words.device} beside a tensor on {tensor.device}", "tensors of one device")
        if not tensor.is_contiguous():
            raise ArgumentError("tensors", f"strides {tensor.stride()}", "contiguous tensors")


def _coalition_logits(
    words: torch.Tensor, tensors: list[torch.Tensor], workspace: torch.Tensor, text: str, place: Sequence[int]
) -> Results:
    spec = Spec.of(text)
    chunk = Chunk.of(spec, tensors)
    results = _results(words, spec)
    if not len(words):
        return results
    _check(words, [*tensors, workspace])
    group, offset, contexts = place
    part = Part(len(words), contexts, group, offset, len(chunk.varying))
    for step, run in launches(chunk, words, part, workspace, results):
        step.launch(run)
    return results


def launches(
    chunk: Chunk, words: torch.Tensor, part: Part, workspace: torch.Tensor, results: Results
) -> Iterator[tuple[Step, Run]]:
    """Every step of a chunk with what it is to be launched on, in order.

    ``results`` are logits (C, E, K), routing (C, E) and mixture (C, K) to write, float64.
    """
    listed = steps(chunk.spec, part)
    places = Layout(step.writes for step in listed)
    if workspace.dtype != torch.uint8 or workspace.numel() < places.bytes:
        raise ArgumentError("workspace", f"{workspace.numel()} bytes", f"at least {places.bytes} bytes of torch.uint8")
    arrays: dict[str, torch.Tensor] = {}
    for step in listed:
        arrays |= {name: places.view(workspace, name, array) for name, array in step.writes.items()}
        yield step, Run(chunk, words, part, arrays, results)


def _results(words: torch.Tensor, spec: Spec) -> Results:
    """Logits (C, E, K), routing (C, E) and mixture (C, K), uninitialised."""
    count = words.shape[0]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float64, device=words.device)

    return empty(count, spec.experts, spec.classes), empty(count, spec.experts), empty(count, spec.classes)


def _on_cpu(words: torch.Tensor, *others) -> Results:
    """Triton's interpreter runs on CPU tensors; without it there is nothing that could."""
    import triton

    if not triton.knobs.runtime.interpret:
        raise ArgumentError(
            "words", "a tensor on the CPU", "CUDA tensors (on a CPU the kernels run only under TRITON_INTERPRET=1)"
        )
    return _coalition_logits(words, *others)


library = torch.library.Library("flmoe_fast", "DEF")
library.define(
    "coalition_logits(Tensor words, Tensor[] tensors, Tensor(a!) workspace, str spec, SymInt[] place) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("coalition_logits", _coalition_logits, "CUDA")
library.impl("coalition_logits", _on_cpu, "CPU")


@torch.library.register_fake("flmoe_fast::coalition_logits", lib=library)
def _(words, tensors, workspace, spec, place):
    torch._check(words.dim() == 2, lambda: "words must be (C, words)")
    torch._check(words.dtype == torch.int64, lambda: "words must be int64")
    return _results(words, Spec.of(spec))
