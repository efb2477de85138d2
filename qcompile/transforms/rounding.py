"""What the roundings of activations share: which values have one scale, how large it is, and the grids of small floats."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qcompile.dtypes import DTYPES
from qcompile.format import Stored
from qcompile.transform import Transform

Per = Literal["tensor", "token", "position", "head", "group"]
Element = Literal["f8e4m3", "f8e5m2", "e2m1", "e2m3", "e3m2"]

LARGEST: dict[str, float] = {"f8e4m3": 448.0, "f8e5m2": 57344.0, "e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0}
"""The largest value of each small float."""

_GRIDS = {"e2m1": (0, 2, 1), "e2m3": (0, 2, 3), "e3m2": (-2, 4, 2)}
"""The exponents of the smallest and largest normal numbers, and the bits of the mantissa."""

_FRACTION = (1 << 23) - 1


def to_element(x: Tensor, element: str) -> Tensor:
    """x rounded to the nearest value of a small float, ties to even; what is too large becomes the largest. Same dtype.

    >>> to_element(torch.tensor([0.25, 0.75, 2.5, -3.5, 5.0, 99.0]), "e2m1").tolist()
    [0.0, 1.0, 2.0, -4.0, 4.0, 6.0]
    """
    largest = LARGEST[element]
    if element not in _GRIDS:
        return x.clamp(-largest, largest).to(DTYPES[element]).to(x.dtype)
    lowest, highest, mantissa = _GRIDS[element]
    wide = x.to(torch.float32).clamp(-largest, largest)
    size, step = wide.abs(), torch.full_like(wide, 2.0 ** (lowest - mantissa))
    for exponent in range(lowest + 1, highest + 1):
        step = torch.where(size >= 2.0**exponent, 2.0 ** (exponent - mantissa), step)
    return (torch.round(wide / step) * step).to(x.dtype)


def power_of_two(x: Tensor, rule: str) -> Tensor:
    """The power of two at or below x >= 0, f32 ("floor"), at or above it ("ceil"), or by rounding ("even1", "even3").

    "even<m>" adds half a unit of a mantissa of m bits first, as OCP converters do for elements with m bits. Subnormal
    numbers count as 0.

    >>> power_of_two(torch.tensor([3.0, 4.0]), "ceil").tolist(), power_of_two(torch.tensor([7.0]), "even1").tolist()
    ([4.0, 4.0], [8.0])
    """
    more = {"floor": 0, "ceil": _FRACTION}.get(rule)
    more = 1 << (22 - int(rule[-1])) if more is None else more
    return ((x.view(torch.int32) + more) & ~_FRACTION).view(torch.float32)


def split(x: Tensor, size: int) -> Tensor:
    """x [..., K] as [..., ceil(K / size), size]; a short last group is filled with zeros, which no maximum sees."""
    K = x.shape[-1]
    if K % size:  # functional.pad, traced, makes a constant of every dimension
        x = torch.cat((x, x.narrow(-1, 0, 1).clamp(0.0, 0.0).expand(*x.shape[:-1], -K % size)), -1)
    return x.reshape(*x.shape[:-1], -(-K // size), size)


def join(x: Tensor, K: int) -> Tensor:
    """The inverse of `split`: [..., K]."""
    whole = x.flatten(-2)
    return whole if whole.shape[-1] == K else whole.narrow(-1, 0, K)


@dataclass(frozen=True)
class Rounding(Transform):
    """x rounded to values of few bits times a scale, and back: the base of `RoundInt` and `RoundFloat`.

    One scale holds for a whole call ("tensor"), each row ("token"), each index of dimension 1 over all of the others
    ("position") or of the first two ("head"), or every `size` inputs of a row ("group"; the last may be short). `scale` is
    the dtype of a stored scale [1] that holds for everything, or, with `heads`, [heads, 1, 1] for each index of
    dimension 1; "": computed for each call from the maximum of |x|, which `least` and `most` bound (0: no bound). The
    scale is at least `floor`, and `empty` where it would be 0. `arithmetic`: x / scale ("divide"), x * (1 / scale)
    ("reciprocal"), or x times the inverse limit / maximum ("inverse"). All in `dtype`. With `once`, what another such
    rounding has made is not rounded again: the pass "round-outputs" sees to that.
    """

    per: Per = "token"
    size: int = 0
    scale: str = ""
    least: float = 0.0
    most: float = 0.0
    floor: float = 0.0
    empty: float = 2.0**-23
    arithmetic: Literal["divide", "reciprocal", "inverse"] = "divide"
    dtype: Literal["f32", "f16", "bf16"] = "f32"
    heads: int = field(default=0, kw_only=True)
    once: bool = field(default=False, kw_only=True)

    def stored(self, K: int) -> tuple[Stored, ...]:
        return (Stored("scale", self.scale, self.stored_shape),) if self.scale else ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of a stored scale or zero point."""
        return (self.heads, 1, 1) if self.heads else (1,)

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        rows = x.to(DTYPES[self.dtype])
        if self.per != "group" or self.scale:
            return self.rounded(rows, t).to(torch.float32)
        return join(self.rounded(split(rows, self.size), t), x.shape[-1]).to(torch.float32)

    @abstractmethod
    def rounded(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        """x, whose last dimension is one group where scales are per group, rounded."""

    def shared(self, x: Tensor) -> list[int]:
        """The dimensions over which one scale holds."""
        if self.per == "tensor":
            return list(range(x.dim()))
        if self.per == "head":
            return list(range(2, x.dim()))
        return [d for d in range(x.dim()) if d != 1] if self.per == "position" else [-1]

    def maximum(self, x: Tensor) -> Tensor:
        """The maximum of |x| for each scale, within its bounds."""
        most = x.abs().amax(self.shared(x), keepdim=True)
        return most.clamp(self.least or None, self.most or None) if self.least or self.most else most

    def usable(self, scale: Tensor) -> Tensor:
        """The scale, where it is not too small."""
        if self.floor:
            return scale.clamp(min=self.floor)
        return torch.where(scale == 0, self.empty, scale)

    def over(self, x: Tensor, scale: Tensor) -> Tensor:
        """x over the scale."""
        return x * (1.0 / scale) if self.arithmetic == "reciprocal" else x / scale

    def summary(self) -> str:
        how = "static" if self.scale else f"per {self.per}" + (f" of {self.size}" if self.per == "group" else "")
        return f"{self.what()} {how}"

    @abstractmethod
    def what(self) -> str:
        """The type of the values, for the report."""
