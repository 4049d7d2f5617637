"""Coalitions as packed bits, and the draws of context coalitions that corner grids are built on.

A coalition of n players is a row of W = ceil(n / 64) int64 words: player p is bit ``p & 63`` of word ``p >> 6``, and
the bits of the last word beyond n are zero. ``words`` are CPU int64 tensors ``(C, W)`` throughout.

There are two implementations with identical bits: NumPy, always there, and C++, used when the package was built with
its extension (:func:`implementation` says which). Neither touches torch's random state.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of, shape

MODES = ("lhs", "stratified", "iid", "size")
"""How :func:`sample_contexts` spreads a draw; a mode's position is its number in C++."""

_MOST = 2**32 - 1  # units, players and replicates are words of the generator's counter
_MEMBER_STREAM, _SIZE_STREAM, _SLICE_STREAM = 0, 1, 2  # slices: and those after it, two slices a stream
_DIGITS = 53  # of a number that is drawn by slices


class Contexts(NamedTuple):
    """A draw of K context coalitions.

    Attributes:
        words: int64 (K, W), the coalitions. Antithetic: row 2k is T_k and row 2k + 1 its complement.
        u: float64 (K,), the share of players included, in expectation; 1 - u_k for a complement.
    """

    words: torch.Tensor
    u: torch.Tensor


def words_for(n: int) -> int:
    """Words that n players take."""
    return (n + 63) // 64


def implementation() -> str:
    """Which implementation this process uses: ``"native"`` (C++) or ``"numpy"``."""
    return "numpy" if _extension is None else "native"


def extension() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and one line on why there is none."""
    return _extension, _missing


def pack(coalitions: torch.Tensor) -> torch.Tensor:
    """Pack a bool matrix.

    Args:
        coalitions: bool (C, n), CPU; row c is True at the members of coalition c.

    Returns:
        int64 (C, W).
    """
    _check(coalitions, "coalitions", torch.bool)
    shape("coalitions", coalitions, (None, None), "(coalitions, players)")
    return _active.pack(coalitions.contiguous())


def unpack(words: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int64 (C, W) to bool (C, n)."""
    return _active.unpack(_check_words(words, n=n), int(n))


def complement(words: torch.Tensor, n: int) -> torch.Tensor:
    """The players of 0..n-1 that are not in each coalition: int64 (C, W)."""
    return _active.complement(_check_words(words, n=n), int(n))


def popcount(words: torch.Tensor) -> torch.Tensor:
    """How many members each coalition has: int64 (C,)."""
    return _active.popcount(_check_words(words))


