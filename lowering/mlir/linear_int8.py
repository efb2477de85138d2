"""`qcompile.linear` with x rounded to integers, by its method or for int8 accuracy: the arithmetic that two kernels share.

With codes q, zero z, scale s, offset o of the weight per `group` inputs, and x rounded to (c - z_x) * s_x (`activation_int8`):

    y[m, n] = sum over blocks of  s * s_x * (sum q c - z_x * sum q - z * sum (c - z_x))  +  o * s_x * sum (c - z_x)

where a block is as many inputs as share both a weight scale and an activation scale. The sums are exact in i32, and
every block is added to f32 in the order of K, whatever M, the threads and the processor: a row's result does not depend
on the other rows. Operands are those of `linear.py`; all parts of a node must have the same `Lanes` format.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

from qcompile.format import format_from_json
from qcompile.formats.lanes import Lanes
from qcompile.formats.stream import planes
from qcompile.integer_sums import sums_problem, treatment_problem
from qcompile.lowering.base import Refuse
from qcompile.lowering.mlir import memory
from qcompile.lowering.mlir.activation_int8 import Rounding
from qcompile.lowering.mlir.int8_dot import TABLE_ZERO, Codes
from qcompile.lowering.mlir.linear import F32, LANES
from qcompile.lowering.mlir.row_codes import codes_of
from qcompile.lowering.mlir.text import Text, Value
from qcompile.ops import round_table
from qcompile.transform import Transform, transform_from_json

ONES = 0x01010101  # four codes of 1


@dataclass(frozen=True)
class Scheme:
    """The integer arithmetic of one weight layout over K inputs that are rounded per `act_group`.

    `rounding` is what the method rounds x with, as JSON; None: `ops.round_activations`.
    """

    lanes: Lanes
    k: int
    act_group: int
    rounding: dict[str, Any] | None = None

    @functools.cached_property
    def how(self) -> Transform | None:
        return None if self.rounding is None else transform_from_json(self.rounding)

    @property
    def codes(self) -> Codes:
        return Codes(self.lanes.bits, self.lanes.table)

    @property
    def block(self) -> int:
        """Inputs with one weight scale and one activation scale."""
        return min(self.lanes.group, self.act_group)

    @property
    def chunk(self) -> int:
        """The least number of blocks' inputs that are whole words."""
        return math.lcm(self.block, self.codes.span)

    @property
    def zero(self) -> float | str:
        """The code that is worth 0: a number, or the dtype of the stored zeros."""
        return TABLE_ZERO if self.lanes.table is not None else 0.0 if self.lanes.zero is None else self.lanes.zero

    @property
    def zeros(self) -> bool:
        """Whether x has zeros, so that sums of q are wanted."""
        return codes_of(self.how).zeros

    @property
    def sums(self) -> Literal["none", "start", "after"]:
        """How the zero enters: not at all, as the integer that a dot product starts from, or as a float afterwards."""
        if isinstance(self.zero, str) or self.lanes.offset is not None or not float(self.zero).is_integer():
            return "after"
        return "start" if self.zero else "none"

    @property
    def late(self) -> bool:
        """One scale for all inputs, which multiplies last."""
        return self.lanes.group == self.k and self.lanes.offset is None

    @property
    def unit(self) -> float:
        """What multiplies every weight beside its scale."""
        return self.lanes.factor * (1.0 if self.lanes.table is None else round_table(self.lanes.table)[1])

    def tile(self, rows: int, prologue: dict[str, Any] | None = None) -> Rounding:
        """How x is rounded to tiles of so many rows."""
        zero = int(self.zero) if self.sums == "start" and not isinstance(self.zero, str) else 0
        return Rounding(self.k, self.act_group, self.block, rows, self.sums, zero, prologue, self.rounding)

    def problem(self) -> str:
        """Why there is no kernel for this scheme; empty when there is one."""
        table = self.lanes.table
        if table is not None and len(table) > 16:
            return f"a table of {len(table)} values is not looked up in a register"
        if table is not None and self.lanes.zero is not None:
            return "the values of a table are moved by zeros"
        if self.how is not None:
            return treatment_problem(self.lanes, self.k, self.how, self.act_group)
        return sums_problem(self.lanes, self.k, self.act_group, codes_of(None).reach)


