"""The template "linear-generic": rows of x times packed weights of any format, each weight decoded by its expression.

    y[m, n] = epilogue(sum over k of W[n, k] x[m, k] + bias[n])

A program computes a tile of outputs. For up to four rows of x it multiplies and adds in f32, every weight as it is; for more
it rounds weights and x to the compute dtype, for tensor cores, and sums in f32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qcompile.artifact import Call, Extent
from qcompile.format import Format
from qcompile.lowering.base import Refuse
from qcompile.lowering.extents import numbers, outside, require
from qcompile.lowering.triton import before, prologue, schedule, split, text
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.epilogue import finish
from qcompile.lowering.triton.linear import Request, Section, Shape, types
from qcompile.lowering.triton.linear_params import LinearParams, problem_of
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.tiles import FEW
from qcompile.lowering.triton.weights import Tables, Tile
from qcompile.target import Target

TEMPLATE, TIER = "linear-generic", "generic"
MIDDLE = 32  # rows from which on one kernel serves any number of them


def calls(request: Request, most: int | None) -> list[Call]:
    """The calls for x of at most `most` rows."""
    for format, n, k in _weights(request.shape):
        if problem := problem_of(format, n, k):
            raise Refuse(f"no text for {problem}")
    few = most is not None and most <= FEW
    made: list[Call] = []
    if request.spec.before or not few:
        made, request = prologue.normalised(request, "f32" if few else None, most=most)
    bucket = schedule.OPEN if most is None or most > MIDDLE else most
    split_k = schedule.split(request.shape.n_out, request.spec.k, bucket)
    scratch = split.scratch(request.ctx, request.shape, request.m, split_k)
    tables = Tables.of(_weights(request.shape)).views(request.ctx)
    return [*made, request.call(TEMPLATE, scratch, inputs=tables, most=bucket, split_k=split_k)]


def _weights(shape: Shape) -> list[tuple[Format, int, int]]:
    return [(format, n, shape.k) for format, n in zip(shape.parse(), shape.rows, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """Those of `linear.Shape`; `most`, the M it is made for; and `split_k`, the programs that share a sum."""

    most: int
    split_k: int

    def problem(self) -> str:
        return (
            outside(
                self,
                most=1 <= self.most <= schedule.OPEN,
                split_k=schedule.may_split(self.k, self.split_k),
                prologue=self.prologue is None or self.most <= FEW,
            )
            or super().problem()
            or before.problem(self.before, self.k, self.most, self.x)
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    require(m <= params.most or params.most > FEW, "more rows than the kernel is written for", m, params.most)
    shape = params.shape
    out = [*params.extents(m), *Tables.of(_weights(shape)).extents, *split.extents(shape, m, params.split_k)]
    return out + before.extents(params.before, m)


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: those of `linear`, the tables, the scratch of `split`, those of `before`. Dims: M."""
    made = _Text(Shape.of(params), params["most"], params["split_k"], target).source()
    return before.joined(made, params.get("before"), ["x"], params["split_k"], target)


