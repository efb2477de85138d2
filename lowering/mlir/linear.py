"""What the kernels of `qcompile.linear` share: parameters, order of arguments, and how the work is cut.

A linear kernel's arguments are, in order:
    x          f32 [M, K], or what the template says it reads instead
    y          f32 [M, n_out]
    stored     the tensors of part 0, part 1 ..., each in the order of `Format.stored`
    extras     f32, as `LinearSpec` lists them: bias [N]; norm weight [K] (and bias [K]); what the transform of x stores, where
               the kernel makes one; one [M, n_out] an add or mul
    scratch    f32 [threads, scratch elements], where the template asks for it
and its dimensions are M, K, then the rows of each part.

Sixteen neighbouring outputs are a block. Every block is computed by one thread, in the same way whatever the number of
threads, so results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qcompile.format import Format, Stored, format_from_json
from qcompile.lowering.mlir.text import Text, Value

LANES = 16
F32, I32 = f"vector<{LANES}xf32>", f"vector<{LANES}xi32>"


@dataclass(frozen=True)
class Shape:
    """What a linear kernel computes; `params` is its JSON (the same names), to which a template adds its own.

    `formats`: one for each part. `ragged`: some part has a number of rows that is no multiple of 16.
    `sizes`: [N, K] of each part whose format is no lane layout, None for the others: their kernels serve every size.
    """

    formats: tuple[dict[str, Any], ...]
    ragged: bool = False
    bias: bool = False
    prologue: dict[str, Any] | None = None
    epilogue: tuple[dict[str, Any], ...] = ()
    sizes: tuple[tuple[int, int] | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.sizes:
            object.__setattr__(self, "sizes", (None,) * len(self.formats))

    @staticmethod
    def of(params: dict[str, Any]) -> Shape:
        return Shape(
            tuple(params["formats"]), params["ragged"], params["bias"], params["prologue"], tuple(params["epilogue"]),
            tuple(None if size is None else (size[0], size[1]) for size in params["sizes"]),
        )  # fmt: skip

    def params(self, **more: Any) -> dict[str, Any]:
        return {
            "formats": list(self.formats), "ragged": self.ragged, "bias": self.bias, "prologue": self.prologue,
            "epilogue": list(self.epilogue), "sizes": [size and list(size) for size in self.sizes], **more,
        }  # fmt: skip

    @property
    def glu(self) -> str | None:
        """The activation of a gated unit, None where there is none."""
        return next((step["act"] for step in self.epilogue if step["op"] == "glu"), None)

    def parse(self) -> tuple[Format, ...]:
        return tuple(format_from_json(data) for data in self.formats)


def norm_count(prologue: dict[str, Any] | None) -> int:
    """How many tensors the prologue of a `LinearSpec` has."""
    return {"": 0, "rms_norm": 1, "layer_norm": 2}[prologue["op"] if prologue else ""]


@dataclass
class Operands:
    """The pointers and sizes of a linear kernel, loaded at its start."""

    x: Value
    y: Value
    stored: list[list[Value]]
    bias: Value | None
    norm: list[Value]
    before: list[Value]
    extras: list[Value]
    scratch: Value | None
    m: Value
    k: Value
    rows: list[Value]
    columns: Value = field(init=False)  # of y

    @staticmethod
    def load(t: Text, shape: Shape, scratch: bool, before: int = 0) -> Operands:
        """`before` tensors belong to what the kernel does to x."""
        count = 0

        def take() -> Value:
            nonlocal count
            count += 1
            return t.arg(count - 1)

        formats = shape.parse()
        x, y = take(), take()
        stored = [[take() for _ in _stored(format, size)] for format, size in zip(formats, shape.sizes, strict=True)]
        bias = take() if shape.bias else None
        norm = [take() for _ in range(norm_count(shape.prologue))]
        treatment = [take() for _ in range(before)]
        extras = [take() for step in shape.epilogue if step["op"] in ("add", "mul")]
        made = Operands(
            x, y, stored, bias, norm, treatment, extras, take() if scratch else None, t.dim(0), t.dim(1),
            [t.dim(2 + i) for i in range(len(formats))],
        )  # fmt: skip
        total = t.constant(0, "i64")
        for rows in made.rows:
            total = total + rows
        made.columns = total // 2 if shape.glu else total
        return made


def _stored(format: Format, size: tuple[int, int] | None) -> tuple[Stored, ...]:
    """The stored tensors; their number does not depend on the size, where that is not given."""
    return format.stored(*(size or (LANES, getattr(format, "group", 1))))


@dataclass
class Section:
    """Blocks that are computed alike: `streams` are (part, first block) whose block b + first feeds output column
    `column` + 16 b; two of them, gate and up, for a gated unit. `blocks` and `rows` (outputs) count one stream."""

    streams: tuple[tuple[int, Value | int], ...]
    column: Value
    blocks: Value
    rows: Value


def sections(t: Text, shape: Shape, operands: Operands) -> list[Section]:
    """The parts of the work, in the order of the output's columns.

    A gated unit's halves are two parts, or the two halves of one part (whose half must then be a multiple of 16 rows).
    """
    zero = t.constant(0, "i64")
    if shape.glu:
        if len(shape.formats) == 2:
            rows = operands.rows[0]
            return [Section(((0, 0), (1, 0)), zero, _blocks(rows), rows)]
        half = operands.rows[0] // 2
        return [Section(((0, 0), (0, half // LANES)), zero, _blocks(half), half)]
    out, column = [], zero
    for part, rows in enumerate(operands.rows):
        out.append(Section(((part, 0),), column, _blocks(rows), rows))
        column = column + rows
    return out


def _blocks(rows: Value) -> Value:
    return (rows + (LANES - 1)) // LANES


def shares(t: Text, work: list[Section]) -> Iterator[tuple[Section, Value, Value]]:
    """Each section with the blocks [first, end) of it that are this thread's: a contiguous part of all blocks."""
    total = t.constant(0, "i64")
    for section in work:
        total = total + section.blocks
    first, end = t.share(total)
    before = t.constant(0, "i64")
    for section in work:
        low, high = ((item - before).most(0).least(section.blocks) for item in (first, end))
        yield section, low, high
        before = before + section.blocks
