"""ACT_QUANT words for 16-bit activations: what int8 is not worth, read from the same bytes.

Byte j of word t of a slice holds k = 4t + j in its low nibble and k = 16 + 4t + j in its high one,
as q - 8 in two's complement (layout.py). With codes unsigned and bytes 1 and 2 exchanged, unpack()
makes of nibble 4r + 2p + q' the weight at k = 16q' + 4t + 2p + r, and neighbours in k, which the
matrix unit takes together, share a register.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 0x88888888: what makes q of the eight q - 8 of a word
EIGHTS = tl.constexpr(-0x77777778)


@triton.jit
def unpackable(words, ASM: tl.constexpr):
    """ACT_QUANT words of any shape -> words for unpack()."""
    # q - 8 in two's complement is q with its highest bit turned
    words = words ^ EIGHTS
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x3120;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        changed = (words ^ (words >> 8)) & 0xFF00
        return words ^ changed ^ (changed << 8)
