"""MLX: affine codes with a float offset, a row's codes as one bit stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, k, n
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.stream import stream


@dataclass(frozen=True)
class Mlx(Affine):
    """W = code * scale + bias in float32, over `group` inputs of one output.

    weight i32 [N, ceil(K * bits / 32)] (u32 in files), scales and biases (`scale`) [N, K / group].
    """

    kind: ClassVar[str] = "mlx"
    bits: int = 4
    group: int = 64
    scale: Literal["f32", "f16", "bf16"] = "f16"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        groups = (N, -(-K // self.group))
        return (
            Stored("weight", "i32", (N, -(-K * self.bits // 32))),
            Stored("scales", self.scale, groups),
            Stored("biases", self.scale, groups),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        g = k // self.group
        code = stream(lambda word: t.weight[n, word], k, self.bits)
        return {"code": code, "scale": t.scales[n, g], "offset": t.biases[n, g]}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, offset=f.offset)

    def check(self, N: int, K: int) -> list[Problem]:
        out = [Problem(f"K = {K}", f"a multiple of the group, {self.group}")] if K % self.group else []
        return out + (
            [Problem(f"{K} codes of {self.bits} bits", "whole words of 32 bits")] if K * self.bits % 32 else []
        )

    def group_size(self, N: int, K: int) -> int | None:
        return self.group
