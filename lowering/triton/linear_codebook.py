"""The template "linear-codebook": rows of x times weights that are entries of codebooks, each code read once.

    y[m, n] = epilogue(sum over runs of scale * (sum over books of entry[code] . x[m, run]) + bias[n])

A code names a run of weights along k (AQLM, HIGGS) or along n (VPTQ), which is gathered as a whole. Entries are the left
operand of tensor cores as they are gathered: the thread that loads a run is the one that multiplies it. For that a tile's
outputs and a step's inputs stand in another order, x's too:

    lane 4 r + c of a warp gathers for run r of eight and the c-th quarter of a step's inputs; inputs i = 0, 1, 2, 3, 4 ... of a
    quarter stand at the places 2 c, 2 c + 1, 2 c + 8, 2 c + 9, 2 c + 16 ... of the product

Each book has a product of its own, so entries are neither added nor, in the compute dtype, rounded. Scales multiply sums,
but for those of few inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Call, Extent
from qcompile.expr import Expr, const, k, n, substitute, var
from qcompile.lowering.base import Refuse
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.triton import before, prologue, schedule, split, text
from qcompile.lowering.triton.codebooks import Vectors, vectors
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.epilogue import finish
from qcompile.lowering.triton.linear import Request, Section, Shape, types
from qcompile.lowering.triton.linear_params import LinearParams, problem_of
from qcompile.lowering.triton.render import Renderer
from qcompile.lowering.triton.source import Source
from qcompile.simplify import Fact, simplify
from qcompile.target import Target

TEMPLATE, TIER = "linear-codebook", "codebook"
MOST = 128  # rows: more tiles of them would decode every weight too often
LONG = {"k": 128, "n": 32}  # inputs of a step, by the axis of runs
LARGEST = 256  # outputs of a tile, where more than 16 rows are multiplied


def calls(request: Request, most: int | None) -> list[Call]:
    """The calls for x of at most `most` rows."""
    if most is None or most > MOST:
        raise Refuse(f"more than {MOST} rows")
    for format, rows in zip(request.shape.parse(), request.shape.rows, strict=True):
        found = vectors(format, rows, request.spec.k)
        if isinstance(found, str):
            raise Refuse(found)
        if problem := problem_of(format, rows, request.spec.k):
            raise Refuse(f"no text for {problem}")
    if problem := _cut(request.shape):
        raise Refuse(problem)
    made, request = prologue.normalised(request, most=most)
    most = max(most, before.FEW)  # one row costs what eight do
    split_k = schedule.split(request.shape.n_out, request.spec.k, most)
    scratch = split.scratch(request.ctx, request.shape, request.m, split_k)
    return [*made, request.call(TEMPLATE, scratch, most=most, split_k=split_k)]


def _cut(shape: Shape) -> str:
    """Why a gated unit's second half begins within a run; empty when it does not."""
    for section in shape.sections():
        for part, first in section.streams:
            found = vectors(shape.parse()[part], shape.rows[part], shape.k)
            if isinstance(found, Vectors) and found.axis == "n" and first % found.size:
                return f"a gated unit's second half begins at row {first}, within a run of {found.size}"
    return ""


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
            or next(
                (
                    found
                    for format, rows in zip(self.parts, self.rows, strict=True)
                    if isinstance(found := vectors(format, rows, self.k), str)
                ),
                "",
            )
            or _cut(self.shape)
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


