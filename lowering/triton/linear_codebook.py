"""The template "linear-codebook": few rows of x times weights that are entries of codebooks, each code read once.

    y[m, n] = epilogue(sum over runs of scale * (sum over books of entry[code] . x[m, run]) + bias[n])

A code names a run of weights along k (AQLM, HIGGS) or along n (VPTQ), which is gathered from the codebook as a whole: from the
caches, where codebooks stay. Up to four rows of x are multiplied in f32, every weight as it is; more as tensor cores do, weights
rounded to the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Call, Extent
from qcompile.dims import Dim
from qcompile.expr import Expr, k, n, substitute, var
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
FEW, MOST = 4, 32  # rows that are multiplied without tensor cores; at all


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
    made, request = prologue.normalised(request, "f32" if most <= FEW else None, most=most)
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
            or before.problem(self.before, self.k, self.most)
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
        self.shape, self.split_k, self.target = shape, split_k, target
        self.few = most <= FEW
        self.sections = shape.sections()
        rows = max(section.rows for section in self.sections)
        plan = schedule.choose("codebook", rows, shape.k, most, 2, target.capability, value="codebook", split_k=split_k)
        self.plan, self.block_m = plan, 1 << (most - 1).bit_length() if self.few else plan.block_m
        self.block_n, self.block_k = plan.block_n, plan.block_k
        self.pointers = [*shape.pointers(), *(split.POINTERS if split_k > 1 else [])]
        self.names = [pointer.name for pointer in self.pointers]

    def source(self) -> Source:
        tiles = [-(-section.rows // self.block_n) for section in self.sections]
        bodies = [self._section(section) for section in self.sections]
        helpers = functions("\n".join(line for body in bodies for line in body))
        lines, parts = text.dispatch(bodies, tiles, [*self.names, "d0"])
        formats = ", ".join(str(format) for format in self.shape.parse())
        about = (
            f"y = x @ W.T; W {list(self.shape.rows)} x {self.shape.k} in {formats}\n\n{self.plan}, {self.block_m} rows"
        )
        made = text.module("linear_codebook", about, self.names, 1, "\n".join(lines), self.target, helpers + parts)
        rows: Dim = 1 if self.few else f"(d0 + {self.block_m - 1})//{self.block_m}"
        grid = (sum(tiles), rows, self.split_k)
        return Source(made, "linear_codebook", types(self.pointers), 1, grid, self.plan.warps, self.plan.stages)

    def _section(self, section: Section) -> list[str]:
        """The statements for tile number `tile` of a section."""
        ragged = section.rows % self.block_n != 0
        lines = [
            f"n = tile * {self.block_n} + tl.arange(0, {self.block_n})[:, None]",
            f"m = {'' if self.few else f'tl.program_id(1) * {self.block_m} + '}tl.arange(0, {self.block_m})[None, :]",
        ]
        taken = {"tile", "n", "m", "d0", *self.names}
        streams = [
            _Stream(self, number, part, first, section.rows, taken)
            for number, (part, first) in enumerate(section.streams)
        ]
        body = self._x(streams[0])
        for stream in streams:
            lines += stream.places()
            body += stream.step()
            lines += stream.renderer.once
        for stream in streams:
            lines += stream.zeros()
        steps, part = streams[0].step_inputs, self.shape.k // self.split_k
        start = f"tl.program_id(2) * {part}" if self.split_k > 1 else "0"
        end = f"(tl.program_id(2) + 1) * {part}" if self.split_k > 1 else str(self.shape.k)
        lines += [f"for at0 in range({start}, {end}, {steps}):", *(f"    {line}" for line in body)]
        sums = [stream.sum for stream in streams]
        for stream in streams:
            lines += stream.total()
        ending = finish(self.shape, section, sums, ragged=ragged)
        return [*lines, *split.add_up(self.shape, section, sums, self.split_k, ending, ragged=ragged)]

    def _x(self, stream: _Stream) -> list[str]:
        """The rows of x of one step, in the shape of a step's weights."""
        wide = "" if self.shape.x == "f32" else ".to(tl.float32)"
        if not self.few:
            width = stream.step_inputs
            return [
                f"kt = at0 + tl.arange(0, {width})[:, None]",
                f"x_tile = tl.load(x + m.to(tl.int64) * {self.shape.k} + kt, mask=(m < d0) & (kt < {self.shape.k}), "
                f"other=0.0){wide}",
                f"x_tile = {text.dot_operand('x_tile', {'compute': self.shape.compute}, self.target)}",
            ]
        lines = [f"ke = at0 + {stream.inputs}"]
        for row in range(self.block_m):
            lines.append(
                f"x{row} = tl.load(x + {row * self.shape.k} + ke, mask=(ke < {self.shape.k}) & ({row} < d0), other=0.0){wide}"
            )
        return lines


