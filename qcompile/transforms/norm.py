"""A norm that belongs to a quantized layer itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.format import Stored
from qcompile.transform import Transform


@dataclass(frozen=True)
class RmsNorm(Transform):
    """x / sqrt(mean(x^2) + eps) * norm over each row. norm (`dtype`) [K]."""

    kind: ClassVar[str] = "rms-norm"
    eps: float = 1e-6
    dtype: str = "bf16"

    def stored(self, K: int) -> tuple[Stored, ...]:
        return (Stored("norm", self.dtype, (K,)),)

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * t["norm"].to(torch.float32)
