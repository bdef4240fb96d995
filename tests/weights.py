"""int4 weights of every kind for the tests, with answers that no code of the package computed.

Case is one problem; cases() is the hypothesis strategy over the documented domain, drawn towards
the shapes where formats could be taken for one another: N = n_groups, N = K, N = 1, odd sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor

CLASSES = (CudaCoalescedInt4Tensor, Int4ActQuantTensor)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ZEROS = ("symmetric", "integer", "fractional")
# what rounding an exact answer once leaves, relative; fp32 sums in an order of its own
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}

both_classes = pytest.mark.parametrize("cls", CLASSES, ids=["coalesced", "act_quant"])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])


@dataclass(frozen=True)
class Case:
    """A weight [*stack, n, k] of class `cls`: everything that decides its bytes."""

    cls: type
    n: int = 24
    k: int = 256
    group_size: int = 64
    stack: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    zero: str = "symmetric"
    seed: int = 0

    @property
    def g(self) -> int:
        return self.k if self.group_size == -1 else self.group_size

    def codes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, scale, zero_point. Scales are powers of two, zero points sixteenths: exact sums."""
        rng = torch.Generator().manual_seed(self.seed)
        q = torch.randint(0, 16, (*self.stack, self.n, self.k), generator=rng, dtype=torch.uint8)
        groups = (*self.stack, self.n, self.k // self.g)
        scale = torch.ldexp(torch.ones(groups), torch.randint(-3, 0, groups, generator=rng))
        scale = scale * (torch.randint(0, 2, groups, generator=rng) * 2 - 1)
        zero = None
        if self.zero == "integer":
            zero = torch.randint(0, 16, groups, generator=rng).half()
        elif self.zero == "fractional":
            zero = (torch.randint(-64, 320, groups, generator=rng) / 16).half()
        return q, scale.to(self.dtype), zero

    def weight(self, **fields: Any):
        q, scale, zero = self.codes()
        return self.cls.from_codes(q, scale, zero, group_size=self.group_size, **fields)

    def multiple(self) -> Tensor:
        """Scales of symmetric codes() as multiples of 2**-3, int8."""
        return self.codes()[1].double().mul(8).to(torch.int8)

    def integer_weight(self) -> Int4ActQuantTensor:
        """weight(act_group_size=-1), and its integer scales."""
        return self.weight(act_group_size=-1, multiple=self.multiple())

    def dense(self) -> Tensor:
        """fp64 [*stack, n, k], from the codes and the formula alone."""
        q, scale, zero = self.codes()
        zero = torch.full_like(scale, 8.0).double() if zero is None else zero.double()
        each = torch.arange(self.k) // self.g
        return (q.double() - zero[..., each]) * scale.double()[..., each]

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@st.composite
def cases(
    draw,
    cls: type | None = None,
    stacked: bool | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    k: int | None = None,
) -> Case:
    """Any legal weight, small."""
    group_size = draw(st.sampled_from([16, 32, 64, 128, 256, -1]))
    if k is None and group_size == -1:
        k = draw(st.sampled_from([1, 2, 8, 17, 32, 33, 100, 127, 128, 129, 256, 300]))
    elif k is None:
        k = group_size * draw(st.integers(1, max(1, 512 // group_size)))
    elif k % group_size:
        group_size = -1
    n_groups = 1 if group_size == -1 else k // group_size
    n = draw(st.sampled_from([1, 2, 3, 5, 8, 17, 33, n_groups, min(k, 300)]))
    if stacked is None:
        stacked = draw(st.booleans())
    return Case(
        cls=draw(st.sampled_from(CLASSES)) if cls is None else cls,
        n=n,
        k=k,
        group_size=group_size,
        stack=(draw(st.integers(1, 4)),) if stacked else (),
        dtype=draw(st.sampled_from(dtypes)),
        zero=draw(st.sampled_from(ZEROS)),
        seed=draw(st.integers(0, 99)),
    )


def exact_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Small integers with +-127 first in every 32: int8 rounds them to themselves, with scale 1."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, shape, generator=rng)
    x[..., ::32] = 127 * (torch.randint(0, 2, x[..., ::32].shape, generator=rng) * 2 - 1)
    return x.to(dtype)


def assert_close(y: Tensor, expected: Tensor, dtype: torch.dtype, size: Tensor | float = 0) -> None:
    """y is a plain tensor, `expected` rounded to `dtype`.

    size: of what was summed, where the sum is not exact in fp32.
    """
    assert type(y) is Tensor and y.shape == expected.shape and y.dtype == dtype
    error = (y.double() - expected.double()).abs()
    allowed = ROUNDING[dtype] * expected.double().abs() + 2**-19 * size
    assert bool((error <= allowed).all()), float((error - allowed).max())


def fields(w) -> dict[str, Any]:
    """Every field of a packed tensor by name."""
    names = w.tensor_data_names + w.tensor_attribute_names
    names += w.optional_tensor_data_names + w.optional_tensor_attribute_names
    return {name: getattr(w, name) for name in names}


def assert_same(a, b) -> None:
    """The same class, attributes and bits."""
    assert type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype
    left, right = fields(a), fields(b)
    for name in left:
        if isinstance(left[name], Tensor):
            assert left[name].dtype == right[name].dtype, name
            assert torch.equal(left[name], right[name]), name
        else:
            assert left[name] == right[name], name
