"""Linears over codes on both sides: dots of int8 or of 8-bit floats, with the scales factored out of the sums.

    y[m, n] = sum over g of x_scale[m, g] * scale[n, g] * (sum over the k of g of x_code[m, k] * (code[n, k] - zero))

The codes of x are made first, by the kernel itself or by one in front. Sums of int8 are exact. Codes of floats are
multiplied as they are where the machine can (capability 8.9 and above: it keeps fewer bits than f32 within a step), else as
f16, in which each has a place. Where columns with outliers stay floats (LLM.int8), steps that hold such a column multiply
those numbers too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Call, Extent, View
from qcompile.dims import Dim
from qcompile.format import format_from_json
from qcompile.formats.native import BLOCK, SHORTEST, Native, native_codes
from qcompile.lowering.base import Refuse
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.triton import activation_calls, before, schedule, split
from qcompile.lowering.triton.bytes import halves, packed, unpack
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.epilogue import finish
from qcompile.lowering.triton.linear import Request, Shape
from qcompile.lowering.triton.linear_params import LinearParams
from qcompile.lowering.triton.schedule import OPEN
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import DTYPES, interpreted, module
from qcompile.lowering.triton.tiles import Schedule
from qcompile.row_transforms import problem as row_problem
from qcompile.target import Target
from qcompile.transforms.llm_int8 import LlmInt8

TEMPLATE = "linear-native"
TIER = "native"

_E4M3 = '''
@triton.jit
def half(code):
    """The f16 worth 2^-8 of the e4m3 number whose bits are `code`."""
    bits = code.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
'''
_E5M2 = '''
@triton.jit
def half(code):
    """The e5m2 number whose bits are `code`, as f16."""
    return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
'''


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """`group` inputs share a scale of x (0: all); `most` is the greatest M (0: any); `split_k` programs share a sum.

    `outliers`: some columns stay floats.
    """

    group: int
    most: int
    split_k: int
    outliers: bool

    def problem(self) -> str:
        if found := super().problem():
            return found
        (layout, *others) = self.parts
        if others or not isinstance(layout, Native):
            return "formats"
        sizes = sorted((layout.group or self.k, self.group or self.k))
        whole = self.k % sizes[0] == 0 and sizes[1] % sizes[0] == 0
        long = sizes[0] == self.k or (sizes[0] & -sizes[0] >= SHORTEST and not self.outliers)
        packed = layout.bits == 8 or (layout.block == BLOCK and (sizes[0] == self.k or sizes[0] % BLOCK == 0))
        return outside(
            self,
            formats=packed and (layout.code == "int" or layout.bits == 8) and abs(layout.zero) < 128,
            group=self.group >= 0 and whole and long,
            most=0 <= self.most <= OPEN,
            split_k=self.split_k == 1 or _splits(self.k, sizes[0], self.split_k),
            outliers=not self.outliers or layout.code == "int",
            prologue=self.prologue is None,
        ) or before.problem(
            self.before, self.k, self.most or OPEN, "codes", layout.padded(self.k), self.k // (self.group or self.k)
        )


def _splits(k: int, segment: int, split_k: int) -> bool:
    """Whether K can be cut into so many parts, each of whole steps and whole runs of inputs that share their scales."""
    return schedule.may_split(k, split_k) and (segment == k or k // split_k % segment == 0)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    layout = params.parts[0]
    assert isinstance(layout, Native)
    padded = layout.padded(params.k)
    first, *rest = params.extents(m)
    out = [first._replace(dtype="i8" if layout.code == "int" else "u8", elements=m * padded), *rest]
    out.append(Extent("f32", m * (params.k // (params.group or params.k)), params.before is not None))
    out += [Extent(params.compute, m * padded), Extent("u8", padded)] if params.outliers else []
    return [*out, *split.extents(params.shape, m, params.split_k), *before.extents(params.before, m)]


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: x codes [M, padded], y, codes and scale of the weight, bias, one for each add or mul, the scales of x f32
    [M, groups]; with outliers their numbers in the compute dtype [M, padded] and their columns u8 [padded]; the scratch of
    `split`; those of `before`. Dims: M.
    """
    made = _Text(params, target).source()
    return before.joined(made, params.get("before"), ["x", "x_scale"], params["split_k"], target)


