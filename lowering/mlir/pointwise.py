"""Pointwise kernels over strided views: the same operations on every element, and copies and conversions between views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qcompile.artifact import Call, Extent, View
from qcompile.dims import Dim, evaluate, names, times
from qcompile.dtypes import DTYPES
from qcompile.errors import InternalError
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.mlir.extents import MOST, Element, numbers, outside, require, strided
from qcompile.lowering.mlir.memory import ELEMENTS, FLOATS, convert, gather, load, scatter, store, tiles
from qcompile.lowering.mlir.scalar_ops import OPS
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.target import Target

TEMPLATE = "pointwise"
MOST_DIMS = 6
BLOCK = 4096  # elements of the innermost dimension that one thread takes at a time
_PRIMES = (7919, 104729, 1299709, 15485863, 179424673, 2038074743)


@dataclass(frozen=True)
class Operand:
    """A view of elements of `dtype` that a pointwise kernel reads or writes."""

    view: View
    dtype: str


def call(
    ctx: Context, inputs: Sequence[Operand], outputs: Sequence[Operand], ops: Sequence[Any], results: Sequence[int]
) -> Call:
    """The call that computes `ops` on every element; `inputs` are broadcast to the shape that all `outputs` have.

    An op is [name, dtype, [operand...]]: an operand is the number of a value (inputs first, then ops) or
    {"number": x}; `dtype` is that of the result. Names are those of scalar_ops.OPS, which compute in f32 and integers,
    and "to" (convert to any dtype), "full" (a number) and "index" (the place in a result of one dimension).
    `results[i]` is the value that outputs[i] gets.
    """
    shape = outputs[0].view.shape
    every = [_broadcast(item.view, shape) for item in (*inputs, *outputs)]
    sizes, strides = _collapse(shape, every)
    if len(sizes) > MOST_DIMS:
        raise Refuse(f"a pointwise kernel over {len(sizes)} dimensions, at most {MOST_DIMS} are handled")
    forms = [{0: "same", 1: "unit"}.get(item[-1], "apart") for item in strides]  # type: ignore[arg-type]
    params = {
        "dims": len(sizes),
        "inputs": [[item.dtype, form] for item, form in zip(inputs, forms, strict=False)],
        "outputs": [[o.dtype, form, r] for o, form, r in zip(outputs, forms[len(inputs) :], results, strict=True)],
        "ops": list(ops),
    }
    dims = list(sizes)
    for item, form in zip(strides, forms, strict=True):
        dims += item if form == "apart" else item[:-1]
    views = [item.view for item in (*inputs, *outputs)]
    return ctx.call(TEMPLATE, params, views, dims, range(len(inputs), len(views)))


def copier(ctx: Context, source: View, target: View, source_dtype: str, target_dtype: str) -> Call:
    """The call that copies `source` into `target` (same shape) and converts the dtype."""
    for dtype in (source_dtype, target_dtype):
        if dtype == "f8e8m0":
            raise Refuse(f"no copy kernel for elements of dtype {dtype}")
    ops = [] if source_dtype == target_dtype else [["to", target_dtype, [0]]]
    return call(ctx, [Operand(source, source_dtype)], [Operand(target, target_dtype)], ops, [len(ops)])


def same(left: Dim, right: Dim) -> bool:
    """Whether two size expressions agree, tried at large primes: polynomials that differ do not agree there."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    known = sorted(names(left) | names(right))
    for turn in range(2):
        sizes = {name: _PRIMES[(i + turn) % len(_PRIMES)] + i for i, name in enumerate(known)}
        if evaluate(left, sizes) != evaluate(right, sizes):
            return False
    return True


def _broadcast(view: View, shape: tuple[Dim, ...]) -> list[Dim]:
    """Strides of `view` over `shape`: 0 where its only element serves all."""
    lead = len(shape) - len(view.shape)
    if lead < 0:
        raise InternalError("a pointwise operand has more dimensions than the result", found=view.shape, expected=shape)
    steps: list[Dim] = [0] * lead
    for size, stride in zip(view.shape, view.strides, strict=True):
        steps.append(0 if size == 1 else stride)
    return steps


def _collapse(shape: tuple[Dim, ...], strides: Sequence[list[Dim]]) -> tuple[list[Dim], list[list[Dim]]]:
    """Dimensions of size 1 dropped, and neighbours that every operand walks as one made one."""
    sizes: list[Dim] = []
    kept: list[list[Dim]] = [[] for _ in strides]
    for axis, size in enumerate(shape):
        steps = [item[axis] for item in strides]
        if size == 1:
            continue
        if sizes and all(same(k[-1], times(step, size)) for k, step in zip(kept, steps, strict=True)):
            sizes[-1] = times(sizes[-1], size)
            for k, step in zip(kept, steps, strict=True):
                k[-1] = step
        else:
            sizes.append(size)
            for k, step in zip(kept, steps, strict=True):
                k.append(step)
    return (sizes, kept) if sizes else ([1], [[1] for _ in strides])


