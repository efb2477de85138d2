"""The Triton text of one weight of a tile in `Fragments`: where it lies, how its words become operands, its sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompile.formats.fragments import INPUTS, ROWS
from qcompile.formats.stream import planes
from qcompile.lowering.triton import text
from qcompile.lowering.triton.decode import ELEMENTS, SLOTS
from qcompile.lowering.triton.fragment_way import SKINNY
from qcompile.lowering.triton.text import named

if TYPE_CHECKING:
    from qcompile.lowering.triton.fragment_text import Text

_FUNCTIONS = '''
@triton.jit
def hidden_zero(word):
    """0, which compilers do not know: no word begins with 64 zeros."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; clz.b32 t, $1; shr.u32 $0, t, 6; }", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def by_columns(c):
    """Elements [BN, 16] in memory's order, by thread, as a product of matrices has them: by eight inputs first."""
    return c.reshape(c.shape[0], 4, 2, 2).permute(0, 2, 1, 3).reshape(c.shape[0], 16)


@triton.jit
def by_bytes(c):
    """Elements [BN, 8] of two bytes as [BN, 16] whose low bytes these are."""
    return tl.join(c, c >> 8).reshape(c.shape[0], 16)


@triton.jit
def columns8(p0, p1, p2, p3, p4, p5, p6, p7):
    """The slots of 16 inputs beside each other, [BN, 128]."""
    even, odd = tl.join(tl.join(p0, p4), tl.join(p2, p6)), tl.join(tl.join(p1, p5), tl.join(p3, p7))
    return tl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(p0.shape[0], 128)


@triton.jit
def columns4(p0, p1, p2, p3):
    """The slots of 16 inputs beside each other, [BN, 64]."""
    return tl.join(tl.join(p0, p2), tl.join(p1, p3)).permute(0, 2, 3, 1).reshape(p0.shape[0], 64)


@triton.jit
def columns2(p0, p1):
    """The slots of 16 inputs beside each other, [BN, 32]."""
    return tl.join(p0, p1).permute(0, 2, 1).reshape(p0.shape[0], 32)
