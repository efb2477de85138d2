"""Activations rounded to integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.format import Stored
from qcompile.transforms.rounding import Rounding


@dataclass(frozen=True)
class RoundInt(Rounding):
    """x rounded to integers `low` .. `high` times a scale, half to even.

    Symmetric: scale = max|x| / `divisor` (0: half the range, 127.5 for 8 bits), without a zero point. Otherwise the
    range reaches from min(x, 0) to max(x, 0) and has a zero point: low - min / scale, rounded last and added to x / scale
    before that is rounded (`zero_first`), or rounded alone and added to the rounded x. `zero`: the dtype of a stored
    zero point beside the stored scale; "": none.
    """

    kind: ClassVar[str] = "round-int"
    low: int = -128
    high: int = 127
    symmetric: bool = True
    divisor: float = 0.0
    zero: str = ""
    zero_first: bool = True

    def stored(self, K: int) -> tuple[Stored, ...]:
        zero = (Stored("zero", self.zero, self.stored_shape),) if self.zero else ()
        return (*super().stored(K), *zero)

    def rounded(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        if self.scale:
            scale = t["scale"].to(x.dtype)
            return self._round(x, scale, t["zero"].to(x.dtype)) if self.zero else self._plain(x, scale)
        if not self.symmetric:
            return self._round(x, *self._range(x))
        divisor = self.divisor or (self.high - self.low) / 2
        if self.arithmetic == "inverse":
            inverse = divisor / self.usable(self.maximum(x))
            return self._integers(x * inverse) / inverse
        return self._plain(x, self.usable(self.maximum(x) / divisor))

    def _integers(self, x: Tensor) -> Tensor:
        return torch.round(x).clamp(self.low, self.high)

    def _plain(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._integers(self.over(x, scale)) * scale

    def _round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.zero_first:
            return (self._integers(self.over(x, scale) + zero) - zero) * scale
        return ((torch.round(self.over(x, scale)) + zero).clamp(self.low, self.high) - zero) * scale

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.shared(x)
        least = x.amin(shared, keepdim=True).clamp(max=0)
        scale = self.usable((x.amax(shared, keepdim=True).clamp(min=0) - least) / (self.high - self.low))
        if self.zero_first:
            return scale, torch.round((self.low - least / scale).clamp(self.low, self.high))
        return scale, (self.low - torch.round(least / scale)).clamp(self.low, self.high)

    def what(self) -> str:
        return f"int{(self.high - self.low).bit_length()}"
