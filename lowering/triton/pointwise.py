"""The text of pointwise kernels for GPUs: every program takes a tile of the rows of the innermost dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.dims import Dim
from qcompile.expr import FLOATS
from qcompile.lowering import pointwise
from qcompile.lowering.extents import outside, require
from qcompile.lowering.pointwise import TEMPLATE, formula, literal
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.memory import convert, load, pointer, store, value_type
from qcompile.lowering.triton.scalar_ops import OPS, constant
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module, multiple_of
from qcompile.target import Target

TILE = 1024  # elements of one program


@dataclass(frozen=True)
class Params(pointwise.Params):
    """And what is known of addresses. `columns`: the width of a tile; `multiple`: a power of two that divides the innermost
    size; for each operand, `rows`: a power of two that divides the number of every row's first element, counted from
    an address that is a multiple of 16 bytes; `starts`: whether the first element's number is among the dims."""

    columns: int = TILE
    multiple: int = 1
    rows: tuple[int, ...] = ()
    starts: tuple[bool, ...] = ()

    def problem(self) -> str:
        count, powers = len(self.inputs) + len(self.outputs), (1, 2, 4, 8, 16)
        return super().problem() or outside(
            self,
            columns=self.columns in [1 << i for i in range(11)],
            multiple=self.multiple in powers,
            rows=len(self.rows) == count and all(item in powers for item in self.rows),
            starts=len(self.starts) == count,
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    given = sum(params.starts)
    require(len(dims) >= given, "a kernel is called with the wrong number of dims", len(dims))
    own = dims[: len(dims) - given]
    places = iter(dims[len(own) :])
    found = pointwise.extents(params, own, threads)
    rows = 1
    for size in dims[: params.dims - 1]:
        rows *= size
    require(rows < 2**31, "a kernel is called for too many rows", rows)
    starts = [next(places) if start else 0 for start in params.starts]
    require(min(starts) >= 0, "a kernel is called with a negative dim", starts)
    return [
        Extent(item.dtype, start + item.elements if item.elements else 0, item.written)
        for item, start in zip(found, starts, strict=True)
    ]


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: inputs, outputs. dims: those of the CPU's kernel, then the starts that are given."""
    operands = [*params["inputs"], *params["outputs"]]
    dtypes = [dtype for dtype, *_ in operands]
    names = [f"x{i}" for i in range(len(params["inputs"]))] + [f"y{i}" for i in range(len(params["outputs"]))]
    count, columns = params["dims"], params["columns"]
    tile = max(TILE // columns, 1) if count > 1 else 1
    body = _places(params, count, columns, tile)
    at = count
    rests: list[list[str]] = []  # the strides of each operand
    for _, form, *_ in operands:
        length = count - 1 + (form == "apart")
        rests.append([f"d{at + i}" for i in range(length)])
        at += length
    addresses = []
    for i, (name, (_, form, *_)) in enumerate(zip(names, operands, strict=True)):
        start = f"d{at}" if params["starts"][i] else ""
        at += params["starts"][i]
        address = _address(name, form, rests[i], start, params["rows"][i], count)
        body += address[:-1]
        addresses.append(address[-1])
    body += _values(params, addresses, count, columns, tile, target)
    text = "\n".join(body)
    about = "\n".join(["Pointwise, on every element of the strided arrays x to the arrays y:", "", *formula(params)])
    about += f"\n\nA program takes {f'{tile} rows of {columns} elements' if count > 1 else f'{columns} elements'}."
    rows: Dim = "*".join(f"d{i}" for i in range(count - 1)) or 1
    n = f"d{count - 1}"
    grid = f"({n} + {columns - 1})//{columns}"
    grid = grid if count == 1 else f"({rows} + {tile - 1})//{tile}*({grid})"
    source = module(TEMPLATE, about, names, at, text, target, functions(text))
    return Source(source, TEMPLATE, tuple(pointer(dtype) for dtype in dtypes), at, (grid, 1, 1), fusion=False)


def _places(params: dict[str, Any], count: int, columns: int, tile: int) -> list[str]:
    """Statements: which elements the program has. `col` along the innermost dimension, `i0`, `i1` ... along the others."""
    n = f"n = {multiple_of(f'd{count - 1}', params['multiple'])}"
    if count == 1:
        return [n, f"col = tl.program_id(0).to(tl.int64) * {columns} + tl.arange(0, {columns})", "live = col < n"]
    lines = [
        n,
        f"blocks = (n + {columns - 1}) // {columns}",
        f"row = tl.program_id(0) // blocks * {tile} + tl.arange(0, {tile})[:, None]",
        f"col = tl.program_id(0) % blocks * {columns} + tl.arange(0, {columns})[None, :]",
        f"inside = row < {' * '.join(f'd{i}' for i in range(count - 1))}",
        "live = inside & (col < n)",
    ]
    for i in reversed(range(1, count - 1)):
        lines += [f"i{i} = (row % d{i}).to(tl.int64)", f"row = row // d{i}"]
    return [*lines, "i0 = row.to(tl.int64)"]


def _address(name: str, form: str, strides: list[str], start: str, multiple: int, count: int) -> list[str]:
    """Statements, and at the end the expression of the addresses of an operand's elements."""
    terms = [f"i{i} * {stride}" for i, stride in enumerate(strides[: count - 1])]
    terms += [start] if start else []
    lines: list[str] = []
    if multiple > 1 and form == "unit":
        known = strides[: count - 1] + ([start] if start else [])
        lines += [f"{item} = {multiple_of(item, multiple)}" for item in known]
    inner = {"same": "", "unit": "col", "apart": f"col.to(tl.int64) * {strides[-1]}" if strides else ""}[form]
    terms += [inner] if inner else []
    return [*lines, " + ".join([name, *terms])]


def _values(
    params: dict[str, Any], addresses: list[str], count: int, columns: int, tile: int, target: Target
) -> list[str]:
    """Statements: the tile read, computed and written; v0, v1 ... are numbered as in the params."""
    lines: list[str] = []
    dtypes: list[str] = []
    for i, (dtype, form) in enumerate(params["inputs"]):
        # Without outer dimensions an operand that is the same everywhere is one element, which is there if any is.
        mask = "live" if form != "same" else "" if count == 1 else "inside"
        lines.append(f"v{i} = {load(addresses[i], dtype, mask)}")
        dtypes.append(dtype)
    shape = f"[{columns}]" if count == 1 else f"[{tile}, {columns}]"
    for i, (name, dtype, refs) in enumerate(params["ops"], len(dtypes)):
        lines.append(f"v{i} = {_operation(name, dtype, refs, dtypes, shape, target)}")
        dtypes.append(dtype)
    for i, (dtype, _, result) in enumerate(params["outputs"], len(params["inputs"])):
        value = f"tl.broadcast_to(v{result}, {shape})"
        lines.append(store(addresses[i], value, dtype, target, "live"))
    return lines


def _operation(name: str, dtype: str, refs: list[Any], dtypes: list[str], shape: str, target: Target) -> str:
    if name == "index":
        return "col.to(tl.int64)"
    if name == "to":
        return convert(f"v{refs[0]}", dtypes[refs[0]], dtype, target)
    kinds = [dtypes[ref] for ref in refs if isinstance(ref, int)]
    kind = dtype if name in ("where", "full") else kinds[0]
    args = [f"v{ref}" if isinstance(ref, int) else constant(literal(ref["number"]), kind) for ref in refs]
    if name == "full":
        value = (
            f"tl.full({shape}, {args[0] if kind in FLOATS else int(literal(refs[0]['number']))}, {value_type(kind)})"
        )
        return convert(value, "f32", dtype, target) if dtype in FLOATS else value
    return OPS[name](kind, *args)
