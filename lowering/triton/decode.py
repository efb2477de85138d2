"""How a tile of a `Fragments` weight becomes operands of tensor cores, for a GPU as PTX and for the interpreter as plain Triton.

A tile has 16 outputs or a multiple of them, and 128 inputs: eight slots of 16 inputs. A plane's words come as elements
[BN, 16] of 8 w bits (of 16, if w = 1, the upper ones anything), and become eight tensors [BN, 16] in the compute dtype, one a
slot. What their numbers are made of:

    integers    a code among the lower bits of 2^W is the number 2^W + code * 2^at, exact (W = 7 for bf16, 10 for f16); one
                fused multiply-add makes it code - zero, exact too
    tables      one byte permutation looks up the low bytes of four entries, another the high ones; the entries were
                rounded to the compute dtype. The table comes in registers, as words that the compiler cannot know: it
                would load constants anew for every use
    f8          sign, exponent and mantissa at the compute dtype's places, times a power of two, exact

What f8 calls infinity or NaN gives a finite number. Where scales are given, the number is multiplied by its scale, which
rounds once; where bf16 does not hold a scale, by the sum of two, whose second product is rounded too, 2^-8 of it at most.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qcompile.formats.fragments import Fragments
from qcompile.formats.stream import planes
from qcompile.lowering.triton.linear import Compute
from qcompile.lowering.triton.text import DTYPES, interpreted
from qcompile.target import Target

SLOTS = 8
ELEMENTS = {8: ("tl.int64", 16), 4: ("tl.int32", 16), 2: ("tl.int16", 16), 1: ("tl.int16", 8)}
"""The type in which a plane's tile is read, and how many of it are beside each other, by the plane's width."""
PACK = 2  # elements that one run of the PTX decodes

_HALVES = 0x00010001
_AND_OR, _AND_XOR = 0xEA, 0x6A  # (a & b) | c and (a & b) ^ c, as truth tables
_MANTISSA: dict[Compute, int] = {"bf16": 7, "f16": 10}
_BIAS: dict[Compute, int] = {"bf16": 127, "f16": 15}
_F8 = {"f8e4m3": (3, 7), "f8e5m2": (2, 15)}  # bits of the mantissa, bias


@dataclass(frozen=True)
class Decode:
    """The decoding of one layout into operands of one dtype.

    `zeros` and `scales` say how many tensors of zeros and of scales are given for the 128 inputs of a tile: one for each
    group in it, or none. `rest`: behind each scale in the compute dtype comes what that lacks of the stored one, likewise.
    """

    format: Fragments
    compute: Compute
    zeros: int = 0
    scales: int = 0
    rest: bool = False

    @property
    def level(self) -> int:
        """The zero that is subtracted where none is given: the layout's, if it is a whole number."""
        zero = self.format.zero
        return int(zero) if isinstance(zero, int | float) and float(zero).is_integer() else 0

    @property
    def by_sign(self) -> bool:
        """Whether codes become code - 128 first: bf16 has but seven bits below its leading one."""
        return self.format.code == "int" and self.compute == "bf16" and self.format.bits == 8

    def given_zero(self, zero: str, target: Target) -> str:
        """The text of what `text` wants for the zeros `zero`, i32 in 0..255: -(2^W + zero), or 128 - zero if `by_sign`."""
        if interpreted(target):
            return f"{zero}.to(tl.float32)"
        if self.by_sign:
            return f"(128 - {zero}).to(tl.float32).to({DTYPES[self.compute]})"
        magic = word_of(-float(1 << _MANTISSA[self.compute]), self.compute) & 0xFFFF
        return f"({zero} | {magic:#x}).to(tl.int16).to({DTYPES[self.compute]}, bitcast=True)"

    def words(self) -> list[int]:
        """The table in words of four bytes: the low bytes of 16 entries, then the high bytes; nothing without a table."""
        if self.format.table is None:
            return []
        entries = self.entries().view(torch.int16).tolist()
        packed = (bytes(entry >> shift & 0xFF for entry in entries) for shift in (0, 8))
        return [int.from_bytes(half[i : i + 4], "little") for half in packed for i in range(0, 16, 4)]

    def text(self, name: str, target: Target) -> str:
        """A Triton function of the tiles of each plane, the words of a table (i32, on a GPU only), the zeros and the scales,
        that gives the tensors of eight slots.
        """
        codes = [f"c{p}" for p in range(len(planes(self.format.bits)))]
        if not interpreted(target):
            codes += [f"table{i}" for i in range(len(self.words()))]
        given = [f"zero{i}" for i in range(self.zeros)]
        for i in range(self.scales):
            given += [f"scale{i}", *[f"rest{i}"] * self.rest]
        body = _plain(self, target) if interpreted(target) else _inline(self, [*codes, *given])
        lines = "\n".join(f"    {line}" for line in body)
        return f"@triton.jit\ndef {name}({', '.join([*codes, *given])}):\n{lines}\n"

    def entries(self) -> torch.Tensor:
        """The table in the compute dtype."""
        dtype = torch.bfloat16 if self.compute == "bf16" else torch.float16
        return torch.tensor(self.format.table, dtype=torch.float32).to(dtype)


