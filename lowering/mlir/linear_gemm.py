"""The template "linear-gemm": many rows of x times packed weights, by way of decoded strips that stay in the caches.

    y[m, n] = epilogue(sum over k of W[n, k] x[m, k]),  W = value * scale + shift

x comes from "linear-pack". A thread takes two strips of neighbouring outputs at a time (of a gated unit: one of the gate
and one of the up part) and for every DEPTH inputs decodes each strip's weights to float32 [DEPTH, strip] once; then a tile
of rows of x by one strip is accumulated in registers, a row's input broadcast from memory, for one tile after another.
Sums of finished depths wait in the thread's scratch; the epilogue runs on them when all of K is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.lowering.mlir.decode import Reader, reader
from qcompile.lowering.mlir.epilogue import Epilogue
from qcompile.lowering.mlir.linear import F32, LANES, Operands, Section, Shape, sections, shares
from qcompile.lowering.mlir.linear_pack import rest_width
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "linear-gemm"
DEPTH = 256  # a decoded strip and a tile of x together fit the first cache
TILES = 85  # full tiles whose sums wait at the same time; longer x goes in pieces, each of which decodes again
STRIPS = 2
UNROLL = 4


@dataclass(frozen=True)
class Tile:
    """The register tile: `rows` of x by a strip of `vectors` times 16 outputs."""

    rows: int
    vectors: int

    @property
    def strip(self) -> int:
        return self.vectors * LANES

    @property
    def waiting(self) -> int:
        """Rows of sums in the scratch."""
        return (TILES + 1) * self.rows


def tile(target: Target) -> Tile:
    """24 sums in 32 registers of 16 lanes; 12 in 16 registers of 8 (or 24 in 32 of 4)."""
    return Tile(12, 2) if target.isa == "avx512" else Tile(6, 1)


def scratch(target: Target) -> int:
    """float32 elements that each thread needs."""
    return STRIPS * tile(target).strip * (DEPTH + tile(target).waiting)


def emit(params: dict[str, Any], target: Target) -> str:
    """`params`: those of `linear.Shape`, with no prologue (it is linear-pack's). x is packed; needs `scratch`."""
    shape = Shape.of(params)
    t = Text(TEMPLATE.replace("-", "_"), f"y = epilogue(x @ W.T + bias), {tile(target)}\n{shape}")
    _Gemm(t, target, shape).emit()
    return t.finish()


class _Gemm:
    def __init__(self, t: Text, target: Target, shape: Shape):
        self.t, self.shape, self.tile = t, shape, tile(target)
        self.operands = Operands.load(t, shape, scratch=True)
        self.m, self.k = self.operands.m, self.operands.k
        self.epilogue = Epilogue(t, shape, self.operands)
        self.readers: list[Reader] = [
            reader(t, target, format, stored, self.k)
            for format, stored in zip(shape.parse(), self.operands.stored, strict=True)
        ]
        assert self.operands.scratch is not None
        self.weights = self.operands.scratch.at(t.thread * scratch(target), "f32")  # [STRIPS, DEPTH, strip]
        self.sums = self.weights.at(STRIPS * DEPTH * self.tile.strip, "f32")  # [STRIPS, waiting, strip]

    def emit(self) -> None:
        t, tiles = self.t, self.m // self.tile.rows
        work = sections(t, self.shape, self.operands)
        with t.loop(0, tiles.most(1), TILES) as first_tile:
            count = (tiles - first_tile).least(TILES)
            last = (t.constant(TILES, "i64") + first_tile) > (tiles - 1)
            row = first_tile * self.tile.rows
            rest = t.select(last, self.m - tiles * self.tile.rows, t.constant(0, "i64"))
            for section, first, end in shares(t, work):
                with t.loop(first, end, self._blocks(section)) as block:
                    self._strips(section, block, end, row, count, rest)

    def _blocks(self, section: Section) -> int:
        """Blocks of output in a turn."""
        return self.tile.vectors * STRIPS // len(section.streams)

    def _strip(self, section: Section, number: int) -> tuple[int, Value | int, int]:
        """Of a strip: the part it reads, and its first block: (part, start of the stream, block inside the turn)."""
        if len(section.streams) == STRIPS:
            return (*section.streams[number], 0)
        return (*section.streams[0], number * self.tile.vectors)

    def _strips(self, section: Section, block: Value, end: Value, row: Value, count: Value, rest: Value) -> None:
        t, strip = self.t, self.tile.strip
        rows = count * self.tile.rows + rest_width(rest, self.tile.rows)
        for number in range(STRIPS):
            with t.loop(0, rows * strip, LANES) as at:
                t.store(t.constant(0.0, F32), self._sum(number, at // strip).at(at % strip, "f32"))
        with t.loop(0, self.k, DEPTH) as k:
            depth = (self.k - k).least(DEPTH)
            for number in range(STRIPS):
                part, start, inside = self._strip(section, number)
                with t.when(block + inside < end):
                    blocks = [(block + inside + v).least(end - 1) + start for v in range(self.tile.vectors)]
                    self._decode(self.readers[part], blocks, k, depth, number)
                    self._tiles(number, row, k, depth, count, rest)
        with t.loop(0, count * self.tile.rows + rest) as at:
            for v in range(self._blocks(section)):
                with t.when(block + v < end):
                    self.epilogue.finish(section, block + v, row + at, self._finished(section, at, v))

    def _sum(self, number: int, row: Value) -> Value:
        return self.sums.at((row + number * self.tile.waiting) * self.tile.strip, "f32")

    def _finished(self, section: Section, row: Value, v: int) -> list[Value]:
        """The sums of output block v of the turn."""
        if len(section.streams) == STRIPS:
            places = [(number, v) for number in range(STRIPS)]
        else:
            places = [divmod(v, self.tile.vectors)]
        return [self.t.load(self._sum(number, row).at(lane * LANES, "f32"), F32) for number, lane in places]

    def _decode(self, weight: Reader, blocks: list[Value], first: Value, depth: Value, number: int) -> None:
        """Inputs first .. first + depth - 1 of the blocks, to strip `number` of the scratch."""
        t = self.t
        to = self.weights.at(number * DEPTH * self.tile.strip, "f32")

        def put(value: Value, k: Value, v: int) -> None:
            t.store(value, to.at((k - first) * self.tile.strip + v * LANES, "f32"))

        end = first + depth
        whole = end - end % weight.unit
        with t.loop(first, whole, weight.unit) as k:
            for v, block in enumerate(blocks):
                words = weight.words(block, k)
                finish = self._scaler(weight, block, k)
                for j in range(weight.unit):
                    put(finish(weight.value(words, j)), k + j, v)
        if weight.group is None:
            with t.loop(whole, end) as k:
                for v, block in enumerate(blocks):
                    put(weight.single(block, k), k, v)

    def _scaler(self, weight: Reader, block: Value, k: Value) -> Any:
        """What makes a weight of a value, for the group of input k."""
        t = self.t
        if weight.group is None:
            return lambda value: value
        by = weight.scaling(block, k // weight.group)
        shift = by.offset
        if by.zero is not None:
            shift = -(by.zero * by.scale) if shift is None else t.fma(-by.zero, by.scale, shift)
        return (lambda value: value * by.scale) if shift is None else (lambda value: t.fma(value, by.scale, shift))

    def _tiles(self, number: int, row: Value, k: Value, depth: Value, count: Value, rest: Value) -> None:
        """Adds strip `number` times the inputs k .. k + depth - 1 of this piece's rows to the waiting sums."""
        t, rows = self.t, self.tile.rows
        with t.loop(0, count) as i:
            self._multiply(rows, number, i * rows, row + i * rows, k, depth)
        width = rest_width(rest, rows)
        for third in (1, 2, 3):
            with t.when(width.equals(third * rows // 3)):
                self._multiply(third * rows // 3, number, count * rows, row + count * rows, k, depth)

    def _multiply(self, rows: int, number: int, local: Value, row: Value, k: Value, depth: Value) -> None:
        t, vectors = self.t, self.tile.vectors
        x = self.operands.x.at(row * self.k + k * rows, "f32")
        weights = self.weights.at(number * DEPTH * self.tile.strip, "f32")
        places = [self._sum(number, local + r).at(v * LANES, "f32") for r in range(rows) for v in range(vectors)]
        sums = [t.load(place, F32) for place in places]
        whole = depth - depth % UNROLL
        for start, end, step in ((t.constant(0, "i64"), whole, UNROLL), (whole, depth, 1)):
            with t.loop(start, end, step, carry=sums) as loop:
                values = list(loop.values)
                for j in range(step):
                    at = loop.index + j
                    w = [t.load(weights.at(at * self.tile.strip + v * LANES, "f32"), F32) for v in range(vectors)]
                    for r in range(rows):
                        one = t.broadcast(t.load(x.at(at * rows + r, "f32"), "f32"), LANES)
                        for v in range(vectors):
                            values[r * vectors + v] = t.fma(w[v], one, values[r * vectors + v])
                loop.carry(values)
            sums = list(loop.results)
        for value, place in zip(sums, places, strict=True):
            t.store(value, place)
