"""Instructions whose results depend on their operands alone, on arrays of one element a thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gpu.ptx.values import DTYPES, SMALL, Array, add_odd, flushed, fused, fused_double, halves, joined, narrow, widen

Function = Callable[..., Array | tuple[Array, ...]]


@dataclass(frozen=True)
class Pure:
    """The types that operands are read as and results are written as, and how one gives the other."""

    results: tuple[str, ...]
    operands: tuple[str, ...]
    compute: Function


SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
BITS = {name: np.dtype(dtype).itemsize * 8 for name, dtype in DTYPES.items()}
SMALL_TYPES = ("f16", "bf16", "f16x2", "bf16x2")
COMPARISONS = {
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "lo",
    "ls",
    "hi",
    "hs",
    "num",
    "nan",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
}
MODIFIERS = {*DTYPES, *COMPARISONS, "rn", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "satfinite", "relu", "approx", "full",
             "NaN", "wide", "cc", "l", "r", "wrap", "clamp", "and", "or", "xor"}  # fmt: skip
ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x,
}  # fmt: skip


@functools.cache
def pure(name: tuple[str, ...]) -> Pure | None:
    """What an instruction computes; None for one that is not among these."""
    kind, rest = name[0], name[1:]
    type_ = rest[-1] if rest else ""
    if not MODIFIERS.issuperset(rest) or ("sat" in rest and type_[0] != "f"):
        return None
    if kind == "cvt":
        return _convert(rest)
    if sum(part in DTYPES for part in rest) > 1:
        return _mixed(kind, rest[-2], type_)
    if kind == "mov" or type_ == "pred":
        return _plain(kind, type_)
    if kind in ("setp", "selp"):
        return (
            _setp(rest) if kind == "setp" else Pure((type_,), (type_, type_, "pred"), lambda a, b, p: np.where(p, a, b))
        )
    if type_ in ("s16x2", "u16x2", "f32x2"):
        return _pairs(pure((*name[:-1], type_[:3])), type_)
    if type_ in SMALL_TYPES:
        return _small(kind, rest, type_)
    if type_ in ("f32", "f64"):
        return _float(kind, rest, type_)
    return _integer(kind, rest, type_) if type_ in DTYPES else None


def _mixed(kind: str, total: str, type_: str) -> Pure | None:
    """Sums in f32 of numbers, or products, of 16-bit floats."""
    if total != "f32" or type_ not in ("f16", "bf16") or kind not in ("add", "sub", "fma"):
        return None

    def number(bits: Array) -> Array:
        return widen(bits, type_).astype(np.float32)  # which holds each of them

    if kind == "fma":
        return Pure((total,), (type_, type_, total), lambda a, b, c: fused(number(a), number(b), c))
    return Pure((total,), (type_, total), lambda a, c: number(a) + c if kind == "add" else number(a) - c)


def _plain(kind: str, type_: str) -> Pure | None:
    function: Function | None = {
        "mov": lambda a: a, "not": np.logical_not, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
    }.get(kind)  # fmt: skip
    return function and Pure((type_,), (type_,) * (1 if kind in ("mov", "not") else 2), function)


def _setp(rest: tuple[str, ...]) -> Pure:
    """Comparisons of ordered numbers are false where one is NaN, those that end in u are true."""
    compare, type_ = rest[0], rest[-1]
    plain: dict[str, Function] = {
        "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b) if type_[0] in "fb" and type_ in (*SMALL_TYPES, "f32", "f64")
        else a != b, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
        "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
        "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
    }  # fmt: skip
    if compare in plain:
        found = plain[compare]
    else:
        ordered = plain[compare[:-1]]

        def found(a: Array, b: Array) -> Array:
            return ordered(a, b) | (a != a) | (b != b)

    if type_ in SMALL_TYPES:
        inner = found

        def found(a: Array, b: Array) -> Array:
            return inner(widen(a, type_), widen(b, type_))

    combine = next((each for each in rest[1:-1] if each in ("and", "or", "xor")), None)
    both = (lambda a, b: (found(a, b), ~found(a, b))) if combine is None else None
    if both is not None:
        return Pure(("pred", "pred"), (type_, type_), both)
    logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[str(combine)]
    return Pure(
        ("pred", "pred"), (type_, type_, "pred"), lambda a, b, c: (logic(found(a, b), c), logic(~found(a, b), c))
    )


def _integer(kind: str, rest: tuple[str, ...], type_: str) -> Pure | None:
    dtype, bits, signed = DTYPES[type_], BITS[type_], type_[0] == "s"
    wide_type = {16: "32", 32: "64"}.get(bits, "64")
    wide = f"{'s' if signed else 'u'}{wide_type}"
    if kind in ("mul", "mad", "madc"):
        parts = {
            "lo": lambda a, b: a * b,
            "hi": lambda a, b: _high(a, b, bits),
            "wide": lambda a, b: a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]),
        }
        multiply, result = parts[rest[0]], wide if rest[0] == "wide" else type_
        if kind == "mul":
            return Pure((result,), (type_, type_), multiply)
        if "cc" in rest:
            return Pure((result, "pred"), (type_, type_, result), lambda a, b, c: _carried(multiply(a, b), c))
        if kind == "madc":
            return Pure(
                (result,), (type_, type_, result, "pred"), lambda a, b, c, f: multiply(a, b) + c + f.astype(dtype)
            )
        return Pure((result,), (type_, type_, result), lambda a, b, c: multiply(a, b) + c)
    if kind in ("shl", "shr"):
        return Pure((type_,), (type_, "u32"), functools.partial(_shift, kind, bits, signed))
    two: dict[str, Function] = {
        "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.minimum, "max": np.maximum, "div": _quotient, "rem": lambda a, b: a - _quotient(a, b) * b,
    }  # fmt: skip
    if kind in two and "cc" not in rest:
        return Pure((type_,), (type_, type_), two[kind])
    one: dict[str, Function] = {"not": np.invert, "neg": np.negative, "abs": np.abs}
    if kind in one:
        return Pure((type_,), (type_,), one[kind])
    special: dict[str, Pure] = {
        "lop3": Pure(("b32",), ("b32",) * 4, _lop3),
        "prmt": Pure(("b32",), ("b32",) * 3, _prmt),
        "bfe": Pure((type_,), (type_, "u32", "u32"), functools.partial(_extract, bits, signed)),
        "clz": Pure(("u32",), ("b32",), lambda a: np.uint32(32) - np.frexp(a.astype(np.float64))[1].astype(np.uint32)),
        "popc": Pure(("u32",), (type_,), lambda a: np.bitwise_count(a).astype(np.uint32)),
        "shf": Pure(("b32",), ("b32",) * 3, functools.partial(_funnel, rest[0], "wrap" in rest)),
    }
    return special.get(kind)


def _pairs(one: Pure | None, type_: str) -> Pure | None:
    """What `one` does to a number, done to the two in a register."""
    if one is None:
        return None

    def compute(*words: Array) -> Array:
        found = one.compute(*(word[..., None].view(DTYPES[type_[:3]]) for word in words))
        return np.ascontiguousarray(found).view(DTYPES[type_])[..., 0]

    return Pure((type_,), (type_,) * len(one.operands), compute)


def _high(a: Array, b: Array, bits: int) -> Array:
    wide: type[np.generic] = (
        object if bits == 64 else (np.int64 if np.issubdtype(a.dtype, np.signedinteger) else np.uint64)
    )
    return (
        a.astype(wide) * b.astype(wide) >> wide(bits) if bits < 64 else a.astype(wide) * b.astype(wide) >> 64
    ).astype(a.dtype)


def _carried(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    return total, total < a


def _shift(kind: str, bits: int, signed: bool, a: Array, amount: Array) -> Array:
    over, by = amount >= bits, np.minimum(amount, bits - 1).astype(a.dtype)
    if kind == "shl":
        return np.where(over, a.dtype.type(0), a << by)
    return a >> by if signed else np.where(over, a.dtype.type(0), a >> by)


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero."""
    if np.issubdtype(a.dtype, np.unsignedinteger):
        return a // b
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def _extract(bits: int, signed: bool, a: Array, at: Array, count: Array) -> Array:
    at, count = np.minimum(at & 0xFF, bits).astype(np.int64), np.minimum(count & 0xFF, bits).astype(np.int64)
    end = np.minimum(at + count, bits)
    up, down = bits - end, bits - (end - at)
    raised = np.where(up >= bits, 0, a << np.minimum(up, bits - 1).astype(a.dtype)).astype(a.dtype)
    found = np.where(down >= bits, 0, raised >> np.minimum(down, bits - 1).astype(a.dtype))
    return found.astype(a.dtype)


