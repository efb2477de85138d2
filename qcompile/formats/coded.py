"""What layouts of affine weights share: a code a weight, what a group of inputs has in common, and both read from any format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.dtypes import NAMES
from qcompile.evaluate import Reader, row_chunks
from qcompile.expr import Expr, bitcast, const
from qcompile.format import Format, Names, Packed, Problem
from qcompile.formats.affine import Affine, Terms
from qcompile.simplify import interval


@dataclass(frozen=True)
class Coded(Affine):
    """A layout of codes of `bits` bits and a scale for each `group` inputs of an output; its places are the subclass's.

    W = rounding((code - zero) * scale + offset) * factor, with table[code] for (code - zero) where there is a table.
    A number as `zero` is the same everywhere; a dtype name says that it is stored, in code units (None: there
    is none); `offset` likewise. `code` says what the bits of a code are: "int", or "f8e4m3" or "f8e5m2".
    """

    bits: int = 4
    group: int = 32
    table: tuple[float, ...] | None = None
    zero: float | str | None = None
    scale: str = "f32"
    rounding: str = "none"
    offset: str | None = None
    factor: float = 1.0
    code: str = "int"

    def terms(self, f: Any) -> Terms:
        zero = const(self.zero, "f32") if isinstance(self.zero, int | float) and self.zero != 0 else f.get("zero")
        code = f.code if self.code == "int" else bitcast(self.code, f.code)
        return Terms(code, f.scale, zero, f.get("offset"), self.table, self.rounding, self.factor)

    def check(self, N: int, K: int) -> list[Problem]:
        if K % self.group:
            return [Problem(f"K = {K}", f"a multiple of the group, {self.group}")]
        return []

    def group_size(self, N: int, K: int) -> int | None:
        return self.group


@dataclass(frozen=True)
class Content:
    """A weight [N, K] taken apart, for a layout to store: its arguments for `Coded`, and its numbers.

    codes u8 [N, K]; scale, and zero and offset where stored, [N, K // group]. `order`, if any, is i64 [K]: column i is input
    order[i] of the weight. Dequantized, `form` gives the weight's columns in that order bit for bit.
    """

    form: dict[str, Any]
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    offset: torch.Tensor | None
    order: torch.Tensor | None


def content(packed: Packed, shortest: int) -> Content | str:
    """The weight taken apart, or why it cannot be: a format without terms (see `Affine`), a group below `shortest` inputs."""
    format, N, K = packed.format, packed.N, packed.K
    terms = terms_of(format, N, K)
    if isinstance(terms, str):
        return terms
    located = format.located(N, K)
    kind = code_kind(terms)
    group, order = format.group_size(N, K), None
    if group is None:
        order = _order(packed, located["group"]) if "group" in located else None
    columns = torch.arange(K) if order is None else order
    group = math.gcd(K, group or _longest_run(packed, terms, columns))
    if group < shortest:
        return too_short(group, shortest)
    signed = kind == "int" and interval(terms.code)[0] < 0
    bits = interval(terms.code)[1].bit_length() + signed if kind == "int" else 8
    codes = at(packed, terms.code + 128 if signed else terms.code, columns)
    codes = codes if kind == "int" else codes.view(torch.uint8)
    zero_expr = terms.zero
    if signed:  # codes are stored from 0 on, in as few bits as they need: they and their zeros move up together
        low, high = int(codes.min()) - 128, int(codes.max()) - 128
        bits = next(width for width in (2, 4, 8) if -low <= 1 << width - 1 > high)
        middle = 1 << bits - 1
        codes = codes - (128 - middle)
        zero_expr = (const(0) if terms.zero is None else terms.zero) + middle
    scale, zero, offset = (
        None if expr is None else at(packed, expr, columns[::group]) for expr in (terms.scale, zero_expr, terms.offset)
    )
    assert scale is not None  # every format with terms has one
    entries, level = terms.table, _zero_kind(zero)
    if entries is not None and isinstance(level, float):  # one zero for all: a table of other values
        entries, level = tuple((torch.tensor(entries) - level).tolist()), None
    form = {
        "bits": bits,
        "group": group,
        "table": entries,
        "zero": level,
        "scale": NAMES[scale.dtype],
        "rounding": terms.rounding,
        "offset": None if offset is None else NAMES[offset.dtype],
        "factor": terms.factor,
        "code": kind,
    }
    return Content(form, codes, scale, zero, offset, order)


def form_of(format: Format, N: int, K: int, shortest: int) -> dict[str, Any] | str:
    """`Content.form` of a weight [N, K], or the reason why it has none, from the format alone.

    Zeros count as stored, and codes as of every value that they may have; stored groups count as runs of the format's own
    length. What has no group size at all is refused.
    """
    terms = terms_of(format, N, K)
    if isinstance(terms, str):
        return terms
    sizes = (format.group_size(N, K), getattr(format, "group", None), getattr(format, "columns", None))
    group = math.gcd(K, next((size for size in sizes if size), 1))
    if group < shortest:
        return too_short(group, shortest)
    kind = code_kind(terms)
    low, high = interval(terms.code) if kind == "int" else (0, 255)
    offset = None if terms.offset is None else terms.offset.dtype
    return {
        "bits": high.bit_length() + (low < 0), "group": group, "table": terms.table, "zero": _zero_of(terms, low < 0),
        "scale": terms.scale.dtype, "offset": offset, "code": kind, "rounding": terms.rounding, "factor": terms.factor,
    }  # fmt: skip


def _zero_of(terms: Terms, signed: bool) -> float | str | None:
    """As `_zero_kind`, of zeros that are stored or one number; `signed` codes are stored from 0 on."""
    if terms.zero is None:
        return 128.0 if signed else None
    if terms.zero.dtype != "i32":
        return terms.zero.dtype
    low, high = interval(terms.zero)
    return float(low + 128 * signed) if low == high and terms.table is None else "f16"


def too_short(group: int, shortest: int) -> str:
    return f"only {group} consecutive inputs share a scale, fewer than {shortest}"


def terms_of(format: Format, N: int, K: int) -> Terms | str:
    """The terms of a format that `Coded` has too; the reason why not."""
    if not isinstance(format, Affine):
        return f"a weight of format '{format.kind}' is not a code times a scale"
    terms = format.terms(Names(**format.located(N, K)))
    kind, zero = code_kind(terms), terms.zero
    if kind not in ("int", "f8e4m3", "f8e5m2") or (kind != "int" and zero is not None):
        return f"its codes are {kind} numbers"
    if kind == "int" and interval(terms.code)[0] < 0 and zero is not None and zero.dtype != "i32":
        return f"signed codes with {zero.dtype} zeros"
    return terms


def code_kind(terms: Terms) -> str:
    return "int" if terms.code.dtype == "i32" else terms.code.dtype


def at(packed: Packed, expr: Expr, columns: torch.Tensor) -> torch.Tensor:
    """`expr` at every row and the given columns, [N, len(columns)]; i32 results in 0..255 come as u8."""
    low, high = interval(expr) if expr.dtype == "i32" else (-1, -1)
    small = low >= 0 and high <= 255
    parts = []
    for rows in row_chunks(packed.N, len(columns)):
        part = Reader(packed.tensors, rows, columns)(expr).expand(len(rows), len(columns))
        parts.append(part.to(torch.uint8) if small else part)
    return torch.cat(parts)


def _order(packed: Packed, group: Expr) -> torch.Tensor | None:
    """The stable order of the inputs by their group; None when they lie in it already."""
    order = torch.argsort(at(packed, group, torch.arange(packed.K))[0], stable=True)
    return None if torch.equal(order, torch.arange(packed.K)) else order


def _longest_run(packed: Packed, terms: Terms, columns: torch.Tensor) -> int:
    """The longest aligned run of `columns` over which zero, scale and offset do not change in any row."""
    changes = torch.zeros(len(columns) - 1, dtype=torch.bool)
    for expr in (terms.zero, terms.scale, terms.offset):
        if expr is not None:
            values = at(packed, expr, columns)
            changes |= (values[:, 1:] != values[:, :-1]).any(0)
    return math.gcd(len(columns), *(changes.nonzero().flatten() + 1).tolist())


def _zero_kind(zero: torch.Tensor | None) -> float | str | None:
    """How `Coded` names these zeros: their one value, or a dtype that holds them (f16 holds a code's integers)."""
    if zero is None:
        return None
    first = zero.flatten()[0]
    if bool((zero == first).all()):
        return float(first)
    return NAMES[zero.dtype] if zero.is_floating_point() else "f16"