def word_of(value: float, compute: Compute) -> int:
    """A 32-bit word with a number of the compute dtype in both its halves.

    >>> hex(word_of(128.0, "bf16")), hex(word_of(1024.0, "f16"))
    ('0x43004300', '0x64006400')
    """
    half: int = struct.unpack("<H", struct.pack("<e", value))[0] if compute == "f16" else _bf16(value)
    return half * _HALVES


def _bf16(value: float) -> int:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    assert bits & 0xFFFF == 0, value
    return int(bits >> 16)


@dataclass
class Asm:
    """PTX over registers $0, $1 ..., outputs first; "r" inputs have 32 bits, "l" inputs 64."""

    outputs: int
    inputs: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    temps: int = 0
    constants: dict[int, str] = field(default_factory=dict)

    @property
    def constraints(self) -> str:
        return ",".join([*["=&r"] * self.outputs, *self.inputs])

    @property
    def lines(self) -> list[str]:
        return ["{", f".reg .b32 t<{max(self.temps, 1)}>;", *self.body, "}"]

    @property
    def results(self) -> list[str]:
        return [f"${i}" for i in range(self.outputs)]

    def input(self, kind: str = "r") -> str:
        self.inputs.append(kind)
        return f"${self.outputs + len(self.inputs) - 1}"

    def temp(self) -> str:
        self.temps += 1
        return f"t{self.temps - 1}"

    def do(self, operation: str, *operands: str | int, to: str = "") -> str:
        """One instruction; its result is in `to`, or in a new register. Its name is returned."""
        to = to or self.temp()
        texts = [operand if isinstance(operand, str) else f"{operand:#x}" for operand in operands]
        self.body.append(f"{operation} {', '.join([to, *texts])};")
        return to

    def constant(self, word: int) -> str:
        if word not in self.constants:
            self.constants[word] = self.do("mov.b32", word)
        return self.constants[word]

    def halves(self, wide: str) -> list[str]:
        """The low and the high word of a 64-bit register."""
        names = [self.temp(), self.temp()]
        self.body.append(f"mov.b64 {{{', '.join(names)}}}, {wide};")
        return names

    def shifted(self, word: str, right: int) -> str:
        """The word, `right` bits further down (up, if that is negative)."""
        if right == 0:
            return word
        return self.do("shr.b32", word, right) if right > 0 else self.do("shl.b32", word, -right)