class _Text:
    """Writes one kernel."""

    def __init__(self, shape: Shape, most: int, split_k: int, target: Target):
        self.shape, self.split_k, self.target = shape, split_k, target
        self.sections, self.tables = shape.sections(), Tables.of(_weights(shape))
        self.few = most <= FEW
        formats = shape.parse()
        bits = max(round(format.bits_per_weight(n, shape.k)) for format, n in zip(formats, shape.rows, strict=True))
        rows = max(section.rows for section in self.sections)
        plan = schedule.choose(
            "generic", rows, shape.k, most, max(bits, 1), target.capability, value="any", split_k=split_k,
            streams=2 if shape.glu else 1,
        )  # fmt: skip
        if text.interpreted(target):
            # It takes its time for an operation, not for an element: the fewer programs and steps the better.
            plan = replace(plan, block_n=64, block_k=64)
        self.plan, self.block_n, self.block_k = plan, plan.block_n, plan.block_k
        self.block_m = 1 << (most - 1).bit_length() if self.few else plan.block_m
        self.ragged_k = shape.k % self.block_k != 0
        self.looped = shape.k > self.block_k
        self.pointers = [*shape.pointers(), *self.tables.pointers, *(split.POINTERS if split_k > 1 else [])]
        self.names = [pointer.name for pointer in self.pointers]

    def source(self) -> Source:
        tiles = [-(-section.rows // self.block_n) for section in self.sections]
        bodies = [self._section(section) for section in self.sections]
        helpers = functions("\n".join(line for body in bodies for line in body))
        entry = TEMPLATE.replace("-", "_")
        lines, parts = text.dispatch(bodies, tiles, [*self.names, "d0"])
        made = text.module(entry, self._about(), self.names, 1, "\n".join(lines), self.target, helpers + parts)
        rows = 1 if self.few else f"(d0 + {self.block_m - 1})//{self.block_m}"
        grid = (sum(tiles), rows, self.split_k)
        return Source(
            made, entry, types(self.pointers), 1, grid, self.plan.warps, self.plan.stages, fusion=False
        )  # fmt: skip

    def _about(self) -> str:
        shape = self.shape
        parts = ", ".join(f"[{n}, {shape.k}] in {f}" for f, n in zip(shape.parse(), shape.rows, strict=True))
        x = f"{shape.prologue['op']}(x)" if shape.prologue else "x"
        y = f"{x} @ W.T" + (" + bias" if shape.bias else "")
        steps = [step["act"] + " gate" if step["op"] == "glu" else step["op"] for step in shape.epilogue]
        how = "f32 products" if self.few else f"{shape.compute} products"
        return (
            f"y = {', '.join([y, *steps])}; W {parts}\n\n"
            f"Tiles of {self.block_n} outputs x {self.block_m} rows, {self.block_k} inputs a step, K in {self.split_k} parts; "
            f"{how}, f32 sums."
        )

    # -- one section --

    def _section(self, section: Section) -> list[str]:
        """The statements for tile number `tile` of a section."""
        bn, bk, bm = self.block_n, self.block_k, self.block_m
        ragged = section.rows % bn != 0
        rows = "" if self.few else f"tl.program_id(1) * {bm} + "
        lines = [
            f"n = tile * {bn} + tl.arange(0, {bn})[:, None]",
            *[f"n_in = n < {section.rows}"] * ragged,
            f"m = {rows}tl.arange(0, {bm})[None, :]",
            f"j = tl.arange(0, {bk})[None, :]",
        ]
        sums = ["acc", "acc_up"][: len(section.streams)]
        taken = {"tile", "n", "m", "j", "k0", "k", "n_in", "k_in", "n_up", "w", "w_up", *sums, *self.names}
        taken |= {f"{name}{row}" for name in ("x", "acc", "rate", "mean", "acc_up") for row in range(FEW)}
        taken |= {"x_tile", "kt", "norm_scale", "norm_shift", "inside", "at", "total", "value", "start", "d0"}
        once: list[str] = []
        step: list[str] = []
        values = []
        for number, (part, first) in enumerate(section.streams):
            suffix = "_up" if number else ""
            name = "n"
            if first:
                name = "n_up"
                lines.append(f"n_up = n + {first}")
            size = (self.shape.rows[part], self.shape.k)
            tile = Tile(self.shape.parse()[part], size, bk, name, "n_in" if ragged else "", "up_" if number else "")
            render, value = tile.renderer(self.target, self.shape.stored()[part], self.tables, taken)
            once += render.once
            step += render.lines
            values.append((f"w{suffix}", value))
        for name, value in values:
            value = f"tl.broadcast_to({value}, [{bn}, {bk}])"
            step.append(f"{name} = tl.where(k_in, {value}, 0.0)" if self.ragged_k else f"{name} = {value}")
        head = ["k = k0 + j" if self.looped else "k = j", *[f"k_in = k < {self.shape.k}"] * self.ragged_k]
        names = [name for name, _ in values]
        product = self._few(names, sums) if self.few else self._many(names, sums)
        if self.few and self.shape.prologue is not None:
            lines += prologue.statistics(self.shape.prologue, self.shape.k, bm)
        lines += [f"{name} = tl.zeros([{bn}, {bk if self.few else bm}], tl.float32)" for name in self._sums(sums)]
        body = [*step, *product]
        if self.looped:
            lines += [*once, self._loop(), *(f"    {line}" for line in (*head, *body))]
        else:
            lines += [*head, *once, *body]
        if self.few:
            lines += [self._rows_together(name) for name in sums]
        ending = finish(self.shape, section, sums, ragged=ragged)
        return [*lines, *split.add_up(self.shape, section, sums, self.split_k, ending, self.target, ragged=ragged)]

    def _loop(self) -> str:
        k, bk = self.shape.k, self.block_k
        if self.split_k == 1:
            return f"for k0 in range(0, {k}, {bk}):"
        part = k // self.split_k
        return f"for k0 in range(tl.program_id(2) * {part}, (tl.program_id(2) + 1) * {part}, {bk}):"

    def _sums(self, sums: list[str]) -> list[str]:
        """The names of the tensors that are added to in the loop."""
        return [f"{name}{row}" for name in sums for row in range(self.block_m)] if self.few else sums

    def _few(self, weights: list[str], sums: list[str]) -> list[str]:
        """A step of inputs for a few rows: f32 products, one sum for each place in the tile."""
        k, lines, mask = self.shape.k, list[str](), "k_in" if self.ragged_k else ""
        if self.shape.prologue is not None:
            lines += prologue.weights(self.shape.prologue, mask)
        wide = "" if self.shape.x == "f32" else ".to(tl.float32)"
        for row in range(self.block_m):
            inside = " & ".join([*[mask] * bool(mask), f"({row} < d0)"])
            at = f"x + {prologue.offset(row * k)}k"
            lines.append(f"x{row} = tl.load({at}, mask={inside}, other=0.0){wide}")
            if self.shape.prologue is not None:
                lines.append(f"x{row} = {prologue.apply(self.shape.prologue, f'x{row}', row)}")
            lines += [
                f"{y}{row} = tl.fma({w}, tl.broadcast_to(x{row}, {w}.shape), {y}{row})"
                for w, y in zip(weights, sums, strict=True)
            ]
        return lines

    def _rows_together(self, name: str) -> str:
        """[BN, BM] from the sums of each row."""
        columns = [f"tl.sum({name}{row}, 1, keep_dims=True)" for row in range(self.block_m)]
        made = columns[-1]
        for row in reversed(range(self.block_m - 1)):
            made = f"tl.where(m == {row}, {columns[row]}, {made})"
        return f"{name} = {made}"

    def _many(self, weights: list[str], sums: list[str]) -> list[str]:
        """A step of inputs as a product of matrices, weights on the left."""
        k, params = self.shape.k, {"compute": self.shape.compute}
        start = "k0 + " if self.looped else ""
        inside = f"(m < d0) & (kt < {k})" if self.ragged_k else "m < d0"
        wide = "" if self.shape.x == "f32" else ".to(tl.float32)"
        lines = [
            f"kt = {start}tl.arange(0, {self.block_k})[:, None]",
            f"x_tile = tl.load(x + m.to(tl.int64) * {k} + kt, mask={inside}, other=0.0){wide}",
            f"x_tile = {text.dot_operand('x_tile', params, self.target)}",
        ]
        return lines + [
            f"{y} = tl.dot({text.dot_operand(w, params, self.target)}, x_tile, {y})"
            for w, y in zip(weights, sums, strict=True)
        ]
