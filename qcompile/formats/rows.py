"""Codes of far-apart rows in one word: the rows are cut into equal parts, and word i holds row i of every part."""

from __future__ import annotations

from collections.abc import Callable

from qcompile.expr import Expr, bits

Word = Callable[[Expr], Expr]  # the address of the word of row i of each part


def shared_row(word: Word, row: Expr, rows: int, parts: int, width: int) -> Expr:
    """The code of `row`, of `rows`; the first part sits in the highest bits of a word.

    Word i holds rows i, step + i, 2 * step + i and so on, step = ceil(rows / parts); missing rows are 0.
    """
    step = -(-rows // parts)
    shift = (row // step * -1 + (parts - 1)) * width
    return bits(word(row % step), shift, width)
