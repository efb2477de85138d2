"""Activations rounded to floats of 8, 6 and 4 bits: with float scales, powers of two, or e4m3 scales under one more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompile.dtypes import DTYPES
from qcompile.format import Stored
from qcompile.transform import Transform
from qcompile.transforms.rounding import LARGEST, Element, Rounding, join, power_of_two, split, to_element


@dataclass(frozen=True)
class RoundFloat(Rounding):
    """x rounded to `element` times a float scale: max|x| / the largest element, saturating, ties to even.

    With the "inverse" arithmetic a = largest / max|x|, and the value is element(x * a) * (1 / a).
    """

    kind: ClassVar[str] = "round-float"
    element: Element = "f8e4m3"

    def rounded(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        if self.scale:
            scale = t["scale"].to(x.dtype)
        elif self.arithmetic == "inverse":
            inverse = LARGEST[self.element] / self.usable(self.maximum(x))
            return to_element(x * inverse, self.element) * (1.0 / inverse)
        else:
            scale = self.usable(self.maximum(x) / LARGEST[self.element])
        return to_element(self.over(x, scale), self.element) * scale

    def what(self) -> str:
        return self.element


@dataclass(frozen=True)
class RoundMx(Transform):
    """x rounded to `element` times a power of two for every `size` inputs (OCP Microscaling), in f32.

    scale = power_of_two((max|x| + `more`) / `divisor`) * 2 ** -`shift`, at least 2 ** `lowest`; x becomes
    element(x / scale * `steps`) * scale / `steps`. `rule` is one of `power_of_two`'s.
    """

    kind: ClassVar[str] = "round-mx"
    element: Element = "e2m1"
    size: int = 32
    rule: Literal["floor", "ceil", "even1", "even2", "even3"] = "even1"
    shift: int = 2
    divisor: float = 1.0
    more: float = 0.0
    lowest: int = -126
    steps: float = 1.0

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        rows = split(x, self.size)
        most = rows.abs().amax(-1, keepdim=True)
        most = (most + self.more) / self.divisor
        scale = (power_of_two(most, self.rule) * 2.0**-self.shift).clamp(min=2.0**self.lowest)
        return join(to_element(rows / scale * self.steps, self.element) * (scale / self.steps), x.shape[-1])

    def summary(self) -> str:
        return f"mx {self.element} per group of {self.size}"


@dataclass(frozen=True)
class RoundNvfp4(Transform):
    """x rounded to e2m1 times an e4m3 scale s for every `size` inputs (16) and one scale for the whole call, in f32.

    `tensor` "divide": a stored g = 448 * 6 / max|x|; s = e4m3(g * max / 6), `empty` where that is 0, and the value is
    e2m1(x / (s / g)) * (s / g). `tensor` "multiply": G = max|x| / (448 * 6); s = e4m3(max / 6 / G), at least `floor`, and
    the value is e2m1(x * (1 / G / s)) * (G * s). `stored_scale` is the dtype of the stored tensor_scale [1]; "": G (or
    g) comes from the maximum of the whole call.
    """

    kind: ClassVar[str] = "round-nvfp4"
    size: int = 16
    tensor: Literal["divide", "multiply"] = "divide"
    stored_scale: str = "f32"
    empty: float = 0.125
    floor: float = 0.0

    def stored(self, K: int) -> tuple[Stored, ...]:
        return (Stored("tensor_scale", self.stored_scale, (1,)),) if self.stored_scale else ()

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        rows = split(x, self.size)
        most = rows.abs().amax(-1, keepdim=True)
        whole = t["tensor_scale"].to(torch.float32) if self.stored_scale else self._whole(x)
        if self.tensor == "divide":
            scale = self._small(whole * (most / 6.0)) / whole
            return join(to_element(rows / scale, "e2m1") * scale, x.shape[-1])
        scale = self._small(most / 6.0 / whole)
        return join(to_element(rows * (1.0 / whole / scale), "e2m1") * (whole * scale), x.shape[-1])

    def _whole(self, x: Tensor) -> Tensor:
        most = x.abs().amax()
        most = torch.where(most > 0, most, 1.0)  # nothing but zeros: any scale
        return (448.0 * 6.0) / most if self.tensor == "divide" else most / (448.0 * 6.0)

    def _small(self, scale: Tensor) -> Tensor:
        scale = scale.clamp(min=self.floor, max=LARGEST["f8e4m3"]).to(DTYPES["f8e4m3"]).to(torch.float32)
        return torch.where(scale == 0, self.empty, scale)

    def summary(self) -> str:
        return f"nvfp4 per group of {self.size}"
