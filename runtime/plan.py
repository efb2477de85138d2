"""A program for one set of sizes: variants chosen, temporaries placed, and the tables that its kernels are called by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.artifact import Call, Executable, View
from qcompile.dims import Dim, evaluate
from qcompile.dtypes import itemsize
from qcompile.errors import ArtifactError
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.memory import assign

Table = npt.NDArray[np.int64]
MOST = 2**48  # elements of a buffer: far above any memory, far below overflow


@dataclass(frozen=True)
class Window:
    """A view with its numbers: element offset and strides inside the buffer; `whole` if it is all of it, in order."""

    buffer: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    whole: bool


@dataclass(frozen=True)
class Native:
    """A run of kernel calls: rows `start` .. `start + count` - 1 of the step table."""

    start: int
    count: int


@dataclass(frozen=True)
class Eager:
    """One operator run by torch: arguments as in `Call.literals` with dimensions filled in."""

    operator: str
    windows: tuple[Window, ...]
    literals: tuple[Any, Any]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What to run for one set of sizes.

    `steps` [calls, 3] holds the address of a kernel, and where its pointers start in `args` and its numbers in `dims`.
    Pointer i is base `owners[i]` plus `offsets[i]` bytes, where base 0 is the arena, base 1 the counters and base 2 + j
    is `bound[j]` (what may move between calls first, then the weights). `arena` and `counters` are sizes in bytes.
    `items` is the program in order; `names` has the step name of each item and, for a Native item, of each call in it.
    """

    shapes: dict[str, tuple[int, ...]]
    outputs: tuple[Window, ...]
    arena: int
    counters: int
    places: dict[str, int]
    bound: tuple[str, ...]
    items: tuple[Native | Eager, ...]
    names: tuple[tuple[str, ...], ...]
    steps: Table
    args: Table
    dims: Table
    owners: Table
    offsets: Table


