"""The text of pointwise kernels: one row of the innermost dimension at a time, a register of elements at a time."""

from __future__ import annotations

from typing import Any

from qcompile.dtypes import DTYPES
from qcompile.lowering.mlir.memory import ELEMENTS, FLOATS, convert, gather, load, scatter, store, tiles
from qcompile.lowering.mlir.scalar_ops import OPS
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.lowering.pointwise import TEMPLATE, Params, extents, formula, literal
from qcompile.target import Target

__all__ = ["Params", "emit", "extents"]

BLOCK = 4096  # elements of the innermost dimension that one thread takes at a time
_ABOUT = "Pointwise: one row of the innermost dimension at a time, rows and blocks of them shared by the threads."


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: inputs, outputs. dims: sizes, then for each of them the strides but the last, then the
    last if its form is "apart" ("unit": 1, "same": 0)."""
    operands = [*params["inputs"], *params["outputs"]]
    t = Text(TEMPLATE.replace("-", "_"), "\n".join([_ABOUT, *formula(params)]))
    count, lanes = params["dims"], target.lanes
    sizes = [t.dim(i) for i in range(count)]
    at, outer, inner = count, list[list[Value]](), list[Value | None]()
    for _dtype, form, *_ in operands:
        outer.append([t.dim(at + i) for i in range(count - 1)])
        at += count - 1
        inner.append(t.dim(at) if form == "apart" else None)
        at += form == "apart"
    pointers = [t.arg(i) for i in range(len(operands))]
    n = sizes[-1]
    blocks = (n + (BLOCK - 1)) // BLOCK
    rows = t.constant(1, "i64")
    for size in sizes[:-1]:
        rows = rows * size
    first, end = t.share(rows * blocks)
    with t.loop(first, end) as item:
        assert isinstance(item, Value)
        row, start = item // blocks, item % blocks * BLOCK
        places = _unravel(row, sizes[:-1])
        bases = []
        for (dtype, *_), pointer, steps in zip(operands, pointers, outer, strict=True):
            for place, step in zip(places, steps, strict=True):
                pointer = _move(pointer, place * step, dtype)
            bases.append(pointer)
        fixed = {
            i: load(t, bases[i], 0, dtype) for i, (dtype, form) in enumerate(params["inputs"]) if form == "same"
        }  # fmt: skip
        for i, mask in tiles(t, (n - start).least(BLOCK), lanes):
            _body(t, params, lanes, bases, inner, fixed, start + i, mask)
    return t.finish()


def _body(
    t: Text, params: dict[str, Any], lanes: int, bases: list[Value], inner: list[Value | None],
    fixed: dict[int, Value], at: Value, mask: Value | None,
) -> None:  # fmt: skip
    """One vector of elements: read, compute, write."""
    every = t.constants([1] * lanes, "i1") if mask is None else mask
    numbers = t.broadcast(at, lanes) + t.constants(range(lanes), "i64")
    values: list[Value] = []
    dtypes: list[str] = []
    for i, (dtype, form) in enumerate(params["inputs"]):
        step = inner[i]
        if form == "same":
            value = t.broadcast(fixed[i], lanes)
        elif step is None:
            value = load(t, bases[i], at, dtype, lanes, mask)
        else:
            value = gather(t, bases[i], numbers * t.broadcast(step, lanes), dtype, every)
        values.append(value)
        dtypes.append(dtype)
    for name, dtype, refs in params["ops"]:
        values.append(_apply(t, name, dtype, refs, values, dtypes, numbers))
        dtypes.append(dtype)
    for i, (dtype, _form, result) in enumerate(params["outputs"], len(params["inputs"])):
        step = inner[i]
        if step is None:
            store(t, values[result], bases[i], at, dtype, mask)
        else:
            scatter(t, values[result], bases[i], numbers * t.broadcast(step, lanes), dtype, every)


def _apply(
    t: Text, name: str, dtype: str, refs: list[Any], values: list[Value], dtypes: list[str], place: Value
) -> Value:  # fmt: skip
    """One operation; `place` are the places of the lanes along the innermost dimension."""
    if name == "index":
        return place
    if name == "to":
        return convert(t, values[refs[0]], dtypes[refs[0]], dtype)
    kinds = [dtypes[ref] for ref in refs if isinstance(ref, int)]
    kind = dtype if name in ("where", "full") else kinds[0]
    type = vector(place.count, ELEMENTS[kind][1])
    args = [values[ref] if isinstance(ref, int) else t.constant(literal(ref["number"]), type) for ref in refs]
    if name == "full":
        return convert(t, args[0], "f32", dtype) if dtype in FLOATS else args[0]
    return OPS[name](t, kind, *args)


def _unravel(row: Value, sizes: list[Value]) -> list[Value]:
    """The coordinates of row number `row` of an array with `sizes`."""
    places: list[Value] = []
    for size in reversed(sizes[1:]):
        places.insert(0, row % size)
        row = row // size
    return [row, *places] if sizes else []


def _move(pointer: Value, elements: Value, dtype: str) -> Value:
    return pointer.at(elements * DTYPES[dtype].itemsize)
