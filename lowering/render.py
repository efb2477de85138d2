"""A decode expression as straight-line MLIR text: what any format says about one weight, for one or sixteen of them.

A value is a scalar unless a variable that it depends on is a vector. In registers narrow floats are float32 that hold a
value of the narrow type (see `mlir.memory`), so every operation on them rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from qcompile.errors import InternalError
from qcompile.expr import FLOATS, Expr, walk
from qcompile.lowering.base import Refuse
from qcompile.lowering.mlir import memory
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.simplify import Fact, interval

NARROW = ("f16", "bf16", "f8e4m3", "f8e5m2")


def check(expr: Expr) -> None:
    """Refuse, with the reason, for an expression that has no text: one that reads a tensor of 2^31 elements."""
    for node in walk(expr):
        stored = node.attr if node.op == "load" else None
        if stored and math.prod(stored[2]) >= 1 << 31:
            raise Refuse(f"stored tensor '{stored[0]}' has {math.prod(stored[2])} elements, more than an i32 counts")


class Renderer:
    """Writes expressions over the stored tensors `tensors` (pointers by name); create it outside of every loop.

    `facts` bound the variables, as for `simplify`. The expressions must pass `check`.
    """

    def __init__(self, t: Text, expressions: Iterable[Expr], tensors: Mapping[str, Value], facts: Mapping[str, Fact]):
        self.t, self.tensors, self.facts = t, tensors, facts
        self.tables: dict[Expr, Value] = {}
        for expr in expressions:
            for node in walk(expr):
                if node.op == "table" and node not in self.tables:
                    self.tables[node] = self._table(node)

    def _table(self, node: Expr) -> Value:
        """The entries on the stack, where any machine can look them up by address."""
        element = "f32" if node.dtype == "f32" else "i32"
        place = self.t.stack(len(node.attr), element)
        for i, entry in enumerate(node.attr):
            self.t.store(self.t.constant(entry, element), place.at(i, element))
        return place

    def __call__(self, expr: Expr, variables: Mapping[str, Value]) -> Value:
        """The value of `expr` where each variable has an i32 value, scalar or vector."""
        done: dict[Expr, Value] = {}
        for node in walk(expr):
            done[node] = self._node(node, [done[arg] for arg in node.args], variables)
        return done[expr]

    def _node(self, node: Expr, args: list[Value], variables: Mapping[str, Value]) -> Value:
        t = self.t
        match node.op:
            case "const":
                return t.constant(node.attr, "i32" if node.dtype == "i32" else "f32")
            case "var":
                return variables[node.attr]
            case "field":
                return args[0]
            case "load":
                name, dtype, shape = node.attr
                last = math.prod(shape) - 1
                # An index may be data too, as the group of an input is: no data lead outside of the tensor.
                place = self._place(args, shape).most(0).least(last)
                value = self._element(self.tensors[name], place, dtype)
                return value if dtype in FLOATS else memory.convert(t, value, dtype, "i32")
            case "bits":
                word, shift = self._alike(args)
                moved = word >> shift
                return moved if node.attr == 32 else moved & _signed((1 << node.attr) - 1)
            case "cat":
                parts, low = self._alike(args), 0
                total = t.constant(0, parts[0].type)
                for part, width in zip(parts, node.attr, strict=True):
                    total, low = total | (part << low), low + width
                return total
            case "table":
                place = args[0].most(0).least(len(node.attr) - 1)
                return self._element(self.tables[node], place, "f32" if node.dtype == "f32" else "i32")
            case "where":
                return t.select(*self._alike(args))
            case "lt":
                left, right = self._alike(args)
                return left < right
            case "div" if node.dtype in FLOATS:
                left, right = self._alike(args)
                return memory.convert(t, left / right, "f32", node.dtype) if node.dtype in NARROW else left / right
            case "div" | "mod":
                return self._divide(node, *self._alike(args))
            case "cast":
                return memory.convert(t, args[0], node.args[0].dtype, node.dtype)
            case "bitcast":
                return self._bitcast(args[0], node.attr)
            case "add" | "sub" | "mul":
                left, right = self._alike(args)
                result = left + right if node.op == "add" else left - right if node.op == "sub" else left * right
                return memory.convert(t, result, "f32", node.dtype) if node.dtype in NARROW else result
        raise InternalError("an expression has no text", found=repr(node))

    def _alike(self, values: list[Value]) -> list[Value]:
        """The values as vectors, if one of them is."""
        count = max(value.count for value in values)
        return [value if value.count == count else self.t.broadcast(value, count) for value in values]

    def _place(self, index: list[Value], shape: tuple[int, ...]) -> Value:
        """The number of the element [index] in row-major order."""
        index = self._alike(index)
        place = index[0]
        for item, size in zip(index[1:], shape[1:], strict=True):
            place = place * size + item
        return place

    def _element(self, base: Value, place: Value, dtype: str) -> Value:
        wide = self.t.cast("extsi", place, "i64")
        if place.count == 1:
            return memory.load(self.t, base, wide, dtype)
        return memory.gather(self.t, base, wide, dtype, self.t.constant(1, vector(place.count, "i1")))

    def _divide(self, node: Expr, left: Value, right: Value) -> Value:
        """Toward minus infinity; the remainder has the divisor's sign."""
        t, dividend, divisor = self.t, node.args[0], node.args[1]
        if interval(dividend, self.facts)[0] >= 0 and interval(divisor, self.facts)[0] > 0:
            return left // right if node.op == "div" else left % right
        quotient = t.op(f"arith.divsi {left}, {right} : {left.type}", left.type)
        rest = left - quotient * right
        zero = t.constant(0, left.type)
        differ = rest.compare("ne", 0) & (rest < 0).compare("ne", right < 0)
        if node.op == "div":
            return quotient - t.select(differ, t.constant(1, left.type), zero)
        return rest + t.select(differ, right, zero)

    def _bitcast(self, value: Value, to: str) -> Value:
        t = self.t
        match to:
            case "f32":
                return t.cast("bitcast", value, "f32")
            case "f16":
                return memory.widen(t, t.cast("bitcast", t.cast("trunci", value, "i16"), "f16"), "f16")
            case "bf16":
                return t.cast("bitcast", value << 16, "f32")
            case "f8e4m3" | "f8e5m2" | "f8e8m0":
                return memory.float_of_byte(t, value & 0xFF, to)
            case "i8" | "i16":
                move = 32 - int(to[1:])
                return (value << move).signed_shift(move)
        raise InternalError("a bitcast has no text", found=to)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
