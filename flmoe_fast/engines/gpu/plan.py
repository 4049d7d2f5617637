"""Coalitions cut into chunks: all host work of an evaluation, done before the first launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flmoe_fast.engines.gpu.chunk import Chunk, Part, flops, steps
from flmoe_fast.engines.problem import Logits


@dataclass
class Plan:
    """Chunks of coalitions ready to run: everything is on the device, sized, and checked.

    :meth:`run` may be called again after ``words`` were overwritten in place, and can be captured in a CUDA graph.

    Attributes
    ----------
    chunk : Chunk
        What every chunk reads, the tokens that vary within a context among it.
    words : LongTensor (C, ceil(L / 64))
        Presence of every token in every coalition, bit by bit.
    group : int
        Coalitions per context.
    size : int
        Coalitions evaluated together.
    workspace : ByteTensor
        Scratch memory of one chunk.
    """

    chunk: Chunk
    words: torch.Tensor
    group: int
    size: int
    workspace: torch.Tensor

    @property
    def launches(self) -> int:
        """Kernel launches of all chunks."""
        return sum(len(steps(self.chunk.spec, part)) for _, part in self.parts())

    def parts(self) -> list[tuple[int, Part]]:
        """The first coalition of every chunk, and the chunk's place among the contexts."""
        parts = []
        for start in range(0, len(self.words), self.size):
            stop = min(start + self.size, len(self.words))
            first = start // self.group
            contexts, offset = (stop - 1) // self.group - first + 1, start - first * self.group
            parts.append((start, Part(stop - start, contexts, self.group, offset, len(self.chunk.varying))))
        return parts

    def flops(self) -> int:
        """Multiplications and additions in matrix products, each counted once whatever the precision."""
        return sum(flops(self.chunk.spec, part) for _, part in self.parts())

    def run(self) -> Logits:
        """Logits, routing and mixture, float64 on the device, without waiting for it."""
        out = outputs(self.chunk, len(self.words))
        for start, part in self.parts():
            self.run_part(start, part, out)
        return out

    def run_part(self, start: int, part: Part, out: Logits) -> None:
        """Evaluate one chunk, whose first coalition is number ``start``, into its rows of ``out``."""
        rows = slice(start, start + part.coalitions)
        place = [part.group, part.offset, part.contexts]
        found = torch.ops.flmoe_fast.coalition_logits(
            self.words[rows], self.chunk.tensors(), self.workspace, self.chunk.spec.text, place
        )
        assert out.mixture is not None
        out.experts[rows], out.weights[rows], out.mixture[rows] = found


def outputs(chunk: Chunk, count: int) -> Logits:
    """Uninitialised logits (count, E, K), routing weights (count, E) and mixture (count, K)."""
    spec = chunk.spec
    shapes = (count, spec.experts, spec.classes), (count, spec.experts), (count, spec.classes)
    return Logits(*(torch.empty(*shape, dtype=torch.float64, device=chunk.states.device) for shape in shapes))


def most_contexts(count: int, group: int) -> int:
    """Most contexts of ``group`` coalitions that ``count`` consecutive ones touch."""
    return 1 if group == 1 and count == 1 else -(-count // group) + (1 if count % group else 0)
