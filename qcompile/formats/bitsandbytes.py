"""bitsandbytes: 4-bit table codes in blocks of the flattened weight, and int8 rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, const, k, n
from qcompile.expr import table as lookup
from qcompile.format import Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.tables import entries


@dataclass(frozen=True)
class Bnb4(Affine):
    """A 16-entry table ("nf4" or "fp4") times the largest magnitude of a block of the flattened weight.

    weight u8 [ceil(N * K / 2), 1] (files may label these bytes with another dtype), the first code in the high nibble;
    absmax f32 [ceil(N * K / block)]. `nested` > 0 (double quantization): absmax is u8 codes of the "dynamic" table,
    with nested_absmax f32 [ceil(blocks / nested)]: the scale is table * nested_absmax + `offset`.
    """

    kind: ClassVar[str] = "bnb4"
    table: str = "nf4"
    block: int = 64
    nested: int = 0
    offset: float = 0.0

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks = -(-N * K // self.block)
        weight = Stored("weight", "u8", (-(-N * K // 2), 1))
        if not self.nested:
            return (weight, Stored("absmax", "f32", (blocks,)))
        return (weight, Stored("absmax", "u8", (blocks,)), Stored("nested_absmax", "f32", (-(-blocks // self.nested),)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        i = n * K + k
        out = {"code": bits(t.weight[i // 2, 0], i % 2 * -4 + 4, 4), "absmax": t.absmax[i // self.block]}
        return out | {"nested_absmax": t.nested_absmax[i // (self.block * self.nested)]} if self.nested else out

    def terms(self, f: Any) -> Terms:
        scale = f.absmax
        if self.nested:
            scale = lookup(entries("dynamic"), f.absmax) * f.nested_absmax + const(self.offset, "f32")
        return Terms(f.code, scale, table=entries(self.table))

    def group_size(self, N: int, K: int) -> int | None:
        return K if N == 1 and self.block >= K else math.gcd(self.block, K)


@dataclass(frozen=True)
class BnbInt8(Affine):
    """int8 codes times the largest magnitude of their row, over 127. weight i8 [N, K], SCB f32 [N]."""

    kind: ClassVar[str] = "bnb-int8"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("weight", "i8", (N, K)), Stored("SCB", "f32", (N,)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": t.weight[n, k], "scale": t.SCB[n]}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, factor=7.874015718698502e-3)  # 1 / 127, as bitsandbytes writes it

    def group_size(self, N: int, K: int) -> int | None:
        return K
