"""Layouts for CPU kernels: sixteen outputs side by side, so that one vector register holds sixteen rows' numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.dtypes import DTYPES, NAMES
from qcompile.evaluate import CHUNK, Reader, row_chunks
from qcompile.expr import Expr, bitcast, bits, cast, cat, const, k, n
from qcompile.format import Format, Names, Packed, Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.dense import Dense
from qcompile.formats.stream import planes
from qcompile.simplify import interval

LANES = 16
SHORTEST = 8  # inputs that must share a scale for a kernel to apply it once a group


@dataclass(frozen=True)
class Lanes(Affine):
    """Affine or table codes in planes of 32-bit words, sixteen outputs interleaved.

    Plane p of width w is "codes{p}" i32 [ceil(N/16), ceil(K/(32//w)), 16]. Word (nb, kw, lane) holds inputs
    kw*(32//w) + j of output nb*16 + lane, input j at bit 8*(j % 4) + w*(j // 4): masking a word byte by byte gives four
    consecutive inputs. "scales", and "zeros" and "offsets" where stored, are [ceil(N/16), K//group, 16]. Everything
    beyond N or K is 0.

    W = rounding((code - zero) * scale + offset) * factor, with table[code] for (code - zero) where there is a table.
    A number as `zero` is the same everywhere; a dtype name says that it is stored, in code units (None: there
    is none); `offset` likewise. `code` says what the bits of a code are: "int", or "f8e4m3" or "f8e5m2". Without a
    rounding, kernels factor scale * factor out of the sum over a group; those for int8 activations always do, and leave
    the rounding of weights out.
    """

    kind: ClassVar[str] = "lanes"
    bits: int = 4
    group: int = 32
    table: tuple[float, ...] | None = None
    zero: float | str | None = None
    scale: str = "f32"
    rounding: str = "none"
    offset: str | None = None
    factor: float = 1.0
    code: str = "int"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks, per_group = -(-N // LANES), (-(-N // LANES), K // self.group, LANES)
        out = [Stored(f"codes{p}", "i32", (blocks, -(-K // (32 // w)), LANES)) for p, w in enumerate(planes(self.bits))]
        out.append(Stored("scales", self.scale, per_group))
        if isinstance(self.zero, str):
            out.append(Stored("zeros", self.zero, per_group))
        if self.offset is not None:
            out.append(Stored("offsets", self.offset, per_group))
        return tuple(out)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        parts = []
        for p, w in enumerate(planes(self.bits)):
            j = k % (32 // w)
            word = getattr(t, f"codes{p}")[n // LANES, k // (32 // w), n % LANES]
            parts.append(bits(word, j % 4 * 8 + j // 4 * w, w))
        at = (n // LANES, k // self.group, n % LANES)
        out = {"code": cat(*parts), "scale": t.scales[at]}
        if isinstance(self.zero, str):
            out["zero"] = t.zeros[at]
        if self.offset is not None:
            out["offset"] = t.offsets[at]
        return out

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
class LanesDense(Format):
    """An unquantized weight, sixteen outputs interleaved: "values" [ceil(N/16), K, 16], rows beyond N are 0."""

    kind: ClassVar[str] = "lanes-dense"
    dtype: str = "f32"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("values", self.dtype, (-(-N // LANES), K, LANES)),)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"weight": t.values[n // LANES, k, n % LANES]}

    def value(self, f: Any) -> Expr:
        return cast("f32", f.weight)

    def group_size(self, N: int, K: int) -> int | None:
        return K


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """[N, C] as [ceil(N/16), C, 16], rows beyond N filled with 0."""
    missing = -len(rows) % LANES
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    return padded.reshape(-1, LANES, rows.shape[1]).transpose(1, 2).contiguous()


def pack_codes(codes: torch.Tensor, width: int) -> list[torch.Tensor]:
    """The planes of integer codes [N, K] in 0..2**width - 1: i32 [ceil(N/16), ceil(K/(32//w)), 16] each."""
    out, low = [], 0
    for w in planes(width):
        out.append(_plane(codes, low, w))
        low += w
    return out


def _plane(codes: torch.Tensor, low: int, w: int) -> torch.Tensor:
    per = 32 // w
    part = ((codes >> low) & ((1 << w) - 1)).to(torch.uint8) if w < 8 else codes.to(torch.uint8)
    part = torch.nn.functional.pad(part, (0, -codes.shape[1] % per, 0, -codes.shape[0] % LANES))
    part = part.reshape(part.shape[0], -1, 8 // w, 4)  # [rows, word, slot in the byte, byte]
    word_bytes = part[:, :, 0]
    for slot in range(1, 8 // w):
        word_bytes = word_bytes | (part[:, :, slot] << (w * slot))
    return interleave(word_bytes.contiguous().view(torch.int32).squeeze(-1))


def pack_lanes(
    format: Lanes,
    code: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The stored tensors from codes [N, K] and what `format` stores of scale, zero and offset, each [N, K // group]."""
    chunk = max(LANES, CHUNK * 4 // max(code.shape[1], 1) // LANES * LANES)
    blocks = [pack_codes(code[at : at + chunk], format.bits) for at in range(0, len(code), chunk)]
    out = {f"codes{p}": torch.cat(parts) for p, parts in enumerate(zip(*blocks, strict=True))}
    out["scales"] = interleave(scale.to(DTYPES[format.scale]))
    if isinstance(format.zero, str) and zero is not None:
        out["zeros"] = interleave(zero.to(DTYPES[format.zero]))
    if format.offset is not None and offset is not None:
        out["offsets"] = interleave(offset.to(DTYPES[format.offset]))
    return out


def lanes_for(packed: Packed) -> tuple[Packed, torch.Tensor | None] | str:
    """The weight in a lane layout, and the order of its inputs when that had to change; or the reason why it has none.

    Exact: dequantized, the result equals the original's columns in the order `perm` (i64 [K]; None = unchanged) bit for
    bit. Refused: formats without terms (see `Affine`), except plain float weights, and groups of fewer than 8 inputs.
    """
    format, N, K = packed.format, packed.N, packed.K
    if isinstance(format, Lanes | LanesDense):
        return packed, None
    if isinstance(format, Dense):
        return Packed(LanesDense(format.dtype), {"values": interleave(packed.tensors["weight"])}, N, K), None
    if not isinstance(format, Affine):
        return f"a weight of format '{format.kind}' is not a code times a scale"
    located = format.located(N, K)
    terms = format.terms(Names(**located))
    kind = _code_kind(terms)
    if refusal := _refusal(terms):
        return refusal
    group, perm = format.group_size(N, K), None
    if group is None:
        perm = _order(packed, located["group"]) if "group" in located else None
    columns = torch.arange(K) if perm is None else perm
    group = math.gcd(K, group or _longest_run(packed, terms, columns))
    if group < SHORTEST:
        return f"only {group} consecutive inputs share a scale, fewer than {SHORTEST}"
    signed = kind == "int" and interval(terms.code)[0] < 0
    # Lanes hold codes from 0 on: signed ones and their zeros move up together.
    zero_expr = (const(0) if terms.zero is None else terms.zero) + 128 if signed else terms.zero
    scale, zero, offset = (
        None if expr is None else _at(packed, expr, columns[::group]) for expr in (terms.scale, zero_expr, terms.offset)
    )
    assert scale is not None  # every format with terms has one
    entries, level = terms.table, _zero_kind(zero)
    if entries is not None and isinstance(level, float):  # one zero for all: a table of other values
        entries, level = tuple((torch.tensor(entries) - level).tolist()), None
    layout = Lanes(
        bits=interval(terms.code)[1].bit_length() + signed if kind == "int" else 8,
        group=group,
        table=entries,
        zero=level,
        scale=NAMES[scale.dtype],
        rounding=terms.rounding,
        offset=None if offset is None else NAMES[offset.dtype],
        factor=terms.factor,
        code=kind,
    )
    code = _at(packed, terms.code + 128 if signed else terms.code, columns)
    code = code if kind == "int" else code.view(torch.uint8)
    return Packed(layout, pack_lanes(layout, code, scale, zero, offset), N, K), perm


def lanes_form(format: Format, N: int, K: int) -> Format | str:
    """The layout that `lanes_for` gives a weight [N, K], or the reason why it gives none, from the format alone.

    Zeros count as stored; stored groups count as runs of the format's own length. What has no group size at all is refused.
    """
    if isinstance(format, Lanes | LanesDense):
        return format
    if isinstance(format, Dense):
        return LanesDense(format.dtype)
    if not isinstance(format, Affine):
        return f"a weight of format '{format.kind}' is not a code times a scale"
    terms = format.terms(Names(**format.located(N, K)))
    if refusal := _refusal(terms):
        return refusal
    sizes = (format.group_size(N, K), getattr(format, "group", None), getattr(format, "columns", None))
    group = math.gcd(K, next((size for size in sizes if size), 1))
    if group < SHORTEST:
        return f"only {group} consecutive inputs share a scale, fewer than {SHORTEST}"
    kind, zero, level = _code_kind(terms), terms.zero, None
    low, high = interval(terms.code) if kind == "int" else (0, 255)
    if zero is not None:
        level = "f16" if zero.dtype == "i32" else zero.dtype
    offset = None if terms.offset is None else terms.offset.dtype
    return Lanes(high.bit_length() + (low < 0), group, terms.table, level, terms.scale.dtype, offset=offset, code=kind)


def _code_kind(terms: Terms) -> str:
    return "int" if terms.code.dtype == "i32" else terms.code.dtype


def _refusal(terms: Terms) -> str:
    """Why lanes have no such terms; empty when they do."""
    kind, zero = _code_kind(terms), terms.zero
    if kind not in ("int", "f8e4m3", "f8e5m2") or (kind != "int" and zero is not None):
        return f"its codes are {kind} numbers"
    if kind == "int" and interval(terms.code)[0] < 0 and zero is not None and zero.dtype != "i32":
        return f"signed codes with {zero.dtype} zeros"
    return ""


def _at(packed: Packed, expr: Expr, columns: torch.Tensor) -> torch.Tensor:
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
    perm = torch.argsort(_at(packed, group, torch.arange(packed.K))[0], stable=True)
    return None if torch.equal(perm, torch.arange(packed.K)) else perm


def _longest_run(packed: Packed, terms: Terms, columns: torch.Tensor) -> int:
    """The longest aligned run of `columns` over which zero, scale and offset do not change in any row."""
    changes = torch.zeros(len(columns) - 1, dtype=torch.bool)
    for expr in (terms.zero, terms.scale, terms.offset):
        if expr is not None:
            values = _at(packed, expr, columns)
            changes |= (values[:, 1:] != values[:, :-1]).any(0)
    return math.gcd(len(columns), *(changes.nonzero().flatten() + 1).tolist())


def _zero_kind(zero: torch.Tensor | None) -> float | str | None:
    """How Lanes names these zeros: their one value, or a dtype that holds them (f16 holds a code's integers)."""
    if zero is None:
        return None
    first = zero.flatten()[0]
    if bool((zero == first).all()):
        return float(first)
    return NAMES[zero.dtype] if zero.is_floating_point() else "f16"
