"""The template "linear-gemm": many rows of x times packed weights, by way of decoded strips that stay in the caches.

    y[m, n] = epilogue(sum over k of W[n, k] x[m, k]),  W = value * scale + shift

x comes from "linear-pack". A thread takes two strips of neighbouring outputs at a time (of a gated unit: one of the
gate and one of the up part). For every DEPTH inputs it decodes a strip's weights to float32 [DEPTH, strip] once; then
tiles of rows of x by the strip are accumulated in registers, inputs broadcast from memory. Sums of finished depths wait
in the thread's scratch; the epilogue runs on them when all of K is done.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.mlir.decode import Reader, readers
from qcompile.lowering.mlir.epilogue import Epilogue
from qcompile.lowering.mlir.linear import F32, LANES, Operands, Section, Shape, sections, shares
from qcompile.lowering.mlir.linear_pack import packed_size, rest_width
from qcompile.lowering.mlir.linear_params import LinearParams
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "linear-gemm"
DEPTH = 256  # a decoded strip and a tile of x together fit the first cache
TILES = 85  # full tiles whose sums wait at the same time; longer x goes in pieces, each of which decodes again
STRIPS = 2
UNROLL = 4


@dataclass(frozen=True)
class Tile:
    """The register tile: `rows` of x, 6 or 12, by a strip of `vectors` times 16 outputs."""

    rows: int

    @property
    def vectors(self) -> int:
        return self.rows // 6

    @property
    def strip(self) -> int:
        return self.vectors * LANES

    @property
    def waiting(self) -> int:
        """Rows of sums in the scratch."""
        return (TILES + 1) * self.rows


def tile(target: Target) -> Tile:
    """24 sums in 32 registers of 16 lanes; 12 in 16 registers of 8 (or 24 in 32 of 4)."""
    return Tile(12 if target.isa == "avx512" else 6)


def scratch(tile: Tile) -> int:
    """float32 elements that each thread needs."""
    return tile.strip * (DEPTH + STRIPS * tile.waiting)


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """Those of `linear.Shape`, with no prologue (it is linear-pack's), and "tile", its rows of x."""

    tile: int

    def problem(self) -> str:
        return outside(self, tile=self.tile in (6, 12), prologue=self.prologue is None) or super().problem()


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    m, k, *rows = numbers(dims, 2 + len(params.formats))
    size = threads * scratch(Tile(params.tile))
    x = int(packed_size(m, k, params.tile))
    return [Extent("f32", x), *params.extents(m, k, rows), Extent("f32", size, True)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. x is packed. Dims: M, K, rows of each part. Needs `scratch`."""
    shape, tile = Shape.of(params), Tile(params["tile"])
    t = Text(TEMPLATE.replace("-", "_"), f"y = epilogue(x @ W.T + bias), {tile}\n{shape}")
    _Gemm(t, target, shape, tile).emit()
    return t.finish()


@dataclass(frozen=True)
class Piece:
    """Rows of x whose sums wait together: `tiles` full tiles from tile number `first` on, then `width` packed rows."""

    first: Value
    tiles: Value
    width: Value


class _Gemm:
    def __init__(self, t: Text, target: Target, shape: Shape, tile: Tile):
        self.t, self.shape, self.tile = t, shape, tile
        self.operands = Operands.load(t, shape, scratch=True)
        self.m, self.k = self.operands.m, self.operands.k
        self.epilogue = Epilogue(t, shape, self.operands)
        self.readers = readers(t, target, shape, self.operands)
        assert self.operands.scratch is not None
        self.weights = self.operands.scratch.at(t.thread * scratch(tile), "f32")  # [DEPTH, strip]
        self.sums = self.weights.at(DEPTH * self.tile.strip, "f32")  # [STRIPS, waiting, strip]

    def emit(self) -> None:
        t, rows = self.t, self.tile.rows
        tiles = self.m // rows
        width = rest_width(self.m - tiles * rows, rows)
        # A rest as wide as a tile is packed like one.
        tiles, width = tiles + width // rows, width % rows
        work = sections(t, self.shape, self.operands)
        with t.loop(0, tiles.most(1), TILES) as first:
            piece = Piece(first, (tiles - first).least(TILES), t.select(first + TILES < tiles, 0, width))
            for section, start, end in shares(t, work):
                with t.loop(start, end, self._blocks(section)) as block:
                    self._strips(section, block, end, piece)

    def _blocks(self, section: Section) -> int:
        """Blocks of output in a turn."""
        return self.tile.vectors * STRIPS // len(section.streams)

    def _strips(self, section: Section, block: Value, end: Value, piece: Piece) -> None:
        t, strip, rows = self.t, self.tile.strip, self.tile.rows
        gated = len(section.streams) == STRIPS
        height = piece.tiles * rows + piece.width
        with t.loop(0, STRIPS) as number, t.loop(0, height * strip, LANES) as at:
            t.store(t.constant(0.0, F32), self._sums(number).at(at, "f32"))
        with t.loop(0, self.k, DEPTH) as k, t.loop(0, STRIPS) as number:
            depth = (self.k - k).least(DEPTH)
            first = block if gated else block + number * self.tile.vectors
            with t.when(first < end):
                for i, (part, start) in enumerate(section.streams):
                    blocks = [(first + v).least(end - 1) + start for v in range(self.tile.vectors)]
                    with t.when(number.equals(i)) if gated else nullcontext():
                        self._decode(self.readers[part], blocks, k, depth)
                self._tiles(self._sums(number), piece, k, depth)
        top = piece.first * rows
        with t.loop(0, height.least(self.m - top)) as row:
            for v in range(self._blocks(section)):
                places = [(i, v) for i in range(STRIPS)] if gated else [divmod(v, self.tile.vectors)]
                with t.when(block + v < end):
                    sums = [
                        t.load(self._sums(t.constant(i, "i64")).at(row * strip + lane * LANES, "f32"), F32)
                        for i, lane in places
                    ]
                    self.epilogue.finish(section, block + v, top + row, sums)

    def _sums(self, number: Value) -> Value:
        """The waiting sums of strip `number`."""
        return self.sums.at(number * (self.tile.waiting * self.tile.strip), "f32")

    def _decode(self, weight: Reader, blocks: list[Value], first: Value, depth: Value) -> None:
        """Inputs first .. first + depth - 1 of the blocks, as the strip of weights."""
        t = self.t

        def put(value: Value, k: Value, v: int) -> None:
            t.store(value, self.weights.at((k - first) * self.tile.strip + v * LANES, "f32"))

        end = first + depth
        whole = end - end % weight.unit
        with t.loop(first, whole, weight.unit) as k:
            for v, block in enumerate(blocks):
                words = weight.words(block, k)
                finish = self._scaler(weight, block, k)
                for j in range(weight.unit):
                    put(finish(weight.value(words, j)), k + j, v)
        if weight.rest:
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

    def _tiles(self, sums: Value, piece: Piece, k: Value, depth: Value) -> None:
        """Adds the strip of weights times the inputs k .. k + depth - 1 of this piece's rows to the waiting sums."""
        t, rows = self.t, self.tile.rows
        x = self.operands.x.at(piece.first * rows * self.k, "f32")
        with t.loop(0, piece.tiles) as i:
            self._multiply(rows, x.at(i * rows * self.k + k * rows, "f32"), self._row(sums, i * rows), depth)
        for width in (rows // 3, 2 * rows // 3):
            with t.when(piece.width.equals(width)):
                row = piece.tiles * rows
                self._multiply(width, x.at(row * self.k + k * width, "f32"), self._row(sums, row), depth)

    def _row(self, sums: Value, row: Value) -> Value:
        return sums.at(row * self.tile.strip, "f32")

    def _multiply(self, rows: int, x: Value, sums: Value, depth: Value) -> None:
        """sums [rows, strip] += x [depth, rows].T @ weights [depth, strip]."""
        t, vectors, strip = self.t, self.tile.vectors, self.tile.strip
        places = [sums.at(r * strip + v * LANES, "f32") for r in range(rows) for v in range(vectors)]
        values = [t.load(place, F32) for place in places]
        whole = depth - depth % UNROLL
        for start, end, step in ((t.constant(0, "i64"), whole, UNROLL), (whole, depth, 1)):
            with t.loop(start, end, step, carry=values) as loop:
                values = list(loop.values)
                for j in range(step):
                    at = loop.index + j
                    w = [t.load(self.weights.at(at * strip + v * LANES, "f32"), F32) for v in range(vectors)]
                    for r in range(rows):
                        one = t.broadcast(t.load(x.at(at * rows + r, "f32"), "f32"), LANES)
                        for v in range(vectors):
                            values[r * vectors + v] = t.fma(w[v], one, values[r * vectors + v])
                loop.carry(values)
            values = list(loop.results)
        for value, place in zip(values, places, strict=True):
            t.store(value, place)
