"""The template "linear-gemv": a few rows of x times packed weights, each weight decoded in registers for all rows.

    y[m, n] = epilogue(sum over groups g of scale[n, g] * (sum q[n, k] x[m, k] - zero[n, g] * sum x[m, k])
                       + offset[n, g] * sum x[m, k])

Sixteen outputs are the lanes of a vector; several blocks of sixteen are worked on at once, so that independent chains
of multiply-adds hide their latency, while the words of each stream by in order. Sums of x (and the norm of x) are
computed by every thread for itself: that is cheaper than a barrier for so few rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers, outside, require
from qcompile.lowering.mlir.decode import Reader, Scaling, readers
from qcompile.lowering.mlir.epilogue import Epilogue
from qcompile.lowering.mlir.linear import F32, LANES, Operands, Section, Shape, sections, shares
from qcompile.lowering.mlir.linear_params import MOST_ROWS, LinearParams
from qcompile.lowering.mlir.prologue import open_row, write_row, write_sums
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "linear-gemv"
INLINE = 32  # inputs of a group that are written out instead of looped over


def scratch(params: dict[str, Any], k: int) -> int:
    """float32 elements that each thread needs beside it, a multiple of 16; 0 for none."""
    shape = Shape.of(params)
    rows: int = params["rows"]
    floats = rows * ((k if shape.prologue else 0) + sum(k // group for group in _groups(shape)))
    return -(-floats // LANES) * LANES


def _groups(shape: Shape) -> list[int]:
    """The group sizes over which sums of x are wanted."""
    found = {getattr(f, "group", 0) for f in shape.parse() if _has_terms(f)}
    return sorted(found)


def _has_terms(format: Any) -> bool:
    factored = format.kind == "lanes" and format.rounding == "none"
    return factored and (isinstance(format.zero, str) or format.offset is not None)


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """Those of `linear.Shape`, and "rows", the greatest M it is written for."""

    rows: int

    def problem(self) -> str:
        return outside(self, rows=1 <= self.rows <= MOST_ROWS) or super().problem()


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    m, k, *rows = numbers(dims, 2 + len(params.formats))
    require(m <= params.rows, "more rows than the kernel is written for", m, f"at most {params.rows}")
    size = scratch(asdict(params), k)
    return [Extent("f32", m * k), *params.extents(m, k, rows), *[Extent("f32", threads * size, True)] * (size > 0)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. Dims: M, K, rows of each part. Needs `scratch`."""
    shape, rows = Shape.of(params), params["rows"]
    t = Text(TEMPLATE.replace("-", "_"), f"y = epilogue(norm(x) @ W.T + bias), at most {rows} rows\n{shape}")
    Gemv(t, target, shape, rows, bool(scratch(params, 1 << 20))).emit()
    return t.finish()


