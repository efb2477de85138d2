"""Rows of x as int8 codes: the template "activation-int8", and the text that rounds one row inside another kernel.

Every `group` inputs have a scale, and a zero where x is rounded so; for every `block` inputs there is what the weights' zeros
need. `row_codes` has the roundings. Rows are kept in tiles of `tile` rows, so that a kernel that works on that many rows
reads their codes of the same 4 inputs one behind the other. A tile is an array of 32-bit words:

    codes  i32 [K / 4, tile]      4 codes a word
    scales f32 [K / group, tile]
    sums       [K / block, tile]  of code - zero; i32: times -zero of the weight, f32: alone; none where that is 0
    zeros  i32 [K / group, tile]  none where x has none
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qcompile.artifact import Extent
from qcompile.integer_sums import rounding_problem
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.linear_steps import Norm
from qcompile.lowering.mlir.linear import norm_count
from qcompile.lowering.mlir.prologue import open_row
from qcompile.lowering.mlir.row_codes import MAGIC_BITS, Rounder, codes_of
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.target import Target
from qcompile.transform import Transform, transform_from_json

TEMPLATE = "activation-int8"
_TURN = 128  # inputs that one turn of a loop reads


@dataclass(frozen=True)
class Rounding:
    """How x is rounded: by `transform` (its JSON; None: `ops.round_activations`), behind the norm `prologue` of `LinearSpec`.

    `sums` says what is stored for the weights' zeros; `zero` is theirs if "start".
    """

    k: int
    group: int
    block: int
    tile: int
    sums: Literal["none", "start", "after"] = "none"
    zero: int = 0
    prologue: dict[str, Any] | None = None
    transform: dict[str, Any] | None = None

    @functools.cached_property
    def how(self) -> Transform | None:
        return None if self.transform is None else transform_from_json(self.transform)

    @property
    def zeros(self) -> bool:
        """Whether x has zeros."""
        return codes_of(self.how).zeros

    @property
    def stored(self) -> int:
        """How many tensors the transform stores."""
        return 0 if self.how is None else len(self.how.stored(self.k))

    @property
    def width(self) -> int:
        """Lanes of the vectors that a row is read in."""
        return next(width for width in (16, 8, 4) if self.block % width == 0)

    @property
    def words(self) -> int:
        """Words of a tile."""
        groups = self.k // self.group * (1 + self.zeros)
        return self.tile * (self.k // 4 + groups + (self.k // self.block if self.sums != "none" else 0))


@dataclass(frozen=True)
class Rows:
    """Pointers at the codes, scales, sums and zeros of a tile's first row; those of row i are i words behind."""

    codes: Value
    scales: Value
    sums: Value
    zeros: Value

    @staticmethod
    def of(r: Rounding, tile: Value) -> Rows:
        """The rows of the tile that lies at the pointer `tile`."""
        scales = r.k // 4 * r.tile
        sums = scales + r.k // r.group * r.tile
        zeros = sums + (r.k // r.block * r.tile if r.sums != "none" else 0)
        return Rows(tile, *(tile.at(place, "i32") for place in (scales, sums, zeros)))

    def row(self, index: Value | int) -> Rows:
        return Rows(*(pointer.at(index, "i32") for pointer in (self.codes, self.scales, self.sums, self.zeros)))


def round_row(t: Text, r: Rounding, x: Value, norms: Sequence[Value], stored: Sequence[Value], out: Rows) -> None:
    """Rounds the row that `x` points at; `norms` and `stored` point at the tensors of prologue and transform."""
    row = open_row(t, r.prologue, x, list(norms), t.constant(r.k, "i64"))
    rounder = Rounder(t, r.how, stored)

    def read(start: Value, length: int) -> list[Value]:
        return [rounder.opened(row.read(start + i, r.width)) for i in range(0, length, r.width)]

    with t.loop(0, r.k // r.group) as group:
        start, turn = group * r.group, math.gcd(r.group, _TURN)
        with t.loop(0, r.group, turn, carry=rounder.unseen(r.width)) as loop:
            known: list[Value] = list(loop.values)
            for value in read(start + loop.index, turn):
                known = rounder.see(value, known)
            loop.carry(known)
        scaling = rounder.scaling(loop.results)
        t.store(scaling.scale, out.scales.at(group * r.tile, "f32"))
        zero = scaling.byte_zero()
        if zero is not None:
            t.store(zero, out.zeros.at(group * r.tile, "i32"))
        with t.loop(0, r.group // r.block) as block:
            first, turn = start + block * r.block, math.gcd(r.block, _TURN)
            with t.loop(0, r.block, turn, carry=[t.constant(0, vector(r.width, "i32"))]) as loop:
                total = loop.values[0]
                for i, value in enumerate(read(first + loop.index, turn)):
                    bits = scaling.differences(value)
                    total = total + bits
                    codes = bits if zero is None else bits + t.broadcast(zero, r.width)
                    _store_codes(t, r, codes, out.codes, first + loop.index + i * r.width)
                loop.carry([total])
            if r.sums != "none":
                count = t.reduce("add", loop.results[0]) - _wrapped(r.block * MAGIC_BITS)
                place = out.sums.at((group * (r.group // r.block) + block) * r.tile, "i32")
                t.store(count * -r.zero if r.sums == "start" else t.cast("sitofp", count, "f32"), place)


def _store_codes(t: Text, r: Rounding, bits: Value, codes: Value, k: Value) -> None:
    """Stores the low byte of each lane, of the inputs from k on."""
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
    transform: dict[str, Any] | None

    def problem(self) -> str:
        how = None if self.transform is None else transform_from_json(self.transform)
        if how is not None and (found := rounding_problem(how)):
            return found
        return outside(
            self,
            block=self.block >= 4 and self.block % 4 == 0,
            group=self.block <= self.group and self.group % self.block == 0,
            k=self.k >= 1 and self.k % self.group == 0,
            tile=1 <= self.tile <= 16,
            zero=abs(self.zero) <= 255,
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    r = Rounding(**asdict(params))
    before = [Extent("f32", m * params.k), *Norm.extents(params.prologue, params.k), *[Extent("f32", 1)] * r.stored]
    return [*before, Extent("i32", -(-m // params.tile) * r.words, True)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Args: x f32 [M, K], the prologue's tensors [K], the transform's [1], tiles i32 [ceil(M / tile), words]. Dims: M.

    Threads share the rows; those that fill the last tile repeat row M - 1.
    """
    r = Rounding(**params)
    t = Text(
        "activation_int8",
        f"code[m, k] of x = (code - zero) * scale, each {r.group} inputs with a scale: {r.how or 'max |x| / 127'}\n{r}",
    )
    norms, stored = norm_count(r.prologue), r.stored
    x, *given, tiles = (t.arg(i) for i in range(2 + norms + stored))
    count = t.dim(0)
    first, end = t.share((count + (r.tile - 1)) // r.tile * r.tile)
    with t.loop(first, end) as row:
        rows = Rows.of(r, tiles.at(row // r.tile * r.words, "i32")).row(row % r.tile)
        round_row(t, r, x.at(row.least(count - 1) * r.k, "f32"), given[:norms], given[norms:], rows)
    return t.finish()
