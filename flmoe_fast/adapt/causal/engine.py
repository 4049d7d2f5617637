"""Final states of coalitions through a decoder's own layers, each path of their prefix tree computed once.

Paths that leave the same parent run together as one packed sequence: every token attends to what its own path and the
parent's beginning hold, by a mask. Nothing of a layer is written again; it gets states, positions and masks as from its
model, and a cache that hands it the keys and values of the tokens before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flmoe_fast.adapt.around import eager
from flmoe_fast.adapt.causal.reading import Reading, first_of
from flmoe_fast.adapt.causal.tree import Path, beginnings, blocks, paths
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.steady import steady

#: Tokens to run at a time: enough for matrix products, few enough for the square of them in attention.
CHUNK = 512
#: Attention that takes any mask; others are written out.
MASKED = ("sdpa", "eager")


class Kept:
    """Keys and values in the form that layers ask for, with those of the tokens before, for one layer.

    Attributes
    ----------
    keys, values : Tensor or None
        Those of the new tokens, once the layer has run.
    """

    is_compileable = False

    def __init__(self, before: tuple[torch.Tensor, torch.Tensor] | None):
        self.before = before
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        """Keep the new ones and return all."""
        self.keys, self.values = keys, values
        if self.before is None:
            return keys, values
        return tuple(torch.cat(pair, dim=2) for pair in zip(self.before, (keys, values)))

    def get_seq_length(self, *_: object) -> int:
        """How many tokens there are before the new ones."""
        return 0 if self.before is None else self.before[0].shape[2]


@dataclass
class _Computed:
    """A path's tokens and, layer by layer, their keys and values (1, h, S, d)."""

    positions: torch.Tensor
    kept: list[tuple[torch.Tensor, torch.Tensor]]

    def until(self, stop: int) -> _Computed:
        count = int((self.positions < stop).sum())
        return _Computed(self.positions[:count], [(k[:, :, :count], v[:, :, :count]) for k, v in self.kept])


