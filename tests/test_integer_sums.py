"""When a linear on a CPU multiplies integers: what its passes are told before the weight is laid out."""

from __future__ import annotations

import pytest
import torch

from qcompile.backend import CpuBackend
from qcompile.format import Format, Packed
from qcompile.formats.bitnet import Ternary
from qcompile.formats.bitsandbytes import BnbInt8
from qcompile.formats.bitstream import Bitstream
from qcompile.formats.integer import Int8
from qcompile.formats.lanes import Lanes
from qcompile.formats.minifloat import Fp8
from qcompile.integer_sums import IntegerCodes, integer_codes
from qcompile.transforms.linear import Hadamard
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_float import RoundFloat
from qcompile.transforms.round_int import RoundInt


def test_codes() -> None:
    assert integer_codes(RoundInt()) == IntegerCodes(-128, 127, 0, False)
    found = integer_codes(RoundInt(per="group", size=32, symmetric=False))
    assert found == IntegerCodes(-128, 127, 32, True) and found.reach == 255
    # A stored scale without a stored zero is symmetric, whatever else is said; with one it is not.
    assert integer_codes(RoundInt(scale="f32", symmetric=False)) == IntegerCodes(-128, 127, 0, False)
    assert integer_codes(RoundInt(scale="f32", zero="i8")) == IntegerCodes(-128, 127, 0, True)
    assert integer_codes(RoundFloat()) == "its inputs are not rounded to integers"


@pytest.mark.parametrize(
    "format, each, reason",
    [
        (Int8(), RoundInt(), None),
        (Int8(columns=32, zero="i8"), RoundInt(symmetric=False), None),
        (Ternary(), RoundInt(divisor=127.0, arithmetic="inverse", least=1e-5), None),
        (BnbInt8(), LlmInt8(0.0), None),
        (BnbInt8(), LlmInt8(6.0), "columns with outliers stay floats"),
        (Int8(scale="bf16", rounding="product-bf16"), RoundInt(), "a weight is not just a code times a scale"),
        (Bitstream(scale="f32", columns=128, indirect=True), RoundInt(), None),
        (Int8(), RoundInt(per="tensor", scale="f32", zero="i8"), None),
        (Int8(), RoundInt(per="tensor", scale="f32", zero="f32"), "a zero that is stored as f32 may be no code"),
        (Fp8("f8e4m3"), RoundInt(), "its codes are f8e4m3"),
        (Int8(), RoundFloat(), ""),
    ],
    ids=str,
)
def test_what_a_linear_takes_in(format: Format, each: object, reason: str | None) -> None:
    found = CpuBackend().activation([each], format, 64, 256)  # type: ignore[list-item]
    assert found == reason or (reason and found is not None and found.startswith(reason))
    assert CpuBackend().activation([Hadamard(64), each], format, 64, 256) == ""  # type: ignore[list-item]


def test_int8_accuracy_leaves_the_rounding_of_weights_out() -> None:
    rounded = Int8(scale="bf16", rounding="product-bf16")
    assert CpuBackend("int8").activation([RoundInt()], rounded, 64, 256) is None


def test_inputs_that_are_rounded_in_groups_keep_their_order() -> None:
    """Inputs may be sorted by their group of weights only where that leaves the groups of x alone."""
    made = Bitstream(scale="f32", columns=32, indirect=True)
    tensors = {"packed": torch.randint(1 << 31, (16, 8), dtype=torch.int32), "scale": torch.rand(16, 2)}
    weight = Packed(made, tensors | {"g_idx": torch.arange(64, dtype=torch.int32) % 2}, 16, 64)
    token = CpuBackend().layout(weight, [RoundInt()])
    assert isinstance(token.packed.format, Lanes) and token.order is not None
    grouped = CpuBackend().layout(weight, [RoundInt(per="group", size=32)])
    assert (
        grouped.packed is weight
        and grouped.reason == "groups of its inputs are rounded together, so they keep their order"
    )
