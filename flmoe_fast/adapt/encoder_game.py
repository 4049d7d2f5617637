"""The game of a transformer with one encoder stack, on the engine: BERT, RoBERTa, ViT, ViLT and their like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import PlacedGame, Score, doubled, floating, name_players, quantised
from flmoe_fast.adapt.players import PlayerMap, Players
from flmoe_fast.adapt.reading import Stack
from flmoe_fast.adapt.remember import Remembered
from flmoe_fast.adapt.tower import Tower
from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.engines.choose import STACK_BACKENDS
from flmoe_fast.games.rounding import too_coarse

#: Largest difference between the engine and the model on the coalitions that are checked when a game is made,
#: relative to the largest number. Rounding stays far below it; a head that is not understood does not.
MODEL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class EncoderGame(PlacedGame):
    """A transformer with one encoder stack and one sample as a cooperative game, on the encoder engine.

    The model's own embeddings and head are used as they are; the layers between them run on an engine, which shares
    what coalitions have in common and leaves out what nobody reads (:mod:`flmoe_fast.engines.torch_stack`). Every
    layer, and the whole model on three coalitions, are compared with the model itself when the game is made.

    Parameters
    ----------
    model : nn.Module
        With one stack of plain encoder layers, pre-norm or post-norm, of any depth. Half-precision models are taken in
        float32. Its weights are read when the game is made.
    inputs : mapping of str to Tensor
        The sample, as a tokenizer or processor makes it; tensors with a batch axis of 1.
    players : Players or sequence of Players
        See :func:`text_players` and :func:`image_players`.
    target, value, heads
        As for :class:`ModuleGame`.
    backend : "auto", "cpu" or "torch"
        "cpu" is the native engine: pre-norm stacks with exact GELU and a head that reads a token or two (ViT, DeiT,
        ViLT), in float32, with absent tokens replaced. "auto" takes it where it can run and is the faster one: for wide
        layers only on processors with matrix units. :meth:`about` says why where it does not.
    dtype : torch.float32 or torch.float64, optional
        Arithmetic; the model's own by default.
    memory : int
        Bytes of activations to hold at a time.
    stacks : list of Stack, optional
        What :func:`find_stacks` returned for the model, to read and compare its layers once for many samples.

    Raises
    ------
    Unsupported
        The model is no plain encoder stack; the message names the layer and says why.
    ArgumentError
    """

    backend = "encoder stack"
    dtype: torch.dtype
    tower: Tower
    _values: Remembered
    more_exact = "dtype=torch.float64"

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        players: Players | Sequence[Players],
        *,
        target: int | None = None,
        value: str | Callable[[object], torch.Tensor] = "prob",
        heads: Sequence[str] | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        memory: int = 1 << 28,
        stacks: list[Stack] | None = None,
    ):
        self.model, self.inputs, self.dtype = in_dtype(model, inputs, dtype)
        self.free, self._any_dtype = backend == "auto", dtype is None
        self.memory = integer("memory", memory, least=1)
        self.players = PlayerMap(players, self.inputs)
        name_players(self, self.players)
        self.score = Score(self.model, target, value, heads)
        one_of("backend", backend, STACK_BACKENDS)
        self._make_tower(stacks=stacks if self.model is model else None, backend=backend)
        check_with_model(self.tower)
        self.score.settle(self.tower.full)
        self.heads = self.score.heads
        self.block = self.tower.engine.block
        if self.tower.engine.coarse and (finer := self.finer()) is not None and too_coarse(self, finer):
            self.tower, self._values, self.more_exact = finer.tower, finer._values, finer.more_exact

    @property
    def target(self) -> int | None:
        """The explained class; None for a value of one's own."""
        return self.score.target

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        if not len(coalitions):
            return self.score.nothing()
        return self._values(coalitions)

    def towers(self) -> list[tuple[torch.Tensor, Tower, Callable[[torch.Tensor], torch.Tensor]]]:
        """The players (n,), the tower, and the explained logit (C,), or first value, of what is read of its output."""

        def explained(numbers: torch.Tensor) -> torch.Tensor:
            return numbers if numbers.dim() == 1 else numbers[:, self.target or 0]

        return [(torch.arange(self.n), self.tower, explained)]

    def precise(self) -> EncoderGame | None:
        """This game in float64; None if it already is."""
        if self.dtype == torch.float64:
            return None
        twin = copy.copy(self)
        twin.model, twin.inputs, twin.dtype = in_dtype(self.model, self.inputs, torch.float64)
        twin._make_tower(like=self.tower)
        return twin

    def finer(self) -> EncoderGame | None:
        """This game in the next more exact arithmetic; None if dtype or backend were asked for, or in float64."""
        request = self.tower.engine.finer()
        if request is None or not self.free:
            return None
        if request.dtype != self.dtype:
            return self.precise() if self._any_dtype else None
        twin = copy.copy(self)
        known = {"like": self.tower, "stacks": [self.tower.stack]}
        twin._make_tower(backend=request.backend, precision=request.precision, **known)
        return twin

    @property
    def arithmetic(self) -> str:
        return self.tower.engine.arithmetic

    @property
    def noise(self) -> dict[str, float]:
        return self.tower.engine.noise

    def about(self) -> dict[str, Any]:
        engine, reason = self.tower.engine, self.tower.reason
        tokens = engine.problem.length
        return {
            **self.score.about(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "places": [list(place) for place in self.places],
            "path": f"engine: {len(self.tower.stack.layers)} layers of {self.tower.stack.name}, {tokens} tokens",
            **engine.about(),
            **({"backend": engine.name, "reason": reason} if reason else {}),
        }

    def _make_tower(self, **known: Any) -> None:
        run, read = self.model, self.score.read
        tower = Tower(self.model, run, read, self.inputs, self.players, self.dtype, self.memory, **known)
        self.tower = tower
        self.more_exact = more_exact(tower)
        self._values = Remembered(self._compute)

    def _compute(self, coalitions: torch.Tensor) -> torch.Tensor:
        return self.score.values(self.tower.encode(coalitions))


def more_exact(*towers: Tower) -> str:
    """How to get less rounding, for a person to read."""
    return max((tower.engine.more_exact for tower in towers), key=len)


def in_dtype(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[nn.Module, dict[str, torch.Tensor], torch.dtype]:
    """Model and inputs in the arithmetic of a game: the model itself, or a copy where it has another dtype."""
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    if not isinstance(inputs, Mapping):
        raise ArgumentError("inputs", type(inputs).__name__, "a mapping of keywords to tensors with a batch axis of 1")
    if quantised(model):
        got = f"a {type(model).__name__} with quantised parts ({quantised(model)})"
        raise Unsupported("model", got, "floating point weights: what is computed together would change the scales")
    own = floating(model)
    if own is None:
        raise Unsupported("model", f"a {type(model).__name__} without floating point weights", "a transformer")
    if dtype is None:
        dtype = torch.float64 if own == torch.float64 else torch.float32
    one_of("dtype", dtype, (torch.float32, torch.float64))
    inputs = doubled(inputs) if dtype == torch.float64 else _single(inputs)
    return model if own == dtype else copy.deepcopy(model).to(dtype), inputs, dtype


def check_with_model(tower: Tower) -> None:
    """Compare a tower with the model itself on the full coalition, and without every other player either way.

    Every player is thus absent once: a head that looks for a token of its own (an end symbol, say) would show. Players
    that only the engine can remove, because the model has no mask for them, are present each time.
    """
    some = torch.ones(3, tower.players.n, dtype=torch.bool)
    some[1, 1::2] = False
    some[2, ::2] = False
    for part, columns in zip(tower.players.parts, tower.players.columns):
        if part.mask == "":
            some[:, columns] = True
    ours, truth = tower.encode(some), torch.cat([tower.full, tower.plainly(some[1:])])
    error = float((ours - truth).abs().max() / truth.abs().max().clamp(min=torch.finfo(truth.dtype).tiny))
    tolerance = MODEL_TOLERANCE[truth.dtype]
    if not error <= tolerance:
        got = f"an output that differs from the engine's by {error:.1e}, although every layer of "
        raise Unsupported("model", f"{got}{tower.stack.name} agrees", f"the same within {tolerance:.0e}")


def _single(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
