"""What stands before and behind the product in a linear kernel's parameters, on any backend: as in `LinearSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcompile.artifact import Extent

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"]


@dataclass(frozen=True)
class Norm:
    """A prologue."""

    op: Literal["rms_norm", "layer_norm"]
    eps: float
    offset: float = 0.0

    @staticmethod
    def extents(norm: Norm | None, k: int) -> list[Extent]:
        """Of its tensors."""
        return [Extent("f32", k)] * (0 if norm is None else 1 + (norm.op == "layer_norm"))


@dataclass(frozen=True)
class Ending:
    """A step of the epilogue."""

    op: Literal["bf16", "f16", "silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "add", "mul", "glu"]
    act: Activation | None = None
