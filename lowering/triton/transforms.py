"""What a method does to a row of x, as Triton text: the roundings of `qcompile.transforms` operation for operation.

A row is one tensor f32 [BLOCK], its first K numbers and zeros; groups of inputs are that tensor as [BLOCK / size, size].
A row that no program holds as a whole is one such tensor after another: what is known of all the row only (a norm, a scale
of all inputs) takes a loop over it first. Blocks of a row are multiplied by a matrix some inputs of each block at a time, so
that neither has to lie in registers as a whole. Codes come out the same, bit for bit, as those of the transforms themselves:
divisions round to the nearest, and every operation of a rounding in a 16-bit type rounds to that type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from qcompile.dtypes import DTYPES
from qcompile.lowering.triton.text import cast
from qcompile.target import Target
from qcompile.transform import Transform
from qcompile.transforms.cast import RoundTo
from qcompile.transforms.four_over_six import ADAPTIVE, RoundFourOverSix, limits
from qcompile.transforms.fp_quant import GROUP, RoundFpQuant
from qcompile.transforms.linear import Hadamard, Permute, Rotate, Scale
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.norm import RmsNorm
from qcompile.transforms.round_float import RoundFloat, RoundMx, RoundNvfp4
from qcompile.transforms.round_int import RoundInt
from qcompile.transforms.rounding import LARGEST, Rounding

ELEMENTS = {"f8e4m3": (-6, 3), "f8e5m2": (-14, 2), "e2m1": (0, 1), "e2m3": (0, 3), "e3m2": (-2, 2)}
"""The exponent of each small float's least normal number, and the bits of its mantissa."""

_ALL = {
    "sum": ("tl.sum({}, 0)", "{} + {}"),
    "least": ("tl.min({}, 0)", "tl.minimum({}, {})"),
    "most": ("tl.max({}, 0)", "tl.maximum({}, {})"),
    "largest": ("largest({}, 0, False)", "larger({}, {})"),
}
"""What is known of a tensor, and how a tensor that is so takes in another; from zeros on, which do not count."""

_PIECE = 2048  # entries of a matrix that are multiplied at once


def over(bounds: str, width: int, lines: Sequence[str]) -> list[str]:
    """A loop of `lines` over the inputs `at` from "first, last", `width` of them at a time."""
    body = [f"at = start + tl.arange(0, {width})", *lines]
    return [f"for start in range({bounds}, {width}):", *(f"    {line}" for line in body)]


@dataclass
class Codes:
    """A row as codes: `code` names integers f32, or numbers of a small float f32; `scale` what one is worth.

    `size` inputs share a scale, which then is [BLOCK / size, 1]; 0: all do, and it is one number. `inverse`, if any, is
    what the row was multiplied by, of which the scale is the inverse.
    """

    code: str
    scale: str
    size: int
    inverse: str = ""


