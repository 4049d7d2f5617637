"""What a game is: n players and a value for every coalition of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.engines.engine import Corners, Reduction

#: Coalitions handed to a plain callable at a time.
CALL_ROWS = 4096


class Game:
    """A value function over coalitions of ``n`` players, with one or several outputs (heads).

    Every subclass is checked where it answers: what :meth:`__call__` and :meth:`corner_values` return must be real and
    finite, or :class:`~flmoe_fast.checks.ArgumentError` names the first coalition that is not.

    Attributes
    ----------
    n : int
        Number of players.
    heads : tuple of str, or None
        Names of the O outputs; None when a coalition has a single, unnamed value.
    player_names : tuple of str
    groups : tuple of (name, players) or None
        The modality every player belongs to, where there are modalities.
    backend : str
        What evaluates the coalitions.
    more_exact : str
        How to get the same game with less rounding, for a person to read.
    block : int
        Coalitions worth asking for at a time: enough to keep the machine busy, few enough for a moving progress bar.
    """

    n: int
    heads: tuple[str, ...] | None = None
    player_names: tuple[str, ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    backend: str = "callable"
    more_exact: str = "of the game itself"
    block: int = CALL_ROWS

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, check in (("__call__", _checked), ("corner_values", _checked_corners)):
            if name in vars(cls):
                setattr(cls, name, check(vars(cls)[name]))

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Values of coalitions ``(C, n)`` bool: ``(C,)`` or ``(C, O)`` float64."""
        raise NotImplementedError

    def outputs(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values as from a call, and from the same evaluations the model's logits (C, K) where there is a model."""
        return self(coalitions), None

    def corner_values(self, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
        """Values (K, G) or (K, G, O) of ``contexts[k] ^ toggled[g]``, for contexts (K, n) and toggles (G, n)."""
        values = self((contexts[:, None] ^ toggled).flatten(0, 1))
        return values.unflatten(0, (contexts.shape[0], toggled.shape[0]))

    def corner_samples(self, contexts: torch.Tensor, toggled: torch.Tensor, reduction: Reduction) -> Corners | None:
        """Second differences and gaps of a corner grid's coalitions, named as for :meth:`corner_values`; on the CPU.

        None where the game leaves it to the caller to reduce :meth:`corner_values`.
        """
        return None

    def precise(self) -> Game | None:
        """The same game with less rounding, to measure the rounding of this one; None where there is none."""
        return None

    def finer(self) -> Game | None:
        """The same game in the next more exact arithmetic, where the choice was left to the game; None where not."""
        return None

    @property
    def arithmetic(self) -> str:
        """What the game is computed in, for a person to read."""
        return "its arithmetic"

    @property
    def noise(self) -> dict[str, float]:
        """Largest share of rounding noise seen so far, by arithmetic (:mod:`flmoe_fast.games.rounding`)."""
        return self.__dict__.setdefault("_noise", {})

    def about(self) -> dict[str, Any]:
        """What a result should remember about the game; JSON types only."""
        return {}


def _checked(call: Callable) -> Callable:
    """A game's ``__call__`` whose values are real and finite."""

    @functools.wraps(call)
    def checked(game: Game, coalitions: torch.Tensor) -> torch.Tensor:
        values = call(game, coalitions)
        if _wrong(values):
            _refuse(game, values, lambda row: coalitions[row])
        return values

    return checked


def _checked_corners(corner_values: Callable) -> Callable:
    """A game's ``corner_values`` that are real and finite."""

    @functools.wraps(corner_values)
    def checked(game: Game, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
        values = corner_values(game, contexts, toggled)
        if _wrong(values):
            _refuse(game, values.flatten(0, 1), lambda row: contexts[row // len(toggled)] ^ toggled[row % len(toggled)])
        return values

    return checked


def _wrong(values: torch.Tensor) -> bool:
    # A sum is finite where every term is, but for overflow: one pass without a mask, and the mask only on suspicion.
    return values.is_complex() or not (math.isfinite(values.sum()) or bool(values.isfinite().all()))


def _refuse(game: Game, values: torch.Tensor, coalition: Callable[[int], torch.Tensor]) -> None:
    """Raise for values (C,) or (C, O) that are complex or not finite; ``coalition`` gives a row's players."""
    if values.is_complex():
        raise ArgumentError("game", f"{values.dtype} values", "real numbers, such as .real or .abs() of them")
    wrong = ~values.isfinite()
    row = int(wrong.flatten(1).any(1).nonzero()[0]) if values.dim() > 1 else int(wrong.nonzero()[0])
    at = values[row] if values.dim() == 1 else values[row][wrong[row]][0]
    head = ""
    if values.dim() > 1 and game.heads is not None:
        head = f" of head {game.heads[int(wrong[row].nonzero()[0])]!r}"
    players = coalition(row).nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, players[:16])) + (f", ... ({len(players)} in all)" if len(players) > 16 else "")
    raise ArgumentError(
        "game",
        f"{float(at)}{head} for the coalition of players {{{shown}}} ({int(wrong.sum())} such values in this call)",
        "finite values for every coalition: evaluate the game at this one, and look for overflow in its features, "
        "weights or arithmetic (float64 has more room) or mend the value there",
    )


class CallableGame(Game):
    """Any function from a bool tensor ``(C, n)`` to ``(C,)`` or ``(C, O)`` numbers."""

    def __init__(self, function: Callable, n: int):
        self.n = integer("n", n, least=2)
        self.function = function
        self.player_names = tuple(str(i) for i in range(self.n))

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._call(rows) for rows in coalitions.split(CALL_ROWS)])

    def _call(self, rows: torch.Tensor) -> torch.Tensor:
        try:
            values = torch.as_tensor(self.function(rows))
        except Exception as problem:
            shape = f"({rows.shape[0]}, {self.n})"
            problem.add_note(f"The game was called with {rows.shape[0]} coalitions at once, a bool tensor {shape}.")
            raise
        if values.dim() not in (1, 2) or values.shape[0] != rows.shape[0]:
            raise ArgumentError(
                "game",
                f"a value of shape {tuple(values.shape)} for {rows.shape[0]} coalitions",
                "a callable that maps (C, n) bool to (C,) or (C, O) numbers",
            )
        if values.dim() == 2:
            self.heads = tuple(f"output {o}" for o in range(values.shape[1]))
        values = values.detach().cpu()
        return values if values.is_complex() else values.double()


def as_game(game: Game | Callable, n: int | None = None) -> Game:
    """``game`` itself, or a callable wrapped with its number of players ``n`` (read from ``game.n`` if it has one)."""
    if isinstance(game, Game):
        if n is not None and n != game.n:
            raise ArgumentError("n", n, f"{game.n}, the game's own number of players, or None")
        return game
    if not callable(game):
        raise ArgumentError("game", type(game).__name__, "a Game or a callable from (C, n) bool to (C,) or (C, O)")
    if n is None:
        n = getattr(game, "n", None)
        if n is None:
            raise ArgumentError("n", None, "the number of players, since this callable does not say it")
    return CallableGame(game, n)
