"""The game of any module, by running it on masked inputs in batches: always right, and the slow path."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.players import PlayerMap, Players
from flmoe_fast.adapt.remember import Remembered
from flmoe_fast.adapt.steady import draws_random_numbers, steady
from flmoe_fast.checks import ArgumentError, integer, shape
from flmoe_fast.games.game import Game

VALUES = ("prob", "logit")
#: Largest difference between a sample alone and beside a copy of itself, relative to the largest number; more is not
#: rounding, but inputs that do not belong to one sample of the batch each.
BATCH_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class PlacedGame(Game):
    """A game whose players lie somewhere in a text or an image, as :attr:`Players.places` says it."""

    places: tuple[tuple[int, ...], ...]
    #: Whether the arithmetic was left to the game.
    free: bool = True
    dtype: Any

    def finer(self) -> Game | None:
        """This game in float64, where the arithmetic was left to it."""
        return self.precise() if self.free else None

    @property
    def arithmetic(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class ModuleGame(PlacedGame):
    """Any module and one sample as a cooperative game. Every coalition is a full forward pass: the slow path.

    Parameters
    ----------
    module : nn.Module
        Called with keyword inputs, in eval mode, without gradients and with the same random numbers each time.
    inputs : mapping of str to Tensor
        The sample; tensors with a batch axis of 1, or the rows of one sample, as the flattened patches of an image are.
    players : Players or sequence of Players
    target : int, optional
        Class whose value is explained; by default what the module predicts for the full sample.
    value : "prob", "logit" or function
        The probability of the target (by softmax; by sigmoid for a single class, and for models of transformers whose
        configuration says that they are multilabel) or its logit; or a function from what the module returns to one
        value (C,) or several (C, O) for each of the C samples in a batch.
    heads : sequence of O str, optional
        Names of the values of such a function.
    batch : int
        Coalitions a forward pass. One at a time is taken of models that draw random numbers in evaluation too, and of
        inputs that do not go together in a batch; :meth:`about` says so.
    why : str
        Why nothing faster is used, for a person to read.

    Attributes
    ----------
    slower : Game or None
        The game of the same values on an engine, where one was measured to be slower: it still shows the model's parts.
    """

    backend = "module (slow path)"
    more_exact = "a module in float64"

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        players: Players | Sequence[Players],
        *,
        target: int | None = None,
        value: str | Callable[[object], torch.Tensor] = "prob",
        heads: Sequence[str] | None = None,
        batch: int = 32,
        why: str = "",
    ):
        if not isinstance(module, nn.Module):
            raise ArgumentError("module", type(module).__name__, "a torch.nn.Module")
        self.module, self.inputs, self.dtype = module, dict(inputs), floating(module)
        self.players = PlayerMap(players, self.inputs)
        self.batch, self.why = integer("batch", batch, least=1), why
        self._alone = ""
        self.slower: Game | None = None
        name_players(self, self.players)
        self.block = max(self.batch, 256)
        self.score = Score(module, target, value, heads)
        everyone = torch.ones(1, self.n, dtype=torch.bool)
        full, random = draws_random_numbers(module, lambda: self.score.read(self._run(everyone)))
        if random:
            self._one_by_one("the model draws random numbers in evaluation too")
        elif quantised(module):
            self._one_by_one(f"a quantised {quantised(module)} may take its scale from what shares a batch")
        self._check_batch(everyone, full)
        self._outputs(~everyone)
        self.score.settle(full)
        self.heads = self.score.heads
        self._values = Remembered(self._compute)

    @property
    def target(self) -> int | None:
        """The explained class; None for a value of one's own."""
        return self.score.target

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        if not len(coalitions):
            return self.score.nothing()
        return self._values(coalitions)

    def precise(self) -> ModuleGame | None:
        """The game of a float64 copy of the module; None if it is float64 already, or does not run in it."""
        if floating(self.module) in (torch.float64, None):
            return None
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module).double()
        twin.inputs, twin.dtype = doubled(self.inputs), torch.float64
        twin._values = Remembered(twin._compute)
        try:
            twin._outputs(torch.ones(1, self.n, dtype=torch.bool))
        except Exception as problem:
            first = str(problem).partition("\n")[0]
            warnings.warn(f"rounding is not measured: in float64 the module raises {first!r}", stacklevel=2)
            return None
        return twin

    def about(self) -> dict[str, Any]:
        return {
            **self.score.about(),
            "places": [list(place) for place in self.places],
            "path": self._path(),
            **({"batch": f"1, because {self._alone}"} if self._alone else {}),
        }

    def _path(self) -> str:
        if self.slower is not None:
            return f"module in batches: faster here, {self.why}"
        return "slow: a forward pass for every coalition" + (f", because {self.why}" if self.why else "")

    def _compute(self, coalitions: torch.Tensor) -> torch.Tensor:
        return self.score.values(torch.cat([self._outputs(rows) for rows in coalitions.split(self.batch)]))

    def _outputs(self, coalitions: torch.Tensor) -> torch.Tensor:
        with steady(self.module):
            return self.score.read(self._run(coalitions))

    def _run(self, coalitions: torch.Tensor) -> object:
        return self.module(**self.players.inputs(self.inputs, coalitions))

    def _check_batch(self, everyone: torch.Tensor, full: torch.Tensor) -> None:
        """Take coalitions one by one if a sample beside its copy is not what it is alone.

        Only where an input has other rows than one a sample: then they can only be guessed to belong to the samples of
        a batch in their order.
        """
        rows = [v for v in self.inputs.values() if isinstance(v, torch.Tensor) and v.dim() and len(v) != 1]
        if self.batch == 1 or not rows:
            return
        try:
            both = self._outputs(everyone.expand(2, -1))
        except Exception as problem:
            first = str(problem).partition("\n")[0]
            self._one_by_one(f"a batch of this sample's inputs raises {first!r}")
            return
        error = (both - full).abs().max() / full.abs().max().clamp(min=torch.finfo(full.dtype).tiny)
        if both.shape[0] != 2 or not float(error) <= BATCH_TOLERANCE.get(full.dtype, 1e-3):
            self._one_by_one("this sample's inputs mean something else in a batch")

    def _one_by_one(self, why: str) -> None:
        self.batch, self._alone = 1, why


