"""HIGGS: pairs of weights as points of a grid, in the order in which FLUTE's kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bits, cast, cat, k, n, table
from qcompile.format import Format, Problem, Stored

# With 3 bits, 16 pairs of 6 bits take 96: the place among them of the pair of output q * 32 + p of a block.
ORDER = (0, 5, 10, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14, 15)


def _place(at: int) -> tuple[int, int, int]:
    """Where bits 2 * at and 2 * at + 1 of those 96 lie: one of three words of one of two columns, and the shift.

    Each word of the first column takes 16 bits and that of the second 14, whose last 2 take what is left in the end.
    """
    third, bit = divmod(2 * at, 30)
    if third == 3:
        return bit // 2, 1, 14
    return third, bit // 16, bit % 16


@dataclass(frozen=True)
class Higgs(Format):
    """W = tables2[code of the pair][k % 2] * scale: each two inputs of one output are a point of a grid.

    weight i16 [N * bits / 16, K] holds the codes of 2 * bits bits, the even input's half above the odd one's; `tile`
    outputs lie below each other, and as many tiles as fit into a pair of words beside each other. scales [N, K / group];
    tables2 [4 ** bits, 2], the grid, both of `dtype`.
    """

    kind: ClassVar[str] = "higgs"
    bits: int = 4
    group: int = 256
    tile: int = 32
    dtype: Literal["f16", "bf16"] = "f16"

    @property
    def block(self) -> int:
        """Outputs that share rows of words."""
        return 512 if self.bits == 3 else self.tile * 16 // self.bits

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (
            Stored("weight", "i16", (N * self.bits // 16, K)),
            Stored("scales", self.dtype, (N, K // self.group)),
            Stored("tables2", self.dtype, (4**self.bits, 2)),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        pair = self._three(t, N) if self.bits == 3 else self._whole(t)
        return {"pair": pair, "point": t.tables2[pair, k % 2], "scale": t.scales[n, k // self.group]}

    def _whole(self, t: Any) -> Expr:
        per = 8 // self.bits  # pairs in a word
        tile = n % self.block // self.tile
        row = n // self.block * self.tile + n % self.tile
        return bits(t.weight[row, k // 2 * 2 + tile // per], tile % per * 2 * self.bits, 2 * self.bits)

    def _three(self, t: Any, N: int) -> Expr:
        # The first words of all blocks come first, then the second and third ones block by block.
        block, tile, pieces = n // 512, n % 512 // 32, []
        for piece in range(3):
            places = [_place(3 * pair + piece) for pair in ORDER]
            first = tuple(N // 16 + 32 * (word - 1) if word else 0 for word, _, _ in places)
            rows = block * table(tuple(64 if word else 32 for word, _, _ in places), tile) + table(first, tile)
            column = k // 2 * 2 + table(tuple(column for _, column, _ in places), tile)
            shift = table(tuple(shift for _, _, shift in places), tile)
            pieces.append(bits(t.weight[rows + n % 32, column], shift, 2))
        return cat(*pieces)

    def value(self, f: Any) -> Expr:
        return cast("f32", f.point) * cast("f32", f.scale)

    def check(self, N: int, K: int) -> list[Problem]:
        out = [Problem(f"N = {N}", f"a multiple of {self.block}, the outputs of a block")] if N % self.block else []
        return out + ([Problem(f"K = {K}", f"a multiple of the group, {self.group}")] if K % self.group else [])

    def group_size(self, N: int, K: int) -> int | None:
        return self.group
