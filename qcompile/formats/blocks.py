"""Scales for blocks of a matrix: how many there are, and which one a weight belongs to."""

from __future__ import annotations

from qcompile.expr import Expr, const, k, n


def grid(N: int, K: int, rows: int, columns: int) -> tuple[int, int]:
    """How many blocks of `rows` x `columns` (0: all of them) cover [N, K]; the last ones may be short.

    >>> grid(192, 320, 128, 128), grid(192, 320, 1, 0)
    ((2, 3), (192, 1))
    """
    return -(-N // (rows or N)), -(-K // (columns or K))


def place(rows: int, columns: int) -> tuple[Expr, Expr]:
    """The block of W[n, k]."""
    return n // rows if rows else const(0), k // columns if columns else const(0)
