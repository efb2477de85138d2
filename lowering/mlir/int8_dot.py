"""Integer dot products of packed codes: the codes of `Lanes` words as bytes, and 16 outputs times 4 inputs at a time.

A *quad* is 4 consecutive inputs of 16 outputs: an i32 vector of 16 lanes whose bytes are u8 codes. A table's entries
are rounded to 8 bits (`ops.round_table`), so that every weight is (code - zero) * scale with a code of 0..255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.formats.stream import planes
from qcompile.lowering.mlir.linear import LANES
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.ops import round_table
from qcompile.target import Target

WORDS = vector(LANES, "i32")
TABLE_ZERO = 128  # the code of a table entry that is worth 0


@dataclass(frozen=True)
class Codes:
    """What the codes of a weight are: numbers of `bits` bits, or places in a `table` of at most 16 values."""

    bits: int
    table: tuple[float, ...] | None = None

    @property
    def span(self) -> int:
        """The least number of inputs that are whole words of every plane."""
        return 32 // min(planes(self.bits))

    @property
    def greatest(self) -> int:
        """The greatest u8 code that enters a dot product."""
        return 255 if self.table is not None else (1 << self.bits) - 1


def quads(t: Text, target: Target, codes: Codes, words: Sequence[Value], first: int, count: int) -> list[Value]:
    """Quads first .. first + count - 1 behind a place, where `words` points at the i32 vectors of each plane."""
    loaded: dict[tuple[int, int], Value] = {}
    result = []
    for quad in range(first, first + count):
        merged, below = None, 0
        for plane, width in enumerate(planes(codes.bits)):
            number, slot = divmod(quad, 8 // width)
            if (plane, number) not in loaded:
                loaded[plane, number] = t.load(words[plane].at(number * LANES, "i32"), WORDS)
            field = _field(loaded[plane, number], width, slot, below)
            merged = field if merged is None else merged | field
            below += width
        assert merged is not None
        result.append(merged if codes.table is None else _look_up(t, target, round_table(codes.table)[0], merged))
    return result


def _field(word: Value, width: int, slot: int, below: int) -> Value:
    """Field `slot` of every byte of the word, moved up by `below` bits."""
    if width == 8:
        return word
    move = width * slot - below
    moved = word >> move if move > 0 else word << -move
    return moved & (((1 << width) - 1 << below) * 0x01010101)


def _look_up(t: Text, target: Target, table: Sequence[int], words: Value) -> Value:
    """Every byte (0..15) replaced by the u8 `table[byte] + TABLE_ZERO`."""
    entries = [_signed(entry + TABLE_ZERO) for entry in table] + [0] * (16 - len(table))
    if target.isa == "avx512":
        args = [t.constants(entries * 4, "i8"), t.reinterpret(words, vector(64, "i8"))]
        return t.reinterpret(t.intrinsic("llvm.x86.avx512.pshuf.b.512", args, args[0].type), WORDS)
    if target.isa == "avx2":
        places = t.constants(entries * 2, "i8")
        looked = [
            t.intrinsic("llvm.x86.avx2.pshuf.b", [places, t.reinterpret(half, places.type)], places.type)
            for half in _halves(t, words)
        ]
        return t.join(*(t.reinterpret(half, vector(8, "i32")) for half in looked))
    index = t.reinterpret(words, vector(64, "i8"))
    values = [t.constant(entry, index.type) for entry in entries]
    for bit in range(4):
        one = (index & (1 << bit)).equals(1 << bit)
        values = [t.select(one, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return t.reinterpret(values[0], WORDS)


def dot(t: Text, target: Target, greatest: int, total: Value, quad: Value, x: Value) -> Value:
    """total + the 4 products of u8 `quad` (codes up to `greatest`) and s8 `x` of each lane, exact in i32."""
    if target.vnni:
        args = [total, t.reinterpret(quad, vector(64, "i8")), t.reinterpret(x, vector(64, "i8"))]
        return t.intrinsic("llvm.x86.avx512.vpdpbusd.512", args, WORDS)
    if target.isa == "avx2":
        multiply = _pairs if 2 * greatest * 127 < 1 << 15 else _wide_pairs
        sums = [multiply(t, q, s) for q, s in zip(_halves(t, quad), _halves(t, x), strict=True)]
        return total + t.join(*sums)
    for byte in range(4):
        total = total + ((quad >> 8 * byte) & 0xFF) * (x << 24 - 8 * byte).signed_shift(24)
    return total


def _pairs(t: Text, quad: Value, x: Value) -> Value:
    """vpmaddubsw, where the sum of two products cannot saturate, then vpmaddwd with ones."""
    args = [t.reinterpret(item, vector(32, "i8")) for item in (quad, x)]
    pairs = t.intrinsic("llvm.x86.avx2.pmadd.ub.sw", args, vector(16, "i16"))
    return t.intrinsic("llvm.x86.avx2.pmadd.wd", [pairs, t.constant(1, pairs.type)], vector(8, "i32"))


def _wide_pairs(t: Text, quad: Value, x: Value) -> Value:
    """Even and odd bytes as i16, each by vpmaddwd."""
    words, wide = vector(16, "i16"), t.reinterpret(x, vector(16, "i16"))
    even = [t.reinterpret(quad & 0x00FF00FF, words), (wide << 8).signed_shift(8)]
    odd = [t.reinterpret((quad >> 8) & 0x00FF00FF, words), wide.signed_shift(8)]
    return t.intrinsic("llvm.x86.avx2.pmadd.wd", even, vector(8, "i32")) + t.intrinsic(
        "llvm.x86.avx2.pmadd.wd", odd, vector(8, "i32")
    )


def _halves(t: Text, value: Value) -> list[Value]:
    return [t.slice(value, start, LANES // 2) for start in (0, LANES // 2)]


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte
