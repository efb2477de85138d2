"""A decode expression as straight-line Triton text: what any format says about each weight of a tile.

Variables are names of i32 values of any shapes that broadcast: n [BN, 1], j [1, BK], a scalar k0. What depends on one of them
only is computed at its shape. In registers narrow floats are float32 that hold a value of the narrow type, so every
operation on them rounds; floats of 8 bits are read as bytes and converted by integer arithmetic, which every GPU has.

Integers are i32. An address of a weight with more elements than an i32 counts is computed in i64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qcompile.errors import InternalError
from qcompile.expr import FLOATS, Expr, walk
from qcompile.lowering.triton.text import interpreted
from qcompile.simplify import WHOLE, Fact, Simplifier
from qcompile.target import Target

LONGEST = 88  # characters of a text that is written where it is used; a longer one gets a name
FEW = 4  # entries of a table of floats that are text
_INFIX = {"add": "+", "sub": "-", "mul": "*", "lt": "<"}
_INTEGER_BITS = {"i8": 8, "i16": 16}

_EIGHT_BITS = ("f8e4m3", "f8e5m2", "f8e8m0")


def tables(expressions: Iterable[Expr]) -> list[tuple[float, ...]]:
    """The entries of the tables that a kernel reads from memory, f32: each table once, in a fixed order."""
    found = (node for expr in expressions for node in walk(expr) if node.op == "table" and not _in_text(node))
    return list({repr(node.attr): node.attr for node in found}.values())


def _in_text(table: Expr) -> bool:
    """Whether a table is text: integers, which are places and shifts and small, and a few floats."""
    return table.dtype == "i32" or len(table.attr) <= FEW


def _words(entries: Sequence[int]) -> tuple[int, int, int, list[int]]:
    """(bits of a word, bits of an entry, entries of a word, words): entries side by side from the lowest bit up.

    A word has all entries, or a power of two of them.
    """
    width = max(max(entries).bit_length(), 1)
    total = 32 if width * len(entries) <= 32 else 64
    each = total // width
    if each < len(entries):
        each = 1 << (each.bit_length() - 1)
    words = []
    for first in range(0, len(entries), each):
        word = sum(entry << (width * i) for i, entry in enumerate(entries[first : first + each]))
        words.append(word - (1 << total) if word >> (total - 1) else word)
    return total, width, each, words


@dataclass
class Renderer:
    """Writes expressions over stored tensors, one statement a line to `lines`; values that they share are computed once.

    `tensors` has the pointer of each stored tensor by its name, and `tables` that of each table in memory by the repr of its
    entries;
    `variables` the names of the variables. `masks` has names of conditions: what is read at a place that depends on all
    variables of a key is masked with it, and 0 where it does not hold. Without one, every place must be in the weight.
    `facts` bound the variables, as for `simplify`; `taken` are names that other statements use. The lines of `once` do not
    depend on the variable `k0`, and may stand before its loop. Both call functions of `elementary`, whose text is added.
    """

    target: Target
    tensors: Mapping[str, str]
    variables: Mapping[str, str]
    facts: Mapping[str, Fact]
    masks: Mapping[frozenset[str], str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    prefix: str = ""
    once: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._simplifier = Simplifier(self.facts)
        self._done: dict[Expr, str] = {}
        self._needs: dict[Expr, frozenset[str]] = {}
        self._reads: dict[Expr, bool] = {}
        self._wide: dict[Expr, bool] = {}

    def __call__(self, expr: Expr) -> str:
        """The text of the value of `expr`: a name, or an operation on names."""
        uses: dict[Expr, int] = {}
        for node in walk(expr):
            for arg in node.args:
                uses[arg] = uses.get(arg, 0) + 1
        for node in walk(expr):
            if node not in self._done:
                self._done[node] = self._named(node, self._node(node, [self._done[arg] for arg in node.args]), uses)
        return self._done[expr]

    def needs(self, expr: Expr) -> frozenset[str]:
        """The variables that the value depends on."""
        if expr not in self._needs:
            own = frozenset([expr.attr]) if expr.op == "var" else frozenset()
            self._needs[expr] = own.union(*(self.needs(arg) for arg in expr.args))
        return self._needs[expr]

    # -- names --

    def _named(self, node: Expr, text: str, uses: Mapping[Expr, int]) -> str:
        """`text`, or the new name of its value: of a field, of what is read, of what is used twice or too long."""
        simple = text.isidentifier() or node.op == "const"
        hint = {"field": str(node.attr), "load": str(node.attr[0]) if node.op == "load" else ""}.get(node.op, "v")
        if simple or (node.op not in ("field", "load") and uses.get(node, 0) < 2 and len(text) <= LONGEST):
            return text
        name = self.fresh(self.prefix + hint)
        # Only what has one row or one column is worth a register for the length of a loop.
        early = "k0" not in self.needs(node) and len(self.needs(node)) <= 1
        (self.once if early else self.lines).append(f"{name} = {_bare(text)}")
        return name

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet."""
        name, count = hint, 1
        while name in self.taken:
            name, count = f"{hint}_{count}", count + 1
        self.taken.add(name)
        return name

    # -- nodes --

    def _node(self, node: Expr, args: list[str]) -> str:
        match node.op:
            case "const":
                return _number(node.attr)
            case "var":
                return self.variables[node.attr]
            case "field":
                return args[0]
            case "load":
                return self._load(node, args)
            case "table":
                return self._table(node, args[0])
            case "bits":
                return self._bits(node, *args)
            case "cat":
                text, low = args[0], node.attr[0]
                for part, width in zip(args[1:], node.attr[1:], strict=True):
                    text, low = f"({text} | ({part} << {low}))", low + width
                return text
            case "where":
                return f"tl.where({', '.join(map(_bare, args))})"
            case "lt":
                return f"({args[0]} < {args[1]})"
            case "div" if node.dtype in FLOATS:
                return self.rounded(f"tl.div_rn({_bare(args[0])}, {_bare(args[1])})", node.dtype)
            case "div" | "mod":
                return self._divide(node, *args)
            case "add" | "sub" | "mul":
                if node.dtype == "i32" and self.wide(node) and not any(self.wide(arg) for arg in node.args):
                    at = 1 if node.args[0].op == "const" else 0
                    args[at] = f"{args[at]}.to(tl.int64)"
                return self.rounded(f"({args[0]} {_INFIX[node.op]} {args[1]})", node.dtype)
            case "cast":
                return self._cast(node, args[0])
            case "bitcast":
                return self._bitcast(args[0], node.attr)
        raise InternalError("an expression has no text", found=repr(node))

    def rounded(self, text: str, dtype: str) -> str:
        """The f32 (or i32) `text` rounded to what `dtype` holds."""
        if dtype == "f16":
            return f"{text}.to(tl.float16).to(tl.float32)"
        if dtype == "bf16":
            return (
                f"round_bf16({_bare(text)})" if interpreted(self.target) else f"{text}.to(tl.bfloat16).to(tl.float32)"
            )
        return f"{dtype}_to_f32(f32_to_{dtype}({_bare(text)}))" if dtype in ("f8e4m3", "f8e5m2") else text

    def _load(self, node: Expr, args: list[str]) -> str:
        name, dtype, shape = node.attr
        last, terms, step = math.prod(shape) - 1, list[str](), 1
        for index, text, size in reversed(list(zip(node.args, args, shape, strict=True))):
            if text != "0":
                text = f"{text}.to(tl.int64)" if last > WHOLE[1] and not self.wide(index) else text
                terms.append(text if step == 1 else f"{text} * {step}")
            step *= size
        place = " + ".join(reversed(terms)) or "0"
        if self._is_data(node) and not self._within(node, last):
            # No data lead outside of the tensor.
            place = f"tl.minimum(tl.maximum({_bare(place)}, 0), {last})"
        return self._element(self.tensors[name], place, dtype, self._mask(node))

    def _within(self, load: Expr, last: int) -> bool:
        """Whether the place that is read is known to be inside of the tensor."""
        low = high = 0
        for index, size in zip(load.args, load.attr[2], strict=True):
            bounds = self._simplifier.interval(index)
            low, high = low * size + bounds[0], high * size + bounds[1]
        return low >= 0 and high <= last

    def _mask(self, node: Expr) -> str:
        return " & ".join(mask for variables, mask in self.masks.items() if variables <= self.needs(node))

    def _element(self, pointer: str, place: str, dtype: str, mask: str = "") -> str:
        """The element as the expression sees it: f32 or i32."""
        masked = f", mask={mask}, other=0" if mask else ""
        text = f"tl.load({pointer} + {place}{masked})"
        if dtype in _EIGHT_BITS:
            return f"{dtype}_to_f32({text})"
        if dtype in ("f32", "i32"):
            return text
        return f"{text}.to(tl.float32)" if dtype in FLOATS else f"{text}.to(tl.int32)"

    def _table(self, node: Expr, index: str) -> str:
        entries, last = node.attr, len(node.attr) - 1
        low, high = self._simplifier.interval(node.args[0])
        if low < 0 or high > last:
            index = f"tl.minimum(tl.maximum({_bare(index)}, 0), {last})"
        if node.dtype == "f32":
            return f"tl.load({self.tables[repr(entries)]} + {index})" if not _in_text(node) else _chain(index, entries)
        least = min(entries)
        total, width, each, words = _words([entry - least for entry in entries])
        place = f"({index} & {each - 1})" if len(words) > 1 else index
        place = f"{place}.to(tl.int64)" if total == 64 else place
        found = [f"(({word} >> ({place} * {width})) & {(1 << width) - 1})" for word in words]
        text = found.pop()
        for at, entry in reversed(list(enumerate(found))):
            text = f"tl.where({index} < {(at + 1) * each}, {entry}, {text})"
        text = f"{text}.to(tl.int32)" if total == 64 else text
        return f"({text} + {_number(least)})" if least else text

    def _bits(self, node: Expr, word: str, shift: str) -> str:
        width, last = node.attr, self._simplifier.interval(node.args[1])[1]
        # An arithmetic shift brings in the sign, which a logical one does not; the mask takes it out again, if it can.
        low, high = self._simplifier.interval(node.args[0])
        if shift == "0":
            moved = word
        elif last + width <= 32 or low >= 0 or self.wide(node.args[0]):
            moved = f"({word} >> {shift})"
        else:
            moved = f"({word}.to(tl.uint32, bitcast=True) >> {shift}).to(tl.int32, bitcast=True)"
        first = self._simplifier.interval(node.args[1])[0]
        small = low >= 0 and high >> min(max(first, 0), 31) < 1 << width
        return moved if width == 32 or small else f"({moved} & {(1 << width) - 1})"

    def _divide(self, node: Expr, left: str, right: str) -> str:
        """Toward minus infinity; the remainder has the divisor's sign."""
        dividend, divisor = node.args
        if divisor.op == "const" and divisor.attr > 0 and divisor.attr & (divisor.attr - 1) == 0:
            shift = divisor.attr.bit_length() - 1
            return f"({left} >> {shift})" if node.op == "div" else f"({left} & {divisor.attr - 1})"
        positive = self._simplifier.interval(divisor)[0] > 0
        if positive and (self._simplifier.interval(dividend)[0] >= 0 or self.wide(dividend)):
            return f"({left} {'//' if node.op == 'div' else '%'} {right})"
        rest = f"(({left} % {right} + {right}) % {right})"
        return rest if node.op == "mod" else f"(({left} - {rest}) // {right})"

    def _cast(self, node: Expr, value: str) -> str:
        source, target = node.args[0].dtype, node.dtype
        if target == "f32" and source in FLOATS:
            return value
        if target in FLOATS:
            return self.rounded(value if source in FLOATS else f"{value}.to(tl.float32)", target)
        return f"{value}.to(tl.int32)"

    def _bitcast(self, value: str, to: str) -> str:
        if to in _INTEGER_BITS:
            move = 32 - _INTEGER_BITS[to]
            return f"(({value} << {move}) >> {move})"
        if to in _EIGHT_BITS:
            return f"{to}_to_f32({value} & 0xFF)"
        if to == "f16":
            return f"{value}.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)"
        return (
            f"{value}.to(tl.float32, bitcast=True)" if to == "f32" else f"({value} << 16).to(tl.float32, bitcast=True)"
        )

    # -- what is known --

    def _is_data(self, node: Expr) -> bool:
        """Whether an operand of the node is read from memory, or made of what is."""
        if node not in self._reads:
            self._reads[node] = any(arg.op == "load" or self._is_data(arg) for arg in node.args)
        return self._reads[node]

    def wide(self, node: Expr) -> bool:
        """Whether the value is computed in i64: a place that an i32 does not count to."""
        if node not in self._wide:
            counts = node.dtype == "i32" and node.op not in ("load", "table")
            carried = counts and any(self.wide(arg) for arg in node.args)
            made = counts and node.op in ("add", "sub", "mul") and not self._is_data(node)
            low, high = self._simplifier.bounds(node) if made else (0, 0)
            self._wide[node] = carried or low < WHOLE[0] or high > WHOLE[1]
        return self._wide[node]


def _number(value: int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return f"({value})" if value < 0 else repr(value)


def _chain(index: str, entries: Sequence[float]) -> str:
    text = _number(entries[-1])
    for place in reversed(range(len(entries) - 1)):
        text = f"tl.where({index} == {place}, {_number(entries[place])}, {text})"
    return text


def _bare(text: str) -> str:
    """The text without the parentheses around all of it."""
    if not text.startswith("(") or not text.endswith(")"):
        return text
    depth = 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return text[1:-1] if place == len(text) - 1 else text
    return text
