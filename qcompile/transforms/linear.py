"""Transforms that are linear in x: an order, a scale for each input, a rotation of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.format import Stored
from qcompile.formats.dense import Dense
from qcompile.ops import LinearSpec, Part
from qcompile.transform import Transform


@dataclass(frozen=True)
class Permute(Transform):
    """Column j of the result is column order[j] of x. order i64 [K]."""

    kind: ClassVar[str] = "permute"

    def stored(self, K: int) -> tuple[Stored, ...]:
        return (Stored("order", "i64", (K,)),)

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        return torch.index_select(x, -1, t["order"])

    def weight(self, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        made = torch.empty_like(w)
        made[:, t["order"]] = w
        return made


@dataclass(frozen=True)
class Scale(Transform):
    """x times a number for each input. scale (`dtype`) [K]. `of` names the module whose output it scales, if another."""

    kind: ClassVar[str] = "scale"
    dtype: str = "f32"
    of: str = ""

    def stored(self, K: int) -> tuple[Stored, ...]:
        return (Stored("scale", self.dtype, (K,)),)

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        return x * t["scale"].to(torch.float32)

    def weight(self, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        return w * t["scale"].float()


@dataclass(frozen=True)
class Hadamard(Transform):
    """Every `size` inputs times the Sylvester matrix of that size (a power of two), over sqrt(size).

    The matrix is symmetric and its own inverse.
    """

    kind: ClassVar[str] = "hadamard"
    size: int = 512

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        blocks = x.reshape(*x.shape[:-1], -1, self.size)
        half = 1
        while half < self.size:  # a butterfly: sums and differences of neighbours at distance `half`
            pairs = blocks.reshape(*blocks.shape[:-1], -1, 2, half)
            first, second = pairs.select(-2, 0), pairs.select(-2, 1)
            blocks = torch.stack((first + second, first - second), dim=-2).flatten(-3)
            half *= 2
        return (blocks * float(self.size**-0.5)).flatten(-2)

    def weight(self, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        turned = self.apply(w.double(), t)
        return turned.to(torch.float32)


@dataclass(frozen=True)
class Rotate(Transform):
    """Every `size` inputs go through a linear layer of their own, the same for all. matrix (`dtype`) [size, size].

    The result is block @ matrix.T; the matrix is orthogonal.
    """

    kind: ClassVar[str] = "rotate"
    size: int = 32
    dtype: str = "bf16"

    def stored(self, K: int) -> tuple[Stored, ...]:
        return (Stored("matrix", self.dtype, (self.size, self.size)),)

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        spec = LinearSpec(self.size, (Part(Dense(self.dtype).to_json(), self.size, 1),))
        blocks = x.reshape(*x.shape[:-1], -1, self.size)
        turned: Tensor = torch.ops.qcompile.linear(blocks, [t["matrix"]], [], spec.to_text())
        return turned.flatten(-2)

    def weight(self, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        turned: Tensor = w.double().reshape(len(w), -1, self.size) @ t["matrix"].double()
        return turned.flatten(-2).float()