def _funnel(side: str, wrap: bool, a: Array, b: Array, amount: Array) -> Array:
    """The upper (l) or lower (r) word of b:a moved by `amount` bits."""
    by = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
    both = b.astype(np.uint64) << np.uint64(32) | a
    return (both << by >> np.uint64(32) if side == "l" else both >> by).astype(np.uint32)


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    out = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte >= 128, np.uint32(255), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def _small(kind: str, rest: tuple[str, ...], type_: str) -> Pure | None:
    """16-bit floats, one or two in a register: computed in f64, rounded once."""
    name, pairs = type_.removesuffix("x2"), type_.endswith("x2")
    count = {"fma": 3, "neg": 1, "abs": 1, "ex2": 1, "tanh": 1}.get(kind, 2)
    function: Function | None = {
        "add": add_odd, "sub": lambda a, b: add_odd(a, -b), "mul": np.multiply, "fma": lambda a, b, c: add_odd(a * b, c),
        "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "tanh": np.tanh, "min": _least("NaN" in rest, False),
        "max": _least("NaN" in rest, True),
    }.get(kind)  # fmt: skip
    if function is None:
        return None

    def compute(*bits: Array) -> Array:
        numbers = [halves(each, name) if pairs else widen(each, name) for each in bits]
        found = function(*numbers)
        if "relu" in rest:
            found = np.maximum(found, 0.0)
        return joined(found, name) if pairs else narrow(found, name).astype(np.uint16)

    return Pure((type_,), (type_,) * count, compute)


