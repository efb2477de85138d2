"""Integer linear for few rows: the template "linear-int8-gemv". The formula is that of `linear_int8.py`.

Schedule: every thread rounds the rows of x for itself (they are few: that costs less than a barrier), into its part of
the scratch. Then it streams its share of the weights once, `blocks` blocks of 16 outputs side by side so that several
loads are under way, each block's words in the order they lie in memory; `rows` rows of x use what was loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.formats.stream import planes
from qcompile.integer_sums import UNROLLED
from qcompile.lowering.extents import numbers, outside, require
from qcompile.lowering.mlir.activation_int8 import Rounding, Rows, round_row
from qcompile.lowering.mlir.epilogue import Epilogue
from qcompile.lowering.mlir.int8_dot import WORDS, dot, quads
from qcompile.lowering.mlir.linear import F32, LANES, Operands, Section, Shape, sections, shares
from qcompile.lowering.mlir.linear_int8 import ONES, Block, Scheme, group_of, scheme
from qcompile.lowering.mlir.linear_params import MOST_ROWS, LinearParams
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "linear-int8-gemv"
AHEAD = 64  # cache lines of each stream that are asked for before they are needed
_TURN = 64  # inputs of a long block that one turn of a loop multiplies: whole words of every plane


def scratch(params: dict[str, Any]) -> int:
    """f32 elements of scratch that each thread needs."""
    return _tile(params).words + 15 & ~15


def _tile(params: dict[str, Any]) -> Rounding:
    return scheme(params).tile(params["rows"], params["prologue"])


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """Those of `Shape`, `k`, `act_group`, `rounding`, `rows` >= M, `blocks`."""

    k: int
    act_group: int
    rounding: dict[str, Any] | None
    rows: int
    blocks: int

    def problem(self) -> str:
        few = self.rows >= 1 and self.blocks >= 1 and self.rows * self.blocks <= MOST_ROWS
        return outside(self, rows=few, k=self.k >= 1) or super().problem() or scheme(asdict(self)).problem()


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    m, k, *rows = numbers(dims, 2 + len(params.formats))
    require(k == params.k, "a kernel is called for another size than it was made for", k, params.k)
    require(m <= params.rows, "more rows than the kernel is written for", m, f"at most {params.rows}")
    given = asdict(params)
    known = params.extents(m, k, rows, _tile(given).stored)
    return [Extent("f32", m * k), *known, Extent("f32", threads * scratch(given), True)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel: the operands of `linear.py` with scratch."""
    s, r, shape, rows = scheme(params), _tile(params), Shape.of(params), params["rows"]
    t = Text("linear_int8_gemv", f"{(__doc__ or '').splitlines()[0]}\n{s}\n{shape}")
    operands = Operands.load(t, shape, True, r.stored)
    assert operands.scratch is not None
    tile = Rows.of(r, operands.scratch.at(t.thread * scratch(params), "f32"))
    with t.loop(0, operands.m.least(rows)) as row:
        round_row(t, r, operands.x.at(row * s.k, "f32"), operands.norm, operands.before, tile.row(row))
    kernel = _Gemv(t, target, s, operands, tile, rows, Epilogue(t, shape, operands))
    for section, first, end in shares(t, sections(t, shape, operands)):
        side = max(1, params["blocks"] // len(section.streams))
        whole = end - (end - first) % side
        with t.loop(first, whole, side) as block:
            kernel.blocks(section, block, side)
        if side > 1:
            with t.loop(whole.most(first), end) as block:
                kernel.blocks(section, block, 1)
    return t.finish()


class _Gemv:
    """Writes the work on a few blocks side by side."""

    def __init__(self, t: Text, target: Target, s: Scheme, operands: Operands, x: Rows, rows: int, epilogue: Epilogue):
        self.t, self.target, self.s, self.operands, self.x = t, target, s, operands, x
        self.rows, self.epilogue = rows, epilogue

    def blocks(self, section: Section, first: Value, side: int) -> None:
        t, s = self.t, self.s
        blocks = [
            Block.of(s, self.operands.stored[part], first + i + start)
            for i in range(side)
            for part, start in section.streams
        ]
        totals = [t.constant(0.0, F32)] * (len(blocks) * self.rows)
        with t.loop(0, s.k // s.chunk, carry=totals) as loop:
            loop.carry(self._chunk(blocks, loop.index, s.chunk // s.block, list(loop.values)))
        totals = list(loop.results)
        left = s.k % s.chunk // s.block
        if left:
            totals = self._chunk(blocks, t.constant(s.k // s.chunk, "i64"), left, totals)
        ends = [block.last(total) for i, block in enumerate(blocks) for total in totals[i * self.rows :][: self.rows]]
        streams = len(section.streams)
        for row in range(self.rows):
            with t.when(self.operands.m > row):
                for i in range(side):
                    sums = [ends[(i * streams + stream) * self.rows + row] for stream in range(streams)]
                    self.epilogue.finish(section, first + i, t.constant(row, "i64"), sums)

    def _chunk(self, blocks: list[Block], chunk: Value, count: int, totals: list[Value]) -> list[Value]:
        """Adds `count` blocks of inputs from a chunk on to the sums of every (block of outputs, row)."""
        t, s = self.t, self.s
        words = [block.words_at(chunk * s.chunk) for block in blocks]
        x = self.x.codes.at(chunk * (s.chunk // 4 * self.rows), "i32")
        per_block = s.block // 4
        for inputs in range(count):
            index = chunk * (s.chunk // s.block) + inputs
            sums = [self._row(self.x.sums, index, row) for row in range(self.rows)] if s.sums != "none" else None
            dots = [t.broadcast(self._as_int(v), LANES) for v in sums] if sums and s.sums == "start" else None
            dots = (dots or [t.constant(0, WORDS)] * self.rows) + [t.constant(0, WORDS)] * s.zeros
            dots *= len(blocks)
            if self._turn:
                dots = self._long(blocks, (chunk * (s.chunk // s.block) + inputs) * s.block, dots)
            else:
                dots = self._dots(words, x, inputs * per_block, per_block, dots)
            act = group_of(s, s.act_group, chunk, inputs)
            if s.zeros:
                dots = self._above_zeros(dots, act)
            group = group_of(s, s.lanes.group, chunk, inputs)
            scales = [t.broadcast(self._row(self.x.scales, act, row), LANES) for row in range(self.rows)]
            x_sums = [t.broadcast(v, LANES) for v in sums] if sums and s.sums == "after" else [None] * self.rows
            for i, block in enumerate(blocks):
                stored = block.group(group)
                for row in range(self.rows):
                    at = i * self.rows + row
                    totals[at] = stored.add(totals[at], dots[at], scales[row], x_sums[row])
        return totals

    @property
    def _turn(self) -> int:
        """Inputs of a block that a turn of a loop multiplies; 0: a block is written out as a whole."""
        s = self.s
        if s.block > UNROLLED:
            return _TURN
        # Without the dot instruction LLVM spreads a long block over more registers than there are.
        return 0 if self.target.vnni or s.block % s.codes.span else s.codes.span

    def _long(self, blocks: list[Block], first: Value, dots: list[Value]) -> list[Value]:
        """The dot products of the block of inputs from `first` on, turn by turn."""
        t, turn = self.t, self._turn
        whole = self.s.block // turn * turn

        def some(start: Value, count: int, dots: list[Value]) -> list[Value]:
            codes = self.x.codes.at(start // 4 * self.rows, "i32")
            return self._dots([block.words_at(start) for block in blocks], codes, 0, count // 4, dots)

        with t.loop(first, first + whole, turn, carry=dots) as loop:
            loop.carry(some(loop.index, turn, list(loop.values)))
        dots = list(loop.results)
        return some(first + whole, self.s.block - whole, dots) if whole < self.s.block else dots

    def _above_zeros(self, dots: list[Value], act: Value) -> list[Value]:
        """Dot products with (c - z_x) from those with c, and from the sums of codes that lie behind those of each block."""
        t, wide = self.t, self.rows + 1
        zeros = [t.broadcast(self._as_int(self._row(self.x.zeros, act, row)), LANES) for row in range(self.rows)]
        return [
            dots[block + row] - dots[block + self.rows] * zeros[row]
            for block in range(0, len(dots), wide)
            for row in range(self.rows)
        ]

    def _dots(self, words: list[list[Value]], x: Value, first: int, count: int, dots: list[Value]) -> list[Value]:
        """Adds quads first .. first + count - 1 behind `words` (of each block) and `x` to the dot products.

        Where x has zeros, a block's codes are summed as well, as if they were multiplied with one more row.
        """
        t, dots, widths = self.t, list(dots), planes(self.s.lanes.bits)
        for pointer, width in ((place[i], width) for place in words for i, width in enumerate(widths)):
            for word in range(first * width // 8, (first + count) * width // 8):
                t.prefetch(pointer.at((word + AHEAD) * LANES, "i32"))
        for quad in range(first, first + count):
            columns = [quads(t, self.target, self.s.codes, place, quad, 1)[0] for place in words]
            for row in range(self.rows + self.s.zeros):
                ones = t.constant(ONES, WORDS)
                codes = ones if row == self.rows else t.broadcast(self._quad(x, quad, row), LANES)
                for i, column in enumerate(columns):
                    at = i * (self.rows + self.s.zeros) + row
                    dots[at] = dot(t, self.target, self.s.codes.greatest, dots[at], column, codes)
        return dots

    def _quad(self, x: Value, quad: int, row: int) -> Value:
        return self.t.load(x.at(quad * self.rows + row, "i32"), "i32")

    def _row(self, base: Value, index: Value, row: int) -> Value:
        return self.t.load(base.at(index * self.rows + row, "f32"), "f32")

    def _as_int(self, value: Value) -> Value:
        return self.t.cast("bitcast", value, "i32")