class _Stream:
    """One weight of a tile: its places, its weights in a step, its sums."""

    def __init__(self, text: _Text, number: int, part: int, first: int, rows: int, taken: set[str]):
        self.text, self.number, self.first, self.rows = text, number, first, rows
        shape, suffix = text.shape, "_up" if number else ""
        size = (shape.rows[part], shape.k)
        format = shape.parse()[part]
        found = vectors(format, *size)
        assert isinstance(found, Vectors)  # `problem` has looked
        self.v, self.sum, self.suffix, self.k = found, f"sum{suffix}", suffix, shape.k
        along_k = found.axis == "k"
        self.step_inputs = max(text.block_k, 16)
        self.runs_n = text.block_n if along_k else text.block_n // found.size
        self.runs_k = self.step_inputs // found.size if along_k else self.step_inputs
        stored = [item.name for item in format.stored(*size)]
        self.pointers = dict(zip(stored, (pointer.name for pointer in shape.stored()[part]), strict=True))
        self.facts = facts = {
            "r": Fact(0, size[0] // (1 if along_k else found.size) - 1),
            "j": Fact(0, self.runs_k - 1),
            "k0": Fact(0, size[1] // (found.size if along_k else 1), self.runs_k),
        }
        step = (var("k0") + var("j")) * found.size if along_k else var("k0") + var("j")
        self.into = {n: var("r") if along_k else var("r") * found.size, k: step}
        variables = {name: f"{name}{suffix}" for name in ("r", "j", "k0")}
        taken |= {
            *variables.values(),
            f"k_in{suffix}",
            f"e{suffix}",
            f"w{suffix}",
            self.sum,
            "x_tile",
            "kt",
            "ke",
            "at0",
        }
        taken |= {f"{name}{suffix}{row}" for name in ("acc", "bias_acc", "x") for row in range(FEW)}
        masks = {frozenset({"k0", "j"}): f"k_in{suffix}"} if shape.k % self.step_inputs else {}
        self.renderer = Renderer(text.target, self.pointers, variables, facts, masks, {}, taken, f"u{number}_")

    @property
    def inputs(self) -> str:
        """The inputs of a step from its start on, in the shape of its entries [runs_n, runs_k, size]."""
        j, size = f"tl.arange(0, {self.runs_k})[None, :, None]", self.v.size
        return f"{j} * {size} + tl.arange(0, {size})[None, None, :]" if self.v.axis == "k" else j

    def _render(self, expr: Expr) -> str:
        return self.renderer(simplify(substitute(expr, self.into), self.facts))

    def places(self) -> list[str]:
        """Rows beyond the last read the last one's codes, and write none."""
        size = 1 if self.v.axis == "k" else self.v.size
        first = f" + {self.first // size}" if self.first else ""
        return [
            f"r{self.suffix} = tl.minimum(tile * {self.runs_n} + tl.arange(0, {self.runs_n})[:, None], "
            f"{self.rows // size - 1}){first}",
            f"j{self.suffix} = tl.arange(0, {self.runs_k})[None, :]",
            f"e{self.suffix} = tl.arange(0, {self.v.size})[None, None, :]",
        ]

    def step(self) -> list[str]:
        """The weights of one step, and what they add to the sums."""
        s, v = self.suffix, self.v
        head = [f"k0{s} = at0 // {v.size}" if v.axis == "k" else f"k0{s} = at0"]
        count = self.k // v.size if v.axis == "k" else self.k
        head.append(f"k_in{s} = k0{s} + j{s} < {count}")
        weights = []
        for at, (tensor, index) in enumerate(v.books):
            place = f"({self._render(index)})[:, :, None] * {v.size} + e{s}"
            entry = f"tl.load({self.pointers[tensor]} + {place}).to(tl.float32)"
            weights.append(f"w{s} = {entry}" if at == 0 else f"w{s} += {entry}")
        scale = "" if v.scale is None else f"tl.broadcast_to({self._render(v.scale)}, [{self.runs_n}, {self.runs_k}])"
        return [*head, *self.renderer.lines, *weights, *(self._few(scale) if self.text.few else self._many(scale))]

    def zeros(self) -> list[str]:
        """The sums before the first step."""
        if not self.text.few:
            return [f"{self.sum} = tl.zeros([{self.text.block_n}, {self.text.block_m}], tl.float32)"]
        sizes = [self.runs_n, self.runs_k] + ([self.v.size] if self.v.axis == "n" else [])
        lines = [f"acc{self.suffix}{row} = tl.zeros({sizes}, tl.float32)" for row in range(self.text.block_m)]
        if self.v.columns:
            shape = [1, self.runs_k, 1]
            lines += [f"bias_acc{self.suffix}{row} = tl.zeros({shape}, tl.float32)" for row in range(self.text.block_m)]
        return lines

    def _columns(self) -> tuple[str, str]:
        """The scale and the bias of the inputs of a step, [1, runs_k, 1]."""
        assert self.v.columns is not None
        place = f"at0 + tl.arange(0, {self.runs_k})[None, :, None]"
        scale, bias = (
            f"tl.load({self.pointers[name]} + {place}, mask={place} < {self.k}, other=0).to(tl.float32)"
            for name in self.v.columns
        )
        return scale, bias

    def _few(self, scale: str) -> list[str]:
        """f32 products of each row, whose sums stay apart until the last step."""
        s, lines = self.suffix, list[str]()
        if self.v.columns:
            by, plus = self._columns()
            lines += [f"by{s} = {by}", f"plus{s} = {plus}"]
        for row in range(self.text.block_m):
            acc = f"acc{s}{row}"
            if self.v.axis == "k":
                lines.append(f"{acc} += tl.sum(w{s} * x{row}, 2) * {scale}")
            elif self.v.columns:
                lines.append(f"{acc} += w{s} * (x{row} * by{s})")
                lines.append(f"bias_{acc} += x{row} * plus{s}")
            else:
                lines.append(f"{acc} += w{s} * x{row}")
        return lines

    def _many(self, scale: str) -> list[str]:
        """A product of matrices, weights on the left."""
        s, text_, width = self.suffix, self.text, self.step_inputs
        lines = []
        if scale:
            lines.append(f"w{s} = w{s} * ({scale})[:, :, None]")
        if self.v.columns:
            by, plus = self._columns()
            lines.append(f"w{s} = w{s} * {by} + {plus}")
        flat = f"w{s}" if self.v.axis == "k" else f"tl.permute(w{s}, (0, 2, 1))"
        lines.append(f"w{s} = tl.reshape({flat}, ({text_.block_n}, {width}))")
        operand = text.dot_operand(f"w{s}", {"compute": text_.shape.compute}, text_.target)
        return [*lines, f"{self.sum} = tl.dot({operand}, x_tile, {self.sum})"]

    def total(self) -> list[str]:
        """The sums [block_n, block_m] from those of each row."""
        if not self.text.few:
            return []
        columns = []
        for row in range(self.text.block_m):
            acc = f"acc{self.suffix}{row}"
            if self.v.axis == "k":
                columns.append(f"tl.sum({acc}, 1, keep_dims=True)")
            else:
                whole = f"tl.reshape(tl.sum({acc}, 1), ({self.text.block_n}, 1))"
                columns.append(f"{whole} + tl.sum(bias_{acc}, 1)" if self.v.columns else whole)
        made = columns[-1]
        for row in reversed(range(self.text.block_m - 1)):
            made = f"tl.where(m == {row}, {columns[row]}, {made})"
        return [f"{self.sum} = {made}"]
