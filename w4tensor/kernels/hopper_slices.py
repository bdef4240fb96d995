"""Tiles of a product on Hopper, slices of their K, and the ordered sums of slices, in Gluon.

K is cut into split_k slices where tiles alone would leave the card idle: of all tiles, or of those
that a last, partly filled wave would have. Slices store their sums, and that of the last slice adds
them, in order: two runs give the same bits. A stored sum is announced by a flag that gets this
launch's token, so that the flags need no zeros to begin with; who has seen a flag clears it.
Programs wait only for programs that were started before them.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from w4tensor.kernels.hopper_memory import barrier


@gluon.jit
def tile_at(tile, tiles_n, tiles_m, GROUP_N: gl.constexpr):
    """Row and column of a tile: GROUP_N tiles of rows share x while it is in L2."""
    first = tile // (GROUP_N * tiles_m) * GROUP_N
    width = gl.minimum(tiles_n - first, GROUP_N)
    within = tile % (GROUP_N * tiles_m)
    return first + within % width, within // width


@gluon.jit
def first_tokens(m0, M, FIRST: gl.constexpr, MORE: gl.constexpr):
    """Of a tile at m0: the first of its FIRST tokens, and of MORE if they come in two runs."""
    if MORE:
        # where there are too few tokens, those that both runs have are computed twice
        return m0, gl.maximum(gl.minimum(m0 + FIRST, M - MORE), m0)
    else:
        return (m0,)


@gluon.jit
def slice_at(program, whole, split_k):
    """Of a program: its tile, which slice of the tile's K it has, and of how many."""
    tile = program
    slices = 1
    k_slice = 0
    if program >= whole:
        slices = split_k
        k_slice = (program - whole) % split_k
        tile = whole + (program - whole) // split_k
    return tile, k_slice, slices


@gluon.jit
def await_parts(flag_ptr, parts, token):
    """Until the sums of other slices are there; clears their flags."""
    # lanes look at a flag each, at once (in turn: 0.35 us a flag), and those left over at the last
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    flag = flag_ptr + gl.maximum(gl.minimum(lane, parts - 1), 0)
    missing = parts
    while missing > 0:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b64 $0, [$1];",
            "=l,l",
            [flag.to(gl.int64)],
            dtype=gl.int64,
            is_pure=False,
            pack=1,
        )
        missing = gl.max((seen != token).to(gl.int32), 0)
    barrier()
    gl.store(flag, gl.zeros_like(lane).to(gl.int64), mask=lane < parts)


# of an accumulator, that are added at a time: there are no registers for more
_COLUMNS = gl.constexpr(64)


@gluon.jit
def in_lines(acc):
    """Sums [BN, BM] in the order in which a warp stores and loads whole lines: [BN * BM], of which
    a thread has four neighbours, and a warp those of eight columns and sixteen rows."""
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    return acc.reshape(BN // 16, 2, 8, BM // 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(BN * BM)


@gluon.jit
def _in_columns(sums, like):
    """What in_lines() made of `like`, or numbers in that order, as `like` is."""
    BN: gl.constexpr = like.shape[0]
    BM: gl.constexpr = like.shape[1]
    out = sums.reshape(BM // 8, BN // 16, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5).reshape(BN, BM)
    return gl.convert_layout(out, like.type.layout, assert_trivial=True)


@gluon.jit
def store_part(ptr, acc):
    """As add_parts() reads it."""
    sums = in_lines(acc)
    gl.store(ptr + gl.arange(0, sums.shape[0], sums.type.layout), sums)


@gluon.constexpr_function
def _at_once(tile, warps):
    """How many sums of a tile a thread loads before it adds them: as registers permit."""
    return min(4, max(1, 64 * 32 * warps // tile))


@gluon.jit
def _load_some(ptr, first, parts, PART: gl.constexpr, AT_ONCE: gl.constexpr):
    """Part `first` and those after it, AT_ONCE of them, PART numbers apart; past the last 0."""
    loaded = ()
    for i in gl.static_range(AT_ONCE):
        # no branch around the sum of none: it would cost registers
        at = ptr + (first + i) * PART
        loaded += (gl.load(at, mask=first + i < parts, other=0.0, cache_modifier=".cg"),)
    return loaded


@gluon.jit
def add_parts(acc, ptr, parts, PART: gl.constexpr):
    """((part 0 + part 1) + ..) + acc, of as many `parts` at ptr, PART numbers apart."""
    if acc.shape[1] > _COLUMNS:
        HALF: gl.constexpr = acc.shape[1] // 2
        halved = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1)
        left, right = halved.split()
        left = add_parts(left, ptr, parts, PART)
        right = add_parts(right, ptr + acc.shape[0] * HALF, parts, PART)
        out = gl.join(left, right).permute(0, 2, 1).reshape(acc.shape)
        return gl.convert_layout(out, acc.type.layout, assert_trivial=True)
    else:
        AT_ONCE: gl.constexpr = _at_once(PART, gl.num_warps())
        sums = in_lines(acc)
        ptr += gl.arange(0, sums.shape[0], sums.type.layout)
        loaded = _load_some(ptr, 0, parts, PART, AT_ONCE)
        total = loaded[0]
        for i in gl.static_range(1, AT_ONCE):
            total += loaded[i]
        for part in range(AT_ONCE, parts, AT_ONCE):
            loaded = _load_some(ptr, part, parts, PART, AT_ONCE)
            for i in gl.static_range(AT_ONCE):
                total += loaded[i]
        return _in_columns(total + sums, acc)


def memory_of_sums(
    stored: int, size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Memory of `stored` sums of `size` numbers, and of their flags; uninitialised."""
    if not stored:
        return None, None
    # sums of 4 bytes and flags of 8 in one allocation
    parts = torch.empty(stored * size + 2 * stored, device=device, dtype=torch.float32)
    return parts, parts[stored * size :].view(torch.int64)


def token_of_launch() -> int:
    """What announces a sum in this launch: odd and of 8 bytes, for Triton to specialise once."""
    return random.getrandbits(60) | 1 << 61 | 1
