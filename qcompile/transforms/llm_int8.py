"""LLM.int8(): rows rounded to int8, but for the columns that hold outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.transform import Transform


@dataclass(frozen=True)
class LlmInt8(Transform):
    """x in float16, each row rounded to int8 codes of max|x| / 127; columns with an outlier stay as they are.

    A column holds an outlier when |x| >= threshold in any row of the call; such entries do not count for the row's
    maximum. threshold 0: no outliers. With a single row only the outliers themselves leave the rounding, which is the
    same. Source: bitsandbytes, MatMul8bitLt.
    """

    kind: ClassVar[str] = "llm-int8"
    threshold: float = 6.0

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        half = x.to(torch.float16).to(torch.float32)
        if self.threshold > 0:
            outlier = half.abs() >= self.threshold
            column = outlier.flatten(0, -2).any(0) if x.dim() > 1 else outlier
            small = torch.where(outlier, 0.0, half)
        else:
            small = half
        most = small.abs().amax(-1, keepdim=True)
        # A row of zeros has no scale: 0 / 0 would be NaN.
        safe = torch.where(most > 0, most, 1.0)
        rounded = torch.round(small * (127.0 / safe)) * (safe * (1.0 / 127.0))
        return torch.where(column, x, rounded) if self.threshold > 0 else rounded

    def summary(self) -> str:
        return f"int8 per token, outliers from {self.threshold:g}"
