"""Players and heads by number or by name."""

from __future__ import annotations

from collections.abc import Sequence

from flmoe_fast.checks import ArgumentError, integer, one_of


def checked_names(names: Sequence[str], n: int) -> tuple[str, ...]:
    """``n`` names of players as text."""
    if isinstance(names, str) or len(names) != n:
        got = repr(names) if isinstance(names, str) else f"{len(names)} names"
        raise ArgumentError("names", got, f"one name for each of {n} players")
    return tuple(map(str, names))


def player_number(player: int | str, names: Sequence[str]) -> int:
    """Number of a player given by name or number."""
    if not isinstance(player, str):
        return integer("player", player, least=0, most=len(names) - 1)
    found = [number for number, name in enumerate(names) if name == player]
    if len(found) != 1:
        got = f"{player!r}, the name of players {found}" if found else repr(player)
        raise ArgumentError("player", got, "a number" if found else "a number, or one of player_names")
    return found[0]


def head_number(head: str | int | None, heads: Sequence[str] | None) -> int:
    """Column of a head given by name or number; the first by default."""
    if heads is None:
        if head not in (None, 0):
            raise ArgumentError("head", repr(head), "None, since this game has a single value")
        return 0
    if isinstance(head, str):
        return heads.index(one_of("head", head, tuple(heads)))
    return integer("head", 0 if head is None else head, least=0, most=len(heads) - 1)
