"""The byte formats of the two tensors, and the contract that every reader of them checks.

Meaning, in both: codes q are 0..15 and, with g = group_size,

    w[n, k] = (q[n, k] - zero_point[n, k // g]) * scale[n, k // g]

zero_point is in code units and may be fractional; where a tensor has none it is 8 (symmetric).
Rows stand alone: qdata, scale and zero_point are [.., N, *] and slice together along N (and E).
A row is a run of 128-wide blocks along K (BLOCK_K); the last block is padded with code 8, and every
reader treats activations beyond K as zero, so padding adds nothing.

COALESCED: for bf16/fp16 matrix units. Within a block, k = 32 i + 16 p + 8 q + 2 t + r, with i, t in
0..3 and p, q, r in 0..1, stands in 32-bit word 4 t + i at nibble 4 r + 2 p + q:

    word 4t+i   31..28   27..24   23..20   19..16 | 15..12   11..8    7..4     3..0
    32i + 2t +    25       17        9        1   |   24       16       8        0

so that one thread of an mma.sync or wgmma operand finds its eight values of a 32-wide slice in one
word, and its 32 values of a block in 16 contiguous bytes. Nibbles are q as it is (unsigned).

ACT_QUANT: for int8 matrix units and dp4a. Each 32 k are 16 bytes; byte j of slice i holds

    byte 16i+j    7..4                3..0
    k             32i + 16 + j        32i + j

and nibbles are q - 8 in two's complement, so that (byte & 0xF0) is 16 (q - 8) as an int8.

Integer scales. An ACT_QUANT weight without zero points may say, beside scale, that a row's scales
are multiples of one unit: multiple[n, g] is an int8 of -15..15, not 0, and

    scale[n, g] = unit[n] * multiple[n, g]      exactly

so that w is an integer of -120..120 times what its row has once. Who does not look at multiple
reads the same weight.

Recognition. qdata's dtype is the mark of a format: int16 for COALESCED, int64 for ACT_QUANT. No
int4 format of torchao, tinygemm, mslk, XPU or ExecuTorch uses them (those are int8, uint8, int32).
Shapes could not tell: ExecuTorch's uint8 [N, K/2] with a [n_groups, N] scale has the shapes of a
coalesced byte array wherever N = n_groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from w4tensor.errors import PackingError, Unsupported

__all__ = [
    "ACT_QUANT",
    "BLOCK_K",
    "COALESCED",
    "GROUP_SIZES",
    "LAYOUT_VERSION",
    "Layout",
    "check_contract",
    "check_group_size",
    "check_multiple",
    "check_multiple_values",
    "check_values",
    "has_values",
    "padded_k",
]

BLOCK_K = 128
LAYOUT_VERSION = 1
GROUP_SIZES = (16, 32, 64, 128, 256)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ZERO_POINT_DTYPES = (torch.float16, torch.float32)
SYMMETRIC_ZERO_POINT = 8
# so that codes -8..7 times them are int8, of either sign
MAX_MULTIPLE = 15


def padded_k(k: int) -> int:
    """K rounded up to whole blocks."""
    return -(-k // BLOCK_K) * BLOCK_K


def check_group_size(group_size: int, k: int | None = None) -> int:
    """The group size that `group_size` means for rows of `k` weights: itself, or `k` for -1.

    Raises:
        Unsupported: the size is not one of GROUP_SIZES, -1 or k itself, or does not divide k.
    """
    if k is not None and k < 1:
        raise Unsupported(f"K={k}: a row needs at least one weight")
    # 128.0 == 128, but no kernel takes it
    whole = isinstance(group_size, (int, torch.SymInt))
    if whole and (group_size == -1 or (k is not None and group_size == k)):
        return group_size if k is None else k
    if not whole or group_size not in GROUP_SIZES:
        raise Unsupported(
            f"group_size={group_size} is not one of {GROUP_SIZES} or -1 (the whole row)"
        )
    if k is not None and k % group_size:
        fits = [g for g in GROUP_SIZES if k % g == 0] or [-1]
        raise Unsupported(
            f"K={k} is not a multiple of group_size={group_size}; use group_size={fits[-1]}"
        )
    return group_size


def _pack_coalesced(q: Tensor) -> Tensor:
    v = q.unflatten(-1, (-1, 4, 2, 2, 4, 2))  # [.., block, i, p, q, t, r]
    order = (-6, -2, -5, -1, -4, -3)  # block, t, i, r, p, q
    v = v.permute(*range(q.ndim - 1), *(v.ndim + d for d in order))
    return (v[..., 0] | v[..., 1] << 4).flatten(-5).view(torch.int16)


def _unpack_coalesced(qdata: Tensor) -> Tensor:
    b = qdata.view(torch.uint8).unflatten(-1, (-1, 4, 4, 2, 2))  # [.., block, t, i, r, p]
    v = torch.stack((b & 15, b >> 4), dim=-1)  # [.., block, t, i, r, p, q]
    order = (-6, -4, -2, -1, -5, -3)  # block, i, p, q, t, r
    return v.permute(*range(qdata.ndim - 1), *(v.ndim + d for d in order)).flatten(-6)


def _pack_act_quant(q: Tensor) -> Tensor:
    v = (q ^ 8).unflatten(-1, (-1, 2, 16))  # [.., slice, half, j]; q ^ 8 is q - 8 in 4 bits
    return (v[..., 0, :] | v[..., 1, :] << 4).flatten(-2).view(torch.int64)


def _unpack_act_quant(qdata: Tensor) -> Tensor:
    b = qdata.view(torch.uint8).unflatten(-1, (-1, 16))  # [.., slice, j]
    return (torch.stack((b & 15, b >> 4), dim=-2) ^ 8).flatten(-3)


@dataclass(frozen=True)
class Layout:
    """One byte format: how codes become qdata and back.

    Fields:
        name: as it stands in messages.
        qdata_dtype: the dtype that marks the format.
        codes: how many codes one element of qdata holds.
    """

    name: str
    qdata_dtype: torch.dtype
    codes: int
    _pack: Callable[[Tensor], Tensor]
    _unpack: Callable[[Tensor], Tensor]

    def pack(self, q: Tensor) -> Tensor:
        """Codes uint8 [.., N, K] in 0..15 -> qdata [.., N, padded_k(K) / codes].

        >>> q = torch.arange(256, dtype=torch.uint8).reshape(2, 128) % 16
        >>> COALESCED.pack(q).shape
        torch.Size([2, 32])
        >>> torch.equal(COALESCED.unpack(COALESCED.pack(q), k=128), q)
        True
        """
        pad = padded_k(q.shape[-1]) - q.shape[-1]
        padded = torch.nn.functional.pad(q, (0, pad), value=SYMMETRIC_ZERO_POINT)
        return self._pack(padded.contiguous())

    def unpack(self, qdata: Tensor, k: int) -> Tensor:
        """The inverse of pack: codes uint8 [.., N, k]."""
        return self._unpack(qdata.contiguous())[..., :k]


COALESCED = Layout("coalesced", torch.int16, 4, _pack_coalesced, _unpack_coalesced)
ACT_QUANT = Layout("act_quant", torch.int64, 16, _pack_act_quant, _unpack_act_quant)


def check_contract(
    layout: Layout,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    layout_version: int,
) -> None:
    """Refuse inner tensors that are not `layout`'s, by metadata alone: no device is synchronised.

    Raises:
        PackingError: which field, what it has, what it should have.
    """
    if layout_version != LAYOUT_VERSION:
        raise PackingError(
            "layout_version",
            layout_version,
            LAYOUT_VERSION,
            "convert with the release that wrote it: to_codes() there, from_codes() here",
        )
    if qdata.dtype != layout.qdata_dtype:
        raise PackingError(
            "qdata.dtype",
            qdata.dtype,
            f"{layout.qdata_dtype} (the mark of the {layout.name} format)",
            "convert foreign weights with from_torchao_int4() or from_codes()",
        )
    if qdata.ndim not in (2, 3):
        raise PackingError("qdata.ndim", qdata.ndim, "2 [N, K] or 3 [E, N, K]")
    if scale.dtype not in SCALE_DTYPES:
        raise PackingError("scale.dtype", scale.dtype, f"one of {SCALE_DTYPES}")
    if scale.shape[:-1] != qdata.shape[:-1]:
        raise PackingError(
            "scale.shape", tuple(scale.shape), f"{(*qdata.shape[:-1], 'n_groups')}, as qdata has"
        )
    k = scale.shape[-1] * group_size
    if k <= 0 or (group_size not in GROUP_SIZES and scale.shape[-1] != 1):
        raise PackingError(
            "group_size",
            f"{group_size} with {scale.shape[-1]} groups",
            f"one of {GROUP_SIZES}, or K with one group",
        )
    if qdata.shape[-1] * layout.codes != padded_k(k):
        raise PackingError(
            "qdata.shape",
            tuple(qdata.shape),
            f"{(*qdata.shape[:-1], padded_k(k) // layout.codes)} for K={k} "
            f"({scale.shape[-1]} groups of {group_size})",
        )
    if scale.device != qdata.device:
        raise PackingError("scale.device", scale.device, f"{qdata.device}, as qdata")
    if zero_point is not None:
        if zero_point.dtype not in ZERO_POINT_DTYPES:
            raise PackingError("zero_point.dtype", zero_point.dtype, f"one of {ZERO_POINT_DTYPES}")
        if zero_point.shape != scale.shape:
            raise PackingError(
                "zero_point.shape", tuple(zero_point.shape), f"{tuple(scale.shape)}, as scale"
            )
        if zero_point.device != qdata.device:
            raise PackingError("zero_point.device", zero_point.device, f"{qdata.device}, as qdata")


def check_multiple(
    multiple: Tensor, scale: Tensor, zero_point: Tensor | None, act_group_size: int | None
) -> None:
    """Refuse multiples that are not of this scale, by metadata alone.

    Raises:
        PackingError: as check_contract.
    """
    if act_group_size != -1:
        raise PackingError("multiple", f"with act_group_size={act_group_size}", "-1 (per token)")
    if zero_point is not None:
        raise PackingError("multiple", "beside a zero_point", "symmetric weights")
    if multiple.dtype != torch.int8:
        raise PackingError("multiple.dtype", multiple.dtype, "torch.int8")
    if multiple.shape != scale.shape:
        raise PackingError(
            "multiple.shape", tuple(multiple.shape), f"{tuple(scale.shape)}, as scale"
        )
    if multiple.device != scale.device:
        raise PackingError("multiple.device", multiple.device, f"{scale.device}, as scale")


def check_multiple_values(multiple: Tensor, scale: Tensor) -> None:
    """Refuse multiples that are not -15..15 without 0, or scales that are not theirs exactly.

    Reads the data, as check_values.
    """
    if not has_values(multiple) or not multiple.numel():
        return
    size = multiple.abs()
    if int(size.min()) < 1 or int(size.max()) > MAX_MULTIPLE:
        raise PackingError("multiple", f"{int(size.min())} to {int(size.max())}", "1..15 in size")
    # scale / multiple is the same in all of a row; products are exact in fp64, quotients are not
    exact = scale.double()
    if not torch.equal(exact * multiple[..., :1], exact[..., :1] * multiple):
        raise PackingError("scale", "not its multiples times one unit a row", "exactly that")


def has_values(t: Tensor) -> bool:
    """Whether there are values to read: not on meta, of a fake, or while a graph is traced."""
    return not (torch.compiler.is_compiling() or t.device.type == "meta" or is_fake(t))


def check_values(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    """Refuse codes outside 0..15 and scales or zero points that are not finite.

    Reads the data, so it runs where tensors are made and not where they are used.
    """
    if q.dtype != torch.uint8:
        raise PackingError("codes.dtype", q.dtype, "torch.uint8")
    if has_values(q) and q.numel() and int(q.max()) > 15:
        raise PackingError("codes", f"up to {int(q.max())}", "0..15")
    for field, value in (("scale", scale), ("zero_point", zero_point)):
        if value is not None and has_values(value) and not bool(value.isfinite().all()):
            raise PackingError(field, "not finite somewhere", "finite everywhere")
