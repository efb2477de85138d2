"""Numbers as registers hold them: bits as float64 and back, rounded once, to the nearest, halves to even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# The arrays that instructions of a type compute with; floats without one of numpy's are taken as their bits.
DTYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32, "s16x2": np.uint32, "u16x2": np.uint32, "f32x2": np.uint64,
    "bf16x2": np.uint32, "f32": np.float32, "f64": np.float64,
    "tf32": np.uint32, "e4m3x2": np.uint16, "e5m2x2": np.uint16, "b128": np.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class Small:
    """A float of 8 or 16 bits: those of its fraction, its bias, and how it says infinity (None: not at all, and one NaN)."""

    bits: int
    fraction: int
    bias: int
    infinity: int | None
    nan: int


SMALL = {
    "f16": Small(16, 10, 15, 0x7C00, 0x7FFF),
    "bf16": Small(16, 7, 127, 0x7F80, 0x7FFF),
    "e4m3": Small(8, 3, 7, None, 0x7F),
    "e5m2": Small(8, 2, 15, 0x7C, 0x7F),
}


def widen(bits: Array, name: str) -> Array:
    """The numbers f64 that a small float's bits say."""
    if name == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if name == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return _TABLES[name][bits]


def _table(name: str) -> Array:
    """Of an 8-bit float, every number."""
    small, codes = SMALL[name], np.arange(256)
    exponent, fraction = codes >> small.fraction & (0x7F >> small.fraction), codes & ((1 << small.fraction) - 1)
    numbers = np.where(exponent > 0, fraction + (1 << small.fraction), fraction).astype(np.float64)
    numbers = np.ldexp(numbers, np.maximum(exponent, 1) - small.bias - small.fraction)
    positive = codes & 0x7F
    if small.infinity is None:
        numbers[positive == small.nan] = np.nan
    else:
        numbers[positive == small.infinity], numbers[positive > small.infinity] = np.inf, np.nan
    return np.where(codes < 128, numbers, -numbers)


_TABLES = {name: _table(name) for name in ("e4m3", "e5m2")}


def narrow(values: Array, name: str, finite: bool = False) -> Array:
    """The bits of f64 numbers rounded to a small float, u32; `finite` ends at the largest number."""
    small = SMALL[name]
    if name == "f16" and not finite:
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    if name == "bf16" and not finite:
        return _bf16(values)
    magnitude = np.abs(values)
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, 1 - small.bias), 1 - small.bias)
    steps = np.rint(np.ldexp(magnitude, small.fraction - exponent))
    # What carries out of the fraction adds one to the exponent by itself.
    code = ((exponent + small.bias - 1) * (1 << small.fraction) + np.where(np.isfinite(steps), steps, 0)).astype(
        np.int64
    )
    top = (small.infinity or small.nan) - 1
    code = np.where(code > top, top if finite else top + 1, code)
    code = np.where(np.isinf(values), top if finite else top + 1, code)
    code |= np.signbit(values).astype(np.int64) << (small.bits - 1)
    return np.where(np.isnan(values), small.nan, code).astype(np.uint32)


def _bf16(values: Array) -> Array:
    """bf16 of numbers f64, by way of the f32 below, whose last bit says whether that was exact."""
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32) - (np.abs(back) > np.abs(values)) | (back != values)
    bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), bits)


def halves(words: Array, name: str) -> Array:
    """The two numbers f64 [..., 2] in each register of 32 bits."""
    return widen(words[..., None].view(np.uint16), name)


def joined(values: Array, name: str) -> Array:
    """Registers of 32 bits that hold two numbers each."""
    bits = narrow(values, name)
    return bits[..., 0] | bits[..., 1] << np.uint32(16)


def add_odd(a: Array, b: Array) -> Array:
    """a + b in f64; where that is not exact, the neighbour whose last bit is one, so that rounding it again rounds once."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    if not error.any():
        return total
    even = (total.view(np.int64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & np.isfinite(total) & even, np.nextafter(total, toward), total)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of f32, rounded once."""
    product, more = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + more
    bits = total.view(np.int64) if total.ndim else np.atleast_1d(total).view(np.int64)
    # Rounding twice goes wrong only from halfway between two f32, and where f32 has fewer bits.
    if ((bits & 0x1FFFFFFF) == 0x10000000).any() or (np.abs(total) < 2.0**-125).any():
        total = add_odd(product, more)
    return total.astype(np.float32)


def fused_double(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of f64, rounded once but for ties: the parts of the product and the sum are exact."""
    product = a * b
    parts = []
    for each in (a, b):
        scaled = each * 134217729.0  # 2^27 + 1: cuts a number into halves of its bits
        high = scaled - (scaled - each)
        parts.append((high, each - high))
    (a1, a0), (b1, b0) = parts
    rest = a0 * b0 - (product - a1 * b1 - a0 * b1 - a1 * b0)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    exact = total + (error + rest)
    return np.where(np.isfinite(exact), exact, total)


def flushed(values: Array) -> Array:
    """Numbers too small for a whole fraction as zeros of their sign."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)