class _Text:
    """Writes one kernel."""

    def __init__(self, shape: Shape, most: int, split_k: int, target: Target):
        self.shape, self.most, self.split_k, self.target = shape, most, split_k, target
        self.sections = shape.sections()
        rows = max(section.rows for section in self.sections)
        self.plan = schedule.choose(
            "codebook", rows, shape.k, most, 2, target.capability, value="codebook", split_k=split_k,
            streams=2 if shape.glu else 1,
        )  # fmt: skip
        self.tiles = [self._tile(section) for section in self.sections]
        self.block_m = self.plan.block_m if max(tile.outputs for tile in self.tiles) <= LARGEST else 16
        self.pointers = [*shape.pointers(), *(split.POINTERS if split_k > 1 else [])]
        self.names = [pointer.name for pointer in self.pointers]

    def _tile(self, section: Section) -> _Tile:
        part, _ = section.streams[0]
        found = vectors(self.shape.parse()[part], self.shape.rows[part], self.shape.k)
        assert isinstance(found, Vectors)  # `problem` has looked
        return _Tile(found.axis, found.size, self.plan.warps, self.plan.block_n)

    def source(self) -> Source:
        counts = [-(-section.rows // tile.outputs) for section, tile in zip(self.sections, self.tiles, strict=True)]
        bodies = [self._section(section, tile) for section, tile in zip(self.sections, self.tiles, strict=True)]
        helpers = functions("\n".join(line for body in bodies for line in body))
        lines, parts = text.dispatch(bodies, counts, [*self.names, "d0"])
        formats = ", ".join(str(format) for format in self.shape.parse())
        tile = self.tiles[0]
        about = (
            f"y = x @ W.T; W {list(self.shape.rows)} x {self.shape.k} in {formats}\n\n"
            f"Tiles of {tile.outputs} outputs x {self.block_m} rows, {tile.inputs} inputs a step, K in {self.split_k} parts; "
            f"{self.shape.compute} products, f32 sums."
        )
        made = text.module("linear_codebook", about, self.names, 1, "\n".join(lines), self.target, helpers + parts)
        grid = (sum(counts), f"(d0 + {self.block_m - 1})//{self.block_m}", self.split_k)
        return Source(made, "linear_codebook", types(self.pointers), 1, grid, self.plan.warps, self.plan.stages)

    def _section(self, section: Section, tile: _Tile) -> list[str]:
        """The statements for tile number `tile` of a section."""
        part = self.shape.k // self.split_k
        start = f"tl.program_id(2) * {part}" if self.split_k > 1 else "0"
        end = f"(tl.program_id(2) + 1) * {part}" if self.split_k > 1 else str(self.shape.k)
        taken = {"tile", "i", "n", "m", "d0", "at0", "x_row", "x_tile", "kt", "live", *self.names}
        streams = [_Stream(self, tile, number, section, taken) for number in range(len(section.streams))]
        lines = [
            f"i = tl.arange(0, {tile.outputs})",
            f"n = (tile * {tile.outputs} + {tile.output('i')})[:, None]",
            f"m = tl.program_id(1) * {self.block_m} + tl.arange(0, {self.block_m})[None, :]",
            f"x_row = x + m.to(tl.int64) * {self.shape.k}",
            *(line for stream in streams for line in stream.places()),
            *(line for stream in streams for line in stream.zeros()),
        ]
        steps = [line for stream in streams for line in stream.step()]
        lines += [line for stream in streams for line in stream.once]
        lines += [
            f"for at0 in range({start}, {end}, {tile.inputs}):",
            *(f"    {line}" for line in self._x(tile) + steps),
        ]
        lines += [line for stream in streams for line in stream.total()]
        ragged, sums = section.rows % tile.outputs != 0, [stream.sum for stream in streams]
        ending = finish(self.shape, section, sums, ragged=ragged)
        return [*lines, *split.add_up(self.shape, section, sums, self.split_k, ending, self.target, ragged=ragged)]

    def _x(self, tile: _Tile) -> list[str]:
        """The rows of x of one step, `x_tile` [inputs, BM], in memory's order."""
        inside = f" & (kt < {self.shape.k})" if self.shape.k % tile.inputs else ""
        return [
            f"kt = at0 + tl.arange(0, {tile.inputs})[:, None]",
            f"x_tile = tl.load(x_row + kt, mask=(m < d0){inside}, other=0.0)",
        ]


@dataclass(frozen=True)
class _Tile:
    """Where the weights of a step lie in a product: runs of `size` along `axis`, gathered by `warps`, `least` outputs or more."""

    axis: str
    size: int
    warps: int
    least: int

    @property
    def runs(self) -> int:
        """Rows of codes."""
        each = self.size if self.axis == "n" else 2
        return 8 * self.warps * max(each, self.least // (8 * self.warps)) // (self.size if self.axis == "n" else 1)

    @property
    def outputs(self) -> int:
        return self.runs * self.size if self.axis == "n" else self.runs

    @property
    def inputs(self) -> int:
        return LONG[self.axis]

    @property
    def loads(self) -> int:
        """Codes that a lane has in a row of them."""
        return self.inputs // 4 // (self.size if self.axis == "k" else 1)

    @property
    def _rows(self) -> tuple[int, int]:
        """Blocks of a warp's sixteen outputs, and those of them that are one run's."""
        return self.outputs // (16 * self.warps), self.size // 2 if self.axis == "n" else 1

    def output(self, i: str) -> str:
        """The text of the output, within the tile, that row `i` of the product is."""
        own, w, low, warp = self._rows[1], self.warps, f"{i} % 8", f"{i} // 16 % {self.warps}"
        half, block = f"{i} // 8 % 2", f"{i} // {16 * w}"
        if self.axis == "k":
            return f"(({block} * 2 + {half}) * {w} + {warp}) * 8 + {low}"
        return f"((({block} // {own}) * {w} + {warp}) * 8 + {low}) * {self.size} + {block} % {own} * 2 + {half}"

    def operand(self, entries: str) -> str:
        """The text of the left operand [outputs, inputs] of entries [runs, 4, size, 2, 2 ...], the last one by load."""
        (blocks, own), w, slots = self._rows, self.warps, self.inputs // 16
        if self.axis == "k":
            entries = f"tl.permute(tl.reshape({entries}, [{self.runs}, 4, {self.size}, {self.loads}]), (0, 1, 3, 2))"
            places, order = [blocks, 2, w, 8, 4, slots, 2, 2], [0, 2, 1, 3, 5, 6, 4, 7]
        else:
            places, order = [blocks // own, w, 8, 4, own, 2, slots, 2, 2], [0, 4, 1, 5, 2, 6, 7, 3, 8]
        return f"tl.reshape(tl.permute(tl.reshape({entries}, {places}), {order}), [{self.outputs}, {self.inputs}])"

    def right(self, x: str, rows: int) -> str:
        """The text of the right operand of x [inputs, rows]."""
        pieces = f"tl.reshape({x}, [4, {self.inputs // 16}, 2, 2, {rows}])"
        return f"tl.reshape(tl.permute({pieces}, (1, 2, 0, 3, 4)), [{self.inputs}, {rows}])"


class _Stream:
    """One weight of a tile: its places, its entries in a step, its sum."""

    def __init__(self, kernel: _Text, tile: _Tile, number: int, section: Section, taken: set[str]):
        part, first = section.streams[number]
        shape, s = kernel.shape, "_up" if number else ""
        size, format = (shape.rows[part], shape.k), shape.parse()[part]
        found = vectors(format, *size)
        assert isinstance(found, Vectors)
        self.kernel, self.tile, self.v, self.s, self.sum, self.size = kernel, tile, found, s, f"sum{s}", size
        self.first, self.rows, self.taken, self.number = first, section.rows, taken, number
        stored = [item.name for item in format.stored(*size)]
        self.pointers = dict(zip(stored, (pointer.name for pointer in shape.stored()[part]), strict=True))
        self.along_k = found.axis == "k"
        self.late = not self.along_k or found.group % tile.inputs == 0 or found.group == shape.k
        self.whole = found.group == shape.k
        taken |= {
            self.sum,
            f"r{s}",
            f"row{s}",
            f"k0{s}",
            f"scale{s}",
            f"step{s}",
            f"shift{s}",
            f"by{s}",
            f"plus{s}",
            f"x_right{s}",
        }
        taken |= {f"{name}{s}{u}" for name in ("j", "k_in") for u in range(tile.loads)}
        taken |= {f"w{s}{book}_{u}" for book in range(len(found.books)) for u in range(tile.loads)}
        self.once: list[str] = []

    def places(self) -> list[str]:
        """Rows beyond the last read the last one's codes, and write none."""
        each, s, t = 1 if self.along_k else self.v.size, self.s, self.tile
        first = f" + {self.first // each}" if self.first else ""
        lines = [
            f"r{s} = tl.minimum(tile * {t.runs} + tl.arange(0, {t.runs})[:, None], {self.rows // each - 1}){first}",
            *(f"j{s}{u} = tl.arange(0, 4)[None, :] * {t.loads} + {u}" for u in range(t.loads)),
        ]
        if self.v.scale is not None and self.late:
            lines.append(f"row{s} = tl.minimum(n, {self.rows - 1})" + (f" + {self.first}" if self.first else ""))
        return lines

    def zeros(self) -> list[str]:
        """The sums before the first step."""
        lines = [f"{self.sum} = tl.zeros([{self.tile.outputs}, {self.kernel.block_m}], tl.float32)"]
        if self.v.columns:
            lines.append(f"shift{self.s} = tl.zeros([{self.tile.inputs}, {self.kernel.block_m}], tl.float32)")
        return lines

    def _renderer(self, names: dict[str, str], masked: str, prefix: str) -> tuple[Renderer, dict[str, Fact]]:
        each, t = self.v.size, self.tile
        facts = {
            "r": Fact(0, self.size[0] // (1 if self.along_k else each) - 1),
            "j": Fact(0, t.inputs // (each if self.along_k else 1) - 1),
            "k0": Fact(0, self.size[1] // (each if self.along_k else 1), t.inputs // (each if self.along_k else 1)),
            "at": Fact(0, self.size[1], t.inputs),
        }
        masks = {frozenset({"k0", "j"}): masked} if masked else {}
        return Renderer(
            self.kernel.target, self.pointers, names, facts, masks, {}, self.taken, f"{prefix}{self.number}_"
        ), facts  # fmt: skip

    def step(self) -> list[str]:
        """What one step adds to the sums."""
        s, v, t, kernel = self.s, self.v, self.tile, self.kernel
        each = v.size if self.along_k else 1
        lines = [f"k0{s} = at0 // {each}" if each > 1 else f"k0{s} = at0"]
        ragged = self.size[1] % t.inputs != 0
        for u in range(t.loads):
            if ragged:
                lines.append(f"k_in{s}{u} = k0{s} + j{s}{u} < {self.size[1] // each}")
            lines += self._entries(u, f"k_in{s}{u}" if ragged else "")
        lines += self._right()
        scale = None
        if v.scale is not None and self.late:
            scale = self._scale(lines)
        products = self.sum if scale is None or self.whole else f"step{s}"
        if products != self.sum:
            lines.append(f"{products} = tl.zeros([{t.outputs}, {kernel.block_m}], tl.float32)")
        for book in range(len(v.books)):
            entries = _stacked([f"w{s}{book}_{u}" for u in range(t.loads)])
            lines.append(f"{products} = tl.dot({t.operand(entries)}, x_right{s}, {products})")
        return lines if products == self.sum else [*lines, f"{self.sum} += {products} * {scale}"]

    def _entries(self, u: int, masked: str) -> list[str]:
        """The statements that gather the entries of load u, [runs, 4, size], of each book as the product takes them."""
        s, v, compute = self.s, self.v, {"compute": self.kernel.shape.compute}
        render, facts = self._renderer({"r": f"r{s}", "j": f"j{s}{u}", "k0": f"k0{s}"}, masked, f"u{u}_")
        step = var("k0") + var("j")
        into = {n: var("r") if self.along_k else var("r") * v.size, k: step * v.size if self.along_k else step}

        def written(expr: Expr) -> str:
            return render(simplify(substitute(expr, into), facts))

        gathered = []
        scale = "" if v.scale is None or self.late else f" * ({written(v.scale)})[:, :, None]"
        exact = v.dtype == compute["compute"] and not scale and not text.interpreted(self.kernel.target)
        for book, (tensor, index) in enumerate(v.books):
            place = f"({written(index)})[:, :, None] * {v.size} + tl.arange(0, {v.size})[None, None, :]"
            entry = f"tl.load({self.pointers[tensor]} + {place})"
            entry = (
                entry if exact else text.dot_operand(f"({entry}.to(tl.float32){scale})", compute, self.kernel.target)
            )
            gathered.append(f"w{s}{book}_{u} = {entry}")
        self.once += render.once
        return [*render.lines, *gathered]

    def _right(self) -> list[str]:
        """The statements that give `x_right`, with what a format does to each input."""
        s, kernel, x, lines = self.s, self.kernel, "x_tile", list[str]()
        if self.v.columns:
            inside = f", mask=kt < {self.size[1]}, other=0.0" if self.size[1] % self.tile.inputs else ""
            by, plus = (f"tl.load({self.pointers[name]} + kt{inside}).to(tl.float32)" for name in self.v.columns)
            lines = [f"shift{s} += x_tile.to(tl.float32) * {plus}", f"by{s} = x_tile.to(tl.float32) * {by}"]
            x = f"by{s}"
        if self.v.columns or kernel.shape.x == "f32":
            x = text.dot_operand(x, {"compute": kernel.shape.compute}, kernel.target)
        elif text.interpreted(kernel.target):
            x = f"{x}.to(tl.float32)"
        return [*lines, f"x_right{s} = {self.tile.right(x, kernel.block_m)}"]

    def _scale(self, lines: list[str]) -> str:
        """The text of the scale of a step's sums, [outputs, 1]; what it needs goes to `lines`, or in front of the loop."""
        assert self.v.scale is not None
        render, facts = self._renderer({"r": f"row{self.s}", "at": "at0"}, "", "s")
        place: Expr = const(0) if self.whole else var("at")
        made = render(simplify(substitute(self.v.scale, {n: var("r"), k: place}), facts))
        self.once += [*render.once, *(render.lines if self.whole else [])]
        lines += [] if self.whole else render.lines
        if self.whole:
            self.once.append(f"scale{self.s} = {made}")
        return made

    def total(self) -> list[str]:
        """The statements behind the loop."""
        lines = []
        if self.v.scale is not None and self.whole:
            lines.append(f"{self.sum} = {self.sum} * scale{self.s}")
        if self.v.columns:
            lines.append(f"{self.sum} += tl.sum(shift{self.s}, 0, keep_dims=True)")
        return lines


def _stacked(names: Sequence[str]) -> str:
    """The text of tensors side by side in new last dimensions of two, counted with the last one fastest."""
    return names[0] if len(names) == 1 else f"tl.join({_stacked(names[::2])}, {_stacked(names[1::2])})"
