"""Where the scales, zeros and offsets of a `Fragments` weight come into a product, which depends on the rows of x:

    few     the sum over a group is multiplied by its scale, in f32: every weight as exact as its code
    many    weights are multiplied by their scales, and rounded to the compute dtype once

A scale of all inputs always multiplies the sum. A format's own rounding of each weight to 16 bits is left out. Zeros that are
no whole numbers, and offsets, are added to a group's sum times the sum of its x, or to each weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompile.formats.fragments import INPUTS, Fragments
from qcompile.formats.stream import planes
from qcompile.lowering.triton.decode import Decode
from qcompile.lowering.triton.linear import Compute

FEW = 4  # rows of x that are normalised by every program for itself
SKINNY, MID = 32, 128  # the most rows of these kinds


def kind_of(most: int) -> str:
    """The kind of kernel, as schedules know it, for at most `most` rows of x."""
    return "skinny" if most <= SKINNY else "mid" if most <= MID else "large"


def value_of(format: Fragments) -> str:
    """What codes are worth, as schedules know it."""
    if format.table is not None:
        return "table"
    return "int" if format.code == "int" else "fp"


@dataclass(frozen=True)
class Way:
    """How the scales, zeros and offsets of a weight with K = `k` come into sums over at most `most` rows of x."""

    format: Fragments
    k: int
    compute: Compute
    most: int

    @property
    def whole(self) -> bool:
        """Whether one scale holds for all inputs."""
        return self.format.group == self.k

    @property
    def on_sums(self) -> bool:
        """Whether scales multiply the sums of groups: for many rows where they would cost more instructions elsewhere."""
        cheap = self.most <= MID and self.format.group >= INPUTS and not (self._exact or self.shifted)
        return not self.whole and (self.most <= SKINNY or cheap)

    @property
    def packed(self) -> bool:
        """Whether scales multiply pairs of weights in the compute dtype."""
        # bf16 has the range of f32: two of them are a scale but for a 2^-17th.
        return not (self.whole or self.on_sums or self.shifted) and (self._exact or self.compute == "bf16")

    @property
    def _exact(self) -> bool:
        """Whether the compute dtype holds the scales."""
        return self.format.scale in {"bf16": ("bf16", "f8e4m3", "f8e8m0"), "f16": ("f16", "f8e4m3")}[self.compute]

    @property
    def pieces(self) -> int:
        """Groups in a step of 128 inputs; 1 where they are longer."""
        return 1 if self.whole else max(1, INPUTS // self.format.group)

    @property
    def stored_zeros(self) -> bool:
        """Whether whole zeros are stored, which the decoding subtracts.

        Beside planes of one bit they come in like other zeros where that is cheap: Triton would move decoded weights
        through shared memory.
        """
        moved = self.most <= SKINNY and 1 in planes(self.format.bits) and not self.whole
        return self.format.zero == "u8" and self.format.table is None and not moved

    @property
    def given_zero(self) -> float:
        """The zero that is the same everywhere."""
        return 0.0 if self.format.zero is None or isinstance(self.format.zero, str) else float(self.format.zero)

    @property
    def left(self) -> bool:
        """Whether there is a zero that the decoding does not subtract."""
        if isinstance(self.format.zero, str):
            return not self.stored_zeros
        return self.given_zero != (self.decode.level if self.format.table is None else 0)

    @property
    def shifted(self) -> bool:
        """Whether something beside code - zero is added: a zero that is no whole number, or an offset."""
        return self.left or self.format.offset is not None

    @property
    def decode(self) -> Decode:
        """How codes become operands, without their scales."""
        return Decode(self.format, self.compute, self.pieces if self.stored_zeros else 0)

    @property
    def decoder(self) -> Decode:
        """How codes become operands."""
        return replace(self.decode, scales=self.pieces, rest=not self._exact) if self.packed else self.decode
