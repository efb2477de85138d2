"""The Triton text of linear kernels over `Fragments` weights: W on the left of tensor cores, decoded in registers.

    y[m, n] = epilogue(sum over k of W[n, k] x[m, k] + bias[n])

A program computes a tile of outputs. A step takes 128 inputs, or several times that; each word of W is loaded once, and
becomes operands of tensor cores in the thread that loaded it. Where the scale of a group comes in depends on the rows of x:

    few     the sum over a group is multiplied by its scale, in f32: every weight as exact as its code
    many    weights are multiplied by their scales, and rounded to the compute dtype once

A scale of all inputs always multiplies the sum. A format's own rounding of each weight to 16 bits is left out. Zeros that are
no whole numbers, and offsets, are added to a group's sum times the sum of its x, or to each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcompile.formats.fragments import INPUTS, ROWS, Fragments
from qcompile.formats.stream import planes
from qcompile.lowering.triton import prologue, schedule, split, text
from qcompile.lowering.triton.decode import ELEMENTS, SLOTS, Decode
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.epilogue import finish
from qcompile.lowering.triton.linear import Compute, Section, Shape, types
from qcompile.lowering.triton.source import Source
from qcompile.target import Target

FEW = 4  # rows of x that are normalised by every program for itself
SKINNY, MID = 32, 128  # the most rows of these kinds

_COLUMNS = {
    8: """
@triton.jit
def columns8(p0, p1, p2, p3, p4, p5, p6, p7):
    \"\"\"The slots of 16 inputs beside each other, [BN, 128].\"\"\"
    even, odd = tl.join(tl.join(p0, p4), tl.join(p2, p6)), tl.join(tl.join(p1, p5), tl.join(p3, p7))
    return tl.join(even, odd).permute(0, 2, 3, 4, 1).reshape(p0.shape[0], 128)
""",
    4: """
@triton.jit
def columns4(p0, p1, p2, p3):
    \"\"\"The slots of 16 inputs beside each other, [BN, 64].\"\"\"
    return tl.join(tl.join(p0, p2), tl.join(p1, p3)).permute(0, 2, 3, 1).reshape(p0.shape[0], 64)
""",
    2: """
@triton.jit
def columns2(p0, p1):
    \"\"\"The slots of 16 inputs beside each other, [BN, 32].\"\"\"
    return tl.join(p0, p1).permute(0, 2, 1).reshape(p0.shape[0], 32)
""",
}

_THREADS = """
@triton.jit
def by_columns(c):
    \"\"\"Elements [BN, 16] in memory's order, by thread, as a product of matrices has them: by eight inputs first.\"\"\"
    return c.reshape(c.shape[0], 4, 2, 2).permute(0, 2, 1, 3).reshape(c.shape[0], 16)
"""


_BYTES = """
@triton.jit
def by_bytes(c):
    \"\"\"Elements [BN, 8] of two bytes as [BN, 16] whose low bytes these are.\"\"\"
    return tl.join(c, c >> 8).reshape(c.shape[0], 16)
