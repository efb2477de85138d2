"""Makes expressions shorter without changing their value, from what is known about their variables.

Sums and products of coordinates are taken not to wrap: they are addresses. What holds a stored word may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qcompile.dtypes import DTYPES
from qcompile.expr import Expr, const, make, rebuild, table

WHOLE = (-(2**31), 2**31 - 1)
_STORED = {"i8": (-128, 127), "i16": (-(2**15), 2**15 - 1), "u8": (0, 255), "bool": (0, 1)}
Interval = tuple[int, int]


@dataclass(frozen=True)
class Fact:
    """What is known about a variable: least <= v <= greatest, and v is a multiple of `step`."""

    least: int = 0
    greatest: int = WHOLE[1]
    step: int = 1


COORDINATE = Fact()


def coordinates(N: int, K: int) -> dict[str, Fact]:
    """The facts about `n` and `k` of a weight [N, K]."""
    return {"n": Fact(0, N - 1), "k": Fact(0, K - 1)}


def interval(expr: Expr, facts: Mapping[str, Fact] | None = None) -> Interval:
    """The least and greatest value that an i32 expression can take, as far as is known.

    >>> from qcompile.expr import bits, k
    >>> interval(bits(k, 4, 3)), interval(k % 8 * 4)
    ((0, 7), (0, 28))
    """
    return Simplifier(facts or {}).interval(expr)


def simplify(expr: Expr, facts: Mapping[str, Fact] | None = None) -> Expr:
    """An expression of the same value: divisions and remainders resolved, constants folded, redundant masks dropped.

    `facts` are about variables by name; one that is not named is a coordinate: zero or more. A `bits` node of width 32
    is a logical shift without a mask. Simplify several expressions with one `Simplifier` to share the work.

    >>> from qcompile.expr import k, n, var
    >>> k0 = var("k0")
    >>> print(simplify((k0 * 8 + 3) // 8), simplify((k0 * 8 + 3) % 8), simplify((n * 64 + k) // 32 % 2))
    k0 3 (k // 32) % 2
    >>> print(simplify(k // 8 * 8 + k % 8), simplify((k + 5) // 8, {"k": Fact(step=8)}))
    k k // 8
    """
    return Simplifier(facts or {})(expr)


class Simplifier:
    """`simplify` under the same facts for many expressions, remembering every node seen."""

    def __init__(self, facts: Mapping[str, Fact]):
        self.facts = facts
        self.simple: dict[Expr, Expr] = {}
        self.intervals: dict[Expr, Interval] = {}
        self.texts: dict[Expr, str] = {}

    def __call__(self, expr: Expr) -> Expr:
        if expr not in self.simple:
            node = rebuild(expr, tuple(self(arg) for arg in expr.args))
            self.simple[expr] = self.simple[node] = self.rule(node)
        return self.simple[expr]

    def rule(self, node: Expr) -> Expr:
        """A shorter form of `node`, whose operands are simple."""
        args, op = node.args, node.op
        if op in ("add", "sub", "mul", "div") and node.dtype != "i32":
            return _float(node)
        match op:
            case "add" | "sub" | "mul":
                return self.build(*self.linear(node))
            case "div" | "mod" if args[1].op == "const" and args[1].attr > 0:
                return self.divide(args[0], args[1].attr) if op == "div" else self.remainder(args[0], args[1].attr)
            case "lt" if args[0].dtype == "i32":
                a, b = self.interval(args[0]), self.interval(args[1])
                return const(int(a[1] < b[0]), "bool") if a[1] < b[0] or a[0] >= b[1] else node
            case "where" if args[1] is args[2] or args[0].op == "const":
                return args[1] if args[1] is args[2] or args[0].attr else args[2]
            case "bits":
                return self.bits(args[0], args[1], node.attr)
            case "cat":
                return self.cat(node)
            case "table" if args[0].op == "const":
                return const(node.attr[args[0].attr], node.dtype)
            case "table" if args[0].op == "table":
                return table(tuple(node.attr[i] for i in args[0].attr), args[0].args[0])
            case "cast":
                return args[0] if args[0].dtype == node.dtype else _float(node)
        return node

    def linear(self, expr: Expr) -> tuple[dict[Expr, int], int]:
        """`expr` as a sum of integer multiples of atoms, and a constant."""
        if expr.op == "const":
            return {}, expr.attr
        if expr.dtype == "i32" and expr.op in ("add", "sub"):
            terms, number = self.linear(expr.args[0])
            terms, sign = dict(terms), 1 if expr.op == "add" else -1
            more, other = self.linear(expr.args[1])
            for atom, factor in more.items():
                terms[atom] = terms.get(atom, 0) + sign * factor
            return {atom: factor for atom, factor in terms.items() if factor}, number + sign * other
        if expr.dtype == "i32" and expr.op == "mul":
            (left, a), (right, b) = self.linear(expr.args[0]), self.linear(expr.args[1])
            if left and right:
                return {expr: 1}, 0
            terms, number, factor = (left, a, b) if left else (right, b, a)
            return {atom: f * factor for atom, f in terms.items() if factor}, number * factor
        return {expr: 1}, 0

    def build(self, terms: dict[Expr, int], number: int) -> Expr:
        """The sum, in an order that does not depend on how it was written. x // c * c + x % c becomes x."""
        for atom, factor in terms.items():
            if atom.op == "mod" and atom.args[1].op == "const":
                quotient = self(make("div", "i32", atom.args))
                if terms.get(quotient) == factor * atom.args[1].attr:
                    rest = {a: f for a, f in terms.items() if a not in (atom, quotient)}
                    whole, more = self.linear(atom.args[0])
                    for part, f in whole.items():
                        rest[part] = rest.get(part, 0) + f * factor
                    return self.build({a: f for a, f in rest.items() if f}, number + more * factor)
        total: Expr | None = None
        for atom in sorted(terms, key=self.text):
            factor = terms[atom]
            if total is not None and factor == -1:
                total = total - atom
                continue
            term = atom if factor == 1 else atom * _wrap(factor)
            total = term if total is None else total + term
        if total is None:
            return const(_wrap(number))
        return total if number == 0 else total + _wrap(number) if number > 0 else total - _wrap(-number)

    def text(self, expr: Expr) -> str:
        if expr not in self.texts:
            self.texts[expr] = str(expr)
        return self.texts[expr]

    def divide(self, expr: Expr, divisor: int) -> Expr:
        """expr // divisor: what divides exactly is taken out, the rest is dropped where it is less than the divisor."""
        if divisor == 1:
            return expr
        terms, number = self.linear(expr)
        out: dict[Expr, int] = {}
        rest: dict[Expr, int] = {}
        for atom, factor in terms.items():
            if factor * self.step(atom) % divisor == 0:
                shared = math.gcd(factor, divisor)
                part = _quotient(atom, divisor // shared)
                out[part] = out.get(part, 0) + factor // shared
            else:
                rest[atom] = factor
        whole, number = divmod(number, divisor)
        low, high = self.range(rest, number)
        if low // divisor == high // divisor:
            return self.build(out, whole + low // divisor)
        shared = math.gcd(divisor, *rest.values())  # (s * r + c) // (s * d) = r // d for 0 <= c < s
        rest, number, divisor = {a: f // shared for a, f in rest.items()}, number // shared, divisor // shared
        node = self.build(rest, number)
        more, extra = self.linear(_quotient(node, divisor))
        for atom, factor in more.items():
            out[atom] = out.get(atom, 0) + factor
        return self.build(out, whole + extra)

    def remainder(self, expr: Expr, divisor: int) -> Expr:
        """expr % divisor: multiples of the divisor are dropped, then the operation where the rest is less than it."""
        terms, number = self.linear(expr)
        rest = {atom: f % divisor for atom, f in terms.items() if f * self.step(atom) % divisor}
        number %= divisor
        low, high = self.range(rest, number)
        if low >= 0 and high < divisor:
            return self.build(rest, number)
        shared = math.gcd(divisor, *rest.values())  # (s * r + c) % (s * d) = s * (r % d) + c for 0 <= c < s
        whole, number = divmod(number, shared)
        rest, divisor = {a: f // shared for a, f in rest.items()}, divisor // shared
        node = self.build(rest, whole)
        if divisor == 1:
            return const(number)
        if node.op == "table":
            return self.build({table(tuple(entry % divisor for entry in node.attr), node.args[0]): shared}, number)
        if node.op == "mod" and node.args[1].op == "const" and node.args[1].attr % divisor == 0:
            node = node.args[0]
        return self.build({make("mod", "i32", (node, const(divisor))): shared}, number)

    def range(self, terms: dict[Expr, int], number: int) -> Interval:
        low = high = number
        for atom, factor in terms.items():
            ends = [end * factor for end in self.interval(atom)]
            low, high = low + min(ends), high + max(ends)
        return low, high

    def step(self, expr: Expr) -> int:
        """A number that divides every value of `expr`; 0 if that is 0 alone."""
        match expr.op:
            case "const":
                return abs(int(expr.attr))
            case "var":
                return self.facts.get(expr.attr, COORDINATE).step
            case "add" | "sub":
                return math.gcd(self.step(expr.args[0]), self.step(expr.args[1]))
            case "mul":
                return self.step(expr.args[0]) * self.step(expr.args[1])
            case "mod":
                return math.gcd(self.step(expr.args[0]), self.step(expr.args[1]))
            case "div" if expr.args[1].op == "const" and expr.args[1].attr > 0:
                whole, left = divmod(self.step(expr.args[0]), expr.args[1].attr)
                return 1 if left else whole
        return 1

    def bits(self, word: Expr, shift: Expr, width: int) -> Expr:
        """A bit field of a bit field is one; a mask that clears nothing is dropped (width 32), a shift by 0 too."""
        first, last = self.interval(shift)
        first = max(first, 0)  # a bound may be loose; no shift is negative
        if word.op == "const" and shift.op == "const":
            return const(_wrap((word.attr & 0xFFFFFFFF) >> shift.attr & ((1 << width) - 1)))
        if word.op == "bits" and (first == last or last + width <= word.attr):
            inner, under, width_ = word.args[0], word.args[1], min(width, word.attr - first)
            if width_ <= 0:
                return const(0)
            if self.interval(under)[1] + last < 32:
                return self.bits(inner, self(under + shift), width_)
        low, high = self.interval(word)
        if first + width >= 32 or (low >= 0 and high >> first < 1 << width):
            width = 32
        if width == 32 and shift.op == "const" and shift.attr == 0:
            return word
        return make("bits", "i32", (word, shift), width)

    def cat(self, node: Expr) -> Expr:
        """Neighbouring fields of one word become one."""
        parts = list(zip(node.args, node.attr, strict=True))
        merged = [parts[0]]
        for part, width in parts[1:]:
            below, under = merged[-1]
            one_word = below.op == part.op == "bits" and below.args[0] is part.args[0]
            whole = one_word and below.attr >= under and part.attr >= width  # a narrower field leaves zeros above it
            if whole and part.args[1] is self(below.args[1] + under):
                merged[-1] = (self.bits(below.args[0], below.args[1], under + width), under + width)
            else:
                merged.append((part, width))
        if len(merged) == 1:
            return merged[0][0]
        return make("cat", "i32", tuple(part for part, _ in merged), tuple(width for _, width in merged))

    def interval(self, expr: Expr) -> Interval:
        """See the function `interval`."""
        if expr not in self.intervals:
            low, high = self.bounds(expr)
            if not (WHOLE[0] <= low and high <= WHOLE[1]):  # a stored word may wrap, an address stops at the end
                low, high = WHOLE if _reads(expr) else (max(low, WHOLE[0]), min(high, WHOLE[1]))
            self.intervals[expr] = low, high
        return self.intervals[expr]

    def bounds(self, expr: Expr) -> Interval:
        of, args = self.interval, expr.args
        match expr.op:
            case "const":
                return expr.attr, expr.attr
            case "var":
                fact = self.facts.get(expr.attr, COORDINATE)
                return fact.least, fact.greatest
            case "load":
                return _STORED.get(expr.attr[1], WHOLE)
            case "field":
                return of(args[0])
            case "bits":
                (low, high), first = of(args[0]), min(31, max(0, of(args[1])[0]))
                most = (1 << min(expr.attr, 32 - first)) - 1
                if low >= 0:
                    return 0, min(most, high >> first)
                return (0, most) if most <= WHOLE[1] else WHOLE
            case "cat" if sum(expr.attr) < 32:
                return 0, (1 << sum(expr.attr)) - 1
            case "bitcast":
                return _STORED.get(expr.attr, WHOLE)
            case "table":
                return min(expr.attr), max(expr.attr)
            case "where":
                yes, no = of(args[1]), of(args[2])
                return min(yes[0], no[0]), max(yes[1], no[1])
            case "add":
                return of(args[0])[0] + of(args[1])[0], of(args[0])[1] + of(args[1])[1]
            case "sub":
                return of(args[0])[0] - of(args[1])[1], of(args[0])[1] - of(args[1])[0]
            case "mul":
                ends = [x * y for x in of(args[0]) for y in of(args[1])]
                return min(ends), max(ends)
            case "div" if expr.dtype == "i32" and of(args[1])[0] > 0:
                ends = [x // y for x in of(args[0]) for y in of(args[1])]
                return min(ends), max(ends)
            case "mod" if of(args[1])[0] > 0:
                low, high = of(args[0])
                fits = low >= 0 and high < of(args[1])[0]
                return (low, high) if fits else (0, of(args[1])[1] - 1)
        return WHOLE


def _quotient(expr: Expr, divisor: int) -> Expr:
    """expr // divisor, two divisions made one and a table's entries divided."""
    if divisor == 1:
        return expr
    if expr.op == "table":
        return table(tuple(entry // divisor for entry in expr.attr), expr.args[0])
    if expr.op == "div" and expr.args[1].op == "const" and expr.args[1].attr > 0:
        return make("div", "i32", (expr.args[0], const(expr.args[1].attr * divisor)))
    return make("div", "i32", (expr, const(divisor)))


def _wrap(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def _reads(expr: Expr) -> bool:
    return expr.op == "load" or any(map(_reads, expr.args))


_NEUTRAL = {("mul", "1.0"), ("div", "1.0"), ("sub", "0.0")}


def _float(node: Expr) -> Expr:
    """Float arithmetic of constants, computed as torch does; x * 1, x / 1 and x - 0 are x."""
    args = node.args
    if all(arg.op == "const" for arg in args):
        a, *b = (torch.tensor(arg.attr, dtype=DTYPES[arg.dtype]) for arg in args)
        match node.op:
            case "add":
                a = a + b[0]
            case "sub":
                a = a - b[0]
            case "mul":
                a = a * b[0]
            case "div":
                a = a / b[0]
        return const(a.to(DTYPES[node.dtype]).item(), node.dtype)
    if len(args) == 2 and args[1].op == "const" and (node.op, repr(args[1].attr)) in _NEUTRAL:
        return args[0]
    return node
