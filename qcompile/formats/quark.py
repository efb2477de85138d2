"""Quark's 4-bit integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bits, const, k, n, table
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.awq import ORDER


@dataclass(frozen=True)
class QuarkInt4(Affine):
    """W = (code - zero) * scale in f32, eight codes to a word: of neighbours in AWQ's order, or in their own.

    One scale for `group` inputs of an output (`per` "group"): weight i32 [K, N / 8], scale (`scale`) [K / group, N], zero
    i32 [K / group, N / 8]; one for an output ("channel"): weight i32 [N, K / 8], scale [N], zero i32 [N / 8]; one for all
    ("tensor"): weight as the last, scale [1], zero i32 [1]. `group` says nothing in the last two. `zero` false: none is
    stored. `signed` numbers are in two's complement.
    """

    kind: ClassVar[str] = "quark-int4"
    per: Literal["group", "channel", "tensor"] = "group"
    group: int = 32
    signed: bool = True
    reorder: bool = True
    scale: str = "f32"
    zero: bool = False

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        words, groups = -(-N // 8), K // (self.group or K)
        weight = (K, words) if self.per == "group" else (N, -(-K // 8))
        scale: tuple[int, ...] = {"group": (groups, N), "channel": (N,)}.get(self.per, (1,))
        zero: tuple[int, ...] = {"group": (groups, words), "channel": (words,)}.get(self.per, (1,))
        zeros = (Stored("zero", "i32", zero),) if self.zero else ()
        return (Stored("weight", "i32", weight), Stored("scale", self.scale, scale), *zeros)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        if self.per == "group":
            g = k // self.group
            out = {"code": self._nibble(lambda word: t.weight[k, word], n), "scale": t.scale[g, n]}
            zero = self._nibble(lambda word: t.zero[g, word], n) if self.zero else None
        else:
            at = n if self.per == "channel" else const(0)
            out = {"code": self._nibble(lambda word: t.weight[n, word], k), "scale": t.scale[at]}
            zero = self._nibble(lambda word: t.zero[word], at) if self.zero else None
        return out if zero is None else out | {"zero": zero}

    def _nibble(self, word: Callable[[Expr], Expr], i: Expr) -> Expr:
        """Number `i` of a row of words; a signed one moved up by 8, so that it is a code of four bits."""
        place = table(ORDER, i % 8) if self.reorder else i % 8
        raw = bits(word(i // 8), place * 4, 4)
        return bits(raw + 8, 0, 4) if self.signed else raw

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, f.zero if self.zero else const(8 if self.signed else 0))

    def check(self, N: int, K: int) -> list[Problem]:
        name, size = ("N", N) if self.per == "group" else ("K", K)
        out = [Problem(f"{name} = {size}", "a multiple of 8")] if size % 8 else []
        if self.per == "group" and K % self.group:
            out.append(Problem(f"K = {K}", f"a multiple of the group, {self.group}"))
        return out + ([Problem(f"N = {N}", "a multiple of 8")] if self.per == "channel" and N % 8 else [])

    def group_size(self, N: int, K: int) -> int | None:
        return self.group if self.per == "group" else K
