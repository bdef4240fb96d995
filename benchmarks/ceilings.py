"""What a time is held against: a kernel that only reads, and the card's rates.

    python -m benchmarks.ceilings

The bare read loads bytes and combines them, nothing else: no kernel that uses each of them once
is faster. Several grids are tried once for each size and the best one counts.
"""

from __future__ import annotations

import argparse
import functools
import itertools

import torch
import triton
import triton.language as tl

from benchmarks import timing

# words a program reads at once, how often, and its warps
GRIDS = tuple(itertools.product((1024, 2048, 4096), (1, 2, 4, 8), (4, 8)))


@triton.jit
def _read_kernel(words_ptr, out_ptr, n_words, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    pid = tl.program_id(0)
    first = pid.to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.int32)
    # unrolled: all loads of a program are in flight together
    for step in tl.static_range(STEPS):
        i = first + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(words_ptr + i, mask=i < n_words, other=0)
    tl.store(out_ptr + pid, tl.sum(total, 0))


@functools.cache
def read_us(nbytes: int) -> float:
    """Microseconds of the best bare read of `nbytes`, out of memory and not out of the L2 cache."""
    n_words = -(-nbytes // 64) * 16
    copies = timing.n_copies(n_words * 4)
    buffer = torch.randint(-(2**31), 2**31 - 1, (copies, n_words), device="cuda").to(torch.int32)
    best = float("inf")
    for block, steps, num_warps in GRIDS:
        programs = -(-n_words // (block * steps))
        out = torch.empty(programs, dtype=torch.int32, device="cuda")

        def read(words, out=out, block=block, steps=steps, num_warps=num_warps, programs=programs):
            _read_kernel[(programs,)](
                words, out, n_words, BLOCK=block, STEPS=steps, num_warps=num_warps
            )

        calls = [functools.partial(read, words) for words in buffer]
        best = min(best, timing.graph_time(calls, seconds=0.005).us)
    return best


def read_rate() -> float:
    """Bytes a second of the bare read of 2 GiB."""
    return (2 << 30) / read_us(2 << 30) * 1e6


def matmul_rate(dtype: torch.dtype, n: int = 8192) -> float:
    """Operations a second of the library's n x n x n product: bf16, fp16 or int8."""
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (n, n), device="cuda", dtype=dtype) for _ in range(2))
        return 2 * n**3 / timing.graph_time([lambda: torch._int_mm(a, b.t())]).us * 1e6
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * n**3 / timing.graph_time([lambda: a @ b.t()]).us * 1e6


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"bare read   {read_rate() / 1e12:.2f} TB/s")
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        print(f"{str(dtype)[6:]:11s} {matmul_rate(dtype) / 1e12:.0f} T/s at 8192 x 8192 x 8192")


if __name__ == "__main__":
    main()
