"""Rows of x as int8 codes: the template "activation-int8", and the text that rounds one row inside another kernel.

For every `group` inputs: scale = max|x| / 127, code = round_half_even(x * (127 / max|x|)); for every `block` inputs,
what the weights' zeros need. Rows are kept in tiles of `tile` rows, so that a kernel that works on that many rows reads
their codes of the same 4 inputs one behind the other. A tile is an array of 32-bit words:

    codes  i32 [K / 4, tile]      4 codes a word
    scales f32 [K / group, tile]
    sums       [K / block, tile]  i32: -zero * sum of codes, f32: sum of codes; none where the zero is 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.linear_steps import Norm
from qcompile.lowering.mlir.linear import norm_count
from qcompile.lowering.mlir.prologue import open_row
from qcompile.lowering.mlir.text import Text, Value
from qcompile.ops import SMALLEST_ACTIVATION
from qcompile.target import Target

TEMPLATE = "activation-int8"
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds half to even, and leaves the integer in the low bits
_MAGIC_BITS = 0x4B400000


@dataclass(frozen=True)
class Rounding:
    """How x is rounded. `sums` says what is stored for the weights' zeros; `zero` is theirs if "start".

    `prologue` is that of `LinearSpec`: the norm that is applied first.
    """

    k: int
    group: int
    block: int
    tile: int
    sums: Literal["none", "start", "after"] = "none"
    zero: int = 0
    prologue: dict[str, Any] | None = None

    @property
    def width(self) -> int:
        """Lanes of the vectors that a row is read in."""
        return next(width for width in (16, 8, 4) if self.block % width == 0)

    @property
    def words(self) -> int:
        """Words of a tile."""
        return self.tile * (self.k // 4 + self.k // self.group + (self.k // self.block if self.sums != "none" else 0))


@dataclass(frozen=True)
class Rows:
    """Pointers at the codes, scales and sums of a tile's first row; those of row i are i words behind."""

    codes: Value
    scales: Value
    sums: Value

    @staticmethod
    def of(r: Rounding, tile: Value) -> Rows:
        """The rows of the tile that lies at the pointer `tile`."""
        scales = r.k // 4 * r.tile
        return Rows(tile, tile.at(scales, "i32"), tile.at(scales + r.k // r.group * r.tile, "i32"))

    def row(self, index: Value | int) -> Rows:
        return Rows(*(pointer.at(index, "i32") for pointer in (self.codes, self.scales, self.sums)))


def round_row(t: Text, r: Rounding, x: Value, norms: Sequence[Value], out: Rows) -> None:
    """Rounds the row that `x` points at; `norms` point at the prologue's tensors."""
    row = open_row(t, r.prologue, x, list(norms), t.constant(r.k, "i64"))
    with t.loop(0, r.k // r.group) as group:
        start = group * r.group
        values = [row.read(start + i, r.width) for i in range(0, r.group, r.width)]
        scale, inverse = _scale(t, values)
        t.store(scale, out.scales.at(group * r.tile, "f32"))
        per_block = r.block // r.width
        for block in range(r.group // r.block):
            total = None
            for i in range(block * per_block, (block + 1) * per_block):
                # The low byte of the shifted number is the code.
                bits = t.cast("bitcast", values[i] * t.broadcast(inverse, r.width) + _MAGIC, "i32")
                total = bits if total is None else total + bits
                _store_codes(t, r, bits, out.codes, start + i * r.width)
            if r.sums != "none" and total is not None:
                count = t.reduce("add", total) - _wrapped(r.block * _MAGIC_BITS)
                place = out.sums.at((group * (r.group // r.block) + block) * r.tile, "i32")
                t.store(count * -r.zero if r.sums == "start" else t.cast("sitofp", count, "f32"), place)


def _scale(t: Text, values: Sequence[Value]) -> tuple[Value, Value]:
    """max|x| / 127 and 127 / max|x|, over all lanes of all values. A NaN has the greatest bits: it makes both NaN."""
    most = None
    for value in values:
        size = t.cast("bitcast", value, "i32") & 0x7FFFFFFF
        most = size if most is None else most.most(size)
    assert most is not None
    bits = t.reduce("maxsi", most)
    greatest = t.cast("bitcast", bits.most(t.cast("bitcast", t.constant(SMALLEST_ACTIVATION, "f32"), "i32")), "f32")
    return greatest / 127.0, 127.0 / greatest


def _store_codes(t: Text, r: Rounding, bits: Value, codes: Value, k: Value) -> None:
    words = t.reinterpret(t.cast("trunci", bits, "i8"), f"vector<{r.width // 4}xi32>")
    word = k // 4
    if r.tile == 1 and r.width > 4:
        t.store(words, codes.at(word, "i32"))
        return
    for i in range(r.width // 4):
        t.store(t.slice(words, i, 1), codes.at((word + i) * r.tile, "i32"))


def _wrapped(number: int) -> int:
    """The i32 with the low 32 bits of `number`."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


@dataclass(frozen=True)
class Params:
    """Those of `Rounding`."""

    k: int
    group: int
    block: int
    tile: int
    sums: Literal["none", "start", "after"]
    zero: int
    prologue: Norm | None

    def problem(self) -> str:
        return outside(
            self,
            block=self.block >= 4 and self.block % 4 == 0,
            group=self.block <= self.group <= 512 and self.group % self.block == 0,
            k=self.k >= 1 and self.k % self.group == 0,
            tile=1 <= self.tile <= 16,
            zero=abs(self.zero) <= 255,
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    tiles = -(-m // params.tile) * Rounding(**asdict(params)).words
    return [Extent("f32", m * params.k), *Norm.extents(params.prologue, params.k), Extent("i32", tiles, True)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Args: x f32 [M, K], the prologue's tensors [K], tiles i32 [ceil(M / tile), words]. Dims: M.

    Threads share the rows; those that fill the last tile repeat row M - 1.
    """
    r = Rounding(**params)
    t = Text(
        "activation_int8",
        f"code[m, k] = round(x * 127 / most), scale = most / 127, most = max |x[m, g]| of {r.group} inputs\n{r}",
    )
    x, norms, count = t.arg(0), [t.arg(1 + i) for i in range(norm_count(r.prologue))], t.dim(0)
    tiles = t.arg(1 + len(norms))
    first, end = t.share((count + (r.tile - 1)) // r.tile * r.tile)
    with t.loop(first, end) as row:
        rows = Rows.of(r, tiles.at(row // r.tile * r.words, "i32")).row(row % r.tile)
        round_row(t, r, x.at(row.least(count - 1) * r.k, "f32"), norms, rows)
    return t.finish()