class Gemv:
    """Writes the kernel; `rows` rows of x are worked on at once."""

    def __init__(self, t: Text, target: Target, shape: Shape, rows: int, needs_scratch: bool):
        self.t, self.rows, self.shape = t, rows, shape
        self.operands = Operands.load(t, shape, needs_scratch)
        self.k = self.operands.k
        self.epilogue = Epilogue(t, shape, self.operands)
        self.readers = readers(t, target, shape, self.operands)
        # Registers: rows * blocks sums of a group and as many totals, 32 vectors of 16 floats or half as many of 8.
        wide = target.isa == "avx512"
        self.blocks = max(1, (4 if wide else 2) // max(1, rows // 2))
        self.chains = max(1, (8 if wide else 4) // (rows * self.blocks))

    def emit(self) -> None:
        with self.t.when(self.operands.m > 0):
            self._work()

    def _work(self) -> None:
        t = self.t
        self.x, self.sums = self._rows()
        for section, first, end in shares(t, sections(t, self.shape, self.operands)):
            whole = end - (end - first) % self.blocks
            with t.loop(first, whole, self.blocks) as block:
                self._section(section, [block + i for i in range(self.blocks)])
            if self.blocks > 1:
                with t.loop(whole, end) as block:
                    self._section(section, [block])

    def _rows(self) -> tuple[list[Value], dict[int, list[Value]]]:
        """Pointers to each (normalised) row of x and, by group size, to the sums of each row. Row M - 1 repeats."""
        t, operands = self.t, self.operands
        x = [operands.x.at((operands.m - 1).least(row) * self.k, "f32") for row in range(self.rows)]
        if operands.scratch is None:
            return x, {}
        size = t.constant(0, "i64")
        groups = _groups(self.shape)
        for length in [self.k] * (self.shape.prologue is not None) + [self.k // group for group in groups]:
            size = size + length * self.rows
        own = operands.scratch.at(t.thread * ((size + (LANES - 1)) // LANES * LANES), "f32")
        if self.shape.prologue is not None:
            made = []
            for row in x:
                write_row(t, open_row(t, self.shape.prologue, row, operands.norm, self.k), own, self.k)
                made.append(own)
                own = own.at(self.k, "f32")
            x = made
        sums: dict[int, list[Value]] = {}
        for group in groups:
            sums[group] = []
            for row in x:
                write_sums(t, row, own, self.k, group)
                sums[group].append(own)
                own = own.at(self.k // group, "f32")
        return x, sums

    def _section(self, section: Section, blocks: list[Value]) -> None:
        totals = [self._dot(self.readers[part], [block + start for block in blocks]) for part, start in section.streams]
        for i, block in enumerate(blocks):
            for row in range(self.rows):
                sums = [stream[i * self.rows + row] for stream in totals]
                if row == 0:
                    self.epilogue.finish(section, block, self.t.constant(0, "i64"), sums)
                else:
                    with self.t.when(self.operands.m > row):
                        self.epilogue.finish(section, block, self.t.constant(row, "i64"), sums)

    def _dot(self, weight: Reader, blocks: list[Value]) -> list[Value]:
        """x . W for each block and row: [blocks * rows]."""
        t, zero = self.t, self.t.constant(0.0, F32)
        count = len(blocks) * self.rows
        if weight.group is None:
            whole = self.k - self.k % weight.unit
            sums = self._accumulate(weight, blocks, t.constant(0, "i64"), whole)
            if not weight.rest:
                return sums
            with t.loop(whole, self.k, 1, carry=sums) as rest:
                values = [weight.single(block, rest.index) for block in blocks]
                rest.carry(self._products(values, rest.index, list(rest.values)))
            return list(rest.results)
        with t.loop(0, self.k // weight.group, 1, carry=[zero] * count) as loop:
            start = loop.index * weight.group
            sums = self._accumulate(weight, blocks, start, start + weight.group)
            scalings = [weight.scaling(block, loop.index) for block in blocks]
            loop.carry([
                self._scaled(weight, scalings[i // self.rows], i % self.rows, loop.index, sums[i], loop.values[i])
                for i in range(count)
            ])  # fmt: skip
        return list(loop.results)

    def _scaled(self, weight: Reader, by: Scaling, row: int, group: Value, total: Value, before: Value) -> Value:
        t = self.t
        if weight.needs_sums and weight.group is not None:
            x = t.broadcast(t.load(self.sums[weight.group][row].at(group, "f32"), "f32"), LANES)
            if by.zero is not None:
                total = t.fma(-by.zero, x, total)
            if by.offset is not None:
                before = t.fma(by.offset, x, before)
        return t.fma(by.scale, total, before)

    def _accumulate(self, weight: Reader, blocks: list[Value], start: Value, end: Value) -> list[Value]:
        """sum of value * x over inputs start .. end - 1, whole units, for each block and row."""
        t, zero = self.t, self.t.constant(0.0, F32)
        count = len(blocks) * self.rows
        sums = [zero] * (count * self.chains)
        if weight.group is not None and weight.group <= INLINE:
            for at in range(0, weight.group, weight.unit):
                sums = self._unit(weight, blocks, start + at, sums)
        else:
            with t.loop(start, end, weight.unit, carry=sums) as loop:
                loop.carry(self._unit(weight, blocks, loop.index, list(loop.values)))
            sums = list(loop.results)
        while len(sums) > count:
            sums = [a + b for a, b in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)]
        return sums

    def _unit(self, weight: Reader, blocks: list[Value], k: Value, sums: list[Value]) -> list[Value]:
        words, count = [weight.words(block, k) for block in blocks], len(blocks) * self.rows
        for j in range(weight.unit):
            chain = j % self.chains * count
            values = [weight.value(word, j) for word in words]
            sums[chain : chain + count] = self._products(values, k + j, sums[chain : chain + count])
        return sums

    def _products(self, values: list[Value], k: Value, sums: list[Value]) -> list[Value]:
        t = self.t
        x = [t.broadcast(t.load(row.at(k, "f32"), "f32"), LANES) for row in self.x]
        return [t.fma(values[i // self.rows], x[i % self.rows], sums[i]) for i in range(len(sums))]