def hamming(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In how many players the rows of ``a`` and ``b``, both int64 (C, W), differ: int64 (C,)."""
    _check_words(a, name="a")
    shape("b", _check_words(b, name="b"), tuple(a.shape), "a's shape")
    return _active.hamming(a.contiguous(), b.contiguous())


def toggle(words: torch.Tensor, players: torch.Tensor | Sequence, *, n: int | None = None) -> torch.Tensor:
    """Every coalition with every set of players toggled: members leave, the others join.

    One corner grid is one call: the sets ``[-1, -1]`` (the context itself), ``[i, -1]``, ``[j, -1]`` and ``[i, j]``.

    Args:
        words: int64 (C, W).
        players: integers (G, q), one set a row, or (G,) for sets of one. -1 stands for nobody, which pads sets of
            different sizes; a player listed twice in a row cancels out.
        n: number of players, for a tighter check; without it a player only has to fit into the words.

    Returns:
        int64 (C, G, W).

    Raises:
        ArgumentError: a player below -1, or not below n.
    """
    words = _check_words(words, n=n)
    sets = torch.as_tensor(players)
    if sets.numel() == 0:  # an empty list arrives as float
        sets = sets.long()
    if sets.is_floating_point() or sets.dtype == torch.bool or sets.is_complex():
        raise ArgumentError("players", f"dtype {sets.dtype}", "integers")
    if sets.dim() not in (1, 2):
        raise ArgumentError("players", f"shape {tuple(sets.shape)}", "(sets, players of a set) or (players,)")
    sets = sets.to("cpu", torch.int64)
    sets = (sets[:, None] if sets.dim() == 1 else sets).contiguous()
    most = 64 * words.shape[1] if n is None else n
    if sets.numel() and not (int(sets.min()) >= -1 and int(sets.max()) < most):
        raise ArgumentError("players", f"{int(sets.min())}..{int(sets.max())}", f"-1 (nobody) or 0..{most - 1}")
    return _active.toggle(words, sets)


def sample_contexts(
    n: int, contexts: int, *, seed: int, mode: str = "size", antithetic: bool = True, replicate: int = 0
) -> Contexts:
    """Draw context coalitions whose sizes cover 0..n evenly.

    An antithetic draw consists of ``contexts / 2`` pairs (T_k, complement of T_k); the complement is as good a sample,
    and the errors of the two tend to cancel. Player p is in T_k when its number U[k, p] lies below u_k, where

    ===============  ==========================================  ==============================================
    mode             u_k                                         U[k, p]
    ===============  ==========================================  ==============================================
    ``lhs``          one in each of m equal strata of [0, 1]     per player one in each of m strata, in random
                                                                 order: a Latin hypercube
    ``stratified``   one in each of m equal strata of [0, 1]     independent
    ``iid``          independent                                 independent
    ``size``         as ``lhs``                                  as ``lhs``
    ===============  ==========================================  ==============================================

    with m = the number of T_k, and [0, 1/2] in place of [0, 1] for u_k when antithetic (complements have 1 - u_k). The
    strata ascend with k, so a draw is one sample as a whole: a subset of its rows does not follow the law.

    Every number is a hash of (seed, replicate, k, p), so the same arguments give the same bits on every machine, and
    replicates of one seed are independent draws. Independent numbers are drawn and compared with u_k one binary digit
    of 64 players at a time, which makes ``stratified`` and ``iid`` the modes for very many contexts.

    Args:
        n: players, at least 1.
        contexts: K, at least 1; even when antithetic.
        seed: 0 <= seed < 2**64.
        mode: one of :data:`MODES`.
        antithetic: add every coalition's complement.
        replicate: which draw under this seed, 0 <= replicate < 2**32.

    Raises:
        ArgumentError: an argument out of range.
    """
    n = integer("n", n, least=1, most=_MOST)
    contexts = integer("contexts", contexts, least=1, most=_MOST)
    if antithetic and contexts % 2:
        raise ArgumentError("contexts", contexts, "an even number when antithetic (pairs of a coalition and its rest)")
    seed = integer("seed", seed, least=0, most=2**64 - 1)
    replicate = integer("replicate", replicate, least=0, most=_MOST)
    number = MODES.index(one_of("mode", mode, MODES))
    units = contexts // 2 if antithetic else contexts
    words, u = _active.sample(n, units, seed, replicate, number, bool(antithetic))
    return Contexts(words, torch.stack([u, 1 - u], dim=1).flatten() if antithetic else u)


# ---- checks


def _check(tensor: object, name: str, dtype: torch.dtype) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(name, type(tensor).__name__, f"a {dtype} tensor")
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ArgumentError(name, f"{tensor.dtype} on {tensor.device}", f"{dtype} on cpu")


def _check_words(words: torch.Tensor, *, n: int | None = None, name: str = "words") -> torch.Tensor:
    _check(words, name, torch.int64)
    width = None if n is None else words_for(integer("n", n, least=0))
    shape(name, words, (None, width), "(coalitions, words)")
    return words.contiguous()


# ---- implementations: contiguous, checked tensors in, new tensors out


class _Implementation(Protocol):
    def pack(self, coalitions: torch.Tensor) -> torch.Tensor: ...
    def unpack(self, words: torch.Tensor, n: int) -> torch.Tensor: ...
    def complement(self, words: torch.Tensor, n: int) -> torch.Tensor: ...
    def popcount(self, words: torch.Tensor) -> torch.Tensor: ...
    def hamming(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor: ...
    def toggle(self, words: torch.Tensor, sets: torch.Tensor) -> torch.Tensor: ...
    def sample(
        self, n: int, units: int, seed: int, replicate: int, mode: int, antithetic: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def _philox(counter: tuple[np.ndarray, ...], seed: int) -> list[np.ndarray]:
    """Philox4x32-10: four broadcastable uint64 arrays of 32-bit values to four uint64 arrays of 32-bit values."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    x0, x1, x2, x3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a = x0 * np.uint64(0xD2511F53)
        b = x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (b >> half) ^ x1 ^ np.uint64(key0), b & low, (a >> half) ^ x3 ^ np.uint64(key1), a & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [x0, x1, x2, x3]


def _jitter(bits: list[np.ndarray]) -> np.ndarray:
    """Doubles in [0, 1) from the upper 53 of words 2 and 3."""
    return (((bits[2] << np.uint64(32)) | bits[3]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _element(units: int, n: int, stream: int, replicate: int, seed: int) -> list[np.ndarray]:
    """The random words of every (unit, player): four arrays (units, n)."""
    unit = np.arange(units, dtype=np.uint64)[:, None]
    player = np.arange(n, dtype=np.uint64)[None, :]
    return _philox((unit, player, np.full((1, 1), stream, np.uint64), np.full((1, 1), replicate, np.uint64)), seed)


def _sizes(units: int, seed: int, replicate: int, mode: int, antithetic: bool) -> np.ndarray:
    """u_k: float64 (units,)."""
    u = _jitter(_element(units, 1, _SIZE_STREAM, replicate, seed))[:, 0]
    if MODES[mode] != "iid":
        u = (np.arange(units) + u) / units
    return 0.5 * u if antithetic else u


def _uniforms(n: int, units: int, seed: int, replicate: int) -> np.ndarray:
    """U[k, p] of a Latin hypercube: float64 (units, n)."""
    bits = _element(units, n, _MEMBER_STREAM, replicate, seed)
    # Equal keys rank by unit, so the order is total and every sort finds the same one.
    keys = (bits[0] << np.uint64(32)) | np.arange(units, dtype=np.uint64)[:, None]
    ranks = np.empty((units, n), dtype=np.int64)
    np.put_along_axis(ranks, keys.argsort(axis=0), np.arange(units)[:, None], axis=0)
    return (ranks + _jitter(bits)) / units


def _hypercube_members(n: int, units: int, seed: int, replicate: int, mode: int, u: np.ndarray) -> np.ndarray:
    """Who is in T_k, in a mode with a Latin hypercube: bool (units, n)."""
    uniforms = _uniforms(n, units, seed, replicate)
    if MODES[mode] != "size":
        return uniforms < u[:, None]
    ranks = np.empty((units, n), dtype=np.int64)
    # A stable sort lets equal numbers go by player.
    np.put_along_axis(ranks, uniforms.argsort(axis=1, kind="stable"), np.arange(n)[None, :], axis=1)
    return ranks < (u * (n + 1)).astype(np.int64)[:, None]


def _sliced_words(everybody: np.ndarray, units: int, seed: int, replicate: int, u: np.ndarray) -> np.ndarray:
    """T_k in a mode with independent U: uint64 (units, W); ``everybody`` (W,) has the words of all players.

    Slice s of a word is 64 bits, the s-th binary digits of its players' U. A player's first digit that is not u_k's
    decides; words whose players are all decided are dropped.
    """
    limit = np.ceil(u * 2.0**_DIGITS).astype(np.uint64)  # U, a multiple of 2^-53, is below u if U 2^53 is below this
    always = np.where(limit >> np.uint64(_DIGITS), everybody[:, None], np.uint64(0)).T.copy()  # u = 1
    members = always.reshape(-1)
    unit, word = (index.ravel() for index in np.indices((units, len(everybody)), dtype=np.uint64))
    undecided = np.tile(everybody, units) & ~members
    open_ = np.arange(len(members))
    for pair in range((_DIGITS + 1) // 2):
        open_ = open_[undecided[open_] != 0]
        if not len(open_):
            break
        stream, again = np.array([_SLICE_STREAM + pair], np.uint64), np.array([replicate], np.uint64)
        bits = _philox((unit[open_], word[open_], stream, again), seed)
        left, digits = undecided[open_], limit[unit[open_]]
        for s, (high, low) in enumerate(((bits[0], bits[1]), (bits[2], bits[3]))[: _DIGITS - 2 * pair]):
            slice_ = (high << np.uint64(32)) | low
            one = np.uint64(0) - ((digits >> np.uint64(_DIGITS - 1 - 2 * pair - s)) & np.uint64(1))  # all ones, or zero
            members[open_] |= left & ~slice_ & one
            left &= ~(slice_ ^ one)
        undecided[open_] = left
    return members.reshape(units, -1)


class _NumPy:
    def pack(self, coalitions: torch.Tensor) -> torch.Tensor:
        rows, n = coalitions.shape
        packed = np.zeros((rows, 8 * words_for(n)), dtype=np.uint8)
        packed[:, : (n + 7) // 8] = np.packbits(coalitions.numpy(), axis=1, bitorder="little")
        return torch.from_numpy(packed.view("<i8").astype(np.int64, copy=False))

    def unpack(self, words: torch.Tensor, n: int) -> torch.Tensor:
        octets = words.numpy().astype("<i8", copy=False).view(np.uint8)
        return torch.from_numpy(np.unpackbits(octets, axis=1, count=n, bitorder="little").view(np.bool_))

    def complement(self, words: torch.Tensor, n: int) -> torch.Tensor:
        return torch.from_numpy(~words.numpy() & self.pack(torch.ones(1, n, dtype=torch.bool)).numpy())

    def popcount(self, words: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64)).sum(axis=1, dtype=np.int64))

    def hamming(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.popcount(torch.from_numpy(a.numpy() ^ b.numpy()))

    def toggle(self, words: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        masks = np.zeros((sets.shape[0], words.shape[1]), dtype=np.uint64)
        for players in sets.numpy().T:  # one column at a time: a row's words may repeat across columns, not within one
            row = np.flatnonzero(players >= 0)
            player = players[row].astype(np.uint64)
            masks[row, player >> np.uint64(6)] ^= np.uint64(1) << (player & np.uint64(63))
        return torch.from_numpy(words.numpy()[:, None, :] ^ masks.view(np.int64)[None])

    def sample(
        self, n: int, units: int, seed: int, replicate: int, mode: int, antithetic: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        u = _sizes(units, seed, replicate, mode, antithetic)
        if MODES[mode] in ("lhs", "size"):
            words = self.pack(torch.from_numpy(_hypercube_members(n, units, seed, replicate, mode, u)))
        else:
            everybody = self.pack(torch.ones(1, n, dtype=torch.bool))[0].numpy().view(np.uint64)
            words = torch.from_numpy(_sliced_words(everybody, units, seed, replicate, u).view(np.int64))
        if antithetic:
            words = torch.stack([words, self.complement(words, n)], dim=1).flatten(0, 1)
        return words, torch.from_numpy(u)


class _Native:
    def __init__(self, module: ModuleType):
        self.module = module

    def pack(self, coalitions: torch.Tensor) -> torch.Tensor:
        rows, n = coalitions.shape
        words = torch.empty(rows, words_for(n), dtype=torch.int64)
        self.module.pack(coalitions.data_ptr(), words.data_ptr(), rows, n)
        return words

    def unpack(self, words: torch.Tensor, n: int) -> torch.Tensor:
        coalitions = torch.empty(words.shape[0], n, dtype=torch.bool)
        self.module.unpack(words.data_ptr(), coalitions.data_ptr(), words.shape[0], n)
        return coalitions

    def complement(self, words: torch.Tensor, n: int) -> torch.Tensor:
        out = torch.empty_like(words)
        self.module.complement(words.data_ptr(), out.data_ptr(), words.shape[0], n)
        return out

    def popcount(self, words: torch.Tensor) -> torch.Tensor:
        counts = torch.empty(words.shape[0], dtype=torch.int64)
        self.module.popcount(words.data_ptr(), counts.data_ptr(), *words.shape)
        return counts

    def hamming(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        counts = torch.empty(a.shape[0], dtype=torch.int64)
        self.module.hamming(a.data_ptr(), b.data_ptr(), counts.data_ptr(), *a.shape)
        return counts

    def toggle(self, words: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        out = torch.empty(words.shape[0], sets.shape[0], words.shape[1], dtype=torch.int64)
        self.module.toggle(words.data_ptr(), sets.data_ptr(), out.data_ptr(), *words.shape, *sets.shape)
        return out

    def sample(
        self, n: int, units: int, seed: int, replicate: int, mode: int, antithetic: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.empty(units * (2 if antithetic else 1), words_for(n), dtype=torch.int64)
        u = torch.empty(units, dtype=torch.float64)
        self.module.sample_contexts(words.data_ptr(), u.data_ptr(), units, n, seed, replicate, mode, antithetic)
        return words, u


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("flmoe_fast._C"), ""
    except ModuleNotFoundError:
        return None, "built without the C++ extension: reinstall with a C++ compiler present and FLMOE_NATIVE=on"
    except ImportError as error:
        return None, f"the C++ extension does not load here: {error}"


_extension, _missing = _load()
_active: _Implementation = _NumPy() if _extension is None else _Native(_extension)
