"""Elements of any dtype in memory as lanes in registers: masked and scattered access, and conversions between dtypes.

In registers every float is a float32 that holds a value of the narrow type, bool is i1, integers keep their width.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from qcompile.dtypes import itemsize
from qcompile.lowering.mlir.text import POINTER, Text, Value, vector

# dtype -> element type in memory, element type in a register
ELEMENTS: dict[str, tuple[str, str]] = {
    "f32": ("f32", "f32"), "f16": ("f16", "f32"), "bf16": ("i16", "f32"), "i64": ("i64", "i64"), "i32": ("i32", "i32"),
    "i16": ("i16", "i16"), "i8": ("i8", "i8"), "u8": ("i8", "i8"), "bool": ("i8", "i1"),
    "f8e4m3": ("i8", "f32"), "f8e5m2": ("i8", "f32"), "f8e8m0": ("i8", "f32"),
}  # fmt: skip
FLOATS = ("f32", "f16", "bf16", "f8e4m3", "f8e5m2", "f8e8m0")


def lane_numbers(t: Text, lanes: int) -> Value:
    """0, 1, 2 ... as i64."""
    return t.constants(range(lanes), "i64") if lanes > 1 else t.constant(0, "i64")


def first_lanes(t: Text, count: Value, lanes: int) -> Value:
    """i1 lanes that hold for lane < count."""
    return lane_numbers(t, lanes) < t.broadcast(count, lanes)


def tiles(t: Text, count: Value, lanes: int) -> Iterator[tuple[Value, Value | None]]:
    """For a body that is written twice: whole vectors in a loop (index, None), then the rest (index, mask)."""
    whole = count - count % lanes
    with t.loop(0, whole, lanes) as i:
        assert isinstance(i, Value)
        yield i, None
    with t.when(whole < count):
        yield whole, first_lanes(t, count - whole, lanes)


def load(t: Text, base: Value, index: Value | int, dtype: str, lanes: int = 1, mask: Value | None = None) -> Value:
    """Elements index, index + 1 ...; lanes where `mask` is false are not read and hold zero."""
    element, size = ELEMENTS[dtype][0], itemsize(dtype)
    address, type = base.at(index, element), vector(lanes, element)
    if mask is None:
        return widen(t, t.load(address, type, size), dtype)
    zero = t.constant(0, type)
    return widen(t, t.op(
        f"llvm.intr.masked.load {address}, {mask}, {zero} {{alignment = {size} : i32}} : "
        f"({POINTER}, {mask.type}, {type}) -> {type}", type,
    ), dtype)  # fmt: skip


def gather(t: Text, base: Value, indices: Value, dtype: str, mask: Value) -> Value:
    """Element indices[lane] in each lane; lanes where `mask` is false are not read and hold zero."""
    element, size, lanes = ELEMENTS[dtype][0], itemsize(dtype), indices.count
    type, addresses = vector(lanes, element), _addresses(t, base, indices, element)
    zero = t.constant(0, type)
    return widen(t, t.op(
        f"llvm.intr.masked.gather {addresses}, {mask}, {zero} {{alignment = {size} : i32}} : "
        f"({addresses.type}, {mask.type}, {type}) -> {type}", type,
    ), dtype)  # fmt: skip


def store(t: Text, value: Value, base: Value, index: Value | int, dtype: str, mask: Value | None = None) -> None:
    """Writes the lanes to elements index, index + 1 ..., only where `mask` holds."""
    value, size = narrow(t, value, dtype), itemsize(dtype)
    address = base.at(index, value.element)
    if mask is None:
        t.store(value, address, size)
    else:
        t.line(
            f"llvm.intr.masked.store {value}, {address}, {mask} {{alignment = {size} : i32}} : "
            f"{value.type}, {mask.type} into {POINTER}"
        )


def scatter(t: Text, value: Value, base: Value, indices: Value, dtype: str, mask: Value) -> None:
    """Writes each lane where `mask` holds to element indices[lane]."""
    value, size = narrow(t, value, dtype), itemsize(dtype)
    addresses = _addresses(t, base, indices, value.element)
    t.line(
        f"llvm.intr.masked.scatter {value}, {addresses}, {mask} {{alignment = {size} : i32}} : "
        f"{value.type}, {mask.type} into {addresses.type}"
    )


def _addresses(t: Text, base: Value, indices: Value, element: str) -> Value:
    type = vector(indices.count, POINTER)
    return t.op(f"llvm.getelementptr {base}[{indices}] : ({POINTER}, {indices.type}) -> {type}, {element}", type)


def widen(t: Text, value: Value, dtype: str) -> Value:
    """From the memory form of `dtype` to its register form."""
    if dtype == "f16":
        return t.cast("extf", value, "f32")
    if dtype == "bf16":
        return t.cast("bitcast", t.cast("extui", value, "i32") << 16, "f32")
    if dtype.startswith("f8"):
        return float_of_byte(t, t.cast("extui", value, "i32"), dtype)
    return value.compare("ne", 0) if dtype == "bool" else value


def narrow(t: Text, value: Value, dtype: str) -> Value:
    """From the register form of `dtype` to its memory form; floats are rounded to nearest even."""
    if dtype == "f16":
        return t.cast("truncf", value, "f16")
    if dtype == "bf16":
        bits = t.cast("bitcast", value, "i32")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return t.cast("trunci", t.select(value.compare("uno", 0.0), 0x7FC0, rounded), "i16")
    if dtype in _EIGHT_BITS:
        return _byte_of_float(t, value, *_EIGHT_BITS[dtype])
    return t.cast("extui", value, "i8") if dtype == "bool" else value


# dtype -> bits of mantissa, exponent bias, least number that overflows, code of what overflows (f8e4m3 saturates), of NaN
_EIGHT_BITS = {"f8e4m3": (3, 7, 464.0, 0x7E, 0x7F), "f8e5m2": (2, 15, 65536.0, 0x7C, 0x7F)}


def half_of_byte(t: Text, byte: Value, dtype: str) -> Value:
    """The f32 value of an f8e5m2, or the 256th part of that of an f8e4m3 (NaN becomes a number), from its bits, i32."""
    # With the mantissa moved to float16's place only the exponent's bias differs, also for the smallest numbers.
    half = byte << 8 if dtype == "f8e5m2" else ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return t.cast("extf", t.cast("bitcast", t.cast("trunci", half, "i16"), "f16"), "f32")


def float_of_byte(t: Text, byte: Value, dtype: str) -> Value:
    """The f32 value of an 8-bit float from its bits, i32."""
    if dtype == "f8e8m0":  # a power of two, and no sign; 2^-127 is below float32's exponents
        power = t.select(byte.compare("eq", 0), 0x00400000, byte << 23)
        return t.cast("bitcast", t.select(byte.compare("eq", 255), 0x7FC00000, power), "f32")
    half = half_of_byte(t, byte, dtype)
    return half if dtype == "f8e5m2" else t.select((byte & 0x7F).compare("eq", 0x7F), math.nan, half * 256.0)


def _byte_of_float(t: Text, value: Value, mantissa: int, bias: int, most: float, over: int, nan: int) -> Value:
    """The bits, i8, of the 8-bit float nearest to an f32 (ties to even), as torch's `to` gives them."""
    bits = t.cast("bitcast", value, "i32")
    size, drop = bits & 0x7FFFFFFF, 23 - mantissa
    least = 2.0 ** (1 - bias)  # the smallest number with a whole mantissa
    normal = ((size + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop) - ((127 - bias) << mantissa)
    # Added to this power of two, a smaller number is rounded to the last bit that such codes have.
    ground = least * 2.0 ** (23 - mantissa)
    magnitude = t.cast("bitcast", size, "f32")
    small = t.cast("bitcast", magnitude + ground, "i32") - struct.unpack("<i", struct.pack("<f", ground))[0]
    code = t.select(magnitude < least, small, normal)
    code = t.select(magnitude < most, code, t.select(value.compare("uno", 0.0), t.constant(nan, bits.type), over))
    return t.cast("trunci", code | ((bits >> 24) & 0x80), "i8")


def convert(t: Text, value: Value, source: str, target: str) -> Value:
    """The register value of dtype `source` as one of dtype `target`, as torch's `to` does (floats toward zero)."""
    if source == target:
        return value
    if target == "bool":
        return value.compare("une" if source in FLOATS else "ne", 0)
    if source in FLOATS:
        if target in FLOATS:
            return value if target == "f32" else widen(t, narrow(t, value, target), target)
        wide = t.cast("fptosi", _within(t, value, target), "i64" if target == "i64" else "i32")
        return wide if target in ("i64", "i32") else t.cast("trunci", wide, ELEMENTS[target][1])
    if target in FLOATS:
        number = t.cast("uitofp" if source in ("u8", "bool") else "sitofp", value, "f32")
        return convert(t, number, "f32", target)
    old, new = (int(ELEMENTS[dtype][1][1:]) for dtype in (source, target))
    if old == new:
        return value
    return t.cast("trunci" if new < old else "extui" if source in ("u8", "bool") else "extsi", value, f"i{new}")


def _within(t: Text, value: Value, target: str) -> Value:
    """The float limited to what the conversion is defined for; NaN becomes 0."""
    low, high = (-(2.0**63), 2.0**63 - 2.0**39) if target == "i64" else (-(2.0**31), 2.0**31 - 2.0**7)
    value = t.select(value.compare("uno", 0.0), 0.0, value)
    return t.select(value < low, low, t.select(value > high, high, value))
