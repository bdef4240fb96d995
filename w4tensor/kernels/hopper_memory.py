"""How matrices come to the shared memory of a Hopper multiprocessor, and go from there, in Gluon.

Words and x come by the tensor memory accelerator. With a GATE, half of a tile's rows are gate rows
and half the up rows of the same outputs, eight and eight in turn as the matrix unit has them. In
memory they stand apart:

    halves         words of rows w_row .. and of rows up_row .., one below the other
    interleaved    words of rows w_row .., gate and up in turn

Gluon is young, and its names change from release to release.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# 3.7 renamed the first, 3.8 the next two, 3.9 the last
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret


@gluon.constexpr_function
def rows_in_memory(rows, gate):
    """How far apart in shared memory stand rows of an operand that are 8, 1 and 16 apart: what a
    thread has two of, what lanes divide and what warps do."""
    return {
        "none": (8, 1, 16),
        "halves": (rows // 2, 1, 8),
        "interleaved": (1, 2, 16),
    }[gate]


@gluon.jit
def in_turn(words, GATE: gl.constexpr):
    """[BN, C] as they stand in shared memory -> rows in the order of the operand."""
    BN: gl.constexpr = words.shape[0]
    C: gl.constexpr = words.shape[1]
    if GATE == "halves":
        return words.reshape(2, BN // 16, 8, C).permute(1, 0, 2, 3).reshape(BN, C)
    elif GATE == "interleaved":
        return words.reshape(BN // 16, 8, 2, C).permute(0, 2, 1, 3).reshape(BN, C)
    else:
        return words


@gluon.constexpr_function
def tokens_of(block):
    """How many a box [BM, ..] has, or [2, BM / 2, ..]."""
    return block[0] * block[1] if len(block) == 3 else block[0]


@gluon.jit
def as_halves(memory, LAYOUT: gl.constexpr):
    """[BM, C] in memory as [2, BM / 2, C]."""
    HALF: gl.constexpr = memory.shape[0] // 2
    return reinterpret(memory, memory.dtype, [2, HALF, memory.shape[1]], LAYOUT)


@gluon.jit
def fetch_words(w_desc, ws, full, stage, w_row, up_row, step, ok, GATE: gl.constexpr):
    """Words of a step into ws [STAGES, BN, C]."""
    words = ws.index(stage)
    first = step * ws.shape[2]
    if GATE == "halves":
        HALF: gl.constexpr = ws.shape[1] // 2
        gate = words.slice(0, HALF, 0)
        up = words.slice(HALF, HALF, 0)
        load(w_desc, [w_row, first], full.index(stage), gate, pred=ok)
        load(w_desc, [up_row, first], full.index(stage), up, pred=ok)
    else:
        load(w_desc, [w_row, first], full.index(stage), words, pred=ok)


def aligned_rows(x: Tensor) -> Tensor:
    """x [M, K] (K a multiple of 8), or a copy that the tensor memory accelerator can read."""
    # rows of an expanded x are 0 apart
    apart = x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0
    if apart and x.stride(1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _layout(block: tuple[int, ...], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    # 9 us a call without the cache
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


def descriptor(
    t: Tensor, shape: tuple[int, ...], stride: int, block: tuple[int, ...], dtype: gl.dtype
) -> TensorDescriptor:
    """Tiles of `block` of the matrix [shape] of `dtype` at t, whose rows begin `stride` apart: they
    are contiguous and 16-byte aligned.

    A block [2, BM / 2, C], of a matrix with BM / 2 to BM rows, is its first rows and its last ones.

    Not through the constructor, whose checks of all that cost 6 us; the driver refuses it anyway.
    """
    strides: tuple[int, ...] = (stride, 1)
    if len(block) == 3:
        rows, columns = shape
        shape = (2, block[1], columns)
        strides = ((rows - block[1]) * stride, stride, 1)
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(
        base=t,
        shape=shape,
        strides=strides,
        block_shape=block,
        layout=_layout(block, dtype),
        padding="zero",
    )
    return made
