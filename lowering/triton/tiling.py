"""Kernels over rows [rows, n] without gaps: which tile of them a program has, as parameters and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.dims import Dim
from qcompile.lowering.alignment import MOST_COLUMNS
from qcompile.lowering.extents import outside, require
from qcompile.lowering.triton.text import multiple_of

TILE = 1024  # elements of one program, where rows are shorter


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """`columns`: the width of a program's tile; `whole`: it holds a row; `multiple`: a power of two that divides n."""

    columns: int
    whole: bool
    multiple: int

    def problem(self) -> str:
        widths = [1 << i for i in range(MOST_COLUMNS.bit_length())]
        return outside(self, columns=self.columns in widths, multiple=self.multiple in (1, 2, 4, 8, 16))

    def check(self, rows: int, n: int) -> None:
        """ArtifactError where rows [rows, n] do not fit what the text is made for."""
        require(
            not self.whole or n <= self.columns, "a kernel is called for rows longer than its tile", n, self.columns
        )
        require(n % self.multiple == 0, "a kernel is called for rows of another length", n, self.multiple)
        require(rows < 2**31, "a kernel is called for too many rows", rows)


def height(params: dict[str, Any]) -> int:
    """Rows of a tile."""
    columns: int = params["columns"]
    return max(TILE // columns, 1)


def warps(params: dict[str, Any]) -> int:
    columns: int = params["columns"]
    return min(max(columns * height(params) // 512, 4), 16)


def row_lines(params: dict[str, Any], rows: str, n: str) -> list[str]:
    """Statements: `n`, `row` [rows, 1] i32 and `inside` [rows, 1], whether there is such a row."""
    return [
        f"n = {multiple_of(n, params['multiple'])}",
        f"row = tl.program_id(0) * {height(params)} + tl.arange(0, {height(params)})[:, None]",
        f"inside = row < {rows}",
    ]


def columns(params: dict[str, Any], body: list[str]) -> list[str]:
    """`body` for every tile of the row: in it, `col` [1, columns] and `live` [rows, columns]."""
    arange = f"tl.arange(0, {params['columns']})[None, :]"
    if params["whole"]:
        return [f"col = {arange}", "live = inside & (col < n)", *body]
    inner = [f"col = start + {arange}", "live = inside & (col < n)", *body]
    return [f"for start in range(0, n, {params['columns']}):", *(f"    {line}" for line in inner)]


def grid(params: dict[str, Any], rows: Dim) -> tuple[Dim, Dim, Dim]:
    return (f"({rows} + {height(params) - 1})//{height(params)}", 1, 1)
