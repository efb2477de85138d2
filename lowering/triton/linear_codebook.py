"""The template "linear-codebook": rows of x times weights that are entries of codebooks, in the layout `Runs`.

    y[m, n] = epilogue(sum over k of scale * (sum over books of entry[code]) * x[m, k] + bias[n])

A lane loads its codes as whole words, and gathers entries that are the right operand of tensor cores as they come: it has the
c-th quarter of the inputs of its outputs, so inputs stand in another order in a product, x's too. Each book has a product of
its own, so entries are neither added nor, in the compute dtype, rounded. Scales multiply the sums of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Call, Extent
from qcompile.formats.runs import ROWS, Runs
from qcompile.lowering.base import Refuse
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.triton import before, prologue, schedule, split, text
from qcompile.lowering.triton.codebooks import SETTLED, Gathered, plain, words
from qcompile.lowering.triton.elementary import FUNCTIONS
from qcompile.lowering.triton.epilogue import finish
from qcompile.lowering.triton.linear import Request, Section, Shape, types
from qcompile.lowering.triton.linear_params import LinearParams, problem_of
from qcompile.lowering.triton.source import Source
from qcompile.target import Target

TEMPLATE, TIER = "linear-codebook", "codebook"
MOST = 128  # rows: more tiles of them would decode every weight too often
ROWS_OF_X = 16  # of a product of tensor cores with x on its left
LARGEST = 128  # outputs of a tile, where more than 16 rows are multiplied


def calls(request: Request, most: int | None) -> list[Call]:
    """The calls for x of at most `most` rows."""
    if most is None or most > MOST:
        raise Refuse(f"more than {MOST} rows")
    for format, rows in zip(request.shape.parse(), request.shape.rows, strict=True):
        if not isinstance(format, Runs):
            raise Refuse(f"a weight of format '{format.kind}' is not laid out in runs")
        if problem := problem_of(format, rows, request.spec.k):
            raise Refuse(f"no text for {problem}")
    made, request = prologue.normalised(request, most=most)
    most = max(most, before.FEW)  # one row costs what sixteen do
    split_k = schedule.split(request.shape.n_out, request.spec.k, most)
    split_k = split_k if _whole(request.shape, split_k) else 1
    if problem := _problem(request.shape, split_k):
        raise Refuse(problem)
    scratch = split.scratch(request.ctx, request.shape, request.m, split_k)
    return [*made, request.call(TEMPLATE, scratch, most=most, split_k=split_k)]


def _whole(shape: Shape, split_k: int) -> bool:
    """Whether parts of K are whole steps."""
    return split_k == 1 or all(shape.k % (split_k * format.inputs) == 0 for format in _formats(shape))


def _formats(shape: Shape) -> list[Runs]:
    return [format for format in shape.parse() if isinstance(format, Runs)]


def _problem(shape: Shape, split_k: int) -> str:
    """Why there is no kernel; empty when there is."""
    formats = _formats(shape)
    for section in shape.sections():
        parts = [formats[part] for part, _ in section.streams]
        cut = next(
            (first for format, (_, first) in zip(parts, section.streams, strict=True) if first % format.outputs), 0
        )
        if cut:
            return f"a gated unit's second half begins at row {cut}, within a block of {parts[0].outputs}"
        if len({(format.outputs, format.inputs) for format in parts}) > 1:
            return "the halves of a gated unit lie in blocks of other sizes"
    return "" if _whole(shape, split_k) else f"{split_k} parts of K that cut a block"


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """Those of `linear.Shape`; `most`, the greatest M; and `split_k`, the programs that share a sum."""

    most: int
    split_k: int

    def problem(self) -> str:
        return (
            super().problem()
            or outside(
                self,
                most=1 <= self.most <= MOST,
                split_k=schedule.may_split(self.k, self.split_k),
                prologue=self.prologue is None,
            )
            or next((f"format '{format.kind}'" for format in self.parts if not isinstance(format, Runs)), "")
            or _problem(self.shape, self.split_k)
            or before.problem(self.before, self.k, self.most, self.x)
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    out = [*params.extents(m), *split.extents(params.shape, m, params.split_k)]
    return out + before.extents(params.before, m)


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: those of `linear`, the scratch of `split`, those of `before`. Dims: M."""
    made = _Text(Shape.of(params), params["most"], params["split_k"], target).source()
    return before.joined(made, params.get("before"), ["x"], params["split_k"], target)


