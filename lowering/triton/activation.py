"""Rows of x as a linear wants them: the template "activation", which normalises, transforms and rounds them.

One program makes one row; it holds it in its registers, or a part of it where blocks of it are multiplied by a matrix. The
result is rows of codes with their scales, or of floats. Where columns with outliers stay floats (LLM.int8), those are a second
result: their numbers, and zeros in all other columns.
Linear kernels of few rows do the same for themselves (`before`), with less of a row in their registers.

Which columns these are depends on all rows, as the largest |x| of a call does, where there is one scale for all. With few
rows each program looks at all of them; else other kernels have looked before, "outlier-columns" or this one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qcompile.artifact import Extent
from qcompile.formats.native import native_codes
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.linear_steps import Norm
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import cast, module
from qcompile.lowering.triton.transform_functions import functions
from qcompile.lowering.triton.transforms import Row, over
from qcompile.row_transforms import LONGEST, TOGETHER, neighbours, problem, reads_all_rows
from qcompile.target import Target
from qcompile.transform import Transform, transform_from_json
from qcompile.transforms.linear import Permute, Rotate
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_float import RoundFloat
from qcompile.transforms.round_int import RoundInt

TEMPLATE = "activation"
LEAST = TOGETHER  # inputs at once: what depends on neighbours has room
ROTATED = 4096  # inputs of a row whose blocks are multiplied by a matrix at once
Out = Literal["codes", "f32", "bf16", "f16"]


@dataclass(frozen=True)
class Params:
    """`transforms` (JSON) of rows of `k` inputs behind the norm `prologue`; "codes" or floats come `out`.

    Rows of codes are filled with zeros to `padded` of them. `whole` says who looks at all rows, where the last transform depends
    on them: "self", each program, or "given", another kernel. Outliers stay floats of dtype `rest`. `most`: the largest |y| of
    each row is a result too.
    """

    k: int
    padded: int
    prologue: Norm | None
    transforms: tuple[dict[str, Any], ...]
    out: Out
    whole: Literal["none", "self", "given"] = "none"
    rest: Literal["bf16", "f16"] = "bf16"
    most: bool = False

    @functools.cached_property
    def steps(self) -> tuple[Transform, ...]:
        return tuple(transform_from_json(data) for data in self.transforms)

    @property
    def outliers(self) -> bool:
        """Whether columns with outliers stay floats."""
        return bool(self.steps) and isinstance(self.steps[-1], LlmInt8) and self.whole != "none"

    @property
    def given(self) -> list[tuple[str, str]]:
        """The name and dtype of what another kernel has found in all rows."""
        if self.whole != "given":
            return []
        return [("columns", "u8")] if self.outliers else [("row_most", "f32")]

    @property
    def groups(self) -> int:
        """Scales of a row of codes."""
        found = native_codes(self.steps)
        assert not isinstance(found, str)
        return -(-self.k // found[1]) if found[1] else 1

    def problem(self) -> str:
        whole = bool(self.steps) and reads_all_rows(self.steps[-1])
        found = native_codes(self.steps) if self.out == "codes" else ""
        return outside(
            self,
            k=1 <= self.k <= LONGEST,
            padded=self.k <= self.padded < self.k + 128 and (self.out == "codes" or self.padded == self.k),
            whole=whole == (self.whole != "none"),
            out=not (isinstance(found, str) and found),
            most=not self.most or self.out == "f32",
        ) or problem(self.steps, self.k, codes=self.out == "codes")


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    out = [Extent("f32", m * params.k), *Norm.extents(params.prologue, params.k)]
    for each in params.steps:
        out += [Extent(stored.dtype, _count(stored.shape)) for stored in each.stored(params.k)]
    out += [Extent(dtype, params.padded if dtype == "u8" else m) for _, dtype in params.given]
    out.append(Extent(_element(params), m * params.padded, True))
    if params.out == "codes":
        out.append(Extent("f32", m * params.groups, True))
    if params.outliers:
        out.append(Extent(params.rest, m * params.padded, True))
        out += [Extent("u8", params.padded, True)] * (params.whole == "self")
    return [*out, Extent("f32", m, True)] if params.most else out


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _element(params: Params) -> str:
    """The dtype of the first result."""
    if params.out != "codes":
        return params.out
    return "i8" if native_codes(params.steps)[0] == "int" else "u8"


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: x f32 [M, K], the norm's tensors, those of the transforms; if given the columns u8 [padded] or the largest |x| of
    each row f32 [M]; then what is written: codes [M, padded] and scales f32 [M, groups], or rows; floats of the columns with
    outliers [M, padded], and which columns those are, if the programs find them; the largest |y| of each row. Dims: M.
    """
    return Text(parsed(params), target).source()


