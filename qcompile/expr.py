"""The decode language: 16 kinds of nodes that say what one weight is worth, over its coordinates `n` and `k`.

    const c            a number                        where c,a,b     a if c else b
    var name           a coordinate                    add sub mul     arithmetic
    load t[i,...]      one stored element              div mod lt      division, remainder, a < b
    bits w,shift,width `width` bits of a word          cast d,a        the same value in dtype d
    cat lo,hi,...      bit fields, lowest first        bitcast d,a     the same bits in dtype d
    table t,i          a constant table's entry        field name,a    `a`, known to the packer by name

Integers are i32 everywhere (they wrap, and divide toward minus infinity); narrow integers exist in stored tensors only
and are widened by `load`. An index must be in range in both arms of `where`. Equal expressions are one object, so a
graph of nodes shares its parts.

>>> print(cast("f32", bits(load("qweight", "i32", (512, 64), k // 8, n), k % 8 * 4, 4)))
cast(f32, bits(qweight[k // 8, n], (k % 8) * 4, 4))
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import InternalError

FLOATS = frozenset(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "//", "mod": "%", "lt": "<"}


@dataclass(frozen=True, eq=False)
class Expr:
    """One node. `op` is a kind of the table above, `dtype` the value's dtype, `args` its operands.

    `attr` is what is not an operand: const: the number; var: the name; load: (tensor, stored dtype, stored shape);
    bits: the width; cat: the widths, lowest first; table: the entries; bitcast: the dtype read; field: the name.
    """

    op: str
    dtype: str
    args: tuple[Expr, ...]
    attr: Any
    __slots__ = ("__weakref__", "args", "attr", "dtype", "op")

    def __add__(self, other: Operand) -> Expr:
        return _binary("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return _binary("add", _lift(other, self.dtype), self)

    def __sub__(self, other: Operand) -> Expr:
        return _binary("sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return _binary("sub", _lift(other, self.dtype), self)

    def __mul__(self, other: Operand) -> Expr:
        return _binary("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return _binary("mul", _lift(other, self.dtype), self)

    def __floordiv__(self, other: Operand) -> Expr:
        return _binary("div", _i32(self, "the dividend of //"), other)

    def __truediv__(self, other: Operand) -> Expr:
        if self.dtype not in FLOATS:
            raise InternalError("'/' divides floats; // divides integers", found=repr(self))
        return _binary("div", self, other)

    def __mod__(self, other: Operand) -> Expr:
        return _binary("mod", self, other)

    def __lt__(self, other: Operand) -> Expr:
        return _binary("lt", self, other)

    def __bool__(self) -> bool:
        raise TypeError(f"an expression has no truth value here: {self}")

    def __str__(self) -> str:
        return _text(self)

    def __repr__(self) -> str:
        return f"<{self.dtype} {_text(self)}>"


Operand = Expr | int | float
_nodes: WeakValueDictionary[tuple[Any, ...], Expr] = WeakValueDictionary()


def make(op: str, dtype: str, args: tuple[Expr, ...] = (), attr: Any = None) -> Expr:
    """The one node with these parts. Unchecked: the functions below check their operands."""
    key = (op, dtype, args, repr(attr) if op in ("const", "table") else attr)  # repr tells 0.0 from -0.0
    node = _nodes.get(key)
    if node is None:
        node = _nodes[key] = Expr(op, dtype, args, attr)
    return node


def const(value: int | float, dtype: str | None = None) -> Expr:
    """`value` as i32 (an int, in -2**31..2**31-1) or rounded to a float dtype (f32 unless told)."""
    dtype = dtype or ("i32" if isinstance(value, int) else "f32")
    if dtype == "i32":
        if not isinstance(value, int) or not -(2**31) <= value < 2**31:
            raise InternalError("not an i32 constant", found=value, expected="an int in -2**31..2**31-1")
        return make("const", dtype, (), value)
    return make("const", dtype, (), torch.tensor(float(value), dtype=DTYPES[dtype]).item())


def var(name: str) -> Expr:
    """An i32 coordinate."""
    return make("var", "i32", (), name)


n, k = var("n"), var("k")


def load(tensor: str, dtype: str, shape: tuple[int, ...], *index: Operand) -> Expr:
    """The element of a stored tensor: i32 when it stores integers, else the stored float dtype."""
    if len(index) != len(shape):
        raise InternalError(f"load of '{tensor}' has the wrong rank", found=len(index), expected=len(shape))
    where_ = tuple(_i32(i, f"an index of '{tensor}'") for i in index)
    return make("load", dtype if dtype in FLOATS else "i32", where_, (tensor, dtype, shape))


def bits(word: Expr, shift: Operand, width: int) -> Expr:
    """`width` bits of `word` from bit `shift` up, unsigned; bits shifted in from above bit 31 are 0."""
    if not 0 < width <= 32:
        raise InternalError("bits of an impossible width", found=width, expected="1..32")
    return make("bits", "i32", (_i32(word, "bits"), _i32(shift, "a shift")), width)


def cat(*parts: Expr) -> Expr:
    """One unsigned integer from bit fields, the lowest first. Each part is a `bits` node."""
    if any(part.op != "bits" for part in parts) or sum(part.attr for part in parts) > 32:
        raise InternalError("cat takes bit fields of at most 32 bits together", found=", ".join(map(str, parts)))
    return parts[0] if len(parts) == 1 else make("cat", "i32", parts, tuple(part.attr for part in parts))


def table(entries: tuple[int, ...] | tuple[float, ...], index: Expr) -> Expr:
    """`entries[index]`: i32 if every entry is an int, else f32 (entries rounded to it)."""
    if all(isinstance(entry, int) for entry in entries):
        return make("table", "i32", (_i32(index, "a table index"),), tuple(entries))
    rounded = tuple(struct.unpack("f", struct.pack("f", entry))[0] for entry in entries)
    return make("table", "f32", (_i32(index, "a table index"),), rounded)


def where(condition: Expr, yes: Expr, no: Operand) -> Expr:
    """`yes` where the bool `condition` holds, else `no`; both have one dtype."""
    other = _lift(no, yes.dtype)
    if condition.dtype != "bool" or yes.dtype != other.dtype:
        raise InternalError("where mixes dtypes", found=f"{condition.dtype} ? {yes.dtype} : {other.dtype}")
    return make("where", yes.dtype, (condition, yes, other))


def cast(dtype: str, value: Expr) -> Expr:
    """The same value in another dtype, floats rounded to nearest even, float to i32 truncated."""
    return value if value.dtype == dtype else make("cast", dtype, (value,))


def bitcast(dtype: str, value: Expr) -> Expr:
    """The low bits of an i32 read as a float `dtype` of 8, 16 or 32 bits, or as a signed i8 or i16 widened to i32."""
    signed = dtype in ("i8", "i16")
    if value.dtype != "i32" or not (signed or dtype in FLOATS):
        raise InternalError("bitcast reads an i32 as a float, i8 or i16", found=f"{value.dtype} as {dtype}")
    return make("bitcast", "i32" if signed else dtype, (value,), dtype)


def field(name: str, value: Expr) -> Expr:
    """`value` under the name that the packer knows."""
    return make("field", value.dtype, (value,), name)


def rebuild(expr: Expr, args: tuple[Expr, ...]) -> Expr:
    """`expr` with other operands of the same dtypes."""
    return expr if args == expr.args else make(expr.op, expr.dtype, args, expr.attr)


def rewrite(expr: Expr, leaf: Callable[[Expr], Expr | None]) -> Expr:
    """`expr` with every node for which `leaf` returns a node replaced by it, outermost first, and not looked into."""
    done: dict[Expr, Expr] = {}

    def go(node: Expr) -> Expr:
        if node not in done:
            new = leaf(node)
            done[node] = rebuild(node, tuple(map(go, node.args))) if new is None else new
        return done[node]

    return go(expr)


def substitute(expr: Expr, values: Mapping[Expr, Operand]) -> Expr:
    """`expr` with nodes (usually variables) replaced.

    >>> print(substitute(k // 8 + n, {k: var("k0") * 8 + 3, n: 5}))
    ((k0 * 8 + 3) // 8) + 5
    """
    table_ = {old: _lift(new, old.dtype) for old, new in values.items()}
    return rewrite(expr, table_.get)


def walk(expr: Expr) -> Iterator[Expr]:
    """Each distinct node once, operands before users."""
    seen: set[Expr] = set()

    def go(node: Expr) -> Iterator[Expr]:
        if node not in seen:
            seen.add(node)
            for arg in node.args:
                yield from go(arg)
            yield node

    return go(expr)


def _lift(value: Operand, dtype: str) -> Expr:
    return value if isinstance(value, Expr) else const(value, dtype)


def _i32(value: Operand, what: str) -> Expr:
    expr = _lift(value, "i32")
    if expr.dtype != "i32":
        raise InternalError(f"{what} must be i32", found=repr(expr))
    return expr


def _binary(op: str, left: Expr, right: Operand) -> Expr:
    other = _lift(right, left.dtype)
    if left.dtype != other.dtype or left.dtype == "bool" or (op == "mod" and left.dtype != "i32"):
        raise InternalError(f"'{op}' of these dtypes is not defined; cast first", found=f"{left!r} and {other!r}")
    return make(op, "bool" if op == "lt" else left.dtype, (left, other))


def _text(expr: Expr) -> str:
    args = [str(arg) for arg in expr.args]
    match expr.op:
        case "const" | "var":
            return str(expr.attr)
        case "load":
            return f"{expr.attr[0]}[{', '.join(args)}]"
        case "bits":
            return f"bits({', '.join(args)}, {expr.attr})"
        case "table":
            entries = ", ".join(map(str, expr.attr)) if len(expr.attr) <= 16 else f"{len(expr.attr)} entries"
            return f"table(({entries}), {args[0]})"
        case "cast":
            return f"cast({expr.dtype}, {args[0]})"
        case "bitcast":
            return f"bitcast({expr.attr}, {args[0]})"
        case "field":
            return f"{expr.attr}={args[0]}" if expr.args[0].op not in _SIGNS else f"{expr.attr}=({args[0]})"
        case "where" | "cat":
            return f"{expr.op}({', '.join(args)})"
    for i, arg in enumerate(expr.args):
        if arg.op in _SIGNS and not (expr.op == "add" and arg.op == "mul"):
            args[i] = f"({args[i]})"
    sign = "/" if expr.op == "div" and expr.dtype in FLOATS else _SIGNS[expr.op]
    return f"{args[0]} {sign} {args[1]}"