class CausalEngine:
    """Final states of the last positions for sequences that differ in some of their tokens.

    Parameters
    ----------
    model : nn.Module
    reading : Reading
    reads : int
        Positions at the end whose final states are wanted.
    memory : int
        Bytes of keys and values to hold at a time.

    Attributes
    ----------
    tokens : int
        Tokens that went through the layers so far.
    """

    def __init__(self, model: torch.nn.Module, reading: Reading, reads: int, memory: int):
        self.model, self.reading, self.reads = model, reading, reads
        self.length = len(reading.states)
        self.closed = reading.closed()
        self.tokens = 0
        device = reading.states.device
        self._visible = [part.to(device) for part in reading.visible]
        width = reading.states.shape[1] * reading.states.element_size()
        # Keys and values of a token take no more than two states a layer in any model with grouped queries.
        self._most = max(1, memory // (2 * len(reading.calls) * width))

    def evaluate(self, variants: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H) of sequences.

        Parameters
        ----------
        variants : integer Tensor (C, L)
            Which state every token has: 0 for one that is left out, v for ``states[v - 1]``.
        states : Tensor (V, L, H)
            What may enter the first layer.
        """
        distinct, again = variants.unique(dim=0, return_inverse=True)
        order, common = beginnings(distinct, self.closed)
        shape = (len(distinct), self.reads, states.shape[2])
        final = torch.empty(shape, dtype=states.dtype, device=states.device)
        with steady(self.model), eager(self.model, unless=MASKED):
            own = [int((distinct[row, start:] > 0).sum()) for row, start in zip(order, common)]
            for low, high in blocks(common, own, self._most):
                rows = torch.tensor(order[low:high])
                for row, found in self._block(distinct[rows], states):
                    final[rows[row]] = found
        return final[again]

    def _block(self, variants: torch.Tensor, states: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        tree = paths(variants, self.closed)
        parents = {path.parent for path in tree}
        computed: dict[int, _Computed] = {}
        families: dict[tuple[int, int], list[int]] = {}
        for number, path in enumerate(tree):
            families.setdefault((path.level, path.parent), []).append(number)
        chains: dict[int, _Computed] = {}
        for (_, parent), members in sorted(families.items()):
            before = None if parent < 0 else self._chain(parent, tree, computed, chains)
            for together in self._chunks(members, tree, variants):
                ends = self._run([tree[m] for m in together], variants, states, before)
                for number, (found, own) in zip(together, ends):
                    if number in parents:
                        computed[number] = own
                    yield tree[number].row, found

    def _chain(
        self, number: int, tree: list[Path], computed: dict[int, _Computed], chains: dict[int, _Computed]
    ) -> _Computed:
        """All tokens of a path from the beginning of its sequence."""
        if number not in chains:
            path, own = tree[number], computed[number]
            if path.parent < 0:
                return own
            first = self._chain(path.parent, tree, computed, chains).until(path.start)
            positions = torch.cat([first.positions, own.positions])
            joined = [(torch.cat([a[0], b[0]], 2), torch.cat([a[1], b[1]], 2)) for a, b in zip(first.kept, own.kept)]
            chains.clear()  # families of a parent come one after another
            chains[number] = _Computed(positions, joined)
        return chains[number]

    def _chunks(self, members: list[int], tree: list[Path], variants: torch.Tensor) -> Iterator[list[int]]:
        together: list[int] = []
        count = 0
        for number in members:
            more = int((variants[tree[number].row, tree[number].start :] > 0).sum())
            if together and count + more > CHUNK:
                yield together
                together, count = [], 0
            together.append(number)
            count += more
        yield together

    def _run(
        self, together: list[Path], variants: torch.Tensor, states: torch.Tensor, before: _Computed | None
    ) -> list[tuple[torch.Tensor, _Computed]]:
        """Final states (R, H) at the last positions of some paths of one parent, and what they leave for others."""
        device = states.device
        if before is not None:
            before = before.until(max(path.start for path in together))
        parts = [path.start + variants[path.row, path.start :].nonzero()[:, 0] for path in together]
        sizes = [len(part) for part in parts]
        positions = torch.cat(parts)
        which = torch.cat([variants[path.row, part] - 1 for path, part in zip(together, parts)])
        hidden = states[which.to(device), positions.to(device)][None]
        self.tokens += len(positions)
        masks = self._masks(together, sizes, positions, before, hidden)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        known: dict[int, object] = {}
        for index, call in enumerate(self.reading.calls):
            cache = Kept(None if before is None else before.kept[index])
            given = call.arguments(positions, self.length, known)
            given |= {call.hidden: hidden, call.cache: cache, call.mask: masks[call.visible]}
            hidden = first_of(call.layer(**given))
            if cache.keys is None or cache.values is None or cache.keys.shape[2] != len(positions):
                got = f"{self.reading.name}.{index} ({type(call.layer).__name__}), which keeps no keys and values"
                raise Unsupported("model", got, "attention in every layer; linear attention keeps other state")
            kept.append((cache.keys, cache.values))
            if call.added is not None:
                hidden = hidden + call.added[positions.to(device)]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        found = []
        for end, size, part in zip(ends, sizes, parts):
            own = _Computed(part, [(k[:, :, end - size : end], v[:, :, end - size : end]) for k, v in kept])
            found.append((hidden[0, end - self.reads : end], own))
        return found

    def _masks(
        self,
        together: list[Path],
        sizes: list[int],
        positions: torch.Tensor,
        before: _Computed | None,
        hidden: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Additive masks (1, 1, S, K), one for every kind of layer."""
        device = hidden.device
        owner = torch.repeat_interleave(torch.arange(len(together)), torch.tensor(sizes))
        mine = owner[:, None] == owner
        keys = positions
        if before is not None:
            starts = torch.tensor([path.start for path in together])[owner]
            mine = torch.cat([before.positions < starts[:, None], mine], dim=1)
            keys = torch.cat([before.positions, positions])
        mine, positions, keys = mine.to(device), positions.to(device), keys.to(device)
        least = torch.finfo(hidden.dtype).min
        masks = []
        for visible in self._visible:
            sees = visible[positions][:, keys] & mine
            masks.append(
                torch.zeros(sees.shape, dtype=hidden.dtype, device=device).masked_fill_(~sees, least)[None, None]
            )
        return masks
