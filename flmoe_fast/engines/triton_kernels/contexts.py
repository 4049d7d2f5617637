"""Draws of context coalitions on the device, the bits of :func:`flmoe_fast.coalitions.sample_contexts`.

Every random number is a hash of a counter, so a program recomputes what it needs and depends on no other. Doubles are
only added, multiplied, divided and compared, and every product that could be fused with a sum is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flmoe_fast.coalitions import words_for
from flmoe_fast.engines.triton_kernels.arithmetic import launch
from flmoe_fast.engines.triton_kernels.configs import find

MEMBER_STREAM, SIZE_STREAM, SLICE_STREAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: Binary digits of a uniform number.
DIGITS = tl.constexpr(53)
UNIT = tl.constexpr(2.0**-53)


@triton.jit
def philox(unit, player, stream, replicate, key0, key1):
    """Four random words of broadcastable counters."""
    zero = (unit + player).to(tl.uint32) * 0
    return tl.philox_impl(
        zero + unit.to(tl.uint32),
        zero + player.to(tl.uint32),
        zero + stream.to(tl.uint32),
        zero + replicate.to(tl.uint32),
        key0.to(tl.uint32),
        key1.to(tl.uint32),
    )


@triton.jit
def joined(high, low):
    """One 64-bit word of two random words."""
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def jitter(high, low):
    """A double in [0, 1), a multiple of 2^-53."""
    return (joined(high, low) >> (64 - DIGITS)).to(tl.float64) * UNIT


@triton.jit
def rank_key(unit, player, replicate, key0, key1):
    """What units sort by for a player: a random word, and equal ones by unit."""
    zero = (unit + player) * 0
    key, _, _, _ = philox(unit, player, zero + MEMBER_STREAM, replicate, key0, key1)
    return joined(key, zero + unit)


@triton.jit
def unit_size(unit, units, replicate, key0, key1, STRATIFIED: tl.constexpr, ANTITHETIC: tl.constexpr):
    """u of each unit."""
    stream = unit * 0 + SIZE_STREAM
    _, _, high, low = philox(unit, unit * 0, stream, replicate, key0, key1)
    size = jitter(high, low)
    if STRATIFIED:
        size = (unit.to(tl.float64) + size) / units.to(tl.float64)
    if ANTITHETIC:
        size = 0.5 * size
    return size


@triton.jit
def everybody(players, word):
    """The bits of a word that stand for players."""
    left = players - 64 * word
    ones = tl.full(left.shape, -1, tl.int64)
    return tl.where(left >= 64, ones, ~(ones << tl.minimum(tl.maximum(left, 0), 63).to(tl.int64)))


@triton.jit
def store_words(words_ptr, row, word, width, players, members, mask, ANTITHETIC: tl.constexpr):
    """Store words of coalitions, and of their complements in the rows behind theirs."""
    if ANTITHETIC:
        at = words_ptr + 2 * row * width + word
        tl.store(at + width, everybody(players, word) & ~members, mask=mask)
    else:
        at = words_ptr + row * width + word
    tl.store(at, members, mask=mask)


@triton.jit(do_not_specialize=["units", "players", "width", "replicate", "key0", "key1"])
def sliced_kernel(
    words_ptr,  # [units (2 units if ANTITHETIC), width] int64
    sizes_ptr,  # [units] fp64
    units,
    players,
    width,
    replicate,
    key0,
    key1,
    STRATIFIED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of BLOCK words, each of 64 players of one unit; independent U, compared digit by digit."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    unit = at // width
    word = at % width
    mask = unit < units
    size = unit_size(unit, units, replicate, key0, key1, STRATIFIED, ANTITHETIC)
    tl.store(sizes_ptr + unit, size, mask=mask & (word == 0))
    scaled = size * (1.0 / UNIT)
    limit = scaled.to(tl.int64)
    limit += (limit.to(tl.float64) < scaled).to(tl.int64)
    everyone = tl.where(mask, everybody(players, word), 0)
    members = tl.where((limit >> DIGITS) != 0, everyone, 0)
    undecided = everyone & ~members
    pair = 0
    open_words = tl.max((undecided != 0).to(tl.int32), 0)
    while open_words > 0:
        x0, x1, x2, x3 = philox(unit, word, unit * 0 + SLICE_STREAM + pair, replicate, key0, key1)
        for odd in tl.static_range(2):
            digits = (joined(x2, x3) if odd else joined(x0, x1)).to(tl.int64, bitcast=True)
            # The last of an odd number of digits has no second one.
            shift = DIGITS - 1 - 2 * pair - odd
            ones = 0 - ((limit >> tl.maximum(shift, 0).to(tl.int64)) & 1)  # all ones where the digit is one
            undecided = tl.where(shift >= 0, undecided, 0)
            members |= undecided & ~digits & ones
            undecided &= ~(digits ^ ones)
        pair += 1
        open_words = tl.max((undecided != 0).to(tl.int32), 0)
    store_words(words_ptr, unit, word, width, players, members, mask, ANTITHETIC)


@triton.jit(do_not_specialize=["units", "players", "replicate", "key0", "key1"])
def hypercube_kernel(
    uniforms_ptr,  # [units, players] fp64
    sizes_ptr,  # [units] fp64
    units,
    players,
    blocks,  # of players
    replicate,
    key0,
    key1,
    ANTITHETIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BU: tl.constexpr,
):
    """Grid: one unit's block of BLOCK players. u and all numbers; ranks are counted among BU units at a time."""
    program = tl.program_id(0)
    unit = (program // blocks).to(tl.int64)
    player = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = rank_key(unit, player, replicate, key0, key1)
    rank = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, units, BU):
        other = first + tl.arange(0, BU).to(tl.int64)
        keys = rank_key(other[:, None], player[None, :], replicate, key0, key1)
        before = (keys < own[None, :]) & (other < units)[:, None]
        rank += tl.sum(before.to(tl.int64), 0)
    _, _, high, low = philox(unit, player, player * 0 + MEMBER_STREAM, replicate, key0, key1)
    uniform = (rank.to(tl.float64) + jitter(high, low)) / units.to(tl.float64)
    tl.store(uniforms_ptr + unit * players + player, uniform, mask=player < players)
    own_unit = unit + tl.zeros((1,), dtype=tl.int64)
    size = unit_size(own_unit, units, replicate, key0, key1, True, ANTITHETIC)
    tl.store(sizes_ptr + own_unit, size, mask=program % blocks == own_unit * 0)


