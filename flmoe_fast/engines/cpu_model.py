"""A stack as the native extension multiplies it, and a sample's part of it.

The extension pools final states by *slot* and applies one linear head to the pooled sums. For an FL-I2MoE a slot is a
modality; for a stack whose head reads single tokens every such token has one of its own.

Its LayerNorms have one epsilon, 1e-5. A stream scaled by c has the norms of the stream itself with 1e-5 / c^2 in place
of 1e-5; so c = sqrt(1e-5 / epsilon), applied to everything that is added to the stream, makes it any other epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flmoe_fast import native
from flmoe_fast.engines import cores
from flmoe_fast.engines.scratch import Scratch
from flmoe_fast.engines.stack import EPSILON, LOG2E, Layer, Networks, Stack

#: Every matrix width is padded to whole cells.
CELL = 32


@dataclass(frozen=True)
class PatternSums:
    """Layer-1 attention sums of every pattern, and which patterns a coalition's are the sum of."""

    table: torch.Tensor  # (P, E, h, L + J, d + 1) numerators, then the denominator
    pick: torch.Tensor  # (C, G) int32
    absent_row: torch.Tensor  # (L,) int32: the row with which a varying token asks where it is absent, else -1


class NativeModel:
    """A stack packed for one instruction level; any number of samples and threads may run it."""

    def __init__(self, stack: Stack, level: str):
        self.stack, self.level = stack, level
        self.depth = stack.attended // stack.heads
        #: What the stream is multiplied with, so that its norms have the stack's epsilon.
        self.scale = math.sqrt(EPSILON / stack.layers[0].norm1.epsilon)
        last = stack.layers[-1]
        self._model = native.module().CpuModel(
            level=level,
            experts=stack.count,
            layers=len(stack.layers),
            hidden=stack.width,
            heads=stack.heads,
            wide=stack.expanded,
            residual=stack.residual,
            networks=stack.networks,
            slots=stack.slots,
            among_all=stack.gate == "switch",
            ends=1 if last.networks is None else stack.networks,
        )
        for index, layer in enumerate(stack.layers):
            self._set_layer(index, layer, first=index == 0, last=layer is last)

    def __reduce__(self) -> tuple[type[NativeModel], tuple[Stack, str]]:
        return NativeModel, (self.stack, self.level)

    def workspace(self, length: int, slots: int) -> int:
        """Bytes that one thread needs for samples of that many tokens."""
        return -(-self._model.workspace(length=length, modalities=slots) // 64) * 64

    def run(self, **arrays: int) -> None:
        """One native call; see csrc/cpu/shape.h for the arrays, given as addresses."""
        self._model.run(**arrays)

    def by_head(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns (.., parts * D) with every head's padded to whole cells."""
        return F.pad(columns.unflatten(-1, (-1, self.stack.heads, self.depth)), (0, -self.depth % CELL)).flatten(-3)

    def _set_layer(self, index: int, layer: Layer, first: bool, last: bool) -> None:
        # The first layer's projections are a sample's, the last down-projection is part of the head.
        qkv, bias = layer.projections(LOG2E)
        dense = layer.networks is None
        down = dense and not last
        self._hand_over(
            self._model.set_layer,
            index,
            None if first else self.by_head(qkv),
            None if first else self.by_head(bias),
            self.by_head(layer.out.mT).mT * self.scale,
            layer.out_bias * self.scale,
            layer.up if dense else None,
            layer.up_bias if dense else None,
            layer.down * self.scale if down else None,
            layer.down_bias * self.scale if down else None,
        )
        if layer.networks is not None:
            self._set_networks(index, layer.networks, last)

    def _set_networks(self, index: int, networks: Networks, last: bool) -> None:
        self._hand_over(
            self._model.set_networks,
            index,
            networks.gate,
            networks.gate_bias,
            networks.up,
            networks.up_bias,
            None if last else networks.down * self.scale,
            networks.down_bias * self.scale,
        )

    @staticmethod
    def _hand_over(setter: Callable[..., None], layer: int, *arrays: torch.Tensor | None) -> None:
        """Round to float32, pad, and let the extension make its packed copy."""
        padded = [None if a is None else _padded(a.float()) for a in arrays]
        setter(layer, *[0 if a is None else a.data_ptr() for a in padded])


@dataclass(frozen=True)
class Reading:
    """What is made of the final states: a linear head on their sums over the tokens of each slot; float64."""

    slot: torch.Tensor  # (L,) int32
    head: torch.Tensor  # (E, K, S, X F' + H') hidden activations of the last layer, then the stream
    bias: torch.Tensor  # (E, K)

    @staticmethod
    def head_of_sums(wide: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """From heads on the last hidden activations (E, S, X, F, K) and on the final stream (E, S, H, K)."""
        wide, stream = wide.permute(0, 4, 1, 2, 3), stream.permute(0, 3, 1, 2)
        return torch.cat([_pad_last(wide).flatten(3), _pad_last(stream)], dim=-1).contiguous()

    @staticmethod
    def of_tokens(reads: torch.Tensor, length: int, last: Layer, scale: float) -> Reading:
        """Final states of the tokens ``reads`` (R,), one after the other: K = R H outputs of one stack."""
        count, hidden = len(reads), last.down.shape[2]
        slot = torch.full((length,), count, dtype=torch.int32)  # all others share one that nobody reads
        slot[reads] = torch.arange(count, dtype=torch.int32)
        state = torch.cat([_pad_last(last.down[0].T), _pad_last(torch.eye(hidden).double() / scale)], dim=1)
        head = torch.zeros(count, hidden, count + 1, state.shape[1], dtype=torch.float64)
        head[torch.arange(count), :, torch.arange(count)] = state
        return Reading(slot, head.flatten(0, 1)[None].contiguous(), last.down_bias[0].repeat(1, count).contiguous())


class NativeSample:
    """One sample before a native stack.

    Parameters
    ----------
    model : NativeModel
    residual : Tensor (E, 2, L, H)
        What the first layer's attention is added to in both states of every token, its bias included, times the
        model's scale.
    reading : Reading
    room : tuple of ints, optional
        Slots of each modality's tokens that a network takes.
    """

    def __init__(
        self, model: NativeModel, residual: torch.Tensor, reading: Reading, room: tuple[int, ...] | None = None
    ):
        self.model, self.reading = model, reading
        self._base = _padded(residual.float(), rows=False)
        self._room = None if room is None else torch.tensor(room, dtype=torch.int32)
        self._scratch = Scratch()

    def run(self, tokens: torch.Tensor, first: PatternSums | torch.Tensor, memory: int) -> torch.Tensor:
        """Head outputs (C, E, K) float64 of coalitions given as token states (C, L), in calls of bounded memory.

        ``first`` is the first layer's attention: sums that coalitions share, or the projected Q, K and V of both states
        of every token (E, 2, L, 3 D), scores in base 2 and heads padded (:meth:`NativeModel.by_head`).
        """
        count, length = tokens.shape
        experts, outputs, slots = self.reading.head.shape[:3]
        threads, stride = cores.threads(), self.model.workspace(length, slots)
        workspace = self._scratch.tensor("workspace", threads * stride)
        logits = torch.empty(count, experts, outputs, dtype=torch.float64)
        present = tokens.to(torch.uint8)
        chunk = max(1, memory // (length + 8 * experts * outputs))
        for start in range(0, count, chunk):
            self.model.run(
                **_first_arrays(first, start),
                base=self._base.data_ptr(),
                present=present[start:].data_ptr(),
                modality=self.reading.slot.data_ptr(),
                room=0 if self._room is None else self._room.data_ptr(),
                head=self.reading.head.data_ptr(),
                head_bias=self.reading.bias.data_ptr(),
                logits=logits[start:].data_ptr(),
                coalitions=min(chunk, count - start),
                length=length,
                modalities=slots,
                classes=outputs,
                threads=threads,
                workspace=workspace.data_ptr(),
                stride=stride,
            )
        return logits


def _first_arrays(first: PatternSums | torch.Tensor, start: int) -> dict[str, int]:
    """The first layer's attention for coalitions from ``start`` on, as addresses and sizes."""
    nothing = {"table": 0, "pick": 0, "absent_row": 0, "groups": 0, "queries": 0, "states": 0}
    if isinstance(first, torch.Tensor):
        return nothing | {"states": first.data_ptr()}
    return nothing | {
        "table": first.table.data_ptr(),
        "pick": first.pick[start:].data_ptr(),
        "absent_row": first.absent_row.data_ptr(),
        "groups": first.pick.shape[1],
        "queries": first.table.shape[3],
    }


def _pad_last(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % CELL))


def _padded(tensor: torch.Tensor, rows: bool = True) -> torch.Tensor:
    """A contiguous tensor whose last axis, and the one before it unless it has one row, are whole cells."""
    below = -tensor.shape[-2] % CELL if rows and tensor.shape[-2] > 1 else 0
    padding = (0, -tensor.shape[-1] % CELL, 0, below)
    return (F.pad(tensor, padding) if any(padding) else tensor).contiguous()