class Score:
    """What a model's output is worth: a class's logit or probability, or whatever a function makes of it."""

    def __init__(
        self,
        model: nn.Module,
        target: int | None,
        value: str | Callable[[object], torch.Tensor],
        heads: Sequence[str] | None,
    ):
        if not callable(value) and value not in VALUES:
            raise ArgumentError("value", repr(value), "'prob', 'logit' or a function of the model's output")
        if callable(value) and target is not None:
            raise ArgumentError("target", target, "None, since value is a function")
        if heads is not None and not callable(value):
            raise ArgumentError("heads", heads, "None, unless value is a function with several values")
        task = getattr(getattr(model, "config", None), "problem_type", None)
        if task == "regression" and value == "prob":
            raise ArgumentError("value", "'prob' of a regression model", "'logit', which is its output")
        self.independent = task == "multi_label_classification"
        self.target = None if target is None else integer("target", target, least=0)
        self.value = value
        self.heads = None if heads is None else tuple(heads)

    def read(self, output: object) -> torch.Tensor:
        """The numbers (C, K) or (C,) of a model's output that values are made of."""
        if callable(self.value):
            numbers = self.value(output)
            if not isinstance(numbers, torch.Tensor) or numbers.dim() not in (1, 2):
                got = f"shape {tuple(numbers.shape)}" if isinstance(numbers, torch.Tensor) else type(numbers).__name__
                raise ArgumentError("value", got, "a function that returns a tensor (C,) or (C, O)")
            return numbers
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        scores = getattr(output, "logits_per_image", None)
        if logits is None and scores is not None and self.value == "logit":
            logits = scores.diagonal()[:, None]  # image c with text c
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
            got = "no logits" if not isinstance(logits, torch.Tensor) else f"logits of shape {tuple(logits.shape)}"
            raise ArgumentError("value", f"a model with {got}", "logits (C, K), or a function as value")
        return logits

    def settle(self, numbers: torch.Tensor) -> None:
        """Choose what depends on the numbers (1, ...) of the full sample: the target, and names of several values."""
        if not callable(self.value):
            if self.target is None:
                self.target = int(numbers[0].argmax())
            integer("target", self.target, least=0, most=numbers.shape[1] - 1)
        elif numbers.dim() == 2:
            self.heads = self.heads or tuple(f"output {o}" for o in range(numbers.shape[1]))
            if len(self.heads) != numbers.shape[1]:
                raise ArgumentError("heads", f"{len(self.heads)} names", f"one for each of {numbers.shape[1]} values")

    def values(self, numbers: torch.Tensor) -> torch.Tensor:
        """Values (C,) or (C, O), float64 on the CPU."""
        numbers = numbers.detach().to(torch.float64)
        if self.value == "prob":
            alone = self.independent or numbers.shape[1] == 1
            numbers = numbers.sigmoid() if alone else numbers.softmax(1)
        return (numbers if callable(self.value) else numbers[:, self.target]).cpu()

    def nothing(self) -> torch.Tensor:
        """Values of no coalitions."""
        return torch.zeros((0,) if self.heads is None else (0, len(self.heads)), dtype=torch.float64)

    def about(self) -> dict[str, Any]:
        """Facts for a result."""
        return {
            "target": self.target,
            "value": getattr(self.value, "name", "a function") if callable(self.value) else self.value,
        }


def name_players(game: PlacedGame, players: PlayerMap) -> None:
    """Give a game the players' number, names, modalities and places."""
    game.n, game.player_names, game.places = players.n, players.names, players.places
    game.groups = players.groups if len(players.groups) > 1 else None


def floating(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first floating point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def quantised(module: nn.Module) -> str:
    """The kind of a module's first part with weights that are no floating point numbers; empty if it has none."""
    for part in module.modules():
        packed = type(part).__module__.startswith("torch.ao.nn.")
        if packed or any(not p.is_floating_point() for p in part.parameters(recurse=False)):
            return type(part).__name__
    return ""


def doubled(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs with their floating point tensors in float64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
