"""Integer dot products of four bytes at a time."""

from __future__ import annotations

import triton
import triton.language as tl

# signed or not: the bytes of a, those of b
S8_S8 = tl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;")
U8_S8 = tl.constexpr("dp4a.u32.s32 $0, $1, $2, $3;")
U8_U8 = tl.constexpr("dp4a.u32.u32 $0, $1, $2, $3;")


@triton.jit
def dp4a(a, b, c, FORM: tl.constexpr, ASM: tl.constexpr):
    """c + the sum of the four products of the bytes in words a and b; FORM: S8_S8, .."""
    if ASM:
        return tl.inline_asm_elementwise(
            FORM, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            # shifted up, then down again with the sign
            a_byte = a << (24 - 8 * byte) >> 24
            b_byte = b << (24 - 8 * byte) >> 24
            if FORM != S8_S8:
                a_byte = a_byte & 255
            if FORM == U8_U8:
                b_byte = b_byte & 255
            c += a_byte * b_byte
        return c
