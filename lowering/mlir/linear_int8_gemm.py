"""Integer linear for many rows: the template "linear-int8-gemm". The formula is that of `linear_int8.py`.

Schedule: x comes as tiles of "activation-int8". A thread takes its share of the blocks of 16 outputs, `side` at a time.
It writes their codes as bytes to its scratch once, [K / 4, side, 16] words, which stay in the second-level cache, and
uses them for `m_block` rows: `tile` rows times `side` blocks of i32 sums stay in registers over the inputs that share
scales, then are scaled and added to f32 sums in the scratch. When all inputs are done, rows leave by the epilogue.
Where x has zeros, the sums of the codes, [K / block, side, 16], lie behind the codes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers, outside, require
from qcompile.lowering.mlir.activation_int8 import Rounding, Rows
from qcompile.lowering.mlir.epilogue import Epilogue
from qcompile.lowering.mlir.int8_dot import WORDS, dot, quads
from qcompile.lowering.mlir.linear import F32, LANES, Operands, Section, Shape, sections, shares
from qcompile.lowering.mlir.linear_int8 import ONES, Block, Scheme, scheme
from qcompile.lowering.mlir.linear_params import LinearParams
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "linear-int8-gemm"
_UNPACK = 32  # inputs that are unpacked by one turn of a loop, or more where words hold more


def scratch(params: dict[str, Any]) -> int:
    """f32 elements of scratch that each thread needs: unpacked codes, their sums, then the sums of each stream."""
    streams = 2 if Shape.of(params).glu else 1
    return int(params["side"] * LANES * (_panel(scheme(params)) + streams * params["m_block"]))


def _panel(s: Scheme) -> int:
    """Vectors of a block's unpacked codes and of their sums."""
    return s.k // 4 + (s.k // s.block if s.zeros else 0)


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """Those of `Shape`, without prologue, `k`, `act_group`, `rounding`, `tile`, `side`, `m_block`, a multiple of `tile`."""

    k: int
    act_group: int
    rounding: dict[str, Any] | None
    tile: int
    side: int
    m_block: int

    def problem(self) -> str:
        return outside(
            self,
            tile=1 <= self.tile <= 16,
            side=1 <= self.side <= 4,
            m_block=1 <= self.m_block <= 4096 and self.m_block % self.tile == 0,
            prologue=self.prologue is None,
            k=self.k >= 1,
        ) or super().problem() or scheme(asdict(self)).problem()  # fmt: skip


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    m, k, *rows = numbers(dims, 2 + len(params.formats))
    require(k == params.k, "a kernel is called for another size than it was made for", k, params.k)
    given = asdict(params)
    x = -(-m // params.tile) * scheme(given).tile(params.tile).words
    return [Extent("i32", x), *params.extents(m, k, rows), Extent("f32", threads * scratch(given), True)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel: the operands of `linear.py`, x being tiles of `scheme(params).tile(tile)`, with scratch."""
    s, shape = scheme(params), Shape.of(params)
    t = Text("linear_int8_gemm", f"{(__doc__ or '').splitlines()[0]}\n{s}\n{shape}")
    operands = Operands.load(t, shape, True)
    assert operands.scratch is not None
    panel = operands.scratch.at(t.thread * scratch(params), "f32")
    kernel = _Gemm(t, target, s, s.tile(params["tile"]), operands, params["side"], panel)
    home = panel.at(_panel(s) * kernel.side * LANES, "f32")
    epilogue = Epilogue(t, shape, operands)
    rows, m = params["m_block"], operands.m
    for section, first, end in shares(t, sections(t, shape, operands)):
        with t.loop(0, m, rows) as top, t.loop(first, end, kernel.side) as start:
            bottom = (top + rows).least(m)
            blocks = [(start + i).least(end - 1) for i in range(kernel.side)]
            homes = [home.at(i * rows * kernel.side * LANES, "f32") for i in range(len(section.streams))]
            for (part, before), sums in zip(section.streams, homes, strict=True):
                weights = [Block.of(s, operands.stored[part], block + before) for block in blocks]
                kernel.stream(weights, top, bottom, sums)
            _finish(t, section, epilogue, blocks, top, bottom, homes)
    return t.finish()


def _finish(
    t: Text, section: Section, epilogue: Epilogue, blocks: list[Value], top: Value, bottom: Value, homes: list[Value]
) -> None:
    with t.loop(top, bottom) as row:
        for i, block in enumerate(blocks):
            place = ((row - top) * len(blocks) + i) * LANES
            epilogue.finish(section, block, row, [t.load(home.at(place, "f32"), F32) for home in homes])


def _again(t: Text, pointer: Value) -> Value:
    """Sixteen sums, read from memory for certain: else LLVM keeps all of them in registers as well, that is on the stack."""
    return t.op(f"llvm.load volatile {pointer} {{alignment = 4}} : !llvm.ptr -> {F32}", F32)


class _Gemm:
    """Writes the sums of `side` blocks of one stream for the rows top .. bottom - 1."""

    def __init__(self, t: Text, target: Target, s: Scheme, r: Rounding, operands: Operands, side: int, panel: Value):
        self.t, self.target, self.s, self.r = t, target, s, r
        self.operands, self.side, self.panel = operands, side, panel
        self.sums = panel.at(s.k // 4 * side * LANES, "i32")

    def stream(self, blocks: list[Block], top: Value, bottom: Value, home: Value) -> None:
        t, r = self.t, self.r
        for i, block in enumerate(blocks):
            self._unpack(block, i)
        if self.s.zeros:
            self._sum_codes()
        with t.loop(top, bottom, r.tile) as row:
            rows = Rows.of(r, self.operands.x.at(row // r.tile * r.words, "i32"))
            self._tile(blocks, rows, home.at((row - top) * (self.side * LANES), "f32"))

    def _unpack(self, block: Block, side: int) -> None:
        t, s = self.t, self.s
        step = max(_UNPACK, s.codes.span)
        whole = s.k // step * step

        def write(start: Value | int, count: int) -> None:
            columns = quads(t, self.target, s.codes, block.words_at(start), 0, count)
            first = t.constant(start, "i64") // 4
            for i, column in enumerate(columns):
                t.store(column, self.panel.at(((first + i) * self.side + side) * LANES, "i32"))

        with t.loop(0, whole, step) as start:
            write(start, step // 4)
        if whole < s.k:
            write(whole, (s.k - whole) // 4)

    def _sum_codes(self) -> None:
        """Of each block of inputs."""
        t, s, side = self.t, self.s, self.side
        ones, quads_ = t.constant(ONES, WORDS), s.block // 4
        with t.loop(0, s.k // s.block) as index:
            with t.loop(index * quads_, (index + 1) * quads_, carry=[t.constant(0, WORDS)] * side) as loop:
                columns = [t.load(self.panel.at((loop.index * side + i) * LANES, "i32"), WORDS) for i in range(side)]
                loop.carry([
                    dot(t, self.target, s.codes.greatest, total, column, ones)
                    for total, column in zip(loop.values, columns, strict=True)
                ])  # fmt: skip
            for i, total in enumerate(loop.results):
                t.store(total, self.sums.at((index * side + i) * LANES, "i32"))

    def _tile(self, blocks: list[Block], rows: Rows, home: Value) -> None:
        t, s, r, side = self.t, self.s, self.r, self.side
        zero = t.constant(0.0, F32)
        for i in range(r.tile * side):
            t.store(zero, home.at(i * LANES, "f32"))
        with t.loop(0, s.k // s.block) as index:
            dots = self._dots(rows, index)
            groups = [block.group(index // (s.lanes.group // s.block)) for block in blocks]
            act = index // (s.act_group // s.block)
            if s.zeros:
                sums = [t.load(self.sums.at((index * side + i) * LANES, "i32"), WORDS) for i in range(side)]
                zeros = [self._read(rows.zeros, act, row, "i32") for row in range(r.tile)]
                dots = [total - sums[i % side] * zeros[i // side] for i, total in enumerate(dots)]
            for row in range(r.tile):
                x_scale = self._read(rows.scales, act, row, "f32")
                x_sum = self._read(rows.sums, index, row, "f32") if s.sums == "after" else None
                for i, group in enumerate(groups):
                    place = home.at((row * side + i) * LANES, "f32")
                    t.store(group.add(_again(t, place), dots[row * side + i], x_scale, x_sum), place)
        if s.late or s.unit != 1.0:
            for i in range(r.tile * side):
                place = home.at(i * LANES, "f32")
                t.store(blocks[i % side].last(t.load(place, F32)), place)

    def _dots(self, rows: Rows, index: Value) -> list[Value]:
        """The i32 sums of block `index` of the inputs, for each row the blocks of outputs."""
        t, s, r, side = self.t, self.s, self.r, self.side
        start = [t.constant(0, WORDS)] * r.tile
        if s.sums == "start":
            start = [self._read(rows.sums, index, row, "i32") for row in range(r.tile)]
        dots = [value for value in start for _ in range(side)]
        per_block = s.block // 4
        unroll = math.gcd(per_block, 4)
        with t.loop(index * per_block, (index + 1) * per_block, unroll, carry=dots) as loop:
            dots = list(loop.values)
            for quad in range(unroll):
                at = loop.index + quad
                columns = [t.load(self.panel.at((at * side + i) * LANES, "i32"), WORDS) for i in range(side)]
                for row in range(r.tile):
                    x = self._read(rows.codes, at, row, "i32")
                    for i, column in enumerate(columns):
                        place = row * side + i
                        dots[place] = dot(t, self.target, s.codes.greatest, dots[place], column, x)
            loop.carry(dots)
        return list(loop.results)

    def _read(self, base: Value, index: Value, row: int, element: str) -> Value:
        """A row's word of a tile, in every lane."""
        return self.t.broadcast(self.t.load(base.at(index * self.r.tile + row, element), element), LANES)