def ptx(decode: Decode) -> Asm:
    """The PTX that decodes a pair of elements of each plane's tile.

    Outputs: a register for each slot. Inputs: the elements of each plane (one register for both where they have 16 bits), then
    each word of the table for each element, then a register for each zero and scale.
    """
    asm = Asm(SLOTS)
    words = []  # of each plane
    for width in planes(decode.format.bits):
        if width == 8:
            words.append([word for wide in (asm.input("l"), asm.input("l")) for word in asm.halves(wide)])
        else:
            words.append([asm.input() for _ in range(max(width // 2, 1))])
    table = [[asm.input() for _ in range(PACK)] for _ in decode.words()]  # all of a word's are alike
    zeros = [asm.input() for _ in range(decode.zeros)]
    scales = [[asm.input() for _ in range(1 + decode.rest)] for _ in range(decode.scales)]
    _Pair(decode, asm, words, [same[0] for same in table], zeros, scales, asm.results).run()
    return asm


@dataclass
class _Pair:
    """The instructions for two elements: the words of each plane to a register for each slot, elements e = 0 and 1 its halves."""

    decode: Decode
    asm: Asm
    words: list[list[str]]
    table: Sequence[str]
    zeros: Sequence[str]
    scales: Sequence[Sequence[str]]
    outputs: Sequence[str]
    levels: dict[tuple[int, int], str] = field(default_factory=dict)
    base: dict[str, tuple[int, str]] = field(default_factory=dict)

    def run(self) -> None:
        if self.decode.format.table is not None:
            self._tables()
            return
        for slot in range(SLOTS):
            self._float(slot) if self.decode.format.code != "int" else self._integer(slot)

    def _place(self, plane: int, slot: int) -> tuple[str, int]:
        """The word that holds a plane's part of a slot's codes, and the part's place in a half."""
        width = planes(self.decode.format.bits)[plane]
        each = min(16 // width, SLOTS)
        return self.words[plane][slot // each], slot % each * width

    def _fma(self, a: str, b: str | float, c: str | float, to: str = "") -> str:
        compute, asm = self.decode.compute, self.asm
        b, c = (each if isinstance(each, str) else asm.constant(word_of(each, compute)) for each in (b, c))
        return asm.do(f"fma.rn.{compute}x2", a, b, c, to=to)

    def _finish(self, slot: int, a: str, b: str | float, c: str | float) -> None:
        """a * b + c, times the scale if there is one, is the slot's result."""
        if not self.scales:
            self._fma(a, b, c, self.outputs[slot])
            return
        self._scaled(slot, self._fma(a, b, c))

    def _scaled(self, slot: int, value: str) -> None:
        """The value times its scale is the slot's result: its only rounding that counts."""
        scale, *rest = self.scales[slot * len(self.scales) // SLOTS]
        small = self._fma(value, rest[0], -0.0) if rest else -0.0
        self._fma(value, scale, small, self.outputs[slot])

    def _integer(self, slot: int) -> None:
        decode, asm = self.decode, self.asm
        if decode.by_sign:
            word, place = self._place(0, slot)
            word = asm.shifted(word, place)
            low = asm.do("lop3.b32", word, 0x7F * _HALVES, word_of(128.0, "bf16"), _AND_OR)
            high = asm.do("lop3.b32", word, 0x80 * _HALVES, word_of(256.0, "bf16"), _AND_XOR)  # 128 if the bit is set
            if not self.zeros and decode.level == 128:
                self._finish(slot, high, -1.0, low)
            else:
                self._finish(slot, self._fma(high, -1.0, low), 1.0, self._level(slot, 0))
            return
        bits, magic = decode.format.bits, word_of(float(1 << _MANTISSA[decode.compute]), decode.compute)
        if len(self.words) == 1:
            word, at = self._near(slot)
            code = asm.do("lop3.b32", word, (((1 << bits) - 1) << at) * _HALVES, magic, _AND_OR)
        else:
            code, at, low_bits = "", 0, 0
            for plane, width in enumerate(planes(bits)):
                word, place = self._place(plane, slot)
                word, mask = asm.shifted(word, place - low_bits), (((1 << width) - 1) << low_bits) * _HALVES
                code, low_bits = asm.do("lop3.b32", word, mask, code or magic, _AND_OR), low_bits + width
        self._finish(slot, code, 2.0**-at, self._level(slot, at))

    def _near(self, slot: int) -> tuple[str, int]:
        """A word with the slot's codes inside the mantissa, and their place in it; as few shifts as can be."""
        word, place = self._place(0, slot)
        base, shifted = self.base.get(word, (0, word))
        if place - base + self.decode.format.bits > _MANTISSA[self.decode.compute]:
            base, shifted = place, self.asm.shifted(word, place)
            self.base[word] = (base, shifted)
        return shifted, place - base

    def _level(self, slot: int, at: int) -> str | float:
        """What makes 2^(W - at) + code into code - zero when it is added."""
        decode = self.decode
        if not self.zeros:
            return (
                float(128 - decode.level)
                if decode.by_sign
                else -float((1 << _MANTISSA[decode.compute] - at) + decode.level)
            )
        which, whole = slot * len(self.zeros) // SLOTS, 1 << _MANTISSA[decode.compute]
        if at == 0:
            return self.zeros[which]
        if (which, at) not in self.levels:
            self.levels[which, at] = self._fma(self.zeros[which], 1.0, float(whole - (whole >> at)))
        return self.levels[which, at]

    def _float(self, slot: int) -> None:
        compute, asm = self.decode.compute, self.asm
        mantissa, bias = _F8[self.decode.format.code]
        word, place = self._place(0, slot)
        up = _MANTISSA[compute] - mantissa
        body = asm.shifted(word, place - up)
        signs = asm.do("and.b32", asm.shifted(word, place - 8), 0x8000 * _HALVES)
        value = asm.do("lop3.b32", body, (0x7F << up) * _HALVES, signs, _AND_OR)
        self._finish(slot, value, 2.0 ** (_BIAS[compute] - bias), -0.0)

    def _tables(self) -> None:
        asm = self.asm
        for at, word in enumerate(self.words[0]):
            eighths = asm.do("and.b32", word, 0x77777777)  # which of eight
            uppers = asm.do("lop3.b32", asm.shifted(word, 1), 0x44444444, 0x32103210, _AND_OR)  # from the second eight
            for half in (0, 1):
                eight, upper = asm.shifted(eighths, 16 * half), asm.shifted(uppers, 16 * half)
                low, high = (self._bytes(table, eight, upper) for table in (self.table[:4], self.table[4:]))
                for j, selector in enumerate((0x5140, 0x7362)):
                    slot = 4 * at + 2 * half + j
                    if not self.scales:
                        asm.do("prmt.b32", low, high, selector, to=self.outputs[slot])
                        continue
                    self._scaled(slot, asm.do("prmt.b32", low, high, selector))

    def _bytes(self, table: Sequence[str], eight: str, upper: str) -> str:
        """The entries of a table of 16 bytes at four indices."""
        first, second = (self.asm.do("prmt.b32", table[i], table[i + 1], eight) for i in (0, 2))
        return self.asm.do("prmt.b32", first, second, upper)


def _inline(decode: Decode, given: Sequence[str]) -> list[str]:
    """The function's body for a GPU."""
    made = ptx(decode)
    outputs = ", ".join(f"p{slot}" for slot in range(SLOTS))
    return [
        f"{outputs} = tl.inline_asm_elementwise(",
        '    """',
        *(f"    {line}" for line in made.lines),
        '    """,',
        f'    "{made.constraints}",',
        f"    [{', '.join(given)}], dtype=({DTYPES[decode.compute]},) * {SLOTS}, is_pure=True, pack={PACK},",
        ")",
        f"return {outputs}",
    ]


def _plain(decode: Decode, target: Target) -> list[str]:
    """The function's body for the interpreter, whose operands are f32 that hold numbers of the compute dtype."""
    format, lines = decode.format, list[str]()
    widths = planes(format.bits)
    lines += [f"words{p} = c{p}.to(tl.int64)" for p in range(len(widths))]
    for p, width in enumerate(widths):
        if width >= 4:  # pairs of elements hold both elements' codes
            lines.append(f"first{p}, second{p} = tl.split(words{p}.reshape(words{p}.shape[0], 8, 2))")
    for slot in range(SLOTS):
        low, code = 0, ""
        for p, width in enumerate(widths):
            code = f"({code} | ({_part(format, p, width, slot)} << {low}))" if code else _part(format, p, width, slot)
            low += width
        lines += [f"code = ({code}).to(tl.int32)", f"value = {_value(decode)}"]
        if decode.zeros:
            lines.append(f"value = value - zero{slot * decode.zeros // SLOTS}")
        if decode.scales:
            which = slot * decode.scales // SLOTS
            lines.append("value = value * " + (f"(scale{which} + rest{which})" if decode.rest else f"scale{which}"))
        rounded = "round_bf16(value)" if decode.compute == "bf16" else "value.to(tl.float16).to(tl.float32)"
        lines.append(f"p{slot} = {rounded}")
    return [*lines, f"return {', '.join(f'p{slot}' for slot in range(SLOTS))}"]


def _part(format: Fragments, p: int, width: int, slot: int) -> str:
    """A plane's bits of the codes [BN, 16] of a slot."""
    mask = (1 << width) - 1
    if width < 4:
        return f"((words{p} >> {slot * width}) & {mask})"
    per = 4  # slots in an element
    word, j = ("first" if slot < per else "second") + str(p), slot % per
    if width == 8:
        even, odd = (f"({word} >> {32 * (j // 2) + 16 * e + 8 * (j % 2)})" for e in (0, 1))
    elif format.table is not None:
        even, odd = (f"({word} >> {8 * j + 4 * e})" for e in (0, 1))
    else:
        even, odd = (f"({word} >> {16 * e + 4 * j})" for e in (0, 1))
    return f"(tl.join({even}, {odd}).reshape({word}.shape[0], 16) & {mask})"


def _value(decode: Decode) -> str:
    """What `code` is worth, f32."""
    format = decode.format
    if format.table is not None:
        text = "0.0"
        for i, entry in enumerate(decode.entries().float().tolist()):
            text = f"tl.where(code == {i}, {entry!r}, {text})"
        return text
    if format.code == "int":
        return (
            f"code.to(tl.float32) - {float(decode.level)!r}"
            if decode.level and not decode.zeros
            else "code.to(tl.float32)"
        )
    mantissa, bias = _F8[format.code]
    half = f"(((code & 0x80) << 8) | ((code & 0x7F) << {10 - mantissa})).to(tl.int16).to(tl.float16, bitcast=True)"
    return f"{half}.to(tl.float32) * {2.0 ** (15 - bias)!r}"
