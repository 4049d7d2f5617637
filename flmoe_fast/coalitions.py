"""Coalitions as packed bits, and the draws of context coalitions that corner grids are built on.

A coalition of n players is a row of W = ceil(n / 64) int64 words: player p is bit ``p & 63`` of word ``p >> 6``, and
the bits of the last word beyond n are zero. ``words`` are CPU int64 tensors ``(C, W)`` throughout.

There are two implementations with identical bits: NumPy, always there, and C++, used when the package was built with
its extension (:func:`implementation` says which). Neither touches torch's random state.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.native import missing, module

MODES = ("lhs", "stratified", "iid", "size")
"""How :func:`sample_contexts` spreads a draw; a mode's position is its number in C++."""

_MOST = 2**32 - 1  # units, players and replicates are words of the generator's counter
_MEMBER_STREAM, _SIZE_STREAM, _SLICE_STREAM = 0, 1, 2  # slices: and those after it, two slices a stream
_DIGITS = 53  # of a number that is drawn by slices


class Contexts(NamedTuple):
    """A draw of K context coalitions.

    Attributes
    ----------
    words : Tensor
        int64 (K, W), the coalitions. Antithetic: row 2k is T_k and row 2k + 1 its complement.
    u : Tensor
        float64 (K,), the share of players included, in expectation; 1 - u_k for a complement.
    """

    words: torch.Tensor
    u: torch.Tensor


def words_for(n: int) -> int:
    """Words that n players take."""
    return (n + 63) // 64


def implementation() -> str:
    """Which implementation this process uses: ``"native"`` (C++) or ``"numpy"``."""
    return "numpy" if missing() else "native"


def pack(coalitions: torch.Tensor) -> torch.Tensor:
    """Pack a bool matrix.

    Parameters
    ----------
    coalitions : Tensor
        Bool (C, n), CPU; row c is True at the members of coalition c.

    Returns
    -------
    Tensor
        int64 (C, W).
    """
    _check(coalitions, "coalitions", torch.bool)
    shape("coalitions", coalitions, (None, None), "(coalitions, players)")
    return _active.pack(coalitions.contiguous())


def unpack(words: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int64 (C, W) to bool (C, n)."""
    _check(words, "words", torch.int64)
    n = integer("n", n, least=0)
    shape("words", words, (None, words_for(n)), "(coalitions, words)")
    return _active.unpack(words.contiguous(), n)


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

    Parameters
    ----------
    n : int
        Players, at least 1.
    contexts : int
        K, at least 1; even when antithetic.
    seed : int
        0 <= seed < 2**64.
    mode : str
        One of :data:`MODES`.
    antithetic : bool
        Add every coalition's complement.
    replicate : int
        Which draw under this seed, 0 <= replicate < 2**32.

    Raises
    ------
    ArgumentError
        An argument out of range.
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


# ---- implementations: contiguous, checked tensors in, new tensors out


class _Implementation(Protocol):
    def pack(self, coalitions: torch.Tensor) -> torch.Tensor: ...
    def unpack(self, words: torch.Tensor, n: int) -> torch.Tensor: ...
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

    def sample(
        self, n: int, units: int, seed: int, replicate: int, mode: int, antithetic: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        u = _sizes(units, seed, replicate, mode, antithetic)
        everybody = self.pack(torch.ones(1, n, dtype=torch.bool))[0].numpy()
        if MODES[mode] in ("lhs", "size"):
            words = self.pack(torch.from_numpy(_hypercube_members(n, units, seed, replicate, mode, u)))
        else:
            words = torch.from_numpy(_sliced_words(everybody.view(np.uint64), units, seed, replicate, u).view(np.int64))
        if antithetic:
            rest = torch.from_numpy(~words.numpy() & everybody)
            words = torch.stack([words, rest], dim=1).flatten(0, 1)
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

    def sample(
        self, n: int, units: int, seed: int, replicate: int, mode: int, antithetic: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.empty(units * (2 if antithetic else 1), words_for(n), dtype=torch.int64)
        u = torch.empty(units, dtype=torch.float64)
        self.module.sample_contexts(words.data_ptr(), u.data_ptr(), units, n, seed, replicate, mode, antithetic)
        return words, u


_active: _Implementation = _NumPy() if missing() else _Native(module())