def bits_of(format: Runs) -> int:
    """The bits of a weight, as schedules know them."""
    return -(-format.total // format.size)


def value_of(format: Runs) -> str:
    """What codes are worth, as schedules know it: "n8x2" is two books of eight weights along n."""
    return f"{format.axis}{format.size}x{len(format.widths)}"


class _Text:
    """Writes one kernel."""

    def __init__(self, shape: Shape, most: int, split_k: int, target: Target):
        self.shape, self.most, self.split_k, self.target = shape, most, split_k, target
        self.sections, self.formats = shape.sections(), _formats(shape)
        widest = max(self.formats, key=bits_of)
        rows = max(section.rows for section in self.sections)
        self.plan = schedule.choose(
            "codebook", rows, shape.k, most, bits_of(widest), target.capability, value=value_of(widest),
            split_k=split_k, streams=2 if shape.glu else 1,
        )  # fmt: skip
        largest = self.plan.warps * max(format.outputs for format in self.formats) * (2 if shape.glu else 1)
        self.block_m = self.plan.block_m if largest <= LARGEST else ROWS_OF_X
        # Few rows are read once and repeated: what is computed of the others is not stored.
        self.read = before.FEW if most <= before.FEW else self.block_m
        self.gathered = [
            Gathered(format, shape.compute, target, names[1].name, f"book{part}_")
            for part, (format, names) in enumerate(zip(self.formats, shape.stored(), strict=True))
        ]
        self.pointers = [*shape.pointers(), *(split.POINTERS if split_k > 1 else [])]
        self.names = [pointer.name for pointer in self.pointers]

    def source(self) -> Source:
        tiles = [self.plan.warps * self.formats[section.streams[0][0]].outputs for section in self.sections]
        counts = [-(-section.rows // tile) for section, tile in zip(self.sections, tiles, strict=True)]
        bodies = [self._section(section, tile) for section, tile in zip(self.sections, tiles, strict=True)]
        gathers = {name: made for each in self.gathered for name, made in each.functions().items()}
        body = "\n".join(line for body in bodies for line in body)
        helpers = "\n\n\n".join(filter(None, (text.called(known, body) for known in (FUNCTIONS, SETTLED, gathers))))
        lines, parts = text.dispatch(bodies, counts, [*self.names, "d0"])
        about = (
            f"y = x @ W.T; W {list(self.shape.rows)} x {self.shape.k} in {', '.join(map(str, self.formats))}\n\n"
            f"Tiles of {tiles[0]} outputs x {self.block_m} rows, {self.formats[0].inputs} inputs a step, K in {self.split_k} "
            f"parts; {self.shape.compute} products, f32 sums."
        )
        made = text.module("linear_codebook", about, self.names, 1, "\n".join(lines), self.target, helpers + parts)
        grid = (sum(counts), f"(d0 + {self.block_m - 1})//{self.block_m}", self.split_k)
        return Source(made, "linear_codebook", types(self.pointers), 1, grid, self.plan.warps, self.plan.stages)

    def _section(self, section: Section, outputs: int) -> list[str]:
        """The statements for tile number `tile` of a section, of `outputs` outputs."""
        k, warps = self.shape.k, self.plan.warps
        streams = [_Stream(self, number, part, first) for number, (part, first) in enumerate(section.streams)]
        format = streams[0].format
        steps = -(-k // format.inputs)
        first, last = "0", str(steps)
        if self.split_k > 1:
            first, last = (f"(tl.program_id(2){more}) * {steps // self.split_k}" for more in ("", " + 1"))
        i, start = (
            f"tl.arange(0, {outputs})",
            f"tl.program_id(1) * {self.block_m} + " if self.most > self.block_m else "",
        )
        if format.axis == "k":
            place = (
                f"({i} // {ROWS} % {warps} * {format.outputs // ROWS} + {i} // {ROWS * warps}) * {ROWS} + {i} % {ROWS}"
            )
        else:
            place = f"{i} % {ROWS * warps} * {format.size} + {i} // {ROWS * warps}"
        lines = [
            f"n = (tile * {outputs} + {place})[None, :]",
            f"m = {start}tl.arange(0, {self.block_m})[:, None]",
            f"m_x = {start}tl.arange(0, {self.read})[:, None]",
            f"x_row = x + m_x.to(tl.int64) * {k}",
            f"row = tl.arange(0, {ROWS * warps})",
            *(line for stream in streams for line in stream.places(section.rows)),
        ]
        lines.append(f"for step in range({first}, {last}):")
        lines += [f"    {line}" for stream in streams for line in stream.words()]
        for piece in range(format.inputs // format.span):
            lines += [f"    {line}" for line in self._x(format, piece)]
            lines += [f"    {line}" for stream in streams for line in stream.products(piece)]
        lines += [line for stream in streams for line in stream.total()]
        ragged, sums = section.rows % outputs != 0, [stream.sum for stream in streams]
        ending = finish(self.shape, section, sums, ragged=ragged)
        return [*lines, *split.add_up(self.shape, section, sums, self.split_k, ending, self.target, ragged=ragged)]

    def _x(self, format: Runs, piece: int) -> list[str]:
        """The rows of x at the inputs `k` of a piece of a step, `x_tile` [read, span], in memory's order."""
        at = f"step * {format.inputs} + {piece * format.span}" if piece else f"step * {format.inputs}"
        inside = f" & (k < {self.shape.k})" if self.shape.k % format.inputs else ""
        return [
            f"k = {at} + tl.arange(0, {format.span})[None, :]",
            f"x_tile = tl.load(x_row + k, mask=(m_x < d0){inside}, other=0.0)",
        ]


class _Stream:
    """One weight of a tile: where its codes lie, its products, its sum [rows of x, outputs]."""

    def __init__(self, kernel: _Text, number: int, part: int, first: int):
        self.kernel, self.first, self.format, self.gathered = kernel, first, kernel.formats[part], kernel.gathered[part]
        self.n, self.s = kernel.shape.rows[part], "_up" if number else ""
        self.sum = f"sum{self.s}"
        stored = [item.name for item in self.format.stored(self.n, kernel.shape.k)]
        self.stored = dict(zip(stored, (pointer.name for pointer in kernel.shape.stored()[part]), strict=True))

    def places(self, rows: int) -> list[str]:
        """The statements in front of the loop. Blocks behind the last one of the section read that, and write nothing."""
        format, kernel, s, warps = self.format, self.kernel, self.s, self.kernel.plan.warps
        steps = format.blocks(self.n, kernel.shape.k)[1]
        block = f"tile * {warps} + row // {ROWS}"
        if rows % (warps * format.outputs):
            block = f"tl.minimum({block}, {-(-rows // format.outputs) - 1})"
        block = f"({block} + {self.first // format.outputs})" if self.first else f"({block})"
        lane = f"{block} * {steps * format.loads * 128} + row % {ROWS} * 16"
        lines = [
            f"codes{s} = {self.stored['codes']} + ({lane})[:, None] + tl.arange(0, 16)[None, :]",
            f"{self.sum} = tl.zeros([{kernel.block_m}, {warps * format.outputs}], tl.float32)",
        ]
        lines += self.gathered.once()
        if format.scale:
            lines.append(f"n_scale{s} = {prologue.offset(self.first)}tl.minimum(n, {rows - 1})")
        if format.norm:
            lines.append(f"shift{s} = tl.zeros([{kernel.read}, {format.inputs}], tl.float32)")
        return lines

    def words(self) -> list[str]:
        """The statements that load the codes of a step."""
        format, each = self.format, self.format.loads * 128
        return words(f"q{self.s}", format.loads, f"codes{self.s} + step * {each}", ROWS * self.kernel.plan.warps)

    def products(self, piece: int) -> list[str]:
        """The statements that add what a piece of a step gives to the sum."""
        format, kernel, lines, group = self.format, self.kernel, self._left(), ""
        if format.group:
            group = f"(step * {format.inputs} + {piece * format.span}) // {format.group}"
            if kernel.shape.k % format.inputs:  # behind the last one, where x is 0, the last
                group = f"tl.minimum({group}, {kernel.shape.k // format.group - 1})"
        to = "products" if group else self.sum
        if group:
            lines.append(f"products = tl.zeros({self.sum}.shape, tl.float32)")
        for book in range(len(format.widths)):
            lines += self.gathered.statements(f"q{self.s}", book, piece, kernel.plan.warps)
            ready = "weights" if plain(kernel.target) else "settled(weights)"
            lines.append(f"{to} = tl.dot(x_left, {ready}, {to})")
        return [*lines, f"{self.sum} += products * {self._scale(group)}"] if group else lines

    def _left(self) -> list[str]:
        """The statements that give `x_left`, the left operand, with what the format does to each input."""
        format, kernel, x = self.format, self.kernel, "x_tile"
        lines, rows, span = list[str](), kernel.read, format.span
        if format.norm:
            inside = f", mask=k < {kernel.shape.k}, other=0.0" if kernel.shape.k % format.inputs else ""
            by, plus = (f"tl.load({self.stored[name]} + k{inside}).to(tl.float32)" for name in ("by", "plus"))
            lines = [f"shift{self.s} += x_tile.to(tl.float32) * {plus}", f"x_by = x_tile.to(tl.float32) * {by}"]
            x = "x_by"
        if format.norm or kernel.shape.x == "f32":
            x = text.dot_operand(x, {"compute": kernel.shape.compute}, kernel.target)
        elif text.interpreted(kernel.target):
            x = f"{x}.to(tl.float32)"
        if rows < kernel.block_m:
            lines.append(f"x_left = {x}")
            copies = f"[{kernel.block_m // rows}, {rows}, {span}]"
            x = f"tl.reshape(tl.broadcast_to(x_left[None, :, :], {copies}), [{kernel.block_m}, {span}])"
        elif not plain(kernel.target):
            x = f"settled({x})"
        order = f"tl.permute(tl.reshape({x}, [{kernel.block_m}, 4, {span // 16}, 2, 2]), (0, 2, 3, 1, 4))"
        return [*lines, f"x_left = tl.reshape({order}, [{kernel.block_m}, {span}])"]

    def _scale(self, group: str) -> str:
        """The text of the scales of a group, [1, outputs]."""
        place = f"({group}) * {self.n} + n_scale{self.s}" if group else f"n_scale{self.s}"
        return f"tl.load({self.stored['scales']} + {place}).to(tl.float32)"

    def total(self) -> list[str]:
        """The statements behind the loop."""
        lines = []
        if self.format.scale and not self.format.group:
            lines.append(f"{self.sum} = {self.sum} * {self._scale('')}")
        if self.format.norm:
            shift = f"tl.sum(shift{self.s}, 1, keep_dims=True)"
            rows, copies = self.kernel.read, self.kernel.block_m // self.kernel.read
            if copies > 1:
                shift = (
                    f"tl.reshape(tl.broadcast_to(({shift})[None, :, :], [{copies}, {rows}, 1]), [{copies * rows}, 1])"
                )
            lines.append(f"{self.sum} += {shift}")
        return lines
