"""Wait for the matrix unit before the registers that it reads are written again.

wgmma reads a register operand while later instructions run. Triton 3.6 chains such products across
the steps of a loop with up to seven outstanding, and the next step's weights are unpacked into the
registers of the last: on an H200, tiles of 128 x 128 with 8 warps gave other numbers in each run.
Passing the accumulator through an opaque move makes the step wait for its own products. With 4
warps that is even faster (440 against 496 us at 1024 x 28672 x 4096).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def settle(acc, ASM: tl.constexpr):
    """`acc` (fp32 or int32), once all products that make it are done."""
    if not ASM:
        return acc
    elif acc.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.int32, is_pure=True, pack=1
        )
