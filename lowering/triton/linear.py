"""What the Triton kernels of `qcompile.linear` share: parameters, order of pointers, the parts of the work, the request.

A linear kernel's pointers are, in order:
    x          f32 [M, K]; or in the compute dtype, where it has been normalised (`Shape.x`)
    y          f32 [M, n_out]
    stored     the tensors of part 0, part 1 ..., each in the order of `Format.stored`
    extras     f32: bias [N]; norm weight [K] (and bias [K]); one [M, n_out] an add or mul
    scratch    whatever the template asks for
    before     what the kernel makes x from, where it does that itself: x is scratch then (`before`)
and its one number d0 is M. Rows of each part and K are literals of its text.

A tier is a module with a constant `TIER` ("native", "lanes", "codebook", "generic": what the report says) and a function

    calls(request: Request, most: int | None) -> list[Call]

for x of at most `most` rows (None: any number), which raises `Refuse(reason)` where it has no kernel. `linear_rule` asks the
tiers in order for each of its buckets of M and takes the first that serves; equal calls for two buckets become one variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qcompile.artifact import Call, View
from qcompile.dims import Dim
from qcompile.format import Format, format_from_json
from qcompile.lowering.base import Context
from qcompile.lowering.triton.before import Before
from qcompile.ops import LinearSpec
from qcompile.program import Program

Compute = Literal["bf16", "f16"]
Element = Literal["f32", "bf16", "f16"]


@dataclass(frozen=True)
class Section:
    """Outputs that are computed alike: columns `column` .. `column` + `rows` - 1 of y.

    Column `column` + i is x . W[first + i] of the part, for each (part, first) of `streams`: two of them, gate and up, for a
    gated unit, else one.
    """

    streams: tuple[tuple[int, int], ...]
    column: int
    rows: int


@dataclass(frozen=True)
class Pointer:
    """An argument of a kernel: its name in the text, and the dtype of its elements."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Shape:
    """What a linear kernel computes; `params` is its JSON (the same names), to which a template adds its own.

    `formats` and `rows`: one of each part. `compute`: the dtype of a dot's operands. `x`: the dtype of x in memory.
    """

    formats: tuple[dict[str, Any], ...]
    rows: tuple[int, ...]
    k: int
    bias: bool = False
    prologue: dict[str, Any] | None = None
    epilogue: tuple[dict[str, Any], ...] = ()
    compute: Compute = "bf16"
    x: Element = "f32"

    @staticmethod
    def of(params: dict[str, Any]) -> Shape:
        """The shape that `params` describe; what the template added is left out."""
        return Shape(
            tuple(params["formats"]), tuple(params["rows"]), params["k"], params["bias"], params["prologue"],
            tuple(params["epilogue"]), params["compute"], params["x"],
        )  # fmt: skip

    def params(self, **more: Any) -> dict[str, Any]:
        return {
            "formats": list(self.formats), "rows": list(self.rows), "k": self.k, "bias": self.bias,
            "prologue": self.prologue, "epilogue": list(self.epilogue), "compute": self.compute, "x": self.x, **more,
        }  # fmt: skip

    @property
    def glu(self) -> str | None:
        """The activation of a gated unit, None where there is none."""
        return next((step["act"] for step in self.epilogue if step["op"] == "glu"), None)

    @property
    def n(self) -> int:
        return sum(self.rows)

    @property
    def n_out(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.glu else self.n

    def parse(self) -> tuple[Format, ...]:
        return tuple(format_from_json(data) for data in self.formats)

    def sections(self) -> list[Section]:
        """The parts of the work, in the order of the columns of y.

        >>> Shape(({}, {}), (8, 4), 64).sections()[1]
        Section(streams=((1, 0),), column=8, rows=4)
        >>> Shape(({},), (8,), 64, epilogue=({"op": "glu", "act": "silu"},)).sections()
        [Section(streams=((0, 0), (0, 4)), column=0, rows=4)]
        """
        if self.glu:
            streams = ((0, 0), (1, 0)) if len(self.rows) == 2 else ((0, 0), (0, self.n // 2))
            return [Section(streams, 0, self.n // 2)]
        starts = [sum(self.rows[:part]) for part in range(len(self.rows))]
        return [Section(((part, 0),), start, self.rows[part]) for part, start in enumerate(starts)]

    def stored(self) -> list[list[Pointer]]:
        """The pointers of each part's stored tensors, in the order of `Format.stored`."""
        several = len(self.rows) > 1
        return [
            [Pointer(f"w{part if several else ''}_{item.name}", item.dtype) for item in format.stored(n, self.k)]
            for part, (format, n) in enumerate(zip(self.parse(), self.rows, strict=True))
        ]

    def extras(self) -> list[Pointer]:
        """The pointers of the tensors that adds and muls of the epilogue take, in order."""
        added = [step["op"] for step in self.epilogue if step["op"] in ("add", "mul")]
        return [Pointer(f"{op}_{i}", "f32") for i, op in enumerate(added)]

    def pointers(self) -> list[Pointer]:
        """All pointers in order, up to the scratch."""
        stored = [pointer for part in self.stored() for pointer in part]
        names = [*["bias"] * self.bias, *["norm_weight", "norm_bias"][: norm_count(self.prologue)]]
        extras = [*(Pointer(name, "f32") for name in names), *self.extras()]
        return [Pointer("x", self.x), Pointer("y", "f32"), *stored, *extras]


def types(pointers: Sequence[Pointer]) -> tuple[str, ...]:
    """The dtypes that a kernel's text sees: floats of 8 bits are bytes, which every GPU can read."""
    return tuple("u8" if pointer.dtype.startswith("f8") else pointer.dtype for pointer in pointers)


def norm_count(prologue: dict[str, Any] | None) -> int:
    """How many tensors the prologue of a `LinearSpec` has."""
    return {"": 0, "rms_norm": 1, "layer_norm": 2}[prologue["op"] if prologue else ""]


def compute_dtype(program: Program) -> Compute:
    """The dtype of a dot's operands: the model's own where its config names one of 16 bits, else bf16."""
    config = program.model_config
    named = str(config.get("torch_dtype") or config.get("dtype") or "")
    return "f16" if named.rpartition(".")[2] in ("float16", "half") else "bf16"


@dataclass(frozen=True)
class Request:
    """A linear node made ready: its operands as contiguous views, in the order of the pointers, and what it computes.

    `stored` has the views of each part; `norms` those of the prologue; `transforms` the views stored for each transform of
    `spec.before`; `extras` one for each add or mul. The output is allocated: every call writes to `y`.
    """

    ctx: Context
    spec: LinearSpec
    shape: Shape
    m: Dim
    x: View
    y: View
    stored: tuple[tuple[View, ...], ...]
    bias: View | None = None
    norms: tuple[View, ...] = ()
    transforms: tuple[tuple[View, ...], ...] = ()
    extras: tuple[View, ...] = ()
    before: Before | None = None

    @property
    def args(self) -> list[View]:
        """The views for all pointers in order, up to the scratch."""
        stored = [view for part in self.stored for view in part]
        return [self.x, self.y, *stored, *([self.bias] if self.bias else []), *self.norms, *self.extras]

    def call(self, template: str, scratch: Sequence[View] = (), inputs: Sequence[View] = (), **more: Any) -> Call:
        """The call of `template` with the shape's parameters and `more`. `inputs`, then `scratch`, which is written, follow the
        other arguments.
        """
        args = [*self.args, *inputs, *scratch]
        written = (1, *range(len(args) - len(scratch), len(args)))
        if self.before is None:
            return self.ctx.call(template, self.shape.params(**more), args, (self.m,), written)
        params = self.shape.params(**more, before=self.before.params)
        return self.ctx.call(template, params, [*args, *self.before.read], (self.m,), (0, *written))

    def reading(self, x: View, dtype: Element, before: Before | None = None) -> Request:
        """The same work on an x of `dtype` that is normalised already, or that the kernel makes so first."""
        shape = replace(self.shape, prologue=None, x=dtype)
        return replace(self, shape=shape, x=x, norms=(), before=before)
