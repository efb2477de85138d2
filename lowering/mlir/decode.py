"""Weights as float32 vectors of sixteen outputs, read from a layout or any other format by MLIR text.

A reader gives the weight of a block (outputs 16 b .. 16 b + 15) at an input in two halves: `value`, which changes with
every input, and `Scaling`, which holds for a group of inputs. Where a reader has no group, W = value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from qcompile.dtypes import itemsize
from qcompile.errors import InternalError
from qcompile.format import Format
from qcompile.formats.lanes import Lanes, LanesDense
from qcompile.formats.stream import planes
from qcompile.lowering.mlir.linear import F32, I32, LANES, Operands, Shape
from qcompile.lowering.mlir.memory import ELEMENTS, gather, half_of_byte, load, narrow, widen
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.lowering.render import Renderer
from qcompile.simplify import coordinates, simplify
from qcompile.target import Target

# Bytes that a stream of weights is asked for in advance: several streams at once, each crossing a page every few
# microseconds, are more than the machine's own prefetcher follows.
AHEAD = 1024


@dataclass(frozen=True)
class Scaling:
    """What holds for one group of a block: W = (value - zero) * scale + offset, vectors; None where there is none."""

    scale: Value
    zero: Value | None
    offset: Value | None


class Reader(Protocol):
    """How kernels read one weight. `unit` inputs are read together; it divides the group, if there is one."""

    @property
    def unit(self) -> int: ...

    @property
    def group(self) -> int | None: ...

    @property
    def rest(self) -> bool:
        """True where K may be no multiple of `unit`: the inputs behind the last whole unit are read by `single`."""
        ...

    @property
    def needs_sums(self) -> bool:
        """True where zero or offset are stored, so that sums of x over each group are wanted."""
        ...

    def words(self, block: Value, k: Value) -> list[list[Value]]:
        """What the values of inputs k .. k + unit - 1 are made of; k is a multiple of `unit`."""
        ...

    def value(self, words: list[list[Value]], j: int) -> Value:
        """The value at input k + j."""
        ...

    def scaling(self, block: Value, group: Value) -> Scaling: ...

    def single(self, block: Value, k: Value) -> Value:
        """The value at input k, wherever k is; only where `rest`."""
        ...


class LanesReader:
    """`Lanes`: words of sixteen outputs, see its docstring for the order of the bits."""

    rest = False

    def __init__(self, t: Text, target: Target, format: Lanes, stored: list[Value], k: Value):
        self.t, self.target, self.format, self.k = t, target, format, k
        self.widths = planes(format.bits)
        self.planes, rest = stored[: len(self.widths)], stored[len(self.widths) :]
        self.scales = rest.pop(0)
        self.zeros = rest.pop(0) if isinstance(format.zero, str) else None
        self.offsets = rest.pop(0) if format.offset is not None else None
        self.group = format.group
        self.needs_sums = self.zeros is not None or self.offsets is not None
        self.unit = next(u for u in (32, 16, 8, 4, 1) if format.group % u == 0 and u * min(self.widths) <= 32)
        self.power = 256.0 if format.code == "f8e4m3" else 1.0  # of which `value` lacks the factor
        entries = _entries(format)
        self._table = entries if _in_registers(target, format) else None
        self._memory = self._store(entries) if format.table is not None and self._table is None else None

    def _store(self, entries: list[float]) -> Value:
        """The table on the stack, for machines that look it up there."""
        memory = self.t.stack(len(entries), "f32")
        for at in range(0, len(entries), LANES):
            self.t.store(self.t.constants(entries[at : at + LANES], "f32"), memory.at(at, "f32"))
        return memory

    def words(self, block: Value, k: Value) -> list[list[Value]]:
        t, out = self.t, []
        for pointer, width in zip(self.planes, self.widths, strict=True):
            per = 32 // width
            start = pointer.at(block * ((self.k + (per - 1)) // per * LANES), "i32")  # the same over all inputs
            at = k // per * LANES
            loaded = []
            for i in range(max(1, self.unit // per)):
                t.prefetch(start.at(at + i * LANES + AHEAD // 4, "i32"))
                loaded.append(t.load(start.at(at + i * LANES, "i32"), I32))
            if self.unit < per:
                inside = k % per
                shift = inside // 4 * width
                if self.unit == 1:
                    shift = shift + inside % 4 * 8
                loaded = [loaded[0] >> t.broadcast(t.cast("trunci", shift, "i32"), LANES)]
            out.append(loaded)
        return out

    def _code(self, words: list[list[Value]], j: int) -> Value:
        """The code of input j. For a table in registers, bits above the code are not cleared."""
        code, below = self.t.constant(0, I32), 0
        for loaded, width in zip(words, self.widths, strict=True):
            per = 32 // width
            place = j % per
            up = below - (8 * (place % 4) + width * (place // 4))
            part = loaded[j // per] << up if up > 0 else loaded[j // per] >> -up
            code, below = self._merge(code, part, below) if below else part, below + width
        return code if self._table is not None else code & ((1 << below) - 1)

    def _merge(self, low: Value, high: Value, bits: int) -> Value:
        """The low bits of `low` below the other bits of `high`."""
        if self.target.isa != "avx512":
            return (low & ((1 << bits) - 1)) | (high & -(1 << bits))
        choose = self.t.constant(0xCA, "i32")  # the truth table of "first ? second : third"
        mask = self.t.constant((1 << bits) - 1, I32)
        return self.t.intrinsic("llvm.x86.avx512.pternlog.d.512", [mask, low, high, choose], I32)

    def value(self, words: list[list[Value]], j: int) -> Value:
        t, code = self.t, self._code(words, j)
        if self.format.code != "int":
            return half_of_byte(t, code, self.format.code)
        if self._memory is not None:
            everywhere = t.constant(1, vector(LANES, "i1"))
            return gather(t, self._memory, t.cast("extui", code, "i64"), "f32", everywhere)
        if self._table is not None:
            return self._look_up(code)
        zero = self.format.zero
        if isinstance(zero, int | float) and zero:
            if float(zero).is_integer():
                return t.cast("sitofp", code - int(zero), "f32")
            return t.cast("sitofp", code, "f32") - float(zero)
        return t.cast("sitofp", code, "f32")

    def _look_up(self, code: Value) -> Value:
        """The entry at the low bits of each code, four or five."""
        t, entries = self.t, self._table
        assert entries is not None
        if len(entries) == 32:
            halves = [t.constants(half, "f32") for half in (entries[:16], entries[16:])]
            return t.intrinsic("llvm.x86.avx512.vpermi2var.ps.512", [halves[0], code, halves[1]], F32)
        if self.target.isa == "avx512":
            return t.intrinsic("llvm.x86.avx512.permvar.sf.512", [t.constants(entries, "f32"), code], F32)
        low, high = t.constants(entries[:8], "f32"), t.constants(entries[8:], "f32")
        halves = []
        for start in (0, 8):
            index = t.slice(code, start, 8)
            below, above = (t.intrinsic("llvm.x86.avx2.permps", [item, index], low.type) for item in (low, high))
            halves.append(t.select((index << 28) < 0, above, below))
        return t.join(*halves)

    def stored_scaling(self, block: Value, group: Value) -> Scaling:
        """Scale, zero and offset as they are stored, without the format's factor."""
        t, format = self.t, self.format
        at = (block * (self.k // format.group) + group) * LANES
        scale = load(t, self.scales, at, format.scale, LANES)
        zero = load(t, self.zeros, at, str(format.zero), LANES) if self.zeros is not None else None
        offset = load(t, self.offsets, at, str(format.offset), LANES) if self.offsets is not None else None
        return Scaling(scale, zero, offset)

    def scaling(self, block: Value, group: Value) -> Scaling:
        by, factor = self.stored_scaling(block, group), self.format.factor * self.power
        if factor == 1.0:
            return by
        return Scaling(by.scale * factor, by.zero, None if by.offset is None else by.offset * factor)

    def single(self, block: Value, k: Value) -> Value:
        raise InternalError("a group has no rest", found=self.format.group)


class RoundedReader:
    """`Lanes` whose format rounds every weight to 16 bits: W = value, rounded as `formats.affine.Terms` says.

    A scale taken out of the sum would leave the roundings out, up to 2^-9 of each weight.
    """

    group, needs_sums, rest = None, False, False

    def __init__(self, lanes: LanesReader):
        self.t, self.lanes, self.unit = lanes.t, lanes, lanes.unit
        mode, _, self.dtype = lanes.format.rounding.partition("-")
        self.each = mode == "each"

    def words(self, block: Value, k: Value) -> list[list[Value]]:
        by = self.lanes.stored_scaling(block, k // self.lanes.format.group)
        return [*self.lanes.words(block, k), [by.scale], [by.zero] if by.zero else [], [by.offset] if by.offset else []]

    def value(self, words: list[list[Value]], j: int) -> Value:
        *codes, scale, zero, offset = words
        format, value = self.lanes.format, self.lanes.value(codes, j)
        if self.lanes.power != 1.0:
            value = value * self.lanes.power
        if zero:
            value = value - zero[0]
        exact = format.table is None and isinstance(format.zero, int | float) and float(format.zero).is_integer()
        if self.each and not exact:  # a difference of small integers is exact in 16 bits
            value = self._rounded(value)
        value = value * scale[0]
        if offset:
            value = (self._rounded(value) if self.each else value) + offset[0]
        value = self._rounded(value)
        return value if format.factor == 1.0 else value * format.factor

    def _rounded(self, value: Value) -> Value:
        return widen(self.t, narrow(self.t, value, self.dtype), self.dtype)

    def single(self, block: Value, k: Value) -> Value:
        raise InternalError("a group has no rest", found=self.lanes.format.group)

    def scaling(self, block: Value, group: Value) -> Scaling:
        raise InternalError("a rounded weight has no scale")


def _in_registers(target: Target, format: Lanes) -> bool:
    """True where one or two instructions look codes up; on AVX-512 that also beats arithmetic."""
    if target.isa == "avx512":
        return format.bits <= 5
    return target.isa == "avx2" and format.table is not None and format.bits <= 4


def _entries(format: Lanes) -> list[float]:
    """What each code is worth without its scale, for at least four bits of code: those above the format's are ignored."""
    size = 1 << format.bits
    if format.table is not None:
        entries = [*format.table, *[0.0] * (size - len(format.table))]
    else:
        zero = format.zero if isinstance(format.zero, int | float) else 0.0
        entries = [code - zero for code in range(size)]
    return entries * max(1, LANES // size)


class DenseReader:
    """`LanesDense`: floats, sixteen outputs side by side."""

    unit, group, needs_sums, rest = 8, None, False, True

    def __init__(self, t: Text, format: LanesDense, stored: list[Value], k: Value):
        self.t, self.format, self.pointer, self.k = t, format, stored[0], k

    def words(self, block: Value, k: Value) -> list[list[Value]]:
        start = self.pointer.at(block * self.k * LANES, ELEMENTS[self.format.dtype][0])
        words = []
        for j in range(self.unit):
            place, size = (k + j) * LANES, itemsize(self.format.dtype)
            self.t.prefetch(start.at(place + AHEAD // size, ELEMENTS[self.format.dtype][0]))
            words.append(load(self.t, start, place, self.format.dtype, LANES))
        return [words]

    def value(self, words: list[list[Value]], j: int) -> Value:
        return words[0][j]

    def single(self, block: Value, k: Value) -> Value:
        return load(self.t, self.pointer, (block * self.k + k) * LANES, self.format.dtype, LANES)

    def scaling(self, block: Value, group: Value) -> Scaling:
        raise InternalError("an unquantized weight has no scale")


class AnyReader:
    """Any other format: its own decode expression, evaluated for sixteen outputs at a time, input by input."""

    unit, group, needs_sums, rest = 1, None, False, False

    def __init__(self, t: Text, format: Format, stored: list[Value], size: tuple[int, int]):
        rows, columns = size
        facts = coordinates(rows, columns)
        self.t, self.weight = t, simplify(format.weight(rows, columns), facts)
        tensors = {s.name: pointer for s, pointer in zip(format.stored(rows, columns), stored, strict=True)}
        self.render = Renderer(t, [self.weight], tensors, facts)
        self.last = rows - 1

    def words(self, block: Value, k: Value) -> list[list[Value]]:
        return [[self.single(block, k)]]

    def value(self, words: list[list[Value]], j: int) -> Value:
        return words[0][0]

    def single(self, block: Value, k: Value) -> Value:
        t = self.t
        first = t.broadcast(t.cast("trunci", block * LANES, "i32"), LANES)
        n = (first + t.constants(range(LANES), "i32")).least(self.last)  # outputs beyond the last repeat it
        value = self.render(self.weight, {"n": n, "k": t.cast("trunci", k, "i32")})
        return t.broadcast(value, LANES) if value.count == 1 else value

    def scaling(self, block: Value, group: Value) -> Scaling:
        raise InternalError("a decoded weight has no scale")


def readers(t: Text, target: Target, shape: Shape, operands: Operands) -> list[Reader]:
    """The reader of each part."""
    made: list[Reader] = []
    for format, stored, size in zip(shape.parse(), operands.stored, shape.sizes, strict=True):
        if isinstance(format, Lanes):
            lanes = LanesReader(t, target, format, stored, operands.k)
            made.append(lanes if format.rounding == "none" else RoundedReader(lanes))
        elif isinstance(format, LanesDense):
            made.append(DenseReader(t, format, stored, operands.k))
        elif size is not None:
            made.append(AnyReader(t, format, stored, size))
        else:
            raise InternalError("a format that is no lane layout needs its size", found=format.kind)
    return made