@dataclass
class Row:
    """The text that transforms one row: lines, one assignment each, in which `value` names what the row is now.

    The lines know `at`, the inputs that they are about, and `inside`, which of them there are. `width`: the row is walked so many
    inputs at a time, from `start` on, after the statements `first`; 0: its lines are about all of it. `at` is another name for
    these inputs as long as blocks of them are to be multiplied by a matrix. `whole` names the largest |x| of all rows, where the
    last transform depends on it.
    """

    k: int
    target: Target
    width: int = 0
    at: str = "at"
    value: str = "row"
    lines: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    whole: str = "whole"

    def let(self, expression: str, name: str = "t") -> str:
        """A new name for the value of an expression."""
        made = f"{name}{len(self.lines)}"
        self.lines.append(f"{made} = {expression}")
        return made

    def set(self, expression: str) -> None:
        """The row becomes the value of an expression."""
        self.value = self.let(expression, "row")

    def all(self, kind: Literal["sum", "least", "most", "largest"], value: str) -> str:
        """A name for the sum, the least, the greatest, or the largest size of the numbers `value` of the whole row."""
        result, step = _ALL[kind]
        if not self.width:
            return self.let(result.format(value))
        name = f"{kind}{len(self.lines)}"
        place = [f"{self.at} = at"] if self.at != "at" else []
        self.first.append(f"{name} = tl.zeros(({self.width},), tl.float32)")
        self.first += over(f"0, {self.k}", self.width, [*place, *self.lines, f"{name} = {step.format(name, value)}"])
        self.first.append(f"{name} = {result.format(name)}")
        return name

    def apply(self, each: Transform, tensors: Sequence[str]) -> None:
        """The row is transformed; `tensors` are the pointers at what the transform stores."""
        match each:
            case Permute():
                pass  # the row was loaded in this order
            case Scale():
                self.set(f"{self.value} * tl.load({tensors[0]} + {self.at}, mask=inside, other=0).to(tl.float32)")
            case RmsNorm():
                self.norm(each.eps, tensors[0], "", self.at)
            case RoundTo():
                self.set(self.rounded(self.value, each.dtype))
            case Hadamard():
                for i in range(each.size.bit_length() - 1):
                    self.set(f"butterfly({self.value}, {1 << i})")
                self.set(f"{self.value} * {float(each.size**-0.5)!r}")
            case Rotate():
                self._rotate(each.size, tensors[0])
            case RoundInt() | RoundFloat():
                self._round(each, tensors)
            case RoundMx():
                self._mx(each)
            case RoundNvfp4():
                self._nvfp4(each, *tensors)
            case RoundFourOverSix():
                self._four_over_six(each)
            case RoundFpQuant():
                self._fp_quant(each, tensors)

    def _rotate(self, size: int, matrix: str) -> None:
        """Blocks of `size` inputs times a matrix; what was done before is done to some inputs of all blocks at a time.

        Products are sums of three of tf32, which AMD's tensor cores do not have: within 2^-22 of those of f32.
        """
        precision = "ieee" if self.target.isa == "gcn" else "tf32x3"
        piece, blocks = min(size, _PIECE // size), f"(at.shape[0] // {size})"
        j, i = f"(j0 + tl.arange(0, {piece}))", f"tl.arange(0, {size})[None, :]"
        before = [
            f"{self.at} = start + tl.arange(0, {blocks})[:, None] * {size} + {j}[None, :]",
            *self.lines,
            f"turned = tl.load({matrix} + {j}[:, None] + {i} * {size}).to(tl.float32)",
            f"sums = tl.dot({self.value}, turned, sums, input_precision='{precision}')",
        ]
        # One piece at a time: more would be copied to shared memory ahead.
        loop = f"for j0 in tl.range(0, {size}, {piece}, num_stages=1):"
        self.lines = [f"sums = tl.zeros(({blocks}, {size}), tl.float32)", loop, *(f"    {line}" for line in before)]
        self.at = "at"
        self.lines.append(f"inside = at < {self.k}")
        self._flat("sums", size)

    def norm(self, eps: float, weight: str, offset: str, place: str) -> None:
        """Root mean square norm; `weight` is the pointer at its weights, which lie at `place`; `offset` is added to them."""
        mean = self.let(f"{self.all('sum', f'{self.value} * {self.value}')} / {self.k}")
        gain = self.let(f"tl.load({weight} + {place}, mask=inside, other=0).to(tl.float32){offset}")
        self.set(f"{self.value} * tl.rsqrt({mean} + {eps!r}) * {gain}")

    def layer_norm(self, eps: float, weight: str, bias: str, place: str) -> None:
        """Layer norm with weights and biases."""
        mean = self.let(f"{self.all('sum', self.value)} / {self.k}")
        self.set(f"tl.where(inside, {self.value} - {mean}, 0.0)")
        variance = self.let(f"{self.all('sum', f'{self.value} * {self.value}')} / {self.k}")
        gain, shift = (f"tl.load({pointer} + {place}, mask=inside, other=0)" for pointer in (weight, bias))
        self.set(f"{self.value} * tl.rsqrt({variance} + {eps!r}) * {gain} + {shift}")

    def rounded(self, expression: str, dtype: str) -> str:
        """The f32 expression rounded to a float dtype and back."""
        return expression if dtype == "f32" else f"({cast(expression, dtype, self.target)}).to(tl.float32)"

    # -- integers and floats under a scale --

    def codes(self, each: RoundInt | RoundFloat, tensors: Sequence[str]) -> Codes:
        """The row as the codes of a symmetric rounding."""
        size = each.size if each.per == "group" and not each.scale else 0
        x = self._grouped(self.rounded(self.value, each.dtype), size)
        limit = (each.divisor or (each.high - each.low) / 2) if isinstance(each, RoundInt) else LARGEST[each.element]
        inverse = ""
        if each.scale:
            scale = self.let(self.rounded(f"tl.load({tensors[0]}).to(tl.float32)", each.dtype))
        elif each.arithmetic == "inverse":
            # As torch divides a number by a tensor: times the reciprocal.
            one = self._divided(each, "1.0", self._usable(each, self._most(each, x, size)))
            inverse = self.let(self.rounded(f"{one} * {limit!r}", each.dtype))
            scale = self._divided(each, "1.0", inverse)
        else:
            scale = self._usable(each, self._divided(each, self._most(each, x, size), repr(float(limit))))
        over = self.let(self.rounded(f"{x} * {inverse}", each.dtype)) if inverse else self._over(each, x, scale)
        return Codes(self._code(each, over), scale, size, inverse)

    def is_outlier(self, each: LlmInt8) -> str:
        """The condition that a number of the row is an outlier; only where the threshold is not 0."""
        half = self.let(self.rounded(self.value, "f16"))
        return f"(tl.abs({half}) >= {each.threshold!r})"

    def outliers(self, each: LlmInt8, column: str) -> Codes:
        """The row as codes; 0 in the columns for which `column` ("": none) holds."""
        small = self.let(self.rounded(self.value, "f16"))
        if column:
            small = self.let(f"tl.where({self.is_outlier(each)}, 0.0, {small})")
        most = self.all("largest", small)
        safe = self.let(f"tl.where({most} == 0.0, 1.0, {most})")
        inverse = self.let(f"tl.div_rn(1.0, {safe}) * 127.0")
        code = self.let(f"to_integer({small} * {inverse})", "code")
        scale = self.let(f"{safe} * {1.0 / 127.0!r}")
        return Codes(self.let(f"tl.where({column}, 0.0, {code})", "code") if column else code, scale, 0)

    def _round(self, each: RoundInt | RoundFloat, tensors: Sequence[str]) -> None:
        if isinstance(each, RoundInt) and (each.zero if each.scale else not each.symmetric):
            return self._round_asymmetric(each, tensors)
        made = self.codes(each, tensors)
        divides = made.inverse and isinstance(each, RoundInt)
        value = f"tl.div_rn({made.code}, {made.inverse})" if divides else f"{made.code} * {made.scale}"
        self._flat(self.rounded(value, each.dtype), made.size)

    def _round_asymmetric(self, each: RoundInt, tensors: Sequence[str]) -> None:
        size = each.size if each.per == "group" and not each.scale else 0
        x = self._grouped(self.rounded(self.value, each.dtype), size)
        as_ = self.rounded
        if each.scale:
            scale, zero = (self.let(as_(f"tl.load({t}).to(tl.float32)", each.dtype)) for t in tensors)
        else:
            lowest = f"tl.min({x}, 1, keep_dims=True)" if size else self.all("least", x)
            highest = f"tl.max({x}, 1, keep_dims=True)" if size else self.all("most", x)
            least = self.let(f"tl.minimum({lowest}, 0.0)")
            width = as_(f"tl.maximum({highest}, 0.0) - {least}", each.dtype)
            scale = self._usable(each, self._divided(each, width, repr(float(each.high - each.low))))
            over = self._divided(each, least, scale)
            if each.zero_first:
                zero = self.let(f"to_integer({self._within(each, as_(f'{float(each.low)!r} - {over}', each.dtype))})")
            else:
                zero = self.let(self._within(each, f"{float(each.low)!r} - to_integer({over})"))
        over = self._over(each, x, scale)
        if each.zero_first:
            code = f"to_integer({self._within(each, as_(f'{over} + {zero}', each.dtype))})"
        else:
            code = self._within(each, as_(f"to_integer({self._near(over)}) + {zero}", each.dtype))
        self._flat(as_(f"({code} - {zero}) * {scale}", each.dtype), size)

    def _most(self, each: Rounding, x: str, size: int) -> str:
        if each.per == "tensor":
            most = self.let(self.rounded(self.whole, each.dtype))
        else:
            most = self.let(f"largest({x}, 1, True)") if size else self.all("largest", x)
        for bound, sign in ((each.least, "<"), (each.most, ">")):
            if bound:
                limit = _literal(bound, each.dtype)
                most = self.let(f"tl.where({most} {sign} {limit}, {limit}, {most})")
        return most

    def _usable(self, each: Rounding, scale: str) -> str:
        scale = self.let(scale)
        if each.floor:
            floor = _literal(each.floor, each.dtype)
            return self.let(f"tl.where({scale} < {floor}, {floor}, {scale})")
        return self.let(f"tl.where({scale} == 0.0, {_literal(each.empty, each.dtype)}, {scale})")

    def _divided(self, each: Rounding, a: str, b: str) -> str:
        """The name of a / b."""
        return self.let(self.rounded(f"tl.div_rn({a}, {b})", each.dtype))

    def _over(self, each: Rounding, x: str, scale: str) -> str:
        if each.arithmetic == "reciprocal":
            return self.let(self.rounded(f"{x} * {self._divided(each, '1.0', scale)}", each.dtype))
        return self._divided(each, x, scale)

    def _within(self, each: RoundInt, x: str) -> str:
        return f"tl.minimum(tl.maximum({x}, {float(each.low)!r}), {float(each.high)!r})"

    def _near(self, x: str) -> str:
        """x within what `to_integer` rounds; nothing beyond is within any range of codes."""
        return f"tl.minimum(tl.maximum({x}, -1048576.0), 1048576.0)"

    def _code(self, each: RoundInt | RoundFloat, over: str) -> str:
        """The name of the codes of numbers over their scale."""
        if isinstance(each, RoundInt):
            return self.let(f"to_integer({self._within(each, over)})", "code")
        return self.let(self._element(over, each.element), "code")

    def _element(self, x: str, element: str) -> str:
        """x rounded to a small float, saturating; NaN stays."""
        limit, (lowest, mantissa) = LARGEST[element], ELEMENTS[element]
        inside = f"tl.where({x} > {limit}, {limit}, tl.where({x} < -{limit}, -{limit}, {x}))"
        if element == "f8e4m3" and self.target.fp8:
            return f"machine_e4m3({inside}).to(tl.float32)"
        return f"to_small({inside}, {lowest}, {mantissa})"

    def bits(self, x: str, element: str) -> str:
        """The bits of x, numbers of a small float of eight bits, as u8."""
        if element == "f8e4m3" and self.target.fp8:
            return f"machine_e4m3({x}).to(tl.uint8, bitcast=True)"
        lowest, mantissa = ELEMENTS[element]
        return f"small_bits({x}, {lowest}, {mantissa}).to(tl.uint8)"

    # -- floats of four bits in groups --

    def _mx(self, each: RoundMx) -> None:
        x = self._grouped(self.value, each.size)
        most = self.let(f"largest({x}, 1, True)")
        if each.more:
            most = self.let(f"{most} + {each.more!r}")
        if each.divisor != 1.0:
            most = self.let(f"tl.div_rn({most}, {each.divisor!r})")
        scale = self.let(f"power_of_two({most}, {_more(each.rule)}) * {2.0**-each.shift!r}")
        scale = self.let(f"tl.maximum({scale}, {2.0**each.lowest!r})")
        # A division by a power of two is a multiplication.
        inverse = self.let(f"tl.div_rn(1.0, {scale})")
        value = self.let(f"{x} * {inverse} * {each.steps!r}")
        worth = scale if each.steps == 1.0 else self.let(f"tl.div_rn({scale}, {each.steps!r})")
        self._flat(f"{self._element(value, each.element)} * {worth}", each.size)

    def _nvfp4(self, each: RoundNvfp4, stored: str = "") -> None:
        x = self._grouped(self.value, each.size)
        most = self.let(f"largest({x}, 1, True)")
        if stored:
            whole = self.let(f"tl.load({stored}).to(tl.float32)")
        elif each.tensor == "divide":  # as torch divides a number by a tensor
            whole = self.let(f"tl.div_rn(1.0, {self._some(self.whole)}) * 2688.0")
        else:
            whole = self.let(f"tl.div_rn({self._some(self.whole)}, 2688.0)")
        sixth = self.let(f"tl.div_rn({most}, 6.0)")
        if each.tensor == "divide":
            small = self._small(each, f"{whole} * {sixth}")
            scale = self.let(f"tl.div_rn({small}, {whole})")
            value = self.let(f"tl.div_rn({x}, {scale})")
        else:
            small = self._small(each, f"tl.div_rn({sixth}, {whole})")
            inverse = self.let(f"tl.div_rn(tl.div_rn(1.0, {whole}), {small})")
            value, scale = self.let(f"{x} * {inverse}"), self.let(f"{whole} * {small}")
        self._flat(f"{self._element(value, 'e2m1')} * {scale}", each.size)

    def _some(self, most: str) -> str:
        """The largest |x|, or 1 where there are only zeros."""
        return self.let(f"tl.where({most} == 0.0, 1.0, {most})")

    def _four_over_six(self, each: RoundFourOverSix) -> None:
        largest, scales = limits(each.rule)
        x, whole = self._grouped(self.value, 16), self._some(self.whole)
        up = self.let(f"tl.div_rn({largest * scales!r}, {whole})")
        high = self.let(f"tl.div_rn(largest({x}, 1, True), {largest!r}) * {up}")

        def candidate(wanted: str) -> tuple[str, str]:
            """The blocks rounded under the e4m3 scale nearest to `wanted`, and how far off they are."""
            scale = self.let(self._element(wanted, "f8e4m3"))
            safe = self.let(f"tl.where({scale} == 0.0, 1.0, {scale})")
            inverse = self.let(f"tl.div_rn(1.0, tl.div_rn(1.0, {up}) * {safe})")
            ratio = self.let(f"{x} * {inverse}")
            value = self.let(f"tl.where({scale} == 0.0, 0.0, {self._element(ratio, 'e2m1')})")
            value = self.let(f"tl.div_rn({value} * {scale} * {whole}, {largest * scales!r})")
            off = self.let(f"{value} - {x}")
            error = {"mse": f"tl.sum({off} * {off}", "mae": f"tl.sum(tl.abs({off})", "abs_max": f"tl.max(tl.abs({off})"}
            return value, self.let(f"{error[each.rule]}, 1, keep_dims=True)") if each.rule in ADAPTIVE else ""

        value, error = candidate(high)
        if each.rule in ADAPTIVE:
            other, smaller = candidate(self.let(f"{high} * 1.5"))
            value = self.let(f"tl.where({smaller} < {error}, {other}, {value})")
        self._flat(value, 16)

    def _small(self, each: RoundNvfp4, scale: str) -> str:
        scale = self.let(scale)
        scale = self.let(f"tl.where({scale} < {each.floor!r}, {each.floor!r}, {scale})")
        scale = self.let(self._element(scale, "f8e4m3"))
        return self.let(f"tl.where({scale} == 0.0, {each.empty!r}, {scale})")

    def _fp_quant(self, each: RoundFpQuant, tensors: Sequence[str]) -> None:
        size = GROUP[each.dtype]
        x = self._grouped(self.value, size)
        weight, whole = (self.let(f"tl.load({pointer}).to(tl.float32)") for pointer in tensors)
        if each.rule == "quest":
            mean = self.let(f"tl.sum({x}, 1, keep_dims=True) / {size}")
            square = self.let(f"tl.sum({x} * {x}, 1, keep_dims=True) / {size}")
            variance = self.let(f"{square} - {mean} * {mean}")
            spread = self.let(f"tl.sqrt_rn(tl.maximum({variance}, 0.0)) * {2.92247856 / 6.0!r} + 1e-8")
            step = scale = self.let(f"power_of_two(tl.where({variance} < 0.0, 1.0, {spread}), 0)")
        else:
            most = self.let(f"largest({x}, 1, True)")
            if each.dtype == "mxfp4":
                scale = self.let(f"power_of_two({most if each.emulated else f'{most} + 1e-8'}, 0)")
                step = self.let(f"tl.div_rn({scale}, 3.0)")
            else:
                sixth = f"tl.div_rn({whole} * {most}, 6.0)"
                wanted = self.let(sixth if each.emulated else f"{whole} * ({most} * {1.0 / 6.0!r})")
                scale = self.let(self._element(wanted, "f8e4m3"))
                step = self.let(
                    f"tl.div_rn({scale}, {whole})" if each.emulated else f"{scale} * tl.div_rn(1.0, {whole})"
                )
        safe = self.let(f"tl.where({step} > 0.0, {step}, 1.0)")
        if each.emulated:
            self._flat(f"toward_zero(tl.div_rn({x}, {safe})) * {step}", size)
            return
        inverse = f"tl.div_rn(1.0, {safe})"
        ratio = self.let(f"{x} * {inverse}" if each.dtype == "nvfp4" else f"tl.div_rn({x}, {safe})")
        product = self.let(self.rounded(f"({whole} * {weight})", "bf16"))
        factor = self.let(self.rounded(f"tl.div_rn(1.0, {product})", "bf16"))
        self._flat(f"{self._element(ratio, 'e2m1')} * {scale} * ({factor} * {weight})", size)

    # -- shapes --

    def _grouped(self, x: str, size: int) -> str:
        """The row as [BLOCK / size, size], or as it is where size is 0."""
        return self.let(f"grouped({x}, {size})" if size else x)

    def _flat(self, x: str, size: int) -> None:
        """The row becomes x, which is [BLOCK / size, size] where size is not 0."""
        self.set(f"flat({x})" if size else x)


def _literal(value: float, dtype: str) -> str:
    """A number in a float dtype, as text."""
    return repr(float(torch.tensor(value, dtype=DTYPES[dtype])))


def _more(rule: str) -> int:
    """What the rule of a power of two adds to a number's bits."""
    return {"floor": 0, "ceil": (1 << 23) - 1}.get(rule, 1 << (22 - int(rule[-1])) if rule[-1].isdigit() else 0)
