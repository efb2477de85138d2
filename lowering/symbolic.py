"""Strided views with symbolic sizes: what view-like operators do to shape, strides and offset, without moving data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch

from qcompile.artifact import View
from qcompile.dims import Dim

Size: TypeAlias = Any  # a sympy expression, which has no types
ZERO = sympy.Integer(0)


def size(value: Any) -> Size:
    """A sympy expression for an int, a SymInt, or an expression."""
    if isinstance(value, torch.SymInt):
        return sympy.expand(value.node.expr)
    return sympy.expand(sympy.sympify(value))


def product(sizes: Sequence[Size]) -> Size:
    result = sympy.Integer(1)
    for item in sizes:
        result = sympy.expand(result * item)
    return result


def dim(expr: Size, names: Mapping[sympy.Symbol, str]) -> Dim:
    """`expr` as text that qcompile.dims reads; KeyError for a symbol without a name, ValueError for other forms."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return names[expr]
    text = [str(dim(arg, names)) for arg in expr.args]
    if expr.is_Add:
        return "(" + " + ".join(text) + ")"
    if expr.is_Mul:
        return "(" + "*".join(text) + ")"
    if expr.is_Pow and expr.exp.is_Integer and 0 < expr.exp <= 4:
        return "(" + "*".join([text[0]] * int(expr.exp)) + ")"
    operator = {"FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%"}.get(type(expr).__name__)
    if operator is None:
        raise ValueError(f"a size of the form {expr} has no text")
    return f"({text[0]} {operator} {text[1]})"


@dataclass(frozen=True)
class Strided:
    """A window of a buffer. Shape, strides and offset count elements; each is a sympy expression."""

    buffer: str
    dtype: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = ZERO

    @staticmethod
    def contiguous_in(buffer: str, dtype: str, shape: Sequence[Any]) -> Strided:
        sizes = tuple(size(item) for item in shape)
        return Strided(buffer, dtype, sizes, row_major(sizes))

    @property
    def numel(self) -> Size:
        return product(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """True when elements lie in row-major order without gaps (dimensions of size 1 may have any stride)."""
        expected = row_major(self.shape)
        return all(s == 1 or a == b for s, a, b in zip(self.shape, self.strides, expected, strict=True))

    def to_view(self, names: Mapping[sympy.Symbol, str]) -> View:
        def text(items: tuple[Size, ...]) -> tuple[Dim, ...]:
            return tuple(dim(item, names) for item in items)

        return View(self.buffer, text(self.shape), text(self.strides), dim(self.offset, names))

    def permute(self, order: Sequence[int]) -> Strided:
        order = [axis % len(self.shape) for axis in order]
        return self._with([self.shape[a] for a in order], [self.strides[a] for a in order])

    def transpose(self, first: int, second: int) -> Strided:
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def expand(self, shape: Sequence[Any]) -> Strided:
        sizes = [size(item) for item in shape]
        lead = len(sizes) - len(self.shape)
        strides = [sympy.Integer(0)] * lead
        for axis, (old, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            new = sizes[lead + axis]
            if new == -1:
                sizes[lead + axis] = new = old
            strides.append(stride if new == old else sympy.Integer(0))
        return self._with(sizes, strides)

    def unsqueeze(self, axis: int) -> Strided:
        axis %= len(self.shape) + 1
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(axis, sympy.Integer(1))
        strides.insert(axis, sympy.Integer(1))
        return self._with(shape, strides)

    def squeeze(self, axes: Sequence[int]) -> Strided:
        drop = {a % len(self.shape) for a in axes if self.shape[a] == 1}
        keep = [a for a in range(len(self.shape)) if a not in drop]
        return self.permute(keep)

    def select(self, axis: int, index: Any) -> Strided:
        axis %= len(self.shape)
        position = size(index)
        if position.is_negative:
            position = position + self.shape[axis]
        offset = sympy.expand(self.offset + position * self.strides[axis])
        keep = [a for a in range(len(self.shape)) if a != axis]
        return replace(self.permute(keep), offset=offset)

    def slice(self, axis: int, start: Any, length: Any, step: int = 1) -> Strided:
        """`length` elements along `axis` from `start` (not negative), `step` apart."""
        axis %= len(self.shape)
        shape, strides = list(self.shape), list(self.strides)
        offset = sympy.expand(self.offset + size(start) * strides[axis])
        shape[axis], strides[axis] = size(length), sympy.expand(strides[axis] * step)
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def unfold(self, axis: int, count: Any, length: int, step: int) -> Strided:
        """`count` windows of `length` elements along `axis`, `step` apart; the windows' elements become the last axis."""
        axis %= len(self.shape)
        shape, strides = list(self.shape), list(self.strides)
        shape[axis], strides[axis] = size(count), sympy.expand(strides[axis] * step)
        return self._with([*shape, sympy.Integer(length)], [*strides, self.strides[axis]])

    def reshape(self, shape: Sequence[Any]) -> Strided | None:
        """The same elements in another shape, or None when that needs a copy."""
        sizes = [size(item) for item in shape]
        if -1 in sizes:
            rest = product([item for item in sizes if item != -1])
            sizes[sizes.index(-1)] = sympy.cancel(self.numel / rest)
        if self.is_contiguous:
            return self._with(sizes, row_major(sizes))
        strides: list[Size] = []
        remaining = list(sizes)
        for chunk_size, chunk_stride in reversed(self._chunks()):
            covered = sympy.Integer(1)
            while covered != chunk_size or (remaining and remaining[-1] == 1):
                if not remaining:
                    return None
                strides.append(sympy.expand(covered * chunk_stride))
                covered = sympy.expand(covered * remaining.pop())
        return None if remaining else self._with(sizes, strides[::-1])

    def _chunks(self) -> list[tuple[Size, Size]]:
        """Runs of dimensions that lie behind one another without a gap: (elements, stride of the innermost)."""
        chunks: list[tuple[Size, Size]] = []
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length == 1:
                continue
            if chunks and stride == sympy.expand(chunks[0][0] * chunks[0][1]):
                chunks[0] = (sympy.expand(chunks[0][0] * length), chunks[0][1])
            else:
                chunks.insert(0, (length, stride))
        return chunks

    def _with(self, shape: Sequence[Size], strides: Sequence[Size]) -> Strided:
        return replace(self, shape=tuple(shape), strides=tuple(strides))


def row_major(shape: Sequence[Size]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = sympy.Integer(1)
    for length in reversed(shape):
        strides.append(step)
        step = sympy.expand(step * length)
    return tuple(reversed(strides))
