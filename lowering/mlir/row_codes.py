"""How inputs become integers, as MLIR text: `RoundInt` and `LlmInt8` operation for operation, and `ops.round_activations`.

Inputs that share a scale are read twice. `Rounder.see` takes them in, one vector after another; then `Rounder.scaling` knows
their scale and zero, and rounds vectors. Where an input is NaN, the scale is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.integer_sums import IntegerCodes, integer_codes
from qcompile.lowering.mlir.memory import convert
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.ops import SMALLEST_ACTIVATION
from qcompile.transform import Transform
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_int import RoundInt

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds half to even, and leaves the integer in the low bits
MAGIC_BITS = 0x4B400000


def codes_of(how: Transform | None) -> IntegerCodes:
    """The integers that x becomes; None is `ops.round_activations`."""
    found = IntegerCodes(-127, 127, 0, False) if how is None else integer_codes(how)
    assert isinstance(found, IntegerCodes)  # `integer_sums.rounding_problem` has been asked
    return found


@dataclass(frozen=True)
class Scaling:
    """The scale (f32) and zero (None: there is none) of some inputs, and how those are rounded.

    An input is multiplied by `factor`, or divided by it; the zero is added to the quotient before it is rounded
    (`zero_first`) or afterwards. Codes stay between the two `limits`, and lie in signed bytes: those of 0 .. 255 less 128.
    """

    scale: Value
    factor: Value
    divide: bool = False
    limits: tuple[float, float] | None = None
    zero: Value | None = None
    zero_first: bool = False

    def differences(self, x: Value) -> Value:
        """code - zero of every lane, i32, plus MAGIC_BITS."""
        t, zero = x.text, None if self.zero is None else x.text.broadcast(self.zero, x.count)
        factor = t.broadcast(self.factor, x.count)
        over = x / factor if self.divide else x * factor
        if zero is not None and self.zero_first:
            over = over + zero
        if self.limits is not None:
            low, high = (t.constant(limit, x.type) for limit in self.limits)
            if zero is not None and not self.zero_first:
                low, high = low - zero, high - zero
            over = within(over, low, high)
        bits = t.cast("bitcast", over + _MAGIC, "i32")
        return bits - integer(zero) if zero is not None and self.zero_first else bits

    def byte_zero(self) -> Value | None:
        """The zero as it is among bytes, i32."""
        if self.zero is None or self.limits is None:
            return None
        return integer(self.zero) - (128 if self.limits[1] > 127 else 0)


class Rounder:
    """Writes the rounding `how` (None: `ops.round_activations`); `stored` points at what it stores, one f32 each."""

    def __init__(self, t: Text, how: Transform | None, stored: Sequence[Value]):
        self.t, self.how, self.stored = t, how, stored
        self.codes = codes_of(how)
        self._range = self.codes.zeros and not stored

    def opened(self, x: Value) -> Value:
        """Inputs as they are rounded."""
        return convert(self.t, convert(self.t, x, "f32", "f16"), "f16", "f32") if isinstance(self.how, LlmInt8) else x

    def unseen(self, lanes: int) -> list[Value]:
        """What is known before `see`: the bits of the largest |x| of each lane, or the least and greatest x, from 0 on."""
        if self._range:
            return [self.t.constant(0.0, vector(lanes, "f32"))] * 2
        return [self.t.constant(0, vector(lanes, "i32"))]

    def see(self, x: Value, known: Sequence[Value]) -> list[Value]:
        if not self._range:
            return [known[0].most(self.t.cast("bitcast", x, "i32") & 0x7FFFFFFF)]
        kinds = ("minimumf", "maximumf")
        return [
            self.t.op(f"arith.{kind} {value}, {x} : {x.type}", x.type) for kind, value in zip(kinds, known, strict=True)
        ]

    def scaling(self, known: Sequence[Value]) -> Scaling:
        """That of the inputs which have been seen."""
        t, how = self.t, self.how
        if isinstance(how, RoundInt) and self._range:
            return self._of_range(how, t.reduce("minimumf", known[0]), t.reduce("maximumf", known[1]))
        bits = t.reduce("maxsi", known[0])  # the greatest are those of NaN
        most = t.cast("bitcast", bits, "f32")
        if isinstance(how, RoundInt):
            return self._of_stored(how, most) if how.scale else self._of_most(how, most)
        if isinstance(how, LlmInt8):
            safe = t.select(most.equals(0.0), 1.0, most)
            return Scaling(safe * (1.0 / 127.0), 1.0 / safe * 127.0)
        most = t.cast("bitcast", bits.most(t.cast("bitcast", t.constant(SMALLEST_ACTIVATION, "f32"), "i32")), "f32")
        return Scaling(most / 127.0, 127.0 / most)

    def _of_stored(self, how: RoundInt, most: Value) -> Scaling:
        numbers = [self.t.load(pointer, "f32") for pointer in self.stored]
        scale = self.t.select(most.compare("uno", 0.0), most, numbers[0])
        return self._by(how, scale, numbers[1] if how.zero else None)

    def _of_most(self, how: RoundInt, most: Value) -> Scaling:
        divisor = how.divisor or (how.high - how.low) / 2
        if how.least:
            most = self.t.select(most < how.least, how.least, most)
        if how.most:
            most = self.t.select(most > how.most, how.most, most)
        if how.arithmetic == "inverse":
            inverse = 1.0 / self._usable(how, most) * divisor
            return Scaling(1.0 / inverse, inverse, limits=(how.low, how.high))
        return self._by(how, self._usable(how, most / divisor), None)

    def _of_range(self, how: RoundInt, least: Value, most: Value) -> Scaling:
        low, high = (self.t.constant(float(limit), "f32") for limit in (how.low, how.high))
        scale = self._usable(how, (most - least) / float(how.high - how.low))
        over = least / scale
        if how.zero_first:
            return self._by(how, scale, nearest(within(float(how.low) - over, low, high)))
        return self._by(how, scale, within(float(how.low) - nearest(over), low, high))

    def _by(self, how: RoundInt, scale: Value, zero: Value | None) -> Scaling:
        divide = how.arithmetic != "reciprocal"
        return Scaling(scale, scale if divide else 1.0 / scale, divide, (how.low, how.high), zero, how.zero_first)

    def _usable(self, how: RoundInt, scale: Value) -> Value:
        if how.floor:
            return self.t.select(scale < how.floor, how.floor, scale)
        return self.t.select(scale.equals(0.0), how.empty, scale)


def within(x: Value, low: Value, high: Value) -> Value:
    """x, but at least `low` and at most `high`; NaN stays."""
    t = x.text
    x = t.select(x < low, low, x)
    return t.select(x > high, high, x)


def nearest(x: Value) -> Value:
    """x, below 2^22, rounded to the nearest integer, half to even."""
    return x + _MAGIC - _MAGIC


def integer(x: Value) -> Value:
    """An f32 integer below 2^22 as i32; any number of NaN."""
    return x.text.cast("bitcast", x + _MAGIC, "i32") - MAGIC_BITS
