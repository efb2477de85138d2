"""Kernels of mixtures of experts whose weights are in fragment order: those of `linear-fragments`, on one expert's weight.

Fragments lie in blocks of 16 outputs. Where each expert has whole blocks, its tensors are one stretch of each stored tensor,
so a program moves its pointers there and is then a linear's program over a weight [N, K]. Rows that share an expert differ
only in where `m`, the rows of x and y, comes from.
"""

from __future__ import annotations

import math

from qcompile.format import Format
from qcompile.formats.fragments import ROWS, Fragments
from qcompile.lowering.triton.fragment_text import Text
from qcompile.lowering.triton.linear import Compute, Pointer, Shape, types
from qcompile.lowering.triton.linear_fragments import refusal
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.target import Target


def shape_of(format: Format, n: int, k: int, bias: bool, compute: Compute) -> Shape | None:
    """The linear that each expert is, if there are kernels in fragment order for it."""
    shape = Shape((format.to_json(),), (n,), k, bias=bias, compute=compute)
    return None if n % ROWS or refusal(format, n, shape) else shape


class Expert(Text):
    """Writes a kernel whose programs each compute with the weight of the expert `chosen`, of `experts`."""

    def __init__(self, shape: Shape, rows: int, experts: int, target: Target):
        super().__init__(shape, rows, 1, target)
        self.experts = experts

    def gather(self, pointers: list[Pointer], about: str) -> Source:
        """One row a program: x and y are moved to it, and it is the only one."""
        k, n = self.shape.k, self.shape.n
        (section,) = self.sections
        body = self._section(section)
        lines = [
            "token = tl.program_id(1).to(tl.int64)",
            "if token >= d0:",
            "    return",
            "given = tl.load(expert + token)",
            f"chosen = tl.minimum(tl.maximum(given, 0), {self.experts - 1})",
            "# an expert that does not exist gives a row of NaN, and no other",
            "d0 = tl.where(given == chosen, tl.minimum(d0, 1), 0)",
            f"x = x + token * {k}",
            f"y = y + token * {n}",
            *self._moved(),
            "tile = tl.program_id(0)",
            *body,
            "if given != chosen:",
            f'    tl.store(y + n, float("nan"), mask=n < {n})',
        ]
        return self._made("experts_gather", pointers, about, lines, "d0")

    def grouped(self, pointers: list[Pointer], about: str, chosen: list[str]) -> Source:
        """A block of rows a program; `chosen` are the statements that give its expert, and `token` i32 [rows], T for none."""
        n = self.shape.n
        (section,) = self.sections
        body = self._section(section)
        (rows,) = (i for i, line in enumerate(body) if line.startswith("m = "))
        body[rows] = "m = tl.where(e_given == chosen, token, d0)[None, :]"
        lines = [
            *chosen,
            "e_given = tl.load(expert + token, mask=token < d0, other=chosen)",
            *self._moved(),
            "tile = tl.program_id(0)",
            *body,
            "wrong = ((e_given != chosen) & (token < d0))[None, :]",
            f'tl.store(y + token.to(tl.int64)[None, :] * {n} + n, float("nan"), mask=wrong & (n < {n}))',
        ]
        programs = f"(d0 + {self.block_m - 1})//{self.block_m} + {self.experts}"
        return self._made("experts_grouped", pointers, about, lines, programs)

    def _moved(self) -> list[str]:
        """The statements that move the pointers of the weight to the expert's own."""
        (format,), n, k = self.formats, self.shape.n, self.shape.k
        assert isinstance(format, Fragments)
        moved = {f"w_{item.name}": math.prod(item.shape) for item in format.stored(n, k)}
        moved |= {"bias": n} if self.shape.bias else {}
        return [f"{name} = {name} + chosen.to(tl.int64) * {size}" for name, size in moved.items()]

    def _made(self, entry: str, pointers: list[Pointer], about: str, lines: list[str], programs: str) -> Source:
        names, body = [pointer.name for pointer in pointers], "\n".join(lines)
        text = module(entry, about, names, 1, body, self.target, self._helpers(body))
        tiles = -(-self.shape.n // self.block_n)
        return Source(text, entry, types(pointers), 1, (tiles, programs, 1), self.plan.warps, self.plan.stages)
