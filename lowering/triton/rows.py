"""How the rows that an attention kernel reads lie in memory: their dtype and strides, as parameters and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from qcompile.dims import Dim
from qcompile.lowering.alignment import divisor, starts_aligned
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.extents import strided
from qcompile.lowering.symbolic import ZERO, Strided
from qcompile.lowering.triton.text import multiple_of

FLOATS = ("f32", "f16", "bf16")
GIVEN = -1


@dataclass(frozen=True)
class Rows:
    """Rows of floats (of a mask also of bools) without gaps inside; the stride in elements along each axis before the last.

    A stride is a number, or `GIVEN` where only the call knows it, as one of its dims; those are multiples of `unit`.
    """

    dtype: Literal["f32", "f16", "bf16", "bool"]
    steps: tuple[int, ...]
    unit: int = 1

    def problem(self) -> str:
        """What is out of range; empty when nothing is."""
        right = self.unit in (1, 2, 4, 8, 16) and all(GIVEN <= step < 2**31 for step in self.steps)
        return "" if right else f"strides {self.steps} in multiples of {self.unit}"

    def given(self, name: str, axes: str) -> list[str]:
        """The names of the dims that hold strides: q_b for axis b of q."""
        return [f"{name}_{axis}" for axis, step in zip(axes, self.steps, strict=True) if step == GIVEN]

    def lines(self, name: str, axes: str, first: int) -> list[str]:
        """The statements that give those dims, d<first> and on, their names."""
        return [
            f"{given} = {multiple_of(f'd{first + i}', self.unit)}" for i, given in enumerate(self.given(name, axes))
        ]

    def at(self, name: str, axes: str, **places: str) -> str:
        """The text of the offset of a row; `places` holds the i64 index along each axis."""
        steps = [f"{name}_{axis}" if step == GIVEN else str(step) for axis, step in zip(axes, self.steps, strict=True)]
        return " + ".join(f"{places[axis]} * {step}" for axis, step in zip(axes, steps, strict=True))

    def reach(self, name: str, axes: str, sizes: Sequence[int], dims: dict[str, int]) -> int:
        """Elements up to the last of an array of `sizes`; `dims` are those of the call by name."""
        steps = [dims[f"{name}_{axis}"] if step == GIVEN else step for axis, step in zip(axes, self.steps, strict=True)]
        return strided(sizes, steps)


def packed(ctx: Context, source: Strided) -> Strided:
    """`source`, or a copy of it where its rows have gaps or begin at no multiple of 16 bytes."""
    if source.dtype not in (*FLOATS, "bool"):
        raise Refuse(f"attention over {source.dtype} elements")
    if source.strides[-1] == 1 and starts_aligned(ctx.dim(source.offset), source.dtype):
        return source
    return ctx.copied(source)


def describe(ctx: Context, source: Strided, axes: Sequence[int]) -> tuple[Rows, list[Dim]]:
    """The rows of `source` along `axes` as a parameter, and the strides that the call gives."""
    steps: list[int] = []
    given: list[Dim] = []
    unit, dtype = 16, cast("Any", source.dtype)
    for axis in axes:
        step = ZERO if source.shape[axis] == 1 else source.strides[axis]
        text = ctx.dim(step)
        steps.append(text if isinstance(text, int) else GIVEN)
        if steps[-1] == GIVEN:
            given.append(text)
            unit = min(unit, divisor(text))
    return Rows(dtype, tuple(steps), unit if given else 1), given


def blocks(size: Dim, block: int) -> Dim:
    """How many blocks hold `size` elements.

    >>> blocks(33, 16), blocks("d0", 16)
    (3, '(d0 + 15)//16')
    """
    return -(-size // block) if isinstance(size, int) else f"({size} + {block - 1})//{block}"
