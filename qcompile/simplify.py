"""Makes expressions shorter without changing their value, from what is known about their variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qcompile.expr import Expr

WHOLE = (-(2**31), 2**31 - 1)
_STORED = {"i8": (-128, 127), "i16": (-(2**15), 2**15 - 1), "u8": (0, 255), "bool": (0, 1)}


@dataclass(frozen=True)
class Fact:
    """What is known about a variable: least <= v <= greatest, and v is a multiple of `step`."""

    least: int = 0
    greatest: int = WHOLE[1]
    step: int = 1


@dataclass(frozen=True)
class Facts:
    """What is known about variables by name. A variable that is not named is a coordinate: zero or more."""

    known: Mapping[str, Fact] = field(default_factory=dict)

    def of(self, name: str) -> Fact:
        return self.known.get(name, Fact())


NOTHING = Facts()


def interval(expr: Expr, facts: Facts = NOTHING) -> tuple[int, int]:
    """The least and greatest value that an i32 expression can take, as far as is known.

    >>> from qcompile.expr import k
    >>> interval(bits(k, 4, 3)), interval(k % 8 * 4)
    ((0, 7), (0, 28))
    """
    return _interval(expr, facts, {})


def _interval(expr: Expr, facts: Facts, done: dict[Expr, tuple[int, int]]) -> tuple[int, int]:
    if expr not in done:
        low, high = _bounds(expr, facts, lambda e: _interval(e, facts, done))
        done[expr] = (low, high) if WHOLE[0] <= low and high <= WHOLE[1] else WHOLE  # it may wrap
    return done[expr]


def _bounds(expr: Expr, facts: Facts, of: Callable[[Expr], tuple[int, int]]) -> tuple[int, int]:
    match expr.op:
        case "const":
            return expr.attr, expr.attr
        case "var":
            return facts.of(expr.attr).least, facts.of(expr.attr).greatest
        case "load":
            return _STORED.get(expr.attr[1], WHOLE)
        case "field":
            return of(expr.args[0])
        case "bits":
            most = (1 << expr.attr) - 1 if expr.attr < 32 else WHOLE[1]
            low, high = of(expr.args[0])
            if low >= 0:
                return 0, min(most, high >> min(31, max(0, of(expr.args[1])[0])))
            return (0, most) if expr.attr < 32 or of(expr.args[1])[0] > 0 else WHOLE
        case "cat":
            return (0, (1 << sum(expr.attr)) - 1) if sum(expr.attr) < 32 else WHOLE
        case "bitcast":
            return _STORED.get(expr.attr, WHOLE)
        case "table":
            return min(expr.attr), max(expr.attr)
        case "where":
            yes, no = of(expr.args[1]), of(expr.args[2])
            return min(yes[0], no[0]), max(yes[1], no[1])
        case "add" | "sub" | "mul" | "div":
            return _arithmetic(expr.op, of(expr.args[0]), of(expr.args[1]))
        case "mod":
            low, high = of(expr.args[0])
            least, most = of(expr.args[1])
            if least <= 0:
                return WHOLE
            return (low, high) if 0 <= low and high < least else (0, most - 1)
    return WHOLE


def _arithmetic(op: str, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    match op:
        case "add":
            return a[0] + b[0], a[1] + b[1]
        case "sub":
            return a[0] - b[1], a[1] - b[0]
        case "mul":
            ends = [x * y for x in a for y in b]
        case _:
            if b[0] <= 0:
                return WHOLE
            ends = [x // y for x in a for y in b]
    return min(ends), max(ends)