'''

FUNCTIONS = named(_FUNCTIONS)
"""What puts words and operands in order."""


class Stream:
    """One of the weights that a tile of y is made of: its places in memory, its operands, its sum."""

    def __init__(self, kernel: Text, number: int, part: int, first: int):
        self.kernel, self.part, self.first = kernel, part, first
        self.way, self.format = kernel.ways[part], kernel.formats[part]
        self.suffix = "_up" if number else ""
        self.total = f"acc{self.suffix}"
        names = kernel.shape.stored()[part]
        count = len(planes(self.format.bits))
        self.codes = [pointer.name for pointer in names[:count]]
        self.stored = {pointer.name.rpartition("_")[2]: pointer.name for pointer in names[count:]}
        if self.format.tensor:
            self.stored["tensor"] = names[-1].name

    def places(self, rows: int) -> list[str]:
        """The statements that say where the tile's blocks lie."""
        bn, s = self.kernel.block_n, self.suffix
        block = f"tile * {bn // ROWS} + i // {ROWS}" + (f" + {self.first // ROWS}" if self.first else "")
        if rows % bn:
            block = f"tl.minimum({block}, {(self.first + rows - 1) // ROWS})"
        lines = [f"block{s} = {block}"]
        for p, width in enumerate(planes(self.format.bits)):
            element, count = ELEMENTS[width]
            pointer = self.codes[p] if width == 4 else f"{self.codes[p]}.to(tl.pointer_type({element}))"
            row = f"block{s} * {self.kernel.steps * ROWS * count} + i % {ROWS} * {count}"
            place = f"({row})[:, None] + tl.arange(0, {count})[None, :]"
            lines.append(f"c{p}_at{s} = {pointer} + {place}")
        groups = self.kernel.shape.k // self.format.group
        # Compilers would load constants again and again. What comes from a load has the layout of the product; what is made of
        # scalars has not in each version of Triton, which then moves decoded weights through shared memory.
        if self.table:
            lines.append(f"none{s} = hidden_zero(tl.load({self.codes[0]} + tl.zeros([1, 1], tl.int32)))")
        for name, word in zip(self.table, self.way.decode.words(), strict=False):
            lines.append(f"{name} = none{s} ^ {word - (word >> 31 << 32)}")
        return [
            *lines,
            f"row{s} = block{s} * {groups * ROWS} + i % 8 * 2 + i % {ROWS} // 8",
            *[f"pair{s} = block{s} * {groups * ROWS // 2} + i % 8", f"side{s} = i % {ROWS} // 8 * 8"]
            * bool(self._bytes),
        ]

    @property
    def _parts(self) -> list[str]:
        """The stored tensors of groups that the loop reads."""
        names = [] if self.way.whole else ["scales"]
        shifts = (
            [] if self.way.whole else [*["zeros"] * ("zeros" in self.stored), *["offsets"] * ("offsets" in self.stored)]
        )
        return names + (["zeros"] if self.way.whole and self.way.stored_zeros else shifts)

    @property
    def groups(self) -> list[str]:
        """The names of what is loaded for a step: for each 128 inputs of it, and each group in these."""
        return [
            f"{part}{self.suffix}_{u}_{piece}"
            for part in self._parts
            for u in range(self.kernel.together)
            for piece in range(self.way.pieces)
        ]

    def fetched(self, step: str, ending: str) -> list[str]:
        """The statements that load the parts of the groups of a step."""
        return [
            f"{part}{self.suffix}_{u}_{piece}{ending} = "
            f"{self._loaded(part, self._group(f'({step} + {u})' if u else step, piece))}"
            for part in self._parts
            for u in range(self.kernel.together)
            for piece in range(self.way.pieces)
        ]

    def _loaded(self, part: str, group: str) -> str:
        """A part of a group, for each output."""
        pointer, s = self.stored[part], self.suffix
        if part not in self._bytes:
            return f"tl.load({pointer} + row{s} + {group} * {ROWS})"
        pointer = f"{pointer}.to(tl.pointer_type(tl.uint16))"
        return f"(tl.load({pointer} + pair{s} + {group} * {ROWS // 2}) >> side{s}) & 0xFF"

    @property
    def _bytes(self) -> list[str]:
        """The parts of groups whose bytes are read two at a time, those of outputs r and r + 8.

        Where bytes become part of decoded weights, and a warp has tensor cores of its own, Triton would order the inputs of
        a product as for weights of 8 bits, and move every operand to that order.
        """
        if self.kernel.few or not self.kernel.alone:
            return []
        return [part for part in self._parts if self._dtype(part) in ("u8", "f8e8m0", "f8e4m3", "f8e5m2")]

    def _dtype(self, part: str) -> str:
        """The stored dtype of a part of groups."""
        return {"scales": self.format.scale, "zeros": str(self.format.zero), "offsets": str(self.format.offset)}[part]

    def _group(self, step: str, piece: int) -> str:
        """The group of a piece of 128 inputs; behind the last one, where x is 0, the last."""
        if self.way.whole:
            return "0"
        group = self.format.group
        if group >= INPUTS:
            return f"({step} // {group // INPUTS})" if group > INPUTS else step
        made = f"({step} * {INPUTS // group} + {piece})" if piece else f"({step} * {INPUTS // group})"
        last = self.kernel.shape.k // group - 1
        return f"tl.minimum({made}, {last})" if self.kernel.ragged_k else made

    def _number(self, part: str, u: int, piece: int) -> str:
        """A part of a group as f32 [BN]."""
        return _as_f32(f"{part}{self.suffix}_{u}_{piece}", self._dtype(part))

    @property
    def table(self) -> list[str]:
        """The names of the words of the table; the interpreter needs none."""
        count = 0 if text.interpreted(self.kernel.target) else len(self.way.decode.words())
        return [f"table{self.part}_{i}" for i in range(count)]

    def weights(self, u: int, pieces: int) -> list[str]:
        """The statements that decode 128 inputs to `w`, one tensor for each of `pieces`."""
        s, way, kernel = self.suffix, self.way, self.kernel
        policy = ', eviction_policy="evict_first"' if kernel.most <= SKINNY else ""
        given = []
        lines = []
        for p, width in enumerate(planes(self.format.bits)):
            read = f"tl.load(c{p}_at{s} + (step + {u}) * {ROWS * ELEMENTS[width][1]}{policy})"
            lines.append(f"c{p} = by_columns({f'by_bytes({read})' if width == 1 else read})")
            given.append(f"c{p}")
        tile = f"[{kernel.block_n}, 16]"
        given += [f"tl.broadcast_to({name}, {tile})" for name in self.table]
        if way.stored_zeros:
            for piece in range(way.pieces):
                zero = way.decode.given_zero(f"zeros{s}_{u}_{piece}.to(tl.int32)", kernel.target)
                given.append(f"tl.broadcast_to(({zero})[:, None], {tile})")
        if way.packed:
            for piece in range(way.pieces):
                rounded = {"compute": way.compute}
                scale, parts = self._number("scales", u, piece), [f"scale{piece}"]
                lines.append(f"scale{piece} = {text.dot_operand(scale, rounded, kernel.target)}")
                if way.decoder.rest:
                    parts.append(f"rest{piece}")
                    rest = f"{scale} - scale{piece}.to(tl.float32)"
                    lines.append(f"rest{piece} = {text.dot_operand(rest, rounded, kernel.target)}")
                given += [f"tl.broadcast_to({part}[:, None], {tile})" for part in parts]
        slots = [f"p{slot}{s}" for slot in range(SLOTS)]
        lines.append(f"{', '.join(slots)} = decode{self.part}({', '.join(given)})")
        if not (way.whole or way.on_sums or way.packed):
            for slot, name in enumerate(slots):
                lines.append(f"{name} = {self._rounded(name, u, slot * way.pieces // SLOTS)}")
        each = SLOTS // pieces
        for piece in range(pieces):
            some = slots[piece * each : (piece + 1) * each]
            lines.append(f"w{piece}{s} = " + (f"columns{each}({', '.join(some)})" if each > 1 else some[0]))
        return lines

    def _rounded(self, name: str, u: int, piece: int) -> str:
        """A slot's numbers made weights in f32, rounded once."""
        value = f"{name}.to(tl.float32)"
        zero = self._zero(u, piece)
        if zero:
            value = f"({value} - {zero})"
        value = f"{value} * ({self._number('scales', u, piece)})[:, None]"
        if self.format.offset is not None:
            value += f" + ({self._number('offsets', u, piece)})[:, None]"
        return text.dot_operand(value, {"compute": self.way.compute}, self.kernel.target)

    def _zero(self, u: int, piece: int) -> str:
        """The zero that decoding has left, f32; empty where there is none."""
        if not self.way.left:
            return ""
        stored = isinstance(self.format.zero, str)
        return f"({self._number('zeros', u, piece)})[:, None]" if stored else repr(self.way.given_zero)

    def products(self, u: int, piece: int, pieces: int) -> list[str]:
        """The statements that add a piece's products to the sum."""
        s, total, way = self.suffix, self.total, self.way
        if not way.on_sums:
            return [f"{total} = tl.dot(w{piece}{s}, x_tile, {total})"]
        own = piece * way.pieces // pieces
        scale = f"tl.broadcast_to(({self._number('scales', u, own)})[:, None], {total}.shape)"
        lines = [f"{total} = tl.fma(tl.dot(w{piece}{s}, x_tile), {scale}, {total})"]
        if way.shifted:
            zero = self._zero(u, own)
            shift = f"-({self._number('scales', u, own)})[:, None] * {zero}" if zero else ""
            if self.format.offset is not None:
                shift = f"({self._number('offsets', u, own)})[:, None] {shift}"
            lines += [self._all_x(piece, pieces), f"{total} += tl.dot(ones, x_tile) * ({shift})"]
        return lines

    def _all_x(self, piece: int, pieces: int) -> str:
        dtype = "tl.float32" if text.interpreted(self.kernel.target) else text.DTYPES[self.way.compute]
        return f"ones = tl.full([{self.kernel.block_n}, {INPUTS // pieces}], 1.0, {dtype})"

    def after(self, late: bool) -> list[str]:
        """The statements behind the loop, for what multiplies all of the sum."""
        lines, total, s, format = [], self.total, self.suffix, self.format
        if self.way.whole:
            scale = _as_f32(f"tl.load({self.stored['scales']} + row{s})", format.scale)
            lines.append(f"{total} = {total} * ({scale})[:, None]")
        if format.tensor:
            lines.append(f"{total} = {total} * tl.load({self.stored['tensor']} + block{s})[:, None]")
        if format.factor != 1.0:
            lines.append(f"{total} = {total} * {format.factor!r}")
        return [*lines, *[f"{total} = {total} * rate"] * late]


def _as_f32(value: str, dtype: str) -> str:
    """The text of a stored number as f32; floats of 8 bits are read as bytes."""
    match dtype:
        case "f8e8m0":  # no exponent of zero: 2^-127 is below what a scale can sensibly be, but exact all the same
            return f"tl.where({value} == 0, 0x00400000, {value}.to(tl.int32) << 23).to(tl.float32, bitcast=True)"
        case "f8e4m3" | "f8e5m2":
            return f"{dtype}_to_f32({value})"
        case "f32":
            return value
        case _:
            return f"{value}.to(tl.float32)"