def _least(nan: bool, most: bool) -> Function:
    """The smaller (larger) number, -0 below +0; of a number and NaN the number, or NaN."""
    choose = (np.maximum if most else np.minimum) if nan else (np.fmax if most else np.fmin)

    def function(a: Array, b: Array) -> Array:
        found = choose(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            negative = np.signbit(a) & np.signbit(b) if most else np.signbit(a) | np.signbit(b)
            found = np.where(zeros, np.where(negative, a.dtype.type(-0.0), a.dtype.type(0.0)), found)
        return found

    return function


def _float(kind: str, rest: tuple[str, ...], type_: str) -> Pure | None:
    dtype, approximate = DTYPES[type_], any(each in rest for each in ("approx", "full"))
    two: dict[str, Function] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": _least("NaN" in rest, False),
        "max": _least("NaN" in rest, True), "copysign": lambda a, b: np.copysign(b, a),
    }  # fmt: skip
    one: dict[str, Function] = {"neg": np.negative, "abs": np.abs}
    if kind in APPROXIMATE and (approximate or kind in ("sqrt", "rcp")):
        one[kind] = lambda a: APPROXIMATE[kind](a.astype(np.float64)).astype(dtype)
    if kind == "fma":
        found, count = fused if type_ == "f32" else fused_double, 3
    elif kind in two:
        found, count = two[kind], 2
    elif kind in one:
        found, count = one[kind], 1
    else:
        return None
    saturate, flush = "sat" in rest, "ftz" in rest

    def compute(*values: Array) -> Array:
        result = found(*(flushed(each) for each in values) if flush else values)
        result = flushed(result) if flush else result
        return np.where(result > 0, np.minimum(result, dtype(1)), dtype(0)) if saturate else result

    return Pure((type_,), (type_,) * count, compute if saturate or flush else found)


def _convert(rest: tuple[str, ...]) -> Pure | None:
    to, source = rest[-2], rest[-1]
    how = rest[:-2]
    if to.endswith("x2"):
        name = to.removesuffix("x2")
        if source.endswith("x2"):  # of 8 bits to 16
            small = source.removesuffix("x2")
            return Pure((to,), ("b16",), lambda a: joined(widen(np.stack([a & 255, a >> 8], -1), small), name))
        finite, bits = "satfinite" in how, SMALL[name].bits
        if source == "f32":

            def compute(high: Array, low: Array) -> Array:
                low, high = (narrow(_ready(each, how), name, finite) for each in (low, high))
                return (low | high << np.uint32(bits)).astype(DTYPES[to])

            return Pure((to,), ("f32", "f32"), compute)
        return Pure((to,), (source,), lambda a: _two(narrow(halves(a, source.removesuffix("x2")), name, finite), bits))
    if how == ("rna",) and to == "tf32":  # halves away from zero
        return Pure((to,), ("b32",), lambda a: a + np.uint32(0x1000) & np.uint32(0xFFFFE000))
    floats = ("f16", "bf16", "f32", "f64")
    if to not in DTYPES or source not in DTYPES:
        return None
    rounding = next((ROUNDING[each] for each in how if each in ROUNDING), None)
    flush = "ftz" in how

    def number(a: Array) -> Array:
        if source not in floats:
            return a
        found = widen(a, source) if source in SMALL_TYPES else flushed(a) if flush else a
        return rounding(found) if rounding else found

    def compute(a: Array) -> Array:
        found = number(a)
        if to in floats:
            if "sat" in how:
                found = np.where(found > 0, np.minimum(found, 1), 0)
            if to in SMALL_TYPES:
                return narrow(_ready(found, how), to).astype(np.uint16)
            return found.astype(DTYPES[to])
        if source in floats:
            return _whole(found.astype(np.float64), to)
        return found.astype(DTYPES[to])

    return Pure((to,), (source,), compute)


def _ready(values: Array, how: tuple[str, ...]) -> Array:
    found = values.astype(np.float64)
    return np.where(found > 0, found, 0.0) if "relu" in how else found


def _two(bits: Array, width: int) -> Array:
    return (bits[..., 0] | bits[..., 1] << np.uint32(width)).astype(np.uint16 if width == 8 else np.uint32)


def _whole(values: Array, to: str) -> Array:
    """Whole numbers, ended at the smallest and largest of the type; 0 for NaN."""
    info = np.iinfo(DTYPES[to])
    low, high = values <= info.min, values >= info.max
    inside = np.where(low | high | np.isnan(values), 0, values).astype(DTYPES[to])
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(DTYPES[to])
