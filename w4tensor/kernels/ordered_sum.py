"""Partial sums of the slices of K, added in the order of the slices: one result, whoever is last.

Every program stores its part, then calls arrive(). The one that arrives last adds the parts of all
slices, in order, and sets the counter back to 0 for the next launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr, SPLIT_K: tl.constexpr):
    """Whether this program is the last of SPLIT_K to arrive; what the others stored is visible."""
    # every thread's stores come before the one thread that counts
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLIT_K - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


@triton.jit
def add_parts(part_ptrs, stride, mask, SPLIT_K: tl.constexpr):
    """The sum, in order, of SPLIT_K fp32 tiles that lie `stride` apart."""
    total = tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    for k_slice in range(1, SPLIT_K):
        part = tl.load(part_ptrs + k_slice * stride, mask=mask, other=0.0, cache_modifier=".cg")
        total += part
    return total
