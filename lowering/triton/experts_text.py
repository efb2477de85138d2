"""What the kernels of mixtures of experts share as Triton text: weights decoded by their formula, and the end of a row.

n i32 [BN, 1] are a tile's outputs, of those that each expert has, and m i32 [1, BM] its rows of y, d0 for none. `source`
i32 [1, BM] are the places of these rows in `expert`, `chosen` is the expert whose weight the tile is multiplied with, and
`right` says where that is the expert which was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.experts import Gate
from qcompile.lowering.triton import split
from qcompile.lowering.triton.epilogue import activated
from qcompile.lowering.triton.linear import Section, Shape
from qcompile.lowering.triton.scalar_ops import OPS, constant
from qcompile.lowering.triton.weights import Tile
from qcompile.target import Target

if TYPE_CHECKING:
    from qcompile.lowering.triton.experts import Params

NAMES = frozenset({"n", "m", "j", "k0", "k_in", "source", "chosen", "right", "given", "live", "acc", "acc_up", "xs"})
"""Names that the text of a kernel has for itself, whatever its format."""


def rows_of(gate: Gate | None, n: int) -> list[str]:
    """The rows of an expert's weight whose sums make outputs n: one, or those of gate and up."""
    if gate is None:
        return ["n"]
    return ["2 * n", "(2 * n + 1)"] if gate.turns else ["n", f"(n + {n // 2})"]


@dataclass(frozen=True)
class Weights:
    """Statements that decode W[rows, k0 .. k0 + block_k): `before` the loop over k0, `step` inside, and `value` [BN, block_k]."""

    before: list[str]
    step: list[str]
    value: str


def weights(p: Params, number: int, block_n: int, block_k: int, target: Target, taken: set[str]) -> Weights:
    """The tile of sum `number` of `rows_of`; inputs that are not there are 0.

    `j` is i32 [1, block_k]; `k_in` [1, block_k] is the condition that inputs are there, where some are not.
    """
    suffix = "_up" if number else ""
    tile = Tile(p.parsed, p.size, block_k, n=f"row{suffix}", prefix="u_" * number)
    names = {*NAMES, "row", "row_up", "w", "w_up", *(pointer.name for pointer in p.pointers)}
    render, value = tile.renderer(target, p.stored, p.tables, names | taken)
    value = f"tl.where(k_in, {value}, 0.0)" if tile.ragged else value
    rows = rows_of(p.gate, p.n)[number]
    before = [f"row{suffix} = chosen * {p.n} + tl.minimum({rows}, {p.n - 1})", *render.once]
    made = f"w{suffix} = tl.broadcast_to({value}, [{block_n}, {block_k}])"
    return Weights(before, [*render.lines, made], f"w{suffix}")


def ending(p: Params, sums: list[str], shape: Shape, block_n: int, target: Target) -> list[str]:
    """The statements that make rows of y of the f32 tensors `sums` [BN, BM], one for each of `rows_of`, and store them.

    `bias` points to the chosen expert's. What is added up over experts is, in kernels of one row a program, added by the
    last to arrive; in others every result is stored.
    """
    columns, acc = p.columns, sums[0]
    ragged = columns % block_n != 0
    lines = []
    for y, rows in zip(sums, rows_of(p.gate, p.n), strict=True):
        lines += [f"{y} += tl.load(bias + {rows}, mask=n < {columns}, other=0.0)"] * p.bias
    if p.gate is not None:
        lines += _gated(p.gate, *sums)
    if p.summed:
        lines.append(f"{acc} = {acc} * tl.load(share + source, mask=m < d0, other=0.0)")
    lines.append(f'{acc} = tl.where(right, {acc}, float("nan"))')
    store = [
        "inside = (m < d0)" + (f" & (n < {columns})" if ragged else ""),
        f"tl.store(y + m.to(tl.int64) * {columns} + n, {acc}, mask=inside)",
    ]
    return [*lines, *split.add_up(shape, Section(((0, 0),), 0, columns), [acc], p.parts, store, target, ragged=ragged)]


def _gated(gate: Gate, y: str, up: str) -> list[str]:
    """The statements that make y the gated unit of y and up."""
    lines = []
    if gate.limit is not None:
        limit, least = constant(gate.limit, "f32"), constant(-gate.limit, "f32")
        lines += [
            f"{y} = {OPS['minimum']('f32', y, limit)}",
            f"{up} = {OPS['minimum']('f32', up, limit)}",
            f"{up} = {OPS['maximum']('f32', up, least)}",
        ]
    act = activated(gate.act, y) if gate.alpha == 1.0 else f"{y} * sigmoid({y} * {constant(gate.alpha, 'f32')})"
    factor = f"({up} + {constant(gate.plus, 'f32')})" if gate.plus else up
    return [*lines, f"{y} = {act} * {factor}"]
