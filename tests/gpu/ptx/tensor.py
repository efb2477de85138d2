"""Tensor-core instructions: which thread holds which element, and the products.

Arrays of registers have a row for each thread; threads of a warp are neighbours.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from gpu.ptx.parser import Fault
from gpu.ptx.values import Array, widen

LANES = np.arange(32)
ROW, PLACE = LANES // 4, LANES % 4
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}


def elements(registers: Array, name: str) -> Array:
    """The numbers f64 [..., registers, elements of one] in registers u32."""
    if name == "tf32":
        return widen(registers, name)[..., None]
    dtype = {"s8": np.int8, "u8": np.uint8}.get(name, np.uint16 if BITS[name] == 16 else np.uint8)
    parts = np.ascontiguousarray(registers, np.uint32)[..., None].view(dtype)
    return parts.astype(np.float64) if name in ("s8", "u8") else widen(parts, name)


def left(registers: Array, name: str) -> Array:
    """A [warps, 16, K] of registers [warps, 32, 2 or 4]: i is for row + 8 (i % 2), its half of K is i // 2."""
    held = elements(registers, name)
    warps, _, count, per = held.shape
    out = np.empty((warps, 16, count // 2 * 4 * per))
    for i in range(count):
        k = (i // 2) * 4 * per + PLACE[:, None] * per + np.arange(per)
        out[:, ROW[:, None] + 8 * (i % 2), k] = held[:, :, i]
    return out


def right(registers: Array, name: str) -> Array:
    """B [warps, K, 8] of registers [warps, 32, 1 or 2]."""
    held = elements(registers, name)
    warps, _, count, per = held.shape
    out = np.empty((warps, count * 4 * per, 8))
    for i in range(count):
        k = i * 4 * per + PLACE[:, None] * per + np.arange(per)
        out[:, k, ROW[:, None]] = held[:, :, i]
    return out


@functools.cache
def sums(width: int) -> tuple[Array, Array]:
    """Row and column of each of a thread's sums, [32, width // 2], in 16 rows and `width` columns."""
    i = np.arange(width // 2)
    return ROW[:, None] + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * PLACE[:, None] + i % 2


def multiplied(a: Array, b: Array, c: Array) -> Array:
    """The sums of each thread, in the dtype of c [warps, 32, width // 2]: c + a @ b, rounded once."""
    row, column = sums(b.shape[-1])
    return (np.matmul(a, b)[:, row, column] + c).astype(c.dtype)


def mma(name: tuple[str, ...]) -> tuple[str, str, str]:
    """The types of A, B and the sums of an mma.sync; Fault for one that is not known."""
    shape, *order = next((i, *name[at + 1 : at + 3]) for at, i in enumerate(name) if re.fullmatch(r"m\d+n\d+k\d+", i))
    _, a, b, total = name[-4:]
    if not shape.startswith("m16n8") or order != ["row", "col"] or total not in ("f32", "s32") or a not in BITS:
        raise Fault("an mma.sync that is not known")
    return a, b, total


def matrices(count: int, transposed: bool) -> tuple[Array, Array]:
    """For each thread's half-words [32, count, 2]: the thread that has the address of their row, and their place in it."""
    i, e = np.arange(count)[:, None], np.arange(2)
    one, two = np.broadcast_arrays(ROW[:, None, None] + 0 * i, 2 * PLACE[:, None, None] + e)
    row, column = (two, one) if transposed else (one, two)
    return 8 * i + row, column


def described(descriptor: int, rows: int, k: int, size: int, transposed: bool) -> Array:
    """The shared addresses [rows, k] of elements of `size` bytes that a wgmma descriptor describes.

    Without `transposed` inputs lie one after the other, otherwise rows do. Lines as long as the swizzle lie in groups of eight;
    the swizzle mixes the number of a line into the number of 16 bytes in it.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7 and descriptor >> 62:
        raise Fault("a swizzle that begins in the middle")
    line = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    n, i = np.arange(rows)[:, None], np.arange(k)[None, :]
    along, across = (n, i) if transposed else (i, n)
    block, byte = along * size // line, along * size % line
    # Without a swizzle, eight lines of 16 bytes are one matrix, and the two offsets change places for transposed ones.
    first, second = (stride, leading) if transposed and line == 16 else (leading, stride)
    address = start + block * first + across // 8 * second + across % 8 * line + byte
    return address ^ (address >> 7 & (line // 16 - 1)) << 4


def wgmma(name: tuple[str, ...]) -> tuple[int, int, str, str, str]:
    """N, K and the types of sums, A and B of a wgmma.mma_async."""
    found = next(match for each in name if (match := re.fullmatch(r"m64n(\d+)k(\d+)", each)))
    total, a, b = name[name.index(found[0]) + 1 :][:3]
    if total not in ("f32", "s32") or a not in BITS or b not in BITS:
        raise Fault("a wgmma that is not known")
    return int(found[1]), int(found[2]), total, a, b
