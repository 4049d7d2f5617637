"""Which arithmetic a game is played in: the cheapest whose rounding is seen not to matter.

Arithmetics are a ladder from cheap to exact, :meth:`Game.finer`. What decides is the share of noise: the mean square of
the error of second differences over their own. An arithmetic that is coarser than the model's numbers is judged before
its first use, by a few second differences of the game at hand; the model's own arithmetic is judged by what is done
with its values, since values as they are have no small differences. A probe looks at a few of its second differences
again whatever came before, and masking at a few of its drops where nothing has been measured of the model yet.

A share above :data:`NOISE_LIMIT` moves the game up, with a warning that says so. Shares are kept with the model, so
that its next sample begins where this one ended; :data:`MARGIN` below the limit is good enough not to ask again.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from flmoe_fast.coalitions import sample_contexts, unpack

if TYPE_CHECKING:
    from flmoe_fast.games.game import Game

#: Share of rounding noise in the variance of second differences from which on an arithmetic is too coarse.
NOISE_LIMIT = 0.01
#: How far below the limit a share has to be where few differences stand for all that follow.
MARGIN = 10.0
#: Contexts that an arithmetic is judged in.
CONTEXTS = 2
#: Drops that are looked at again.
ROWS = 3


def judged(game: Game, exact: Game) -> float:
    """Share of noise of a few second differences of ``game`` against ``exact``, of the worst head."""
    contexts = unpack(sample_contexts(game.n, CONTEXTS, seed=0).words, game.n)
    groups = [players for _, players in game.groups or () if len(players)]
    first, second = groups[:2] if len(groups) > 1 else (range(game.n // 2), range(game.n // 2, game.n))
    one, others = first[len(first) // 2], sorted({second[0], second[len(second) // 2]})
    toggled = torch.zeros(2 + 2 * len(others), game.n, dtype=torch.bool)  # nobody, one, the others alone and with it
    toggled[1, one] = True
    for row, other in enumerate(others, start=2):
        toggled[row, other] = toggled[row + len(others), other] = toggled[row + len(others), one] = True

    def differences(values: torch.Tensor) -> torch.Tensor:
        values = values.reshape(len(contexts), len(toggled), -1)
        alone, both = values[:, 2:].tensor_split(2, 1)
        return (both - values[:, 1:2] - alone + values[:, :1]).flatten(0, 1)

    ours, truth = (differences(each.corner_values(contexts, toggled)) for each in (game, exact))
    return worst_share(ours - truth, truth)


def too_coarse(game: Game, finer: Game) -> bool:
    """Whether a game has to move up before its values are used: judged where nothing is known of the model.

    What is found is remembered, and said where it is too much.
    """
    known = game.noise.get(game.arithmetic)
    share = judged(game, finer) if known is None else known
    if share <= NOISE_LIMIT / MARGIN:
        remember(game, share)
    elif known is None:
        say_moved(game, finer, share)
    return share > NOISE_LIMIT / MARGIN


def worst_share(error: torch.Tensor, size: torch.Tensor) -> float:
    """Mean square of errors (N, O) over that of what they are errors of (N, O), of the worst head."""
    noise, power = error.square().mean(0), size.square().mean(0)
    tiny = torch.finfo(power.dtype).tiny
    return float(torch.where(noise == 0, 0.0, noise / power.clamp(min=tiny)).max())


def steady_outputs(game: Game, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and logits of coalitions as by :meth:`Game.outputs`, for differences to the first one's.

    A few of these are computed in float64 where nothing is known of the model's rounding. Where it is too much, all
    values are computed again in a finer arithmetic.
    """
    while True:
        values, logits = game.outputs(coalitions)
        finer = game.finer() if len(coalitions) > 1 else None
        known = game.noise.get(game.arithmetic)
        if finer is None or (known is not None and known <= NOISE_LIMIT / MARGIN):
            return values, logits
        exact = game.precise() or finer
        rows = torch.linspace(0, len(coalitions) - 1, min(1 + ROWS, len(coalitions))).long()
        ours, truth = (part.reshape(len(rows), -1) for part in (values[rows], exact(coalitions[rows])))
        ours, truth = ours[1:] - ours[:1], truth[1:] - truth[:1]
        share = worst_share(ours - truth, truth)
        if share <= NOISE_LIMIT:
            return values, logits
        say_moved(game, finer, share, "of what values differ by")
        game = finer


def say_moved(game: Game, finer: Game, share: float, of: str = "of the second differences' variance") -> None:
    """Remember a share that is too large, and warn that the values are computed in a finer arithmetic."""
    remember(game, share)
    warnings.warn(
        f"rounding in {game.arithmetic} makes up {percent(share)} {of}: evaluated in {finer.arithmetic} instead",
        RuntimeWarning,
        stacklevel=3,
    )


def remember(game: Game, share: float) -> None:
    """Keep the largest share that was seen of a model in an arithmetic."""
    game.noise[game.arithmetic] = max(share, game.noise.get(game.arithmetic, 0.0))


def percent(share: float) -> str:
    """A share for a person to read."""
    return f"{share:.1%}" if share < 1 else "more than all"
