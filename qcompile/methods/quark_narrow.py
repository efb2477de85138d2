"""Quark's integers of 2 and 3 bits: what its files hold of them, and the bit stream that they are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from qcompile.formats.bitstream import Bitstream

if TYPE_CHECKING:
    from qcompile.methods.quark_spec import Spec

Tensors = dict[str, torch.Tensor]
BITS = {"int2": 2, "uint2": 2, "int3": 3}
STORED = {"int2": "i32", "uint2": "u8", "int3": "u8"}
"""The dtype of a weight and of its zero points: a word for each int2, four uint2 or 8/3 int3 to a byte."""


def format_of(spec: Spec, scale: str, k: int) -> Bitstream | None:
    """The format; None where quark's files hold no such weight."""
    rows, columns = spec.blocks(k)
    if spec.qscheme not in ("per_group", "per_channel") or rows != 1:
        return None
    zero = "" if spec.symmetric and spec.dtype != "uint2" else "i8"
    return Bitstream(BITS[spec.dtype], rows, columns, scale, zero)  # type: ignore[arg-type]


def shapes(spec: Spec, n: int, k: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors. Groups lie the other way round than the weight, but for int3 alone its scales."""
    groups = k // (spec.blocks(k)[1] or k)
    grouped, three = spec.qscheme == "per_group", spec.dtype == "int3"

    def packed(*shape: int) -> tuple[int, ...]:
        per = {"int2": (1, 1), "uint2": (1, 4), "int3": (3, 8)}[spec.dtype]
        return (*shape[:-1], shape[-1] // per[1] * per[0])

    weight = (k, n) if grouped and not three else (n, k)
    zero = ((n, groups) if three else (groups, n)) if grouped else (n,)
    return {
        "weight": packed(*weight),
        "weight_scale": (groups, n) if grouped else (n,),
        "weight_zero_point": packed(*zero),
    }


def problem(spec: Spec, n: int, k: int) -> str:
    """What does not fill groups, or the bytes that several integers share; "" where all do."""
    size = spec.blocks(k)[1] or k
    if k % size:
        return f"K = {k}, groups of {size}"
    grouped = spec.qscheme == "per_group"
    shared = {"uint2": (4, (n,) if grouped else (k, n)), "int3": (8, (k, k // size if grouped else n))}
    count, sizes = shared.get(spec.dtype, (1, ()))
    return ", ".join(f"rows of {each}, {count} to a few bytes" for each in sizes if each % count)


def read(spec: Spec, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The integers of the weight [N, K], their scales and zero points [N, groups], from the stored tensors."""
    grouped = spec.qscheme == "per_group"
    turned = grouped and spec.dtype != "int3"

    def integers(stored: torch.Tensor) -> torch.Tensor:
        made = _unpacked(spec.dtype, stored)
        return made.t() if turned else made

    scale, zero = tensors["weight_scale"], integers(tensors["weight_zero_point"])
    return {
        "value": integers(tensors["weight"]),
        "scale": scale.t() if grouped else scale[:, None],
        "zero": zero if grouped else zero[:, None],
    }


def written(spec: Spec, value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Tensors:
    """The inverse of `read`."""
    grouped = spec.qscheme == "per_group"
    turned = grouped and spec.dtype != "int3"

    def stored(integers: torch.Tensor) -> torch.Tensor:
        return _packed(spec.dtype, integers.t() if turned else integers).contiguous()

    return {
        "weight": stored(value),
        "weight_scale": scale.t().contiguous() if grouped else scale.flatten(),
        "weight_zero_point": stored(zero if grouped else zero.flatten()),
    }


def _unpacked(dtype: str, stored: torch.Tensor) -> torch.Tensor:
    """Integers i32: of uint2 the first has the highest bits of a byte, of int3 the first the lowest of three."""
    if dtype == "int2":
        return stored
    if dtype == "uint2":
        codes: torch.Tensor = stored[..., None].int() >> torch.tensor([6, 4, 2, 0]) & 3
        return codes.flatten(-2)
    words = (_split(stored, 3) << torch.tensor([0, 8, 16])).sum(-1)
    raw = words[..., None] >> torch.arange(0, 24, 3) & 7
    integers: torch.Tensor = (raw ^ 4) - 4
    return integers.flatten(-2).int()


def _packed(dtype: str, integers: torch.Tensor) -> torch.Tensor:
    if dtype == "int2":
        return integers.int()
    if dtype == "uint2":
        return (_split(integers, 4) << torch.tensor([6, 4, 2, 0])).sum(-1).to(torch.uint8)
    words = ((_split(integers, 8) & 7) << torch.arange(0, 24, 3)).sum(-1)
    parts: torch.Tensor = words[..., None] >> torch.tensor([0, 8, 16]) & 255
    return parts.flatten(-2).to(torch.uint8)


def _split(integers: torch.Tensor, size: int) -> torch.Tensor:
    """The last dimension in runs of `size`, as i32."""
    return integers.int().reshape(*integers.shape[:-1], -1, size)
