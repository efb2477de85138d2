"""Pointwise kernels over strided views, as data: the same operations on every element, and copies between views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qcompile.artifact import Call, Extent, View
from qcompile.dims import Dim, evaluate, names, times
from qcompile.errors import InternalError
from qcompile.expr import FLOATS
from qcompile.lowering.alignment import columns, divisor, starts_aligned
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.extents import MOST, Element, numbers, outside, require, strided

TEMPLATE = "pointwise"
MOST_DIMS = 6
OPS = (
    "add", "sub", "mul", "div", "floor_divide", "remainder", "pow", "maximum", "minimum", "and", "or", "xor", "not",
    "eq", "ne", "lt", "le", "gt", "ge", "where", "neg", "abs", "sign", "sqrt", "rsqrt", "reciprocal", "floor", "ceil",
    "trunc", "round", "bitcast", "isnan", "isinf", "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "erf",
    "sigmoid", "softplus", "relu", "silu", "gelu", "gelu_tanh",
)  # fmt: skip
"""The closed list of operations inside a pointwise kernel; each backend has a text for every one."""
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
    {"number": x}; `dtype` is that of the result. Names are those of `OPS`, which compute in f32 and integers,
    and "to" (convert to any dtype), "full" (a number) and "index" (the place in a result of one dimension).
    `results[i]` is the value that outputs[i] gets. A GPU kernel is given the start of a view that may begin at an address
    which is no multiple of 16 bytes as a number.
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
    if ctx.target.backend == "cuda":
        starts = [not starts_aligned(item.view.offset, item.dtype) for item in (*inputs, *outputs)]
        params |= {"starts": starts, **_steps(sizes, strides, forms, views)}
        dims += [view.offset for view, given in zip(views, starts, strict=True) if given]
        views = [replace(view, offset=0) if given else view for view, given in zip(views, starts, strict=True)]
    return ctx.call(TEMPLATE, params, views, dims, range(len(inputs), len(views)))


def _steps(
    sizes: Sequence[Dim], strides: Sequence[list[Dim]], forms: Sequence[str], views: Sequence[View]
) -> dict[str, Any]:
    """What a GPU kernel has to know to move several elements at once: powers of two that divide the size of the innermost
    dimension, and the place where each row of an operand begins; and how wide a tile it takes of a row."""
    rows = [
        min(map(divisor, (view.offset, *item[:-1]))) if form == "unit" else 1
        for view, item, form in zip(views, strides, forms, strict=True)
    ]
    wide = columns(sizes[-1], 256, 256) if len(sizes) > 1 else 1024
    return {"columns": wide, "multiple": divisor(sizes[-1]), "rows": rows}


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


def literal(value: float | str) -> float:
    """A number of the params, where infinities and NaN are text; integers stay exact."""
    return float(value) if isinstance(value, str) else value


def formula(params: dict[str, Any]) -> list[str]:
    """What a kernel computes, a line a value."""
    lines = [f"v{i} = {dtype} input ({form} stride)" for i, (dtype, form) in enumerate(params["inputs"])]
    for i, (name, dtype, refs) in enumerate(params["ops"], len(params["inputs"])):
        args = ", ".join(f"v{ref}" if isinstance(ref, int) else str(ref["number"]) for ref in refs)
        lines.append(f"v{i} = {dtype} {name}({args})")
    lines += [f"output {i} = {dtype} v{value}" for i, (dtype, _form, value) in enumerate(params["outputs"])]
    return lines
