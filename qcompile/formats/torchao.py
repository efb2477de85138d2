"""TorchAO's two layouts of 4-bit groups: plain rows with transposed scales, and the tiles of tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, const, k, n
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms


@dataclass(frozen=True)
class Int4Rows(Affine):
    """W = code * scale + zero_point in f32, codes -8 .. 7 in two's complement, the even input in the low nibble.

    qdata i8 [N, K / 2]; scale and zero_point (`scale`) [K / group, N].
    """

    kind: ClassVar[str] = "torchao-int4"
    group: int = 128
    scale: str = "bf16"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        groups = (K // self.group, N)
        return (
            Stored("qdata", "i8", (N, K // 2)),
            Stored("scale", self.scale, groups),
            Stored("zero_point", self.scale, groups),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        at = (k // self.group, n)
        nibble = bits(t.qdata[n, k // 2], k % 2 * 4, 4)
        return {"code": bits(nibble + 8, 0, 4), "scale": t.scale[at], "zero": t.zero_point[at]}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, const(8), f.zero)

    def check(self, N: int, K: int) -> list[Problem]:
        return whole_groups(K, self.group)

    def group_size(self, N: int, K: int) -> int | None:
        return self.group


@dataclass(frozen=True)
class Int4Tiles(Affine):
    """W = (code - 8) * scale + zero in f32, codes 0 .. 15 as the tiles of `_convert_weight_to_int4pack`.

    With N and K filled up to Np, a multiple of 8, and Kp, of 1024: qdata i32 [Np / 8, Kp / 128, 32, 4], eight inputs of
    one output a word; scale_and_zero bf16 [Kp / group, Np, 2].
    """

    kind: ClassVar[str] = "torchao-int4-tiles"
    group: int = 128

    def padded(self, N: int, K: int) -> tuple[int, int]:
        """Np and Kp."""
        return -(-N // 8) * 8, -(-K // 1024) * 1024

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        Np, Kp = self.padded(N, K)
        return (
            Stored("qdata", "i32", (Np // 8, Kp // 128, 32, 4)),
            Stored("scale_and_zero", "bf16", (Kp // self.group, Np, 2)),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        # Inputs 2c and 2c + 1 of each 8 are the low and the high half of lane c's word; four 8s share it.
        word = t.qdata[n // 8, k // 128, n % 8 * 4 + k % 8 // 2, k % 128 // 32]
        nibble = k % 2 * 4 + k % 32 // 16 * 2 + k % 16 // 8
        at = (k // self.group, n)
        return {
            "code": bits(word, nibble * 4, 4),
            "scale": t.scale_and_zero[*at, 0],
            "zero": t.scale_and_zero[*at, 1],
        }

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, const(8), f.zero)

    def check(self, N: int, K: int) -> list[Problem]:
        return whole_groups(K, self.group)

    def group_size(self, N: int, K: int) -> int | None:
        return self.group


def whole_groups(K: int, group: int) -> list[Problem]:
    """A problem unless groups of `group` inputs fill K."""
    return [Problem(f"K = {K}", f"a multiple of the group, {group}")] if K % group else []