def scheme(params: dict[str, Any]) -> Scheme:
    """The scheme of a kernel's parameters: `formats` (all equal), `k`, `act_group` and `rounding`."""
    lanes = format_from_json(params["formats"][0])
    if not isinstance(lanes, Lanes) or any(other != params["formats"][0] for other in params["formats"]):
        raise Refuse("integer activations need weights that are all in one lane layout")
    made = Scheme(lanes, params["k"], params["act_group"], params["rounding"])
    if made.problem():
        raise Refuse(made.problem())
    return made


@dataclass(frozen=True)
class Block:
    """Sixteen outputs' stored tensors: pointers at their first word, scale, zero, offset."""

    scheme: Scheme
    words: list[Value]
    scales: Value
    zeros: Value | None
    offsets: Value | None

    @staticmethod
    def of(s: Scheme, stored: list[Value], block: Value) -> Block:
        """Block number `block` of a part with the pointers `stored`."""
        words = [
            pointer.at(block * (-(-s.k // (32 // width)) * LANES), "i32")
            for pointer, width in zip(stored, planes(s.lanes.bits), strict=False)
        ]
        rest = stored[len(words) :]
        groups = block * (s.k // s.lanes.group * LANES)

        def per_group(dtype: Any) -> Value | None:
            return rest.pop(0).at(groups, element(dtype)) if isinstance(dtype, str) else None

        scales = per_group(s.lanes.scale)
        assert scales is not None
        return Block(s, words, scales, per_group(s.lanes.zero), per_group(s.lanes.offset))

    def words_at(self, k: Value | int) -> list[Value]:
        """Pointers at the words of input k, the first of a word of every plane."""
        place = self.scales.text.constant(k, "i64")
        widths = planes(self.scheme.lanes.bits)
        return [
            pointer.at(place // (32 // width) * LANES, "i32") for pointer, width in zip(self.words, widths, strict=True)
        ]

    def group(self, index: Value) -> Group:
        """What is stored for weight group `index`, as f32."""
        s, at = self.scheme, index * LANES

        def read(pointer: Value | None, dtype: Any) -> Value | None:
            return None if pointer is None else floats(self.scales.text, pointer.at(at, element(dtype)), dtype)

        zero = read(self.zeros, s.lanes.zero)
        if s.sums == "after" and not isinstance(s.zero, str) and s.zero:
            zero = self.scales.text.constant(s.zero, F32)
        return Group(None if s.late else read(self.scales, s.lanes.scale), zero, read(self.offsets, s.lanes.offset))

    def last(self, total: Value) -> Value:
        """The finished sum of a row: `total` times what does not change over the inputs."""
        t, s = total.text, self.scheme
        if s.late:
            total = total * floats(t, self.scales, s.lanes.scale)
        return total if s.unit == 1.0 else total * s.unit


@dataclass(frozen=True)
class Group:
    """Scale, zero and offset of 16 outputs, f32; None where they do nothing here."""

    scale: Value | None
    zero: Value | None
    offset: Value | None

    def add(self, total: Value, dot: Value, x_scale: Value, x_sum: Value | None) -> Value:
        """`total` and one block's i32 `dot`; `x_scale` and `x_sum` of the row are in every lane."""
        t = total.text
        value = t.cast("sitofp", dot, "f32")
        if self.zero is not None and x_sum is not None:
            value = t.fma(-self.zero, x_sum, value)
        total = t.fma(value, x_scale if self.scale is None else self.scale * x_scale, total)
        if self.offset is not None and x_sum is not None:
            total = t.fma(self.offset, x_scale * x_sum, total)
        return total


def group_of(s: Scheme, size: int, chunk: Value | int, block: int) -> Value | Any:
    """Which group of `size` inputs holds block number `block` of a chunk; int where the chunk is one."""
    per_chunk, per_group = s.chunk // s.block, size // s.block
    if per_chunk % per_group == 0:
        return chunk * (per_chunk // per_group) + block // per_group
    return (chunk * per_chunk + block) // per_group


def element(dtype: str) -> str:
    """The MLIR type of a stored dtype."""
    return memory.ELEMENTS[dtype][0]


def floats(t: Text, pointer: Value, dtype: str) -> Value:
    """Sixteen stored numbers as f32."""
    return memory.convert(t, memory.load(t, pointer, 0, dtype, LANES), dtype, "f32")