@dataclass(frozen=True)
class Number:
    """A constant operand: a number, true or false; infinities and NaN are text."""

    number: Any

    @property
    def sound(self) -> bool:
        return type(self.number) in (bool, float, str) or (type(self.number) is int and abs(self.number) < 2**64)


@dataclass(frozen=True)
class Params:
    """As `call` makes them: (dtype, form of the innermost stride) of the inputs and, with its value, of the outputs."""

    dims: int
    inputs: tuple[tuple[Element, Literal["same", "unit", "apart"]], ...]
    outputs: tuple[tuple[Element, Literal["unit", "apart"], int], ...]
    ops: tuple[tuple[str, Element, tuple[int | Number, ...]], ...]

    def problem(self) -> str:
        count = len(self.inputs)
        values = count + len(self.ops)
        return outside(
            self,
            dims=1 <= self.dims <= MOST_DIMS,
            inputs=count <= 1024,
            outputs=1 <= len(self.outputs) <= 1024 and all(0 <= value < values for _, _, value in self.outputs),
            ops=len(self.ops) <= 4096 and all(self._known(op, i) for i, op in enumerate(self.ops, count)),
        )

    def _known(self, op: tuple[str, str, tuple[int | Number, ...]], place: int) -> bool:
        """Whether value number `place` is an operation on values before it, and divides integers by none but numbers."""
        name, _, refs = op
        sound = all(ref.sound if isinstance(ref, Number) else 0 <= ref < place for ref in refs)
        if not sound or name not in (*OPS, "to", "full", "index"):
            return False
        if name not in ("floor_divide", "remainder"):
            return True
        dtypes = [*(given[0] for given in self.inputs), *(made[1] for made in self.ops)]
        if all(dtypes[ref] in FLOATS for ref in refs if isinstance(ref, int)):
            return True
        divisor = refs[1].number if len(refs) == 2 and isinstance(refs[1], Number) else 0
        return type(divisor) is int and divisor > 0


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    operands = [*((*given, False) for given in params.inputs), *((*given[:2], True) for given in params.outputs)]
    outer = params.dims - 1
    lengths = [outer + (form == "apart") for _, form, _ in operands]
    rest = list(numbers(dims, params.dims + sum(lengths)))
    sizes, found = [rest.pop(0) for _ in range(params.dims)], []
    require(math.prod(sizes) <= MOST, "a kernel is called for too many elements", sizes)
    for (dtype, form, written), length in zip(operands, lengths, strict=True):
        strides = [rest.pop(0) for _ in range(length)]
        found.append(Extent(dtype, strided(sizes, [*strides, 0] if form == "same" else strides), written))
    return found


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: inputs, outputs. dims: sizes, then for each of them the strides but the last, then the
    last if its form is "apart" ("unit": 1, "same": 0)."""
    operands = [*params["inputs"], *params["outputs"]]
    t = Text(TEMPLATE.replace("-", "_"), _about(params))
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
    args = [values[ref] if isinstance(ref, int) else t.constant(_number(ref["number"]), type) for ref in refs]
    if name == "full":
        return convert(t, args[0], "f32", dtype) if dtype in FLOATS else args[0]
    return OPS[name](t, kind, *args)


def _number(value: float | str) -> float:
    """A number of the params, where infinities and NaN are text; integers stay exact."""
    return float(value) if isinstance(value, str) else value


def _unravel(row: Value, sizes: list[Value]) -> list[Value]:
    """The coordinates of row number `row` of an array with `sizes`."""
    places: list[Value] = []
    for size in reversed(sizes[1:]):
        places.insert(0, row % size)
        row = row // size
    return [row, *places] if sizes else []


def _move(pointer: Value, elements: Value, dtype: str) -> Value:
    return pointer.at(elements * DTYPES[dtype].itemsize)


def _about(params: dict[str, Any]) -> str:
    """The formula as lines of comment."""
    lines = ["Pointwise: one row of the innermost dimension at a time, rows and blocks of them shared by the threads."]
    lines += [f"v{i} = {dtype} input ({form} stride)" for i, (dtype, form) in enumerate(params["inputs"])]
    for i, (name, dtype, refs) in enumerate(params["ops"], len(params["inputs"])):
        args = ", ".join(f"v{ref}" if isinstance(ref, int) else str(ref["number"]) for ref in refs)
        lines.append(f"v{i} = {dtype} {name}({args})")
    lines += [f"output {i} = {dtype} v{value}" for i, (dtype, _form, value) in enumerate(params["outputs"])]
    return "\n".join(lines)