"""


def kind_of(most: int) -> str:
    """The kind of kernel, as schedules know it, for at most `most` rows of x."""
    return "skinny" if most <= SKINNY else "mid" if most <= MID else "large"


def value_of(format: Fragments) -> str:
    """What codes are worth, as schedules know it."""
    if format.table is not None:
        return "table"
    return "int" if format.code == "int" else "fp"


@dataclass(frozen=True)
class Way:
    """How the scales, zeros and offsets of a weight with K = `k` come into sums over at most `most` rows of x."""

    format: Fragments
    k: int
    compute: Compute
    most: int

    @property
    def whole(self) -> bool:
        """Whether one scale holds for all inputs."""
        return self.format.group == self.k

    @property
    def on_sums(self) -> bool:
        """Whether scales multiply the sums of groups: for many rows where they would cost more instructions elsewhere."""
        cheap = self.most <= MID and self.format.group >= INPUTS and not (self._exact or self.shifted)
        return not self.whole and (self.most <= SKINNY or cheap)

    @property
    def packed(self) -> bool:
        """Whether scales multiply pairs of weights in the compute dtype."""
        # bf16 has the range of f32: two of them are a scale but for a 2^-17th.
        return not (self.whole or self.on_sums or self.shifted) and (self._exact or self.compute == "bf16")

    @property
    def _exact(self) -> bool:
        """Whether the compute dtype holds the scales."""
        return self.format.scale in {"bf16": ("bf16", "f8e4m3", "f8e8m0"), "f16": ("f16", "f8e4m3")}[self.compute]

    @property
    def pieces(self) -> int:
        """Groups in a step of 128 inputs; 1 where they are longer."""
        return 1 if self.whole else max(1, INPUTS // self.format.group)

    @property
    def stored_zeros(self) -> bool:
        """Whether whole zeros are stored, which the decoding subtracts.

        Beside planes of one bit they come in like other zeros where that is cheap: Triton would move decoded weights
        through shared memory.
        """
        moved = self.most <= SKINNY and 1 in planes(self.format.bits) and not self.whole
        return self.format.zero == "u8" and self.format.table is None and not moved

    @property
    def given_zero(self) -> float:
        """The zero that is the same everywhere."""
        return 0.0 if self.format.zero is None or isinstance(self.format.zero, str) else float(self.format.zero)

    @property
    def left(self) -> bool:
        """Whether there is a zero that the decoding does not subtract."""
        if isinstance(self.format.zero, str):
            return not self.stored_zeros
        return self.given_zero != (self.decode.level if self.format.table is None else 0)

    @property
    def shifted(self) -> bool:
        """Whether something beside code - zero is added: a zero that is no whole number, or an offset."""
        return self.left or self.format.offset is not None

    @property
    def decode(self) -> Decode:
        """How codes become operands, without their scales."""
        return Decode(self.format, self.compute, self.pieces if self.stored_zeros else 0)

    @property
    def decoder(self) -> Decode:
        """How codes become operands."""
        return replace(self.decode, scales=self.pieces, rest=not self._exact) if self.packed else self.decode


class Text:
    """Writes one kernel."""

    def __init__(self, shape: Shape, most: int, split_k: int, target: Target):
        self.shape, self.most, self.split_k, self.target = shape, most, split_k, target
        self.sections, self.formats = shape.sections(), [f for f in shape.parse() if isinstance(f, Fragments)]
        self.ways = [Way(format, shape.k, shape.compute, most) for format in self.formats]
        self.steps = -(-shape.k // INPUTS)
        widest = max(self.formats, key=lambda format: format.bits)
        group = 0 if widest.group == shape.k else widest.group
        self.plan = schedule.choose(
            kind_of(most), max(section.rows for section in self.sections), shape.k, most, widest.bits, target.capability,
            value=value_of(widest), group=group, split_k=split_k, streams=2 if shape.glu else 1,
        )  # fmt: skip
        self.block_n = self.plan.block_n
        self.block_m = self.plan.block_m
        together = self.plan.block_k // INPUTS
        self.together = together if together and self.steps // split_k % together == 0 else 1
        self.few = most <= SKINNY
        # Where warps have tensor cores of their own, Triton lets them share outputs, and decode the same weights; but where one
        # product adds to another's sum it gives each warp outputs of its own.
        self.alone = target.capability // 10 not in (9, 10)
        self.halves = 2 if self.alone and not self.few else 1
        self.ragged_k = shape.k % INPUTS != 0
        self.pointers = [*shape.pointers(), *(split.POINTERS if split_k > 1 else [])]
        self.names = [pointer.name for pointer in self.pointers]
        # A sum can be multiplied by a row's rate after all products, unless they might overflow without it.
        norm = shape.prologue
        self.late = norm is not None and norm["op"] == "rms_norm" and shape.compute == "bf16"

    def source(self) -> Source:
        tiles = [-(-section.rows // self.block_n) for section in self.sections]
        bodies = [self._section(section) for section in self.sections]
        lines, parts = text.dispatch(bodies, tiles, [*self.names, "d0"])
        entry = f"linear_{kind_of(self.most)}"
        helpers = self._helpers("\n".join(line for body in bodies for line in body)) + parts
        made = text.module(entry, self._about(), self.names, 1, "\n".join(lines), self.target, helpers)
        rows = 1 if self.most <= self.block_m else f"(d0 + {self.block_m - 1})//{self.block_m}"
        plan = self.plan
        return Source(made, entry, types(self.pointers), 1, (sum(tiles), rows, self.split_k), plan.warps, plan.stages)

    def _helpers(self, body: str) -> str:
        decoders = [way.decoder.text(f"decode{part}", self.target) for part, way in enumerate(self.ways)]
        moves = [_THREADS, *[_BYTES] * ("by_bytes(" in body)]
        joins = [made for count, made in _COLUMNS.items() if f"columns{count}(" in body]
        return "\n\n".join(each.strip() + "\n" for each in (*decoders, *moves, *joins, functions(body)) if each)

    def _about(self) -> str:
        shape = self.shape
        parts = ", ".join(f"[{n}, {shape.k}] in {f}" for f, n in zip(self.formats, shape.rows, strict=True))
        y = (f"{shape.prologue['op']}(x)" if shape.prologue else "x") + " @ W.T" + (" + bias" if shape.bias else "")
        steps = [step["act"] + " gate" if step["op"] == "glu" else step["op"] for step in shape.epilogue]
        scales = "the sums of groups" if any(way.on_sums for way in self.ways) else "weights"
        if all(way.whole for way in self.ways):
            scales = "sums"
        return (
            f"y = {', '.join([y, *steps])}; W {parts}\n\n"
            f"Tiles of {self.block_n} outputs x {self.block_m} rows, {self.together * INPUTS} inputs a step, K in "
            f"{self.split_k} parts; {shape.compute} products, scales on {scales}, f32 sums."
        )

    # -- one section --

    def _section(self, section: Section) -> list[str]:
        """The statements for tile number `tile` of a section."""
        bn, bm, k = self.block_n, self.block_m, self.shape.k
        streams = [_Stream(self, i, part, first) for i, (part, first) in enumerate(section.streams)]
        lines = [
            f"i = tl.arange(0, {bn})",
            f"n = tile * {bn} + i[:, None]",
            *self._rows(),
        ]
        norm = self.shape.prologue
        if norm is not None:
            lines += prologue.statistics(norm, k, self.most)
            lines += [self._by_row(name) for name in ("rate", "mean")[: 1 + (norm["op"] == "layer_norm")]]
        for stream in streams:
            lines += stream.places(section.rows)
        part = self.steps // self.split_k
        first, last = ("0", str(self.steps)) if self.split_k == 1 else ("first", f"first + {part}")
        lines += [f"first = tl.program_id(2) * {part}"] * (self.split_k > 1)
        lines += [f"{stream.total} = tl.zeros([{bn}, {bm}], tl.float32)" for stream in streams]
        # With few rows the next step's scales are loaded while this step computes. Where they multiply weights, Triton would
        # move decoded weights through shared memory if they came from the step before.
        body = []
        if self.few:
            lines += [line for stream in streams for line in stream.fetched(first, "")]
            body = [f"ahead = tl.minimum(step + {self.together}, {last} - {self.together})"]
            body = body * any(stream.groups for stream in streams)
        body += [
            line for stream in streams for line in stream.fetched(*(("ahead", "_next") if self.few else ("step", "")))
        ]
        for u in range(self.together):
            body += self._step(u, streams)
        body += [f"{name} = {name}_next" for stream in streams for name in stream.groups] * self.few
        # A table that changes is kept beside the products by Triton; step >> 31 is 0.
        body += [f"{name} = {name} ^ (step >> 31)" for stream in streams for name in stream.table]
        loop = f"for step in range({first}, {last}, {self.together}):"
        lines += [loop, *(f"    {line}" for line in body)]
        lines += [line for stream in streams for line in stream.after(self.late)]
        return [*lines, *self._ending(section, [stream.total for stream in streams])]

    def _rows(self) -> list[str]:
        """The statements for `m` [1, BM], the rows of y, `x_row`, where those of x begin, and, of few, `live`: which exist."""
        start = "" if self.most <= self.block_m else f"tl.program_id(1) * {self.block_m} + "
        return [
            f"m = {start}tl.arange(0, {self.block_m})[None, :]",
            *["live = m < d0"] * self.few,
            f"x_row = x + {'m' if self.few else 'tl.minimum(m, d0 - 1)'}.to(tl.int64) * {self.shape.k}",
        ]

    def _ending(self, section: Section, sums: Sequence[str]) -> list[str]:
        """The statements that make y of the f32 tensors `sums` [BN, BM] and store it."""
        ragged = section.rows % self.block_n != 0
        ending = finish(self.shape, section, sums, ragged=ragged)
        return split.add_up(self.shape, section, sums, self.split_k, ending, ragged=ragged)

    def _by_row(self, name: str) -> str:
        made = f"{name}{self.most - 1}"
        for row in reversed(range(self.most - 1)):
            made = f"tl.where(m == {row}, {name}{row}, {made})"
        return f"{name} = {made}"

    def _step(self, u: int, streams: Sequence[_Stream]) -> list[str]:
        """The statements for 128 inputs; the streams agree in where their groups end, or take them at the finer ends."""
        pieces = max([self.halves, *(stream.way.pieces for stream in streams if stream.way.on_sums)])
        lines = [f"at = (step + {u}) * {INPUTS}" if u else f"at = step * {INPUTS}"]
        for stream in streams:
            lines += stream.weights(u, pieces)
        for piece in range(pieces):
            lines += self._x(piece, INPUTS // pieces)
            for stream in streams:
                lines += stream.products(u, piece, pieces)
        return lines

    def _x(self, piece: int, inputs: int) -> list[str]:
        """The statements that give `x_tile` [inputs, BM] in the compute dtype."""
        shape = self.shape
        start = f"at + {piece * inputs}" if piece else "at"
        lines = [f"k = {start} + tl.arange(0, {inputs})[:, None]"]
        # Rows that are not there cost nothing to leave out, or, where most are there, repeat the last one.
        mask = " & ".join([*["live"] * self.few, *[f"(k < {shape.k})"] * self.ragged_k])
        lines.append(f"x_tile = tl.load(x_row + k{f', mask={mask}, other=0.0' if mask else ''})")
        norm = shape.prologue
        if norm is not None:
            lines += prologue.weights(norm, f"k < {shape.k}" if self.ragged_k else "")
            if self.late:
                lines.append("x_tile = x_tile * norm_scale")
            elif norm["op"] == "rms_norm":
                lines.append("x_tile = x_tile * rate * norm_scale")
            else:
                lines.append("x_tile = tl.where(live, (x_tile - mean) * rate * norm_scale + norm_shift, 0.0)")
                if self.ragged_k:
                    lines.append(f"x_tile = tl.where(k < {shape.k}, x_tile, 0.0)")
        if shape.x == "f32":
            lines.append(f"x_tile = {text.dot_operand('x_tile', {'compute': shape.compute}, self.target)}")
        elif text.interpreted(self.target):
            lines.append("x_tile = x_tile.to(tl.float32)")
        return lines


class _Stream:
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
        # d0 >> 31 is 0, which compilers do not know: they would load constants again and again.
        for name, word in zip(self.table, self.way.decode.words(), strict=False):
            lines.append(f"{name} = tl.full([1, 1], {word - (word >> 31 << 32)}, tl.int32) ^ (d0 >> 31)")
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