@triton.jit(do_not_specialize=["players", "width"])
def members_kernel(
    words_ptr,  # [units (2 units if ANTITHETIC), width] int64
    sizes_ptr,  # [units] fp64
    uniforms_ptr,  # [units, players] fp64
    players,
    width,
    EXACT: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: one word of one unit. EXACT: those with the smallest numbers, counted among BLOCK players at a time."""
    program = tl.program_id(0)
    unit = (program // width).to(tl.int64)
    word = (program % width).to(tl.int64)
    player = 64 * word + tl.arange(0, 64)
    own = tl.load(uniforms_ptr + unit * players + player, mask=player < players, other=2.0)
    one = tl.zeros((1,), dtype=tl.int64)
    size = tl.load(sizes_ptr + unit)
    if EXACT:
        before = tl.zeros((64,), dtype=tl.int64)
        for first in range(0, players, BLOCK):
            other = first + tl.arange(0, BLOCK).to(tl.int64)
            value = tl.load(uniforms_ptr + unit * players + other, mask=other < players, other=2.0)
            less = value[:, None] < own[None, :]
            less |= (value[:, None] == own[None, :]) & (other[:, None] < player[None, :])
            before += tl.sum((less & (other < players)[:, None]).to(tl.int64), 0)
        count = (size * (players + 1).to(tl.float64)).to(tl.int64)
        member = before < count
    else:
        member = own < size
    member &= player < players
    bits = tl.where(member, tl.full((64,), 1, tl.int64) << tl.arange(0, 64).to(tl.int64), 0)
    members = one + tl.sum(bits, 0)
    store_words(words_ptr, one + unit, one + word, width, players, members, one == 0, ANTITHETIC)


def contexts(
    words: torch.Tensor,
    sizes: torch.Tensor,
    *,
    players: int,
    seed: int,
    mode: str,
    antithetic: bool,
    replicate: int,
    target: str,
) -> None:
    """Draw coalitions into ``words`` (K, W) int64 and the first of each pair's u into ``sizes`` (units,) float64.

    As :func:`flmoe_fast.coalitions.sample_contexts`, whose ranges hold: K is twice the units when ``antithetic``. The
    modes with a Latin hypercube take a scratch array of units times players doubles.
    """
    units, width = len(sizes), words_for(players)
    counter = (replicate, seed & 0xFFFFFFFF, seed >> 32)
    if mode in ("stratified", "iid"):
        config = find("sliced", "fp32", target)
        launch(
            sliced_kernel,
            -(-units * width // config.rows),
            config,
            words,
            sizes,
            units,
            players,
            width,
            *counter,
            STRATIFIED=mode == "stratified",
            ANTITHETIC=antithetic,
            BLOCK=config.rows,
        )
        return
    config = find("hypercube", "fp32", target)
    uniforms = torch.empty(units, players, dtype=torch.float64, device=words.device)
    blocks = -(-players // config.columns)
    launch(
        hypercube_kernel,
        units * blocks,
        config,
        uniforms,
        sizes,
        units,
        players,
        blocks,
        *counter,
        ANTITHETIC=antithetic,
        BLOCK=config.columns,
        BU=config.rows,
    )
    config = find("members", "fp32", target)
    launch(
        members_kernel,
        units * width,
        config,
        words,
        sizes,
        uniforms,
        players,
        width,
        EXACT=mode == "size",
        ANTITHETIC=antithetic,
        BLOCK=config.rows,
    )
