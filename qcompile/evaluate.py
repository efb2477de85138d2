"""Reads a format's expressions with torch: the meaning of the decode language, and the oracle of every kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch

from qcompile.dtypes import DTYPES
from qcompile.expr import Expr
from qcompile.format import Format
from qcompile.simplify import coordinates, simplify

CHUNK = 1 << 18  # weights decoded at a time: a chunk's temporaries stay in cache
_SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32}


class Reader:
    """Evaluates expressions at the crossing of rows `n` (i64 [R]) and columns `k` (i64 [C]).

    A result broadcasts to [R, C]: what does not depend on `n` has one row, what does not depend on `k` one column.
    Operands shared between expressions are evaluated once.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], n: torch.Tensor, k: torch.Tensor):
        device = next((t.device for t in tensors.values()), n.device)
        self.tensors, self.done = tensors, dict[Expr, torch.Tensor]()
        self.vars = {"n": n.to(device).reshape(-1, 1), "k": k.to(device).reshape(1, -1)}
        self.device = device

    def __call__(self, expr: Expr) -> torch.Tensor:
        if expr not in self.done:
            self.done[expr] = self.compute(expr)
        return self.done[expr]

    def address(self, load: Expr) -> torch.Tensor:
        """The flat element index of a `load`, i64."""
        flat: torch.Tensor | None = None
        for size, index in zip(load.attr[2], load.args, strict=True):
            i = self(index).long()
            flat = i if flat is None else flat * size + i
        return torch.zeros(1, 1, dtype=torch.int64, device=self.device) if flat is None else flat

    def compute(self, expr: Expr) -> torch.Tensor:
        if expr.op == "const":
            return torch.tensor(expr.attr, dtype=DTYPES[expr.dtype], device=self.device).reshape(1, 1)
        if expr.op == "var":
            return self.vars[expr.attr]
        if expr.op == "load":
            index = self.address(expr)
            value = self.tensors[expr.attr[0]].reshape(-1).index_select(0, index.reshape(-1)).reshape(index.shape)
            return value.to(DTYPES[expr.dtype])
        args = [self(arg) for arg in expr.args]
        match expr.op:
            case "bits":
                return _bits(args[0].to(torch.int32), args[1].to(torch.int32), expr.attr)
            case "cat":
                out, at = args[0], expr.attr[0]
                for part, width in zip(args[1:], expr.attr[1:], strict=True):
                    out, at = out | (part << at), at + width
                return out
            case "table":
                entries = torch.tensor(expr.attr, dtype=DTYPES[expr.dtype], device=self.device)
                return entries.index_select(0, args[0].reshape(-1)).reshape(args[0].shape)
            case "where":
                return torch.where(args[0], args[1], args[2])
            case "cast":
                return args[0].to(DTYPES[expr.dtype])
            case "bitcast":
                dtype = DTYPES[expr.attr]
                value = args[0].to(_SIGNED[dtype.itemsize * 8]).contiguous().view(dtype)
                return value.to(torch.int32) if expr.dtype == "i32" else value
            case "field":
                return args[0]
            case "add":
                return args[0] + args[1]
            case "sub":
                return args[0] - args[1]
            case "mul":
                return args[0] * args[1]
            case "lt":
                return args[0] < args[1]
        return self.divide(expr, *args)

    def divide(self, expr: Expr, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.is_floating_point():
            return left / right
        divisor = expr.args[1].attr if expr.args[1].op == "const" else 0
        if divisor > 0 and divisor & (divisor - 1) == 0:  # a shift or a mask is much faster, and equal below zero too
            return left >> (divisor.bit_length() - 1) if expr.op == "div" else left & (divisor - 1)
        return torch.div(left, right, rounding_mode="floor") if expr.op == "div" else torch.remainder(left, right)


def _bits(word: torch.Tensor, shift: torch.Tensor, width: int) -> torch.Tensor:
    last = int(shift.max())
    if last:
        word = torch.bitwise_right_shift(word, shift)
    if last + width <= 32:
        return word if width == 32 else word & ((1 << width) - 1)
    # torch shifts signed words in copies of the sign; a logical shift brings in zeros.
    low = torch.bitwise_right_shift(torch.full_like(shift, 0xFFFFFFFF, dtype=torch.int64), shift)
    return word & (low & ((1 << width) - 1)).to(torch.int32)


def dequantize(
    format: Format, tensors: Mapping[str, torch.Tensor], N: int, K: int, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight as f32 [N, K] (or [len(rows), K] for the i64 `rows` named), bit for bit by the format's formula.

    Memory beyond the result is bounded: rows are decoded a chunk at a time.
    """
    device = next(iter(tensors.values())).device
    rows = torch.arange(N, device=device) if rows is None else rows.to(device=device, dtype=torch.int64)
    value, columns = _weight(format, N, K), torch.arange(K, device=device)
    out = torch.empty(len(rows), K, dtype=torch.float32, device=device)
    for at in row_chunks(len(rows), K):
        out[at[0] : at[-1] + 1] = Reader(tensors, rows[at[0] : at[-1] + 1], columns)(value)
    return out


@functools.lru_cache(maxsize=256)  # an embedding decodes a few rows at every step
def _weight(format: Format, N: int, K: int) -> Expr:
    return simplify(format.weight(N, K), coordinates(N, K))


def row_chunks(N: int, K: int) -> Iterator[torch.Tensor]:
    """The rows 0..N-1 (i64) in runs of about CHUNK weights [rows, K]."""
    step = max(1, CHUNK // max(K, 1))
    for first in range(0, N, step):
        yield torch.arange(first, min(N, first + step))
