"""How a kernel walks the scales [.., N, G] of rows whose K comes in blocks of 128."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch import Tensor

# tokens of a tile on Hopper up to which two of a step's four scales are loaded together
PAIRS_MAX_M = 64


@dataclass(frozen=True, slots=True)
class Groups:
    """Constants of one weight, for kernels that take `blocks` blocks of a row a step.

    Fields:
        parts: groups in a block; 1 where a group is a block or more.
        blocks_a_group: blocks in a group; 1 where a group is a block or less.
        vector: neighbouring scales that one load takes; rows begin on multiples of it.
        n_vectors, stride: a row's scales, and the distance of rows, in vectors.
    """

    parts: int
    blocks_a_group: int
    vector: int
    n_vectors: int
    stride: int


def groups_of(scale: Tensor, zero_point: Tensor | None, group_size: int, blocks: int) -> Groups:
    """The Groups of a weight; group_size may be K itself, of any size."""
    widest = max(scale.element_size(), 0 if zero_point is None else zero_point.element_size())
    return _groups(scale.shape[-1], scale.stride(-2), widest, group_size, blocks)


@functools.cache
def _groups(n_groups: int, stride: int, widest: int, group_size: int, blocks: int) -> Groups:
    parts = 128 // group_size if group_size in (16, 32, 64) else 1
    blocks_a_group = -(-group_size // 128)
    vector = 1
    if blocks_a_group == 1:
        while (
            vector * 2 <= min(blocks * parts, 16 // widest)
            and n_groups % (vector * 2) == 0
            and stride % (vector * 2) == 0
        ):
            vector *= 2
    return Groups(parts, blocks_a_group, vector, n_groups // vector, stride // vector)


def groups_together(n_groups: int, group_size: int, block_m: int) -> int:
    """How many of a step's groups kernels/hopper_operand.py loads at a time: a row has a multiple.

    Two of four help small tiles only: 5120 x 2880 in groups of 32 takes 8.7 us at 32 tokens (one by
    one 9.4), and at 128 17.9 (14.5).

    >>> groups_together(32, 32, 8), groups_together(90, 32, 8), groups_together(90, 32, 128)
    (4, 2, 1)
    """
    of_step = max(1, 128 // group_size)
    together = math.gcd(n_groups, of_step)
    return together if together == of_step or block_m <= PAIRS_MAX_M else 1
