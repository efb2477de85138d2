"""The layout of weights whose codes tensor cores multiply as they are: rows of codes, and scales beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from qcompile.evaluate import Reader, row_chunks
from qcompile.expr import Expr, bitcast, bits, const, k, n
from qcompile.format import Names, Packed, Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.integer_sums import integer_codes
from qcompile.simplify import interval
from qcompile.transform import Transform
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_float import RoundFloat
from qcompile.transforms.round_int import RoundInt

SHORTEST = 32  # inputs that one machine instruction multiplies
BLOCK = 128  # inputs whose packed codes share bytes
ALIGNED = 16  # bytes that a row is a multiple of


@dataclass(frozen=True)
class Native(Affine):
    """W = (code - zero) * scale: codes of whole bytes, or packed ones, for dots of int8 or of 8-bit floats.

    codes [N, columns of bytes]: i8 where integers have 8 bits (`zero` is 0 then), else u8. Of `bits` < 8 a block of `block`
    inputs shares block * bits / 8 bytes: byte j holds input j in its lowest bits, then input j + block * bits / 8, and so on.
    Rows are filled with zeros to whole blocks. scale f32 [ceil(N / rows), K / group], where group 0 is all of K.
    """

    kind: ClassVar[str] = "native"
    code: Literal["int", "f8e4m3", "f8e5m2"] = "int"
    bits: Literal[8, 4, 2] = 8
    zero: int = 0
    block: int = ALIGNED
    group: int = 0
    rows: int = 1

    def padded(self, K: int) -> int:
        """K filled up to whole blocks."""
        return -(-K // self.block) * self.block

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        signed = self.code == "int" and self.bits == 8
        codes = Stored("codes", "i8" if signed else "u8", (N, self.padded(K) * self.bits // 8))
        return (codes, Stored("scale", "f32", (-(-N // self.rows), K // (self.group or K))))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        width = self.block * self.bits // 8
        place = k % self.block
        if self.bits < 8:
            code = bits(t.codes[n, k // self.block * width + place % width], place // width * self.bits, self.bits)
        else:
            code = t.codes[n, k]
        return {"code": code, "scale": t.scale[n // self.rows, k // (self.group or K)]}

    def terms(self, f: Any) -> Terms:
        code = f.code if self.code == "int" else bitcast(self.code, f.code)
        return Terms(code, f.scale, const(self.zero) if self.zero else None)

    def check(self, N: int, K: int) -> list[Problem]:
        group = self.group or K
        whole = [Problem(f"K = {K}", f"a multiple of the group, {group}")] if K % group else []
        packs = self.block > 0 and self.block * self.bits % 8 == 0 and self.rows > 0
        return whole if packs else [Problem(f"blocks of {self.block} inputs, {self.rows} rows", "whole bytes")]

    def group_size(self, N: int, K: int) -> int | None:
        return self.group or K


def native_codes(transforms: Sequence[Transform]) -> tuple[str, int] | str:
    """What the last of these transforms makes of x: ("int" or a small float's name, inputs that share a scale, 0: all).

    A text says why those are no codes times a scale.
    """
    last = transforms[-1] if transforms else None
    match last:
        case LlmInt8() | RoundInt():
            codes = integer_codes(last)
            if isinstance(codes, str):
                return codes
            if codes.zeros:
                return "its inputs are rounded with a zero point"
            if codes.low < -128 or codes.high > 127:
                return f"its inputs are rounded to {codes.low} .. {codes.high}"
            return "int", codes.size
        case RoundFloat():
            if last.element not in ("f8e4m3", "f8e5m2"):
                return f"its inputs are rounded to {last.element}"
            return last.element, last.size if last.per == "group" and not last.scale else 0
    return "its inputs are not rounded to int8 or to floats of 8 bits"


def native_for(packed: Packed, before: Sequence[Transform]) -> Packed | str:
    """The weight in the layout of a native dot with inputs that `before` has rounded; or the reason why there is none.

    Exact: code by code, scale by scale.
    """
    wanted = native_codes(before)
    if isinstance(wanted, str):
        return wanted
    format, N, K = packed.format, packed.N, packed.K
    if isinstance(format, Native):
        return packed
    if not isinstance(format, Affine):
        return f"a weight of format '{format.kind}' is not a code times a scale"
    terms = format.terms(Names(**format.located(N, K)))
    kind = "int" if terms.code.dtype == "i32" else terms.code.dtype
    if kind != wanted[0]:
        return f"its codes are {kind}, those of its inputs {wanted[0]}"
    if terms.table is not None or terms.offset is not None or terms.rounding != "none":
        return "a weight is not just a code times a scale"
    group = format.group_size(N, K) or 0
    if problem := _shared(group, wanted[1], K):
        return problem
    zero = _zero(packed, terms, group)
    if isinstance(zero, str):
        return zero
    low, high = interval(terms.code) if kind == "int" else (0, 0)
    if low - zero < -128 or high - zero > 127:
        return f"its codes are {low - zero} .. {high - zero} from zero"
    layout = _layout(packed, terms, kind, group if group < K else 0, min(group, wanted[1] or K), zero)
    width = layout.padded(K) * layout.bits // 8
    codes = torch.zeros(N, width, dtype=torch.int8 if layout.stored(N, K)[0].dtype == "i8" else torch.uint8)
    columns, starts, first = torch.arange(K), torch.arange(0, K, group), torch.arange(0, N, layout.rows)
    for rows in row_chunks(N, K):
        code = Reader(packed.tensors, rows, columns)(terms.code).expand(len(rows), K)
        codes[rows] = _bytes(layout, code, zero, K)
    scale = Reader(packed.tensors, first, starts)(terms.scale).float().expand(len(first), len(starts)) * terms.factor
    return Packed(layout, {"codes": codes, "scale": scale.contiguous()}, N, K)


def _shared(weights: int, inputs: int, K: int) -> str:
    """Why scales for so many inputs, of weights and of x, cannot be factored out of a dot; empty when they can."""
    sizes = sorted((weights or K, inputs or K))
    if weights == 0 or K % sizes[0] or sizes[1] % sizes[0]:
        return f"weights share a scale in {weights} inputs, inputs in {inputs or K} of {K}"
    if sizes[0] < K and sizes[0] & -sizes[0] < SHORTEST:
        return f"{sizes[0]} inputs that share a scale are no multiple of {SHORTEST}"
    return ""


def _zero(packed: Packed, terms: Terms, group: int) -> int | str:
    """The zero of all codes, or why there is no such."""
    if terms.zero is None:
        return 0
    if interval(terms.zero)[0] == interval(terms.zero)[1] and terms.zero.dtype == "i32":
        return interval(terms.zero)[0]
    rows, columns = torch.arange(packed.N), torch.arange(0, packed.K, group)
    zero = Reader(packed.tensors, rows, columns)(terms.zero).flatten()
    if not bool((zero == zero[0]).all()) or float(zero[0]) != int(zero[0]):
        return "its zeros differ"
    return int(zero[0])


def _layout(packed: Packed, terms: Terms, kind: str, group: int, shared: int, zero: int) -> Native:
    """The layout of these codes, of which `shared` inputs share both scales, of the weight and of x.

    Blocks of the matrix that share a scale keep sharing it, a whole matrix does not.
    """
    rows = getattr(packed.format, "rows", 1) or 1
    if kind != "int":
        return Native(kind, group=group, rows=rows)  # type: ignore[arg-type]
    low, high = interval(terms.code)
    width = next(w for w in (2, 4, 8) if w == 8 or (low >= 0 and high < 1 << w))
    if width < 8 and (shared == packed.K or shared % BLOCK == 0):
        return Native("int", width, zero, BLOCK, group, rows)  # type: ignore[arg-type]
    return Native("int", group=group, rows=rows)


def _bytes(layout: Native, code: torch.Tensor, zero: int, K: int) -> torch.Tensor:
    """The bytes of codes [rows, K]."""
    if layout.code != "int":
        code = code.contiguous().view(torch.uint8)
    padded = torch.zeros(len(code), layout.padded(K), dtype=torch.int16)
    padded[:, :K] = code if layout.bits < 8 else code - (zero if layout.code == "int" else 0)
    if layout.bits == 8:
        return padded.to(torch.int8 if layout.code == "int" else torch.uint8)
    per = 8 // layout.bits
    planes = padded.reshape(len(code), -1, per, layout.block // per).to(torch.uint8)
    made = planes[:, :, 0]
    for place in range(1, per):
        made = made | planes[:, :, place] << (place * layout.bits)
    return made.flatten(1)
