"""Writes the MLIR text of a kernel: values that know their type, arithmetic by operators, loops by `with`.

>>> t = Text("twice")
>>> with t.loop(0, t.dim(0)) as i:
...     p = t.arg(0).at(i, "f32")
...     t.store(t.load(p, "f32") * 2.0, p)
>>> "arith.mulf" in t.finish()
True
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

from qcompile.errors import InternalError

Operand = "Value | int | float"
POINTER = "!llvm.ptr"


def vector(count: int, element: str) -> str:
    """The type of `count` elements side by side; a count of 1 is the element itself."""
    return element if count == 1 else f"vector<{count}x{element}>"


@dataclass(frozen=True)
class Value:
    """One SSA value. Operators emit arithmetic on it (integers are signed); numbers become constants of its type."""

    text: Text = field(repr=False, compare=False)
    name: str
    type: str

    @property
    def element(self) -> str:
        """The type of one element."""
        return self.type[self.type.index("x") + 1 : -1] if self.type.startswith("vector<") else self.type

    @property
    def count(self) -> int:
        """How many elements lie side by side."""
        return int(self.type[7 : self.type.index("x")]) if self.type.startswith("vector<") else 1

    def __str__(self) -> str:
        return self.name

    def _binary(self, operation: str, other: Value | int | float, flip: bool = False) -> Value:
        kind = "f" if self.element.startswith("f") else "i"
        right = self.text.constant(other, self.type)
        if right.type != self.type:
            raise InternalError("operands of two types", where=operation, found=right.type, expected=self.type)
        a, b = (right, self) if flip else (self, right)
        return self.text.op(f"arith.{operation.format(kind)} {a}, {b} : {self.type}", self.type)

    def __add__(self, other: Value | int | float) -> Value:
        return self._binary("add{}", other)

    def __sub__(self, other: Value | int | float) -> Value:
        return self._binary("sub{}", other)

    def __rsub__(self, other: int | float) -> Value:
        return self._binary("sub{}", other, flip=True)

    def __mul__(self, other: Value | int | float) -> Value:
        return self._binary("mul{}", other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("divf", other)

    def __rtruediv__(self, other: float) -> Value:
        return self._binary("divf", other, flip=True)

    def __floordiv__(self, other: Value | int) -> Value:
        """Division of integers that are not negative."""
        return self._binary("divui", other)

    def __mod__(self, other: Value | int) -> Value:
        """Remainder of integers that are not negative."""
        return self._binary("remui", other)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("andi", other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary("ori", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary("shli", other) if other != 0 else self

    def __rshift__(self, other: Value | int) -> Value:
        """Logical shift: zeros come in from the left."""
        return self._binary("shrui", other) if other != 0 else self

    def signed_shift(self, other: Value | int) -> Value:
        return self._binary("shrsi", other)

    def least(self, other: Value | int | float) -> Value:
        """The smaller; of floats, the one that is a number where the other is NaN."""
        return self._binary("minnumf" if self.is_float else "minsi", other)

    def most(self, other: Value | int | float) -> Value:
        """The greater; of floats, the one that is a number where the other is NaN."""
        return self._binary("maxnumf" if self.is_float else "maxsi", other)

    def __neg__(self) -> Value:
        return self.text.op(f"arith.negf {self} : {self.type}", self.type)

    @property
    def is_float(self) -> bool:
        return self.element.startswith("f")

    def compare(self, name: str, other: Value | int | float) -> Value:
        """i1 lanes; `name` is a predicate of arith: eq, slt, ult ... of integers, oeq, olt, une, uno ... of floats."""
        right = self.text.constant(other, self.type)
        operation = "cmpf" if self.is_float else "cmpi"
        return self.text.op(f"arith.{operation} {name}, {self}, {right} : {self.type}", vector(self.count, "i1"))

    def _ordered(self, name: str, other: Value | int | float) -> Value:
        return self.compare(("o" if self.is_float else "s") + name, other)

    def __lt__(self, other: Value | int | float) -> Value:
        return self._ordered("lt", other)

    def __le__(self, other: Value | int | float) -> Value:
        return self._ordered("le", other)

    def __gt__(self, other: Value | int | float) -> Value:
        return self._ordered("gt", other)

    def __ge__(self, other: Value | int | float) -> Value:
        return self._ordered("ge", other)

    def equals(self, other: Value | int | float) -> Value:
        return self.compare("oeq" if self.is_float else "eq", other)

    def at(self, index: Value | int, element: str = "i8") -> Value:
        """The address of element `index` behind this pointer."""
        place = self.text.constant(index, "i64")
        return self.text.op(f"llvm.getelementptr {self}[{place}] : ({POINTER}, i64) -> {POINTER}, {element}", POINTER)


@dataclass
class Loop:
    """A loop being written: `index`, the carried `values` inside, and `results` after it."""

    index: Value
    values: tuple[Value, ...]
    results: tuple[Value, ...] = ()
    carried: tuple[Value, ...] | None = None

    def carry(self, values: Sequence[Value]) -> None:
        """Sets what the next turn (and `results`) sees; must be called once when values are carried."""
        self.carried = tuple(values)


class Text:
    """A function `name` with the ABI of `artifact.Call`; `comment` (formula, schedule) opens its text."""

    def __init__(self, name: str, comment: str = ""):
        self.name, self.comment = name, comment
        self._lines: list[str] = []
        self._constants: dict[tuple[str, str], Value] = {}
        self._functions: dict[str, str] = {}
        self._indent, self._count = 2, 0
        self.thread, self.threads = Value(self, "%thread", "i64"), Value(self, "%threads", "i64")

    # -- emission --

    def fresh(self) -> str:
        self._count += 1
        return f"%{self._count}"

    def line(self, text: str) -> None:
        self._lines.append("  " * self._indent + text)

    def op(self, text: str, type: str) -> Value:
        """Emits one operation and returns its result, which has `type`."""
        name = self.fresh()
        self.line(f"{name} = {text}")
        return Value(self, name, type)

    def constant(self, value: Value | int | float, type: str) -> Value:
        """`value` unless it is a number: then the constant of `type` (the same in every lane)."""
        if isinstance(value, Value):
            return value
        element = type[type.index("x") + 1 : -1] if type.startswith("vector<") else type
        literal = _float(float(value), element) if element.startswith("f") else str(int(value))
        key = (literal, type)
        if key not in self._constants:
            self._constants[key] = Value(self, f"%c{len(self._constants)}", type)
        return self._constants[key]

    def constants(self, values: Sequence[int | float], element: str) -> Value:
        """The constant vector of `values`."""
        literal = ", ".join(_float(float(v), element) if element.startswith("f") else str(int(v)) for v in values)
        key = (f"[{literal}]", vector(len(values), element))
        if key not in self._constants:
            self._constants[key] = Value(self, f"%c{len(self._constants)}", key[1])
        return self._constants[key]

    # -- arguments and memory --

    def arg(self, index: int) -> Value:
        """The pointer that is argument `index`."""
        return self.load(Value(self, "%args", POINTER).at(index, POINTER), POINTER)

    def dim(self, index: int) -> Value:
        """Dimension `index`, i64."""
        return self.load(Value(self, "%dims", POINTER).at(index, "i64"), "i64")

    def load(self, pointer: Value, type: str, align: int | None = None) -> Value:
        """Reads `type`; `align` in bytes is that of one element unless given."""
        return self.op(f"llvm.load {pointer} {{alignment = {align or _bytes(type)}}} : {POINTER} -> {type}", type)

    def store(self, value: Value, pointer: Value, align: int | None = None) -> None:
        self.line(
            f"llvm.store {value}, {pointer} {{alignment = {align or _bytes(value.type)}}} : {value.type}, {POINTER}"
        )

    def prefetch(self, pointer: Value) -> None:
        """Asks for the cache line at `pointer`, to be read, in the second-level cache; any address is allowed."""
        kinds = "rw = 0 : i32, hint = 2 : i32, cache = 1 : i32"
        self.line(f'"llvm.intr.prefetch"({pointer}) {{{kinds}}} : ({POINTER}) -> ()')

    def stack(self, count: int, element: str) -> Value:
        """The address of `count` elements on the stack, 64-byte aligned; emit it once, outside of loops."""
        size = self.constant(count, "i64")
        return self.op(f"llvm.alloca {size} x {element} {{alignment = 64 : i64}} : (i64) -> {POINTER}", POINTER)

    # -- values --

    def broadcast(self, value: Value, count: int) -> Value:
        type = vector(count, value.type)
        return value if count == 1 else self.op(f"vector.broadcast {value} : {value.type} to {type}", type)

    def cast(self, operation: str, value: Value, element: str) -> Value:
        """An arith conversion by name (sitofp, extf, trunci, bitcast ...) to `element`."""
        type = vector(value.count, element)
        return self.op(f"arith.{operation} {value} : {value.type} to {type}", type)

    def reinterpret(self, value: Value, type: str) -> Value:
        """The same bits as another vector type of the same size."""
        return self.op(f"vector.bitcast {value} : {value.type} to {type}", type)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.op(f"math.fma {a}, {b}, {c} : {a.type}", a.type)

    def math(self, name: str, value: Value) -> Value:
        return self.op(f"math.{name} {value} : {value.type}", value.type)

    def reduce(self, kind: str, value: Value) -> Value:
        """All lanes combined; sums of floats are taken pairwise in a fixed order."""
        if value.count == 1:
            return value
        if not value.element.startswith("f"):
            return self.op(f"vector.reduction <{kind}>, {value} : {value.type} into {value.element}", value.element)
        while value.count > 1:
            half = value.count // 2
            low, high = self.slice(value, 0, half), self.slice(value, half, half)
            value = low + high if kind == "add" else self.op(f"arith.{kind} {low}, {high} : {low.type}", low.type)
        return value

    def slice(self, value: Value, start: int, count: int) -> Value:
        """Lanes start .. start + count - 1."""
        if count == 1:
            return self.op(f"vector.extract {value}[{start}] : {value.element} from {value.type}", value.element)
        type = vector(count, value.element)
        attributes = f"{{offsets = [{start}], sizes = [{count}], strides = [1]}}"
        return self.op(f"vector.extract_strided_slice {value} {attributes} : {value.type} to {type}", type)

    def join(self, low: Value, high: Value) -> Value:
        """The lanes of `low`, then those of `high`."""
        order = ", ".join(str(i) for i in range(2 * low.count))
        type = vector(2 * low.count, low.element)
        return self.op(f"vector.shuffle {low}, {high} [{order}] : {low.type}, {high.type}", type)

    def shuffle(self, a: Value, b: Value, order: Sequence[int]) -> Value:
        """Lane i of the result is lane order[i] of `a` followed by `b`."""
        lanes = ", ".join(map(str, order))
        return self.op(f"vector.shuffle {a}, {b} [{lanes}] : {a.type}, {b.type}", vector(len(order), a.element))

    def select(self, condition: Value, a: Value | float, b: Value | float) -> Value:
        """`a` where `condition` holds, else `b`; one of them may be a number."""
        kind = a.type if isinstance(a, Value) else b.type if isinstance(b, Value) else "f32"
        a, b = self.constant(a, kind), self.constant(b, kind)
        kind = "" if condition.count == 1 else f"{condition.type}, "
        return self.op(f"arith.select {condition}, {a}, {b} : {kind}{a.type}", a.type)

    def intrinsic(self, name: str, args: Sequence[Value], type: str) -> Value:
        """A machine instruction by its LLVM name."""
        types = ", ".join(arg.type for arg in args)
        return self.op(f'llvm.call_intrinsic "{name}"({", ".join(map(str, args))}) : ({types}) -> {type}', type)

    # -- control --

    @overload
    def loop(self, start: Value | int, end: Value | int, step: Value | int = 1) -> AbstractContextManager[Value]: ...

    @overload
    def loop(
        self, start: Value | int, end: Value | int, step: Value | int = 1, *, carry: Sequence[Value]
    ) -> AbstractContextManager[Loop]: ...

    @contextmanager
    def loop(
        self, start: Value | int, end: Value | int, step: Value | int = 1, *, carry: Sequence[Value] | None = None
    ) -> Iterator[Any]:
        """A loop over start, start + step ... below end (i64). Gives the index, or a `Loop` when values are carried."""
        first, last, by = (self.constant(item, "i64") for item in (start, end, step))
        index = Value(self, self.fresh(), "i64")
        values = tuple(Value(self, self.fresh(), item.type) for item in carry or ())
        name, types = self.fresh(), ", ".join(item.type for item in values)
        opening, inits = "", ""
        if values:
            pairs = ", ".join(f"{value} = {init}" for value, init in zip(values, carry or (), strict=True))
            opening, inits = f"{name}:{len(values)} = ", f" iter_args({pairs}) -> ({types})"
        self.line(f"{opening}scf.for {index} = {first} to {last} step {by}{inits} : i64 {{")
        self._indent += 1
        made = Loop(index, values)
        yield index if carry is None else made
        if values:
            if made.carried is None or len(made.carried) != len(values):
                raise InternalError("a loop does not say what it carries", where=self.name)
            self.line(f"scf.yield {', '.join(map(str, made.carried))} : {types}")
            made.results = tuple(Value(self, f"{name}#{i}", item.type) for i, item in enumerate(values))
        self._indent -= 1
        self.line("}")

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """What is emitted inside runs only where `condition` (i1) holds."""
        self.line(f"scf.if {condition} {{")
        self._indent += 1
        yield
        self._indent -= 1
        self.line("}")

    def share(self, count: Value | int) -> tuple[Value, Value]:
        """This thread's part of `count` pieces of work, (first, end): contiguous, sizes that differ by at most one."""
        total = self.constant(count, "i64")
        return self.thread * total // self.threads, (self.thread + 1) * total // self.threads

    def declare(self, name: str, text: str) -> None:
        """Adds a function to the module beside this one, once."""
        self._functions[name] = text

    def finish(self) -> str:
        """The module's text."""
        comment = "".join(f"// {line}\n".replace(" \n", "\n") for line in self.comment.splitlines())
        heads = [
            f"    {value} = arith.constant {f'dense<{literal}>' if value.count > 1 else literal} : {type}"
            for (literal, type), value in self._constants.items()
        ]
        signature = f"%args: {POINTER}, %dims: {POINTER}, %thread: i64, %threads: i64"
        body = [*self._functions.values(), f"  func.func @{self.name}({signature}) {{", *heads, *self._lines]
        return comment + "\n".join(["module {", *body, "    return", "  }", "}", ""])


def _float(value: float, element: str) -> str:
    if math.isfinite(value):
        return f"{value:.17e}" if element == "f64" else f"{value:.9e}"
    return "0x7FC00000" if math.isnan(value) else "0x7F800000" if value > 0 else "0xFF800000"


def _bytes(type: str) -> int:
    element = type[type.index("x") + 1 : -1] if type.startswith("vector<") else type
    return 8 if element == POINTER else max(1, int(element.lstrip("bfi")) // 8)
