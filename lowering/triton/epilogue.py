"""The end of every linear kernel as Triton text: bias, activations, gates, products, sums, and the store of a tile of y."""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.lowering.triton.linear import Section, Shape


def finish(shape: Shape, section: Section, sums: Sequence[str], *, ragged: bool = True) -> list[str]:
    """The statements that make columns of y of the f32 tensors `sums`, one a stream of the section, and store them.

    The text knows n, the i32 rows of the section's streams, and m, the i32 rows of x: of shapes [BN, 1] and [1, BM], or
    [1, BN] and [BM, 1]; `sums` have the shape of both. Rows m >= d0 are not stored, nor rows n outside of the section, which
    there may be where it is `ragged`. The functions that the statements call are those of `elementary`.
    """
    lines = [f"n_in = n < {section.rows}"] if ragged else []
    if shape.bias:
        # The second stream's rows follow all of the first's.
        starts = [section.column, section.column + section.rows][: len(sums)]
        masked = ", mask=n_in, other=0.0" if ragged else ""
        lines += [f"{y} += tl.load(bias + {_plus('n', start)}{masked})" for y, start in zip(sums, starts, strict=True)]
    lines.append(f"at = m.to(tl.int64) * {shape.n_out} + {_plus('n', section.column)}")
    lines.append("inside = (m < d0) & n_in" if ragged else "inside = m < d0")
    y, *up = sums
    extras = iter([pointer.name for pointer in shape.extras()])
    for step in shape.epilogue:
        match step["op"]:
            case "glu":
                lines.append(f"{y} = {activated(step['act'], y)} * {up.pop()}")
            case "add" | "mul" as op:
                sign = "+" if op == "add" else "*"
                lines.append(f"{y} = {y} {sign} tl.load({next(extras)} + at, mask=inside, other=0.0)")
            case name:
                lines += [f"{each} = {activated(name, each)}" for each in (y, *up)]
    return [*lines, f"tl.store(y + at, {y}, mask=inside)"]


def activated(name: str, y: str) -> str:
    """The text of the activation called `name` of y."""
    return f"tl.where({y} < 0.0, 0.0, {y})" if name == "relu" else f"{name}({y})"


def _plus(name: str, number: int) -> str:
    return f"({name} + {number})" if number else name