class _Text:
    """The text of one kernel: `left` says whether the weight is on the left of the dot, as it is for few rows."""

    def __init__(self, params: dict[str, Any], target: Target):
        layout = format_from_json(params["formats"][0])
        assert isinstance(layout, Native)
        self.shape, self.layout, self.target = Shape.of(params), layout, target
        self.outliers, self.most, self.split_k = params["outliers"], params["most"] or OPEN, params["split_k"]
        self.k = self.shape.k
        self.padded = layout.padded(self.k)
        self.x_group: int = params["group"] or self.k
        self.w_group = layout.group or self.k
        self.segment = min(self.x_group, self.w_group)
        self.per = 8 // layout.bits
        self.tile = self._tile()
        self.left = self.most <= 32
        self.exact = layout.code == "int"
        self.native = self.exact or target.fp8

    @property
    def cut(self) -> bool:
        """Whether scales change along K."""
        return self.segment < self.k

    def _tile(self) -> Schedule:
        kind = "int8" if self.layout.code == "int" else "fp8"
        (section,) = self.shape.sections()
        found = schedule.choose(
            kind, section.rows, self.k, self.most, self.layout.bits, self.target.capability,
            group=self.segment if self.segment < self.k else 0, split_k=self.split_k,
            streams=len(section.streams),
        )  # fmt: skip
        step = self.layout.block if self.per > 1 else found.block_k
        if self.segment < self.k:
            step = min(step, self.segment & -self.segment)
        warps = found.warps
        if self.segment < self.k:  # a step's sums, and those of all: twice the registers
            warps = max(warps, min(found.block_n * found.block_m // 1024, 8))
        return Schedule(found.block_n, found.block_m, step, warps, found.stages)

    def source(self) -> Source:
        (section,), tile = self.shape.sections(), self.tile
        pointers = self.shape.pointers()
        names = [pointer.name for pointer in pointers] + ["x_scale", *(["rest", "columns"] if self.outliers else [])]
        types = ["i8" if self.exact else "u8", *(pointer.dtype for pointer in pointers[1:]), "f32"]
        types += [self.shape.compute, "u8"] if self.outliers else []
        if self.split_k > 1:
            names += [pointer.name for pointer in split.POINTERS]
            types += [pointer.dtype for pointer in split.POINTERS]
        self.streams = [first for _, first in section.streams]
        self.rows = section.rows
        lines = [*self._places(), *(self._segments() if self.cut else self._whole())]
        sums = [f"sum{i}" for i in range(len(self.streams))]
        ragged = self.rows % self.tile.block_n != 0
        ending = finish(self.shape, section, sums, ragged=ragged)
        lines += split.add_up(self.shape, section, sums, self.split_k, ending, self.target, ragged=ragged)
        about = (
            "y[m, n] = sum of x_code[m, k] * (code[n, k] - zero) * x_scale * scale\n\n"
            f"{self.layout}\n{tile}; the weight is on the {'left' if self.left else 'right'} of the dot."
        )
        portable = not self.native and self.target.isa != "ptx"
        helper = {"f8e4m3": _E4M3, "f8e5m2": _E5M2}[self.layout.code] if portable else ""
        body = "\n".join(lines)
        text = module("linear_native", about, names, 1, body, self.target, helper + functions(body))
        m_tiles: Dim = f"(d0 + {tile.block_m - 1})//{tile.block_m}"
        grid: tuple[Dim, Dim, Dim] = (-(-section.rows // tile.block_n), m_tiles, self.split_k)
        return Source(text, "linear_native", tuple(types), 1, grid, tile.warps, tile.stages)

    # -- places --

    def _places(self) -> list[str]:
        """Rows beyond the last read the last one's data, and write none."""
        n, m = ("[:, None]", "[None, :]") if self.left else ("[None, :]", "[:, None]")
        k = ("[None, :]", "[:, None]") if self.left else ("[:, None]", "[None, :]")
        tile, bytes_ = self.tile, self.tile.block_k // self.per
        lines = [
            f"n = (tl.program_id(0) * {tile.block_n} + tl.arange(0, {tile.block_n})){n}",
            f"m = (tl.program_id(1) * {tile.block_m} + tl.arange(0, {tile.block_m})){m}",
            "row = tl.minimum(m, d0 - 1).to(tl.int64)",
            f"j = tl.arange(0, {bytes_})",
            f"x_at = row * {self.padded} + j{k[1]}",
        ]
        for i, first in enumerate(self.streams):
            at = f"tl.minimum(n, {self.rows - 1})" + (f" + {first}" if first else "")
            lines.append(f"row{i} = ({at}).to(tl.int64)")
            lines.append(f"w_at{i} = row{i} * {self.padded // self.per} + j{k[0]}")
        return lines

    def _zeros(self, dtype: str) -> str:
        sizes = (self.tile.block_n, self.tile.block_m) if self.left else (self.tile.block_m, self.tile.block_n)
        return f"tl.zeros({sizes}, {dtype})"

    # -- sums --

    def _whole(self) -> list[str]:
        """One sum over all of K, scaled once."""
        lines = [
            f"acc{i} = {self._zeros('tl.int32' if self.exact else 'tl.float32')}" for i in range(len(self.streams))
        ]
        if self.outliers:
            lines += [f"float{i} = {self._zeros('tl.float32')}" for i in range(len(self.streams))]
        lines.append(f"for k0 in range({self._part(self.padded)}, {self.tile.block_k}):")
        lines += [f"    {line}" for line in self._step("k0", self.padded % self.tile.block_k != 0)]
        lines.append("x_by = tl.load(x_scale + row)")
        for i in range(len(self.streams)):
            total = f"acc{i}.to(tl.float32) * x_by" + (f" + float{i}" if self.outliers else "")
            lines.append(f"sum{i} = ({total}) * {self._factor(f'tl.load(w_scale + {self._scale_row(i)})')}")
        return lines

    def _segments(self) -> list[str]:
        """A sum over each run of inputs that share their scales."""
        count, steps = self.k // self.segment, self.segment // self.tile.block_k
        lines = [f"sum{i} = {self._zeros('tl.float32')}" for i in range(len(self.streams))]
        lines.append(f"for s in range({self._part(count)}):")
        inner = [
            f"acc{i} = {self._zeros('tl.int32' if self.exact else 'tl.float32')}" for i in range(len(self.streams))
        ]
        for step in range(steps):
            inner += self._step(f"(s * {self.segment} + {step * self.tile.block_k})", False)
        x_groups, w_groups = self.k // self.x_group, self.k // self.w_group
        inner.append(f"x_by = tl.load(x_scale + row * {x_groups} + s // {self.x_group // self.segment})")
        for i in range(len(self.streams)):
            at = f"{self._scale_row(i)} * {w_groups} + s // {self.w_group // self.segment}"
            by = self._factor(f"(x_by * tl.load(w_scale + {at}))")
            inner.append(f"sum{i} = tl.fma(acc{i}.to(tl.float32), {by}, sum{i})")
        return [*lines, *(f"    {line}" for line in inner)]

    def _part(self, count: int) -> str:
        """The start and the end of this program's part of so many steps."""
        part = count // self.split_k
        return f"0, {count}" if self.split_k == 1 else f"tl.program_id(2) * {part}, (tl.program_id(2) + 1) * {part}"

    def _scale_row(self, i: int) -> str:
        return f"row{i}" if self.layout.rows == 1 else f"row{i} // {self.layout.rows}"

    def _factor(self, scale: str) -> str:
        """The scale, and what the f16 of both codes lack."""
        return f"({scale} * 65536.0)" if not self.native and self.layout.code == "f8e4m3" else scale

    def _step(self, k0: str, ragged: bool) -> list[str]:
        """The dots of one step; `ragged`: the last one passes the end of the rows."""
        width, lines = self.tile.block_k // self.per, list[str]()
        w_mask, x_mask = self._mask(k0, ragged, 0), self._mask(k0, ragged, 1)
        start = k0 if self.per == 1 else f"{k0} // {self.per}"
        for i in range(len(self.streams)):
            lines.append(f"w{i} = tl.load(w_codes + w_at{i} + {start}{w_mask}, eviction_policy='evict_first')")
        for plane in range(self.per):
            at = f"{k0} + {plane * width}" if plane else k0
            lines.append(f"xs = {self._operand(f'tl.load(x + x_at + {at}{x_mask})')}")
            for i in range(len(self.streams)):
                code = self._operand(f"w{i}") if self.per == 1 else self._unpacked(i, plane)
                lines.append(f"acc{i} = {self._dot(code, 'xs', f'acc{i}')}")
        if self.outliers:
            lines += self._floats(k0, ragged)
        return lines

    def _mask(self, k0: str, ragged: bool, side: int) -> str:
        if not ragged:
            return ""
        along = ("[None, :]", "[:, None]") if self.left else ("[:, None]", "[None, :]")
        return f", mask=j{along[side]} < {self.padded} - {k0}, other=0"

    def _operand(self, codes: str) -> str:
        """Loaded codes as the dot takes them."""
        if self.exact:
            return codes
        if self.native:
            return f"{codes}.to({'tl.float8e4nv' if self.layout.code == 'f8e4m3' else 'tl.float8e5'}, bitcast=True)"
        if self.target.isa == "ptx":
            return packed(halves(self.layout.code), "=r,=r,r", codes, "tl.float16")
        return f"half({codes})" + (".to(tl.float32)" if interpreted(self.target) else "")

    def _unpacked(self, i: int, plane: int) -> str:
        """The codes of one plane of packed bytes."""
        bits = self.layout.bits
        if self.target.isa == "ptx":
            return packed(unpack(bits, plane, self.layout.zero), "=r,r", f"w{i}", "tl.int8")
        moved = f"(w{i} >> {plane * bits})" if plane else f"w{i}"
        code = f"({moved} & {(1 << bits) - 1}).to(tl.int8)"
        return f"({code} - {self.layout.zero}).to(tl.int8)" if self.layout.zero else code

    def _dot(self, w: str, x: str, acc: str) -> str:
        a, b = (w, x) if self.left else (x, w)
        if self.exact:
            return f"tl.dot({a}, {b}, {acc}, out_dtype=tl.int32)"
        if self.native:  # Hopper's own sums keep about 14 bits: they join those in f32 every 128 inputs at the latest
            return f"tl.dot({a}, {b}, {acc}, max_num_imprecise_acc={min(self.tile.block_k, 128)})"
        return (
            f"tl.dot({a}, {b}, {acc})"
            if not interpreted(self.target)
            else f"tl.dot({a}, {b}, {acc}, input_precision='ieee')"
        )

    def _floats(self, k0: str, ragged: bool) -> list[str]:
        """The part of columns with outliers, of which most steps have none."""
        mask = f", mask=j < {self.padded} - {k0}, other=0" if ragged else ""
        found = f"tl.max(tl.load(columns + {k0} + j{mask}), 0).to(tl.int32)"
        inner = [f"kept = {self._dot_operand(f'tl.load(rest + x_at + {k0}{self._mask(k0, ragged, 1)})')}"]
        for i in range(len(self.streams)):
            w = self._dot_operand(f"w{i}")
            a, b = (w, "kept") if self.left else ("kept", w)
            inner.append(f"float{i} = tl.dot({a}, {b}, float{i})")
        return [f"if {found} != 0:", *(f"    {line}" for line in inner)]

    def _dot_operand(self, exact: str) -> str:
        """A tensor of numbers that the compute dtype has, in it."""
        return f"{exact}.to({'tl.float32' if interpreted(self.target) else DTYPES[self.shape.compute]})"


def calls(request: Request, most: int | None) -> list[Call]:
    """The codes of x, and the linear over them; Refuse where the weight or what happens to x has no such form."""
    spec, formats = request.spec, request.shape.parse()
    layout, transforms = formats[0], spec.transforms()
    if len(formats) > 1 or not isinstance(layout, Native):
        raise Refuse(f"a weight of format '{layout.kind}' is no rows of codes")
    found = native_codes(transforms)
    if isinstance(found, str):
        raise Refuse(found)
    if problem := row_problem(transforms, spec.k, codes=True):
        raise Refuse(problem)
    kind, group = found
    if kind != layout.code:
        raise Refuse(f"its codes are {layout.code}, those of its inputs {kind}")
    codes, made, own = _round(request, layout, group, most)
    shape = _bare(request.shape)
    bucket = next((bound for bound in schedule.BUCKETS[:-1] if most is not None and most <= bound), 0)
    split_k = schedule.split(shape.n_out, shape.k, bucket or schedule.OPEN)
    split_k = split_k if _splits(shape.k, min(group or shape.k, layout.group or shape.k), split_k) else 1
    scratch = split.scratch(request.ctx, shape, request.m, split_k)
    params = shape.params(group=group, most=bucket, split_k=split_k, outliers=len(made) > 2)
    extras = [*([request.bias] if request.bias else []), *request.extras]
    args = [made[0], request.y, *request.stored[0], *extras, *made[1:]]
    written = (1, *range(len(args), len(args) + len(scratch)))
    args += scratch
    if own is not None:
        written = (0, *written, args.index(made[1]))
        params, args = params | {"before": own.params}, [*args, *own.read]
    return [*codes, request.ctx.call(TEMPLATE, params, args, (request.m,), written)]


def _bare(shape: Shape) -> Shape:
    """The shape without the norm, which the codes of x have had."""
    return Shape(shape.formats, shape.rows, shape.k, shape.bias, None, shape.epilogue, shape.compute)


def _round(
    request: Request, layout: Native, group: int, most: int | None
) -> tuple[list[Call], list[View], before.Before | None]:
    """The calls that round x, and what they write: codes and scales, and the floats and columns of outliers.

    Or, without calls, what the kernel does itself to write codes and scales.
    """
    ctx, spec, padded = request.ctx, request.spec, layout.padded(request.spec.k)
    last = spec.transforms()[-1]
    found = [ctx.temp((request.m, padded), "i8" if layout.code == "int" else "u8")]
    found.append(ctx.temp((request.m, spec.k // (group or spec.k)), "f32"))
    if not activation_calls.apart(request, most):
        return [], found, activation_calls.within(request, "codes", padded)
    if not isinstance(last, LlmInt8) or last.threshold == 0:
        return activation_calls.rows(request, "codes", padded, found, most), found, None
    found.append(ctx.temp((request.m, padded), request.shape.compute))
    columns = ctx.temp((padded,), "u8")
    return activation_calls.rows(request, "codes", padded, found, most, columns), [*found, columns], None
