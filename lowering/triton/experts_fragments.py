"""Kernels of mixtures of experts whose weights are in fragment order: those of `linear-fragments`, on one expert's weight.

Fragments lie in blocks of 16 outputs. Where each expert has whole blocks, its tensors are one stretch of each stored tensor,
so a program moves its pointers there and is then a linear's program over a weight [N, K]. What differs is where rows of x
and y lie, and the end. Gate and up are two weights of a tile, as in a linear, or, where they take turns, one whose sums
are taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcompile.dims import Dim
from qcompile.experts import Gate
from qcompile.format import Format
from qcompile.formats.fragments import ROWS, Fragments
from qcompile.lowering.triton.experts_text import ending
from qcompile.lowering.triton.fragment_text import Text
from qcompile.lowering.triton.linear import Compute, Section, Shape, types
from qcompile.lowering.triton.linear_fragments import refusal
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.target import Target

if TYPE_CHECKING:
    from qcompile.lowering.triton.experts import Params


def shape_of(format: Format, n: int, k: int, gate: Gate | None, compute: Compute) -> Shape | None:
    """The linear that each expert is, if there are kernels in fragment order for it."""
    halves = ({"op": "glu", "act": gate.act},) if gate and not gate.turns else ()
    shape = Shape((format.to_json(),), (n,), k, epilogue=halves, compute=compute)
    return None if n % ROWS or refusal(format, n, shape) else shape


class Expert(Text):
    """Writes a kernel whose programs each compute with the weight of one expert."""

    def __init__(self, p: Params, target: Target):
        assert p.linear is not None
        super().__init__(p.linear, p.rows, 1, target)
        self.p = p

    def text(self, entry: str, about: str, chosen: Sequence[str], grid: tuple[Dim, Dim]) -> Source:
        """The kernel: `chosen` are the statements that choose the expert and the rows, `grid` the programs but for tiles."""
        p = self.p
        (section,) = self.sections
        lines = ["tile = tl.program_id(0)", *chosen, *self._moved(), *self._section(section)]
        names, body = [pointer.name for pointer in p.pointers], "\n".join(lines)
        made = module(entry, about, names, 1, body, self.target, self._helpers(body))
        tiles = -(-section.rows // self.block_n)
        return Source(made, entry, types(p.pointers), 1, (tiles, *grid), self.plan.warps, self.plan.stages)

    def _rows(self) -> list[str]:
        there = ["live = m < d0"] if self.few else []
        return [*there, f"x_row = x + (source // {self.p.each}).to(tl.int64) * {self.shape.k}"]

    def _ending(self, section: Section, sums: Sequence[str]) -> list[str]:
        gate, made, half = self.p.gate, list(sums), self.block_n // 2
        if gate is None or not gate.turns:
            return ending(self.p, made, self.shape, self.block_n, self.target)
        pairs = f"tl.permute(tl.reshape({sums[0]}, [{half}, 2, {self.block_m}]), (0, 2, 1))"
        lines = [f"acc, acc_up = tl.split({pairs})", f"n = tile * {half} + tl.arange(0, {half})[:, None]"]
        return [*lines, *ending(self.p, ["acc", "acc_up"], self.shape, half, self.target)]

    def _moved(self) -> list[str]:
        """The statements that move the pointers of the weight to the expert's own."""
        (format,), p = self.formats, self.p
        assert isinstance(format, Fragments)
        sizes = {f"w_{item.name}": math.prod(item.shape) for item in format.stored(p.n, p.k)}
        return [f"{name} = {name} + chosen.to(tl.int64) * {size}" for name, size in sizes.items()]