def parsed(params: dict[str, Any]) -> Params:
    """The parameters as a spec has them."""
    norm = Norm(**params["prologue"]) if params["prologue"] else None
    return Params(**{**params, "prologue": norm, "transforms": tuple(params["transforms"])})


class Text:
    """The text that makes rows.

    `width`: a row is walked so many inputs at a time (0: it is held as a whole), and of the `parts` equal parts of the results
    a program writes the one that is its number on the third axis.
    """

    def __init__(self, p: Params, target: Target, width: int = 0, parts: int = 1):
        self.rotates = any(isinstance(each, Rotate) for each in p.steps)
        self.block = max(1 << (p.padded // parts - 1).bit_length(), 16)
        if self.rotates and not width:
            width = min(max(self.block, LEAST), ROTATED)
        if width:
            self.block = min(max(self.block, LEAST), width)
        self.p, self.target, self.width, self.parts = p, target, width, parts
        self.norms = ["norm_weight", "norm_bias"][: 0 if p.prologue is None else 1 + (p.prologue.op == "layer_norm")]
        self.stored = [[f"t{i}_{stored.name}" for stored in each.stored(p.k)] for i, each in enumerate(p.steps)]

    def source(self) -> Source:
        p, arguments = self.p, [*self.read(), *self.written()]
        lines = ["m = tl.program_id(0).to(tl.int64)", *self.all_rows(), *self.row()]
        about = f"{self.summary()}\n\nOne program a row of {p.k} inputs."
        names = [name for name, _ in arguments]
        text = module("activation", about, names, 1, "\n".join(lines), self.target, functions("\n".join(lines)))
        warps = min(max(self.block // 1024, 1), 16)
        warps = 1 << (warps - 1).bit_length()
        return Source(
            text, "activation", tuple(dtype for _, dtype in arguments), 1, ("d0", 1, 1), warps, 1, fusion=False
        )

    def all_rows(self) -> list[str]:
        """The statements in front of all rows: what the last transform wants to know of them."""
        p, lines = self.p, [] if self.width else [f"at = tl.arange(0, {self.block})"]
        if p.whole == "self":
            return lines + (self._columns() if p.outliers else self._largest())
        if p.outliers:
            return [*lines, f"column = tl.load(columns + at, mask=at < {p.padded}, other=0) != 0"]
        return lines + (_largest_of_rows() if p.whole == "given" else [])

    def row(self) -> list[str]:
        """The statements that make and store row m."""
        row, part = self._row("m"), self.p.padded // self.parts
        store = self._codes(row) if self.p.out == "codes" else self._rows(row)
        first, last = "0", str(part)
        if self.parts > 1:
            first, last = f"tl.program_id(2) * {part}", f"(tl.program_id(2) + 1) * {part}"
            whole = max((neighbours(each) for each in self.p.steps), default=1)
            first = f"{first} // {whole} * {whole}" if part % whole else first
        return self._walked(row, store, f"{first}, {last}", self.block)

    def _walked(self, row: Row, lines: Sequence[str], bounds: str, width: int) -> list[str]:
        """The statements of a row, and `lines` with them, over the inputs within `bounds`."""
        if not self.width:
            return [*row.lines, *lines]
        return [*row.first, *over(bounds, width, [*row.lines, *lines])]

    def read(self) -> list[tuple[str, str]]:
        """The names and dtypes of what is read."""
        p = self.p
        out = [("x", "f32"), *((name, "f32") for name in self.norms)]
        for each, names in zip(p.steps, self.stored, strict=True):
            out += [(name, stored.dtype) for name, stored in zip(names, each.stored(p.k), strict=True)]
        return out + p.given

    def written(self) -> list[tuple[str, str]]:
        """The names and dtypes of the results."""
        p = self.p
        out = [("codes" if p.out == "codes" else "y", _element(p))]
        out += [("scales", "f32")] * (p.out == "codes") + [("rest", p.rest)] * p.outliers
        out += [("columns", "u8")] * (p.outliers and p.whole == "self")
        return out + [("row_most", "f32")] * p.most

    def summary(self) -> str:
        """What the rows are."""
        steps = [self.p.prologue.op] if self.p.prologue else []
        return "y[m, :] = " + ", then ".join([*steps, *(each.summary() for each in self.p.steps)]) + " of x[m, :]"

    @property
    def _permuted(self) -> bool:
        return bool(self.p.steps) and isinstance(self.p.steps[0], Permute)

    def _row(self, m: str, last: bool = True) -> Row:
        """The text of row m; without its last transform if not `last`, or where that gives codes."""
        p, at = self.p, "each" if self.rotates else "at"
        place = "place" if self._permuted else at
        row = Row(p.k, self.target, self.width, at, lines=[f"inside = {at} < {p.k}"])
        if self._permuted:
            row.lines.append(f"place = tl.load(t0_order + {at}, mask=inside, other=0).to(tl.int32)")
        row.set(f"tl.load(x + {m} * {p.k} + {place}, mask=inside, other=0)")
        if p.prologue is not None and p.prologue.op == "rms_norm":
            row.norm(p.prologue.eps, "norm_weight", f" + {p.prologue.offset!r}" if p.prologue.offset else "", place)
        elif p.prologue is not None:
            row.layer_norm(p.prologue.eps, "norm_weight", "norm_bias", place)
        for each, names in list(zip(p.steps, self.stored, strict=True))[: None if last and p.out != "codes" else -1]:
            row.apply(each, names)
        return row

    def _rows(self, row: Row) -> list[str]:
        value = cast(row.value, self.p.out, self.target)
        most = [f"tl.store(row_most + m, largest({row.value}, 0, False))"] if self.p.most else []
        return [f"tl.store(y + m * {self.p.k} + at, {value}, mask=inside)", *most]

    def _codes(self, row: Row) -> list[str]:
        p, last = self.p, self.p.steps[-1]
        lines = list[str]()
        if isinstance(last, LlmInt8):
            made = row.outliers(last, "column" if p.outliers else "")
        if p.outliers:
            rest = f"tl.where(column, {row.value}, 0.0)"
            lines.append(
                f"tl.store(rest + m * {p.padded} + at, {cast(rest, p.rest, self.target)}, mask=at < {p.padded})"
            )
        if isinstance(last, RoundInt | RoundFloat):
            made = row.codes(last, self.stored[-1])
        code = row.bits(made.code, last.element) if isinstance(last, RoundFloat) else f"{made.code}.to(tl.int8)"
        codes = f"flat({code})" if made.size else code
        # Groups fill up with zeros, whose code is 0.
        lines.append(f"tl.store(codes + m * {p.padded} + at, {codes}, mask=at < {p.padded})")
        if made.size:
            start = f"start // {made.size} + " if self.width else ""
            lines.append(f"group = {start}tl.arange(0, {self.block // made.size})")
            lines.append(f"tl.store(scales + m * {p.groups} + group, flat({made.scale}), mask=group < {p.groups})")
        else:
            lines.append(f"tl.store(scales + m, {made.scale})")
        return lines

    def _columns(self) -> list[str]:
        """Finds the columns that hold an outlier in any row."""
        p, last = self.p, self.p.steps[-1]
        assert isinstance(last, LlmInt8)
        row = self._row("r", last=False)
        outlier = row.is_outlier(last)
        lines = [f"found = tl.zeros(({self.block},), tl.int32)", "for r in range(0, d0):"]
        lines += [f"    {line}" for line in (*row.lines, f"found = found | {outlier}.to(tl.int32)")]
        store = f"tl.store(columns + at, found.to(tl.uint8), mask=at < tl.where(m == 0, {p.padded}, 0))"
        return [*lines, "column = found != 0", store]

    def _largest(self) -> list[str]:
        """Finds the largest |x| of all rows; NaN, whose bits are the greatest, where there is one."""
        row = self._row("r", last=False)
        most = f"bits = tl.maximum(bits, {row.value}.to(tl.int32, bitcast=True) & 0x7FFFFFFF)"
        width = self.width or self.block
        lines = [f"bits = tl.zeros(({width},), tl.int32)", "for r in range(0, d0):"]
        return [*lines, *(f"    {line}" for line in self._walked(row, [most], f"0, {self.p.k}", width)), _WHOLE]


_WHOLE = "whole = tl.max(bits, 0).to(tl.float32, bitcast=True)"


def _largest_of_rows() -> list[str]:
    """The largest of the numbers that were found for each row."""
    lines = ["r = tl.arange(0, 1024)", "bits = tl.zeros((1024,), tl.int32)", "for r0 in range(0, d0, 1024):"]
    lines.append("    found = tl.load(row_most + r0 + r, mask=r < d0 - r0, other=0).to(tl.int32, bitcast=True)")
    return [*lines, "    bits = tl.maximum(bits, found)", _WHOLE]