class _Numbers:
    """Dimensions as numbers; each text is parsed once."""

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes, self.known = sizes, dict[str, int]()

    def __call__(self, dim: Dim) -> int:
        if isinstance(dim, int):
            return dim
        found = self.known.get(dim)
        if found is None:
            found = self.known[dim] = evaluate(dim, self.sizes)
            if abs(found) > MOST:
                raise ArtifactError("a dimension is out of range", where=dim[:80], expected=f"at most {MOST}")
        return found

    def all(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        return tuple([dim if isinstance(dim, int) else self(dim) for dim in dims])


def _elements(shape: tuple[int, ...], where: str) -> int:
    count = 1
    for dim in shape:
        if dim < 0:
            raise ArtifactError("a dimension is negative", where=where, found=shape)
        count *= dim
    if count > MOST:
        raise ArtifactError("an array is too large", where=where, found=shape, expected=f"at most {MOST} elements")
    return count


def _window(view: View, numbers: _Numbers, elements: Mapping[str, int], where: str) -> Window:
    shape, strides, offset = numbers.all(view.shape), numbers.all(view.strides), numbers(view.offset)
    _elements(shape, where)
    last = offset
    for dim, stride in zip(shape, strides, strict=True):
        if stride < 0:
            raise ArtifactError("a view has a negative stride", where=where, found=strides)
        last += (dim - 1) * stride
    if offset < 0 or offset > elements[view.buffer] or (last >= elements[view.buffer] and 0 not in shape):
        raise ArtifactError(
            "a view reaches outside its buffer",
            where=where,
            found=f"elements {offset} to {last} of {view.buffer!r}",
            expected=f"0 to {elements[view.buffer] - 1}",
        )
    contiguous, count = True, 1
    for dim, stride in zip(reversed(shape), reversed(strides), strict=True):
        contiguous = contiguous and (dim == 1 or stride == count)
        count *= dim
    return Window(view.buffer, shape, strides, offset, contiguous and offset == 0 and count == elements[view.buffer])


def _chosen(executable: Executable, numbers: _Numbers) -> list[tuple[str, Call]]:
    calls = []
    for step in executable.steps:
        for variant in step.variants:
            if variant.when is None or numbers(variant.when[0]) <= variant.when[1]:
                calls += [(step.name, call) for call in variant.calls]
                break
        else:
            raise ArtifactError("no variant of a step is for these sizes", where=step.name, found=dict(numbers.sizes))
    return calls


def _with_dims(literal: Any, numbers: _Numbers) -> Any:
    if isinstance(literal, (list, tuple)):
        return [_with_dims(item, numbers) for item in literal]
    if isinstance(literal, dict):
        if set(literal) == {"dim"}:
            return numbers(literal["dim"])
        return {key: _with_dims(item, numbers) for key, item in literal.items()}
    return literal


def is_eager(kernel: str) -> bool:
    """Whether a call names a torch operator rather than a kernel."""
    return kernel.startswith(("aten.", "qcompile."))


def _arena(used: Sequence[tuple[Window, ...]], temporaries: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """The place of each of `temporaries` (name -> bytes) in one arena, and its bytes; `used` are each call's windows."""
    lives: dict[str, tuple[int, int, int]] = {}
    for at, windows in enumerate(used):
        for name in (window.buffer for window in windows if window.buffer in temporaries):
            lives[name] = (lives[name][0] if name in lives else at, at, temporaries[name])
    return assign(lives)


def make_plan(
    executable: Executable, sizes: Mapping[str, int], addresses: Mapping[str, int], bounds: Bounds | None = None
) -> Plan:
    """The plan for `sizes`; `addresses` are the kernels' entries, or what stands for them in the session's own tables.

    `bounds`: what the kernels may touch, which is compared with what the calls give them. ArtifactError for a program
    that does not fit.
    """
    numbers = _Numbers(sizes)
    shapes = {name: numbers.all(buffer.shape) for name, buffer in executable.buffers.items()}
    elements = {name: _elements(shape, name) for name, shape in shapes.items()}
    calls = _chosen(executable, numbers)
    windows = [tuple([_window(v, numbers, elements, name) for v in call.args]) for name, call in calls]
    outputs = tuple(_window(port.view, numbers, elements, port.name) for port in executable.outputs)

    buffers = executable.buffers
    lengths = {name: elements[name] * itemsize(buffer.dtype) for name, buffer in buffers.items()}
    places, arena = _arena([*windows, outputs], {n: lengths[n] for n, b in buffers.items() if b.kind == "temp"})
    fixed = [name for name in sorted(buffers) if buffers[name].kind == "weight"]
    bound = (*[name for name in sorted(buffers) if buffers[name].kind in ("input", "output", "state")], *fixed)
    counting = {w.buffer for args in windows for w in args if buffers[w.buffer].kind == "counter"}
    counters = max((lengths[name] for name in counting), default=0)
    base = {name: index + 2 for index, name in enumerate(bound)} | dict.fromkeys(counting, 1)
    items: list[Native | Eager] = []
    names: list[tuple[str, ...]] = []
    rows: list[tuple[int, int, int]] = []
    owners: list[int] = []
    offsets: list[int] = []
    dims: list[int] = []
    for (name, call), args in zip(calls, windows, strict=True):
        if is_eager(call.kernel):
            literals, keywords = call.literals or ((), {})
            filled = (_with_dims(literals, numbers), _with_dims(keywords, numbers))
            items.append(Eager(call.kernel, args, filled, call.writes))
            names.append((name,))
            continue
        if items and isinstance(items[-1], Native):
            items[-1] = Native(items[-1].start, items[-1].count + 1)
            names[-1] = (*names[-1], name)
        else:
            items.append(Native(len(rows), 1))
            names.append((name,))
        rows.append((addresses[call.kernel], len(owners), len(dims)))
        for window in args:
            owners.append(base.get(window.buffer, 0))
            offsets.append(places.get(window.buffer, 0) + window.offset * itemsize(buffers[window.buffer].dtype))
        given = numbers.all(call.dims)
        if bounds is not None:
            held = [elements[window.buffer] - window.offset for window in args]
            bounds.check(name, call, given, sizes["threads"], buffers, held)
        dims += given

    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    pointers, values = np.zeros(len(owners), dtype=np.int64), np.array(dims, dtype=np.int64)
    return Plan(
        shapes, outputs, arena, counters, places, bound, tuple(items), tuple(names),
        table, pointers, values, np.array(owners, dtype=np.int64), np.array(offsets, dtype=np.int64),
    )  # fmt: skip
