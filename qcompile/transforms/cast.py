"""A plain rounding to a 16-bit type, where a method's kernel gives its result in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from qcompile.dtypes import DTYPES
from qcompile.transform import Transform


@dataclass(frozen=True)
class RoundTo(Transform):
    """x rounded to `dtype` and back."""

    kind: ClassVar[str] = "round-to"
    dtype: Literal["f16", "bf16"] = "bf16"

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        return x.to(DTYPES[self.dtype]).to(x.dtype)

    def summary(self) -> str:
        return f"rounded to {self.dtype}"
