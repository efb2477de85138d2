"""Activations that are integers times a scale, and when a linear is a sum of products of integers: with codes q and zero z
of the weight and c and z_x of the input,

    y[m, n] = sum over groups of  scale * scale_x * sum of (q - z) (c - z_x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qcompile.formats.lanes import Lanes
from qcompile.formats.stream import planes
from qcompile.transform import Transform
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_int import RoundInt

UNROLLED = 512  # inputs that a kernel's text is written out for at most


@dataclass(frozen=True)
class IntegerCodes:
    """x = (code - zero) * scale with codes `low` .. `high`, among which the zero is; there is none unless `zeros`.

    `size` inputs of a row share scale and zero; 0: all of them do.
    """

    low: int
    high: int
    size: int
    zeros: bool

    @property
    def reach(self) -> int:
        """The greatest |code - zero| of bytes."""
        return 255 if self.zeros else max(-self.low, self.high)


def integer_codes(each: Transform) -> IntegerCodes | str:
    """What `each` makes of rows; or why that is no integers times a scale. Columns with outliers are not looked at."""
    match each:
        case LlmInt8():
            return IntegerCodes(-127, 127, 0, False)
        case RoundInt():
            zeros = bool(each.zero) if each.scale else not each.symmetric
            return IntegerCodes(each.low, each.high, each.size if each.per == "group" and not each.scale else 0, zeros)
    return "its inputs are not rounded to integers"


def rounding_problem(each: Transform) -> str:
    """Why no CPU kernel makes the integers that `each` rounds a row to, as bytes; empty when one does."""
    found = integer_codes(each)
    if isinstance(found, str):
        return found
    if isinstance(each, LlmInt8) and each.threshold != 0:
        return "columns with outliers stay floats"
    if isinstance(each, RoundInt):
        if each.heads or (not each.scale and each.per not in ("token", "group")):
            return f"its inputs share a scale per {'head' if each.heads else each.per}"
        if each.dtype != "f32":
            return f"its inputs are rounded in {each.dtype}"
        if not all(math.isfinite(value) for value in vars(each).values() if isinstance(value, float)):
            return "a number of its rounding is not finite"
    signed = -128 <= found.low < found.high <= 127
    if not signed and not (found.zeros and 0 <= found.low < found.high <= 255):
        return f"its inputs are rounded to {found.low} .. {found.high}"
    stored = each.zero if isinstance(each, RoundInt) and each.scale else ""
    return "" if stored in ("", "i8" if signed else "u8") else f"a zero that is stored as {stored} may be no code"


def sums_problem(layout: Lanes, k: int, group: int, reach: int) -> str:
    """Why no CPU kernel sums products of codes with integers up to `reach`; empty when one does.

    `group` of the k integers share a scale.
    """
    block = min(layout.group, group)
    if layout.code != "int":
        return f"its codes are {layout.code}"
    if k % group or k % layout.group or max(group, layout.group) % block:
        return f"weight groups of {layout.group} and activation groups of {group} do not nest in {k} inputs"
    if block % 4:
        return f"{block} inputs that share scales are no multiple of 4"
    word = 32 // min(planes(layout.bits))
    if math.lcm(block, word) > UNROLLED and block % word and block < k:
        return f"groups of {block} inputs, and weights of {layout.bits} bits, need too much unrolling"
    return f"a sum of {block} products may need more than 32 bits" if block * 255 * reach >= 1 << 31 else ""


def treatment_problem(layout: Lanes, k: int, each: Transform, group: int = 0) -> str:
    """Why no CPU kernel multiplies the integers that `each` makes of k inputs with the layout's; empty when one does.

    `group` inputs share a scale, as `each` says where it is 0.
    """
    if problem := rounding_problem(each):
        return problem
    if layout.table is not None:
        return "a weight is an entry of a table"
    codes = integer_codes(each)
    assert isinstance(codes, IntegerCodes)
    return sums_problem(layout, k, group or codes.size or k, codes.reach)
