"""The end of a linear kernel as MLIR text: bias, activations, gates, products, sums, and the store of 16 outputs."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.lowering.mlir.linear import LANES, Operands, Section, Shape
from qcompile.lowering.mlir.memory import first_lanes, load, store
from qcompile.lowering.mlir.text import Text, Value
from qcompile.lowering.mlir.vecmath import ACTIVATIONS


@dataclass(frozen=True)
class Epilogue:
    """Finishes vectors of outputs: `finish(section, block, row, sums)` stores 16 columns of one row of y."""

    t: Text
    shape: Shape
    operands: Operands

    def finish(self, section: Section, block: Value, row: Value, sums: list[Value]) -> None:
        """`sums` has the vector x[row] . W of each stream of the section (gate and up for a gated unit)."""
        t, inside = self.t, block * LANES
        mask = first_lanes(t, section.rows - inside, LANES) if self.shape.ragged else None
        column = section.column + inside
        place = row * self.operands.columns + column
        if self.operands.bias is not None:
            # The second stream's rows follow all of the first's.
            starts = [column, column + section.rows][: len(sums)]
            sums = [
                y + load(t, self.operands.bias, start, "f32", LANES, mask)
                for y, start in zip(sums, starts, strict=True)
            ]
        extras = list(self.operands.extras)
        y, *up = sums
        for step in self.shape.epilogue:
            match step["op"]:
                case "glu":
                    y = ACTIVATIONS[step["act"]](y) * up[0]
                case "add":
                    y = y + load(t, extras.pop(0), place, "f32", LANES, mask)
                case "mul":
                    y = y * load(t, extras.pop(0), place, "f32", LANES, mask)
                case name:
                    y = ACTIVATIONS[name](y)
        store(t, y, self.operands.y, place, "f32", mask)
