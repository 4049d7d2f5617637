"""What a game is: n players and a value for every coalition of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, integer

#: Coalitions handed to a plain callable at a time.
CALL_ROWS = 4096


class Game:
    """A value function over coalitions of ``n`` players, with one or several outputs (heads).

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

    def corner_samples(
        self,
        contexts: torch.Tensor,
        toggled: torch.Tensor,
        pairs: torch.Tensor,
        single: torch.Tensor,
        kind: str,
        least: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Second differences and gaps (K, P, O) of a corner grid, and where a ratio is defined (else None).

        None where the game leaves it to the caller to reduce :meth:`corner_values`. See
        :meth:`~flmoe_fast.engines.triton_engine.TritonEngine.reduce_corners` for the arguments.
        """
        return None

    def precise(self) -> Game | None:
        """The same game with less rounding, to measure the rounding of this one; None where there is none."""
        return None

    def about(self) -> dict[str, Any]:
        """What a result should remember about the game; JSON types only."""
        return {}


class CallableGame(Game):
    """Any function from a bool tensor ``(C, n)`` to ``(C,)`` or ``(C, O)`` numbers."""

    def __init__(self, function: Callable, n: int):
        self.n = integer("n", n, least=2)
        self.function = function
        self.player_names = tuple(str(i) for i in range(self.n))

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._call(rows) for rows in coalitions.split(CALL_ROWS)])

    def _call(self, rows: torch.Tensor) -> torch.Tensor:
        values = torch.as_tensor(self.function(rows))
        if values.dim() not in (1, 2) or values.shape[0] != rows.shape[0]:
            raise ArgumentError(
                "game",
                f"a value of shape {tuple(values.shape)} for {rows.shape[0]} coalitions",
                "a callable that maps (C, n) bool to (C,) or (C, O) numbers",
            )
        if values.dim() == 2:
            self.heads = tuple(f"output {o}" for o in range(values.shape[1]))
        return values.detach().to(device="cpu", dtype=torch.float64)


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
