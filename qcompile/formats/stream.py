"""Codes that lie side by side in words: as one bit stream, or in planes of a power-of-two width."""

from __future__ import annotations

import math
from collections.abc import Callable

from qcompile.expr import Expr, bits, cat

Word = Callable[[Expr], Expr]  # the address of word i


def planes(width: int) -> tuple[int, ...]:
    """The widths of the bit planes that hold a code of `width` bits, the plane of the lowest bits first.

    >>> planes(3), planes(7), planes(8)
    ((2, 1), (4, 2, 1), (8,))
    """
    return tuple(w for w in (8, 4, 2, 1) if width & w)


def stream(word: Word, i: Expr, width: int, size: int = 32) -> Expr:
    """Code `i` of a little-endian bit stream: bits [i * width, (i + 1) * width), across words of `size` where they fall so."""
    if size % width == 0:
        return bits(word(i // (size // width)), i % (size // width) * width, width)
    piece = math.gcd(width, size)  # pieces of this width never straddle two words
    starts = [i * width + j for j in range(0, width, piece)]
    return cat(*(bits(word(start // size), start % size, piece) for start in starts))


def planar(word: Word, i: Expr, width: int) -> Expr:
    """Code `i` where 32 codes take `width` words, one bit plane after another: a plane of width w takes w words."""
    parts, first = [], 0
    for w in planes(width):
        parts.append(bits(word(i // 32 * width + first + i % 32 // (32 // w)), i % (32 // w) * w, w))
        first += w
    return cat(*parts)
