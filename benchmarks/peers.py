"""One weight in each implementation that we compare: ours, bf16 cuBLAS, tinygemm, gemlite, humming.

humming has a file of its own, for it also does experts. Every adapter is made from the same codes,
is called with x [M, K] and returns x @ w.T, so that a wrong use of a peer shows in the row's
rel_err. What a peer cannot do raises Refused, with its reason; peers are imported where they are
used, for some need a GPU to be imported.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from w4tensor import CudaCoalescedInt4Tensor, Int4ActQuantTensor
from w4tensor.testing import Int4Codes

__all__ = [
    "ACTS",
    "Act",
    "Dense",
    "Gemlite",
    "OURS",
    "Linear",
    "Ours",
    "Refused",
    "Tinygemm",
    "only",
    "reason",
]


class Refused(Exception):
    """This implementation does not do this problem."""


@dataclass(frozen=True, slots=True)
class Act:
    """What activations become: x's dtype, and the int8 group (-1 per token) or None; and whether
    the weights' scales are integers."""

    name: str
    dtype: torch.dtype
    int8_group: int | None = None
    integer_scales: bool = False


ACTS = {
    act.name: act
    for act in (
        Act("bf16", torch.bfloat16),
        Act("fp16", torch.float16),
        Act("int8g32", torch.bfloat16, 32),
        Act("int8g64", torch.bfloat16, 64),
        Act("int8g128", torch.bfloat16, 128),
        Act("int8token", torch.bfloat16, -1),
        Act("int8integer", torch.bfloat16, -1, integer_scales=True),
        Act("fp8", torch.bfloat16),
    )
}
# what our tensors do
OURS = ("bf16", "fp16", "int8g32", "int8g64", "int8g128", "int8token", "int8integer")


def reason(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def only(act: Act, *names: str) -> None:
    """Raise Refused for activations that are not among `names`."""
    if act.name not in names:
        raise Refused(f"activations {act.name} are not among {', '.join(names)}")


class Linear:
    """A weight that multiplies. Its tensors are its attributes, so that copy() finds them."""

    def check(self, m: int) -> None:
        """Raise Refused where m tokens are not to be had."""

    def prepare(self, tokens: Sequence[int]) -> None:
        """Compile what these numbers of tokens need, before anything is timed."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def copy(self) -> Linear:
        """The same weight in memory of its own."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(twin, name, value.clone())
        return twin


class Ours(Linear):
    """F.linear on our tensors, as torch.nn.Linear calls it."""

    def __init__(self, codes: Int4Codes, act: Act):
        only(act, *OURS)
        fields = (codes.q, codes.scale, codes.zero_point)
        if act.int8_group is None:
            self.weight = CudaCoalescedInt4Tensor.from_codes(*fields, group_size=codes.group_size)
        else:
            kind = dict(act_group_size=act.int8_group, multiple=codes.multiple)
            self.weight = Int4ActQuantTensor.from_codes(
                *fields, group_size=codes.group_size, **kind
            )

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Dense(Linear):
    """cuBLAS on the dequantised weight in x's dtype."""

    def __init__(self, codes: Int4Codes, act: Act):
        only(act, "bf16", "fp16")
        self.weight = codes.dequantize(act.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Tinygemm(Linear):
    """torchao's Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")."""

    def __init__(self, codes: Int4Codes, act: Act):
        from torchao.quantization.quantize_.workflows import Int4TilePackedTo4dTensor
        from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

        only(act, "bf16")
        n, k = codes.q.shape
        pad_n, pad_k = -n % 8, -k % 1024
        q = F.pad(codes.q, (0, pad_k, 0, pad_n), value=8)
        # its convention: w = (q - 8) * scale + zero
        zero_point = 8 if codes.zero_point is None else codes.zero_point
        zero = ((8 - zero_point) * codes.scale.float()).to(torch.bfloat16)
        zero = zero.expand_as(codes.scale)
        pad = (0, pad_k // codes.group_size, 0, pad_n)
        scale_and_zero = pack_tinygemm_scales_and_zeros(F.pad(codes.scale, pad), F.pad(zero, pad))
        self.weight = Int4TilePackedTo4dTensor(
            torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8),
            scale_and_zero,
            [1, codes.group_size],
            torch.Size((n, k)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Gemlite(Linear):
    """gemlite 0.6, with the tiles that it ships for the H100 (it has none for the H200).

    Where it ships none for a shape it would search for a minute or more: refused, unless
    `Gemlite.autotune` is set.
    """

    autotune = False

    def __init__(self, codes: Int4Codes, act: Act):
        core = _gemlite()
        from gemlite.helper import A16W4_HQQ_INT, A8W4_HQQ_INT_dynamic

        only(act, "bf16", "fp16", "fp8")
        make = A8W4_HQQ_INT_dynamic if act.name == "fp8" else A16W4_HQQ_INT
        zero_point = codes.zero_point
        if zero_point is None:
            zero_point = torch.full_like(codes.scale, 8)
        layer = make(device="cuda", dtype=act.dtype).from_weights(
            codes.q, codes.scale, zero_point.to(codes.scale.dtype)
        )
        self._forward = core.forward_functional
        self.w_q, self.scales, self.zeros, self.meta_scale = layer.get_tensor_args()
        self._meta = layer.get_meta_args()
        self._shape = (*codes.q.shape, codes.group_size)

    def check(self, m: int) -> None:
        core = _gemlite()
        n, k, group_size = self._shape
        # the key of its tables: the codes an int32 holds, and 100 x dtype of x + bits
        _, bits, _, _, packed, dtype = self._meta[:6]
        if dtype == core.DType.BF16.value:
            dtype = core.DType.FP16.value
        tiles = core.GEMLITE_TRITON_CONFIG_CACHE.get(core.get_matmul_type(m, bits), {})
        key = (core.utils.get_closest_m(m), n, k, group_size, packed, dtype * 100 + bits)
        if str(key) not in tiles and not self.autotune:
            raise Refused("gemlite ships no tile for it; --autotune searches for one")

    def __call__(self, x: Tensor) -> Tensor:
        tensors = [self.w_q, self.scales, self.zeros, self.meta_scale]
        return self._forward(x, None, tensors, self._meta)


@functools.cache
def _gemlite():
    """gemlite's core module, with its H100 tiles loaded."""
    from gemlite import core

    tiles = Path(core.__file__).parent / "configs" / "h100.json"
    if not core.GemLiteLinear.load_config(str(tiles)):
        raise Refused(f"gemlite's tiles did not load from {tiles}")
    return core
