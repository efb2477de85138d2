"""A weight moves to another format without a change, or the error says why it cannot."""

from __future__ import annotations

import pytest
import torch
from format_cases import random_storage

from qcompile.errors import ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed
from qcompile.formats.awq import Awq, AwqGemv, AwqGemvFast
from qcompile.formats.bitsandbytes import Bnb4
from qcompile.formats.bitstream import Bitstream
from qcompile.formats.dense import Dense
from qcompile.formats.gguf import Q4_0, Q4_1, Q8_0
from qcompile.formats.gptq import Gptq
from qcompile.formats.hqq import Hqq
from qcompile.formats.integer import Int8
from qcompile.formats.lanes import Lanes
from qcompile.formats.minifloat import Fp4, Fp8
from qcompile.formats.mlx import Mlx
from qcompile.pack import pack, unpack
from qcompile.repack import repack

N, K = 16, 128
PAIRS: list[tuple[Format, Format]] = [
    (Gptq(4, 32), Awq(4, 32)),
    (Awq(4, 32), Gptq(4, 32, v1=False)),
    (Awq(4, 32), AwqGemv(32)),
    (Gptq(4, 64), Awq(4, 32)),  # finer groups say the same
    (Gptq(4, 32), Bitstream(4, 1, 32, "f16", "packed")),
    (Bitstream(4, 1, 32, "f16"), Gptq(4, 32)),
    (Bitstream(8, 1, 32, "bf16", "i8"), Gptq(8, 32)),  # the scales stay bf16
    (Gptq(3, 32, v1=False), Hqq(8, 32)),
    (Q4_0(), Hqq(4, 32, dtype="f32")),
    (Q4_0(), Gptq(4, 32, scale="f32")),
    (Q4_0(), Mlx(4, 32)),
    (Mlx(4, 32), Q4_1()),
    (Q4_1(), Mlx(4, 32)),
    (Q4_0(), Q8_0()),
    (Q8_0(), Int8("i8", "f16", columns=32)),
    (Int8("i8", "f16", columns=32), Q8_0()),
    (Q4_0(), Lanes(4, 32, None, 8.0, "f16")),
    (Fp8(columns=32), Fp8("f8e4m3", "f32", columns=16)),
    (Fp4(32), Fp4(32, "f8e8m0")),
    (Fp4(32, "f8e8m0"), Fp4(32)),
    (Hqq(4, 32), Dense("f16")),
    (Bnb4("nf4", 64), Dense("f32")),
]


def sample(format: Format) -> Packed:
    """A weight with everyday scales."""
    fields = unpack(format, random_storage(format, N, K), N, K)
    for name, value in fields.items():
        if value.is_floating_point() and value.dtype.itemsize > 1 and "group" not in fields:
            fields[name] = torch.rand(N, K // 64).add(0.5).repeat_interleave(64, 1).to(value.dtype)
    return Packed(format, pack(format, fields, N, K), N, K)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{a.kind}-{b.kind}" for a, b in PAIRS])
def test_a_weight_moves_to_another_format_unchanged(source: Format, target: Format) -> None:
    packed = sample(source)
    moved = repack(packed, target)
    moved.check()
    assert moved.format.kind == target.kind
    true, found = dequantize(source, packed.tensors, N, K), dequantize(moved.format, moved.tensors, N, K)
    assert torch.equal(found.nan_to_num(), true.nan_to_num())


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (Gptq(8, 32), Awq(4, 32), "the codes do not fit @ found:    0 to 255\n  expected: 0 to 15"),
        (Gptq(4, 32), Awq(4, 64), "the groups differ @ found:    32 inputs share a scale\n  expected: 64, or a multiple"),
        (Gptq(4, 32, indirect=True), Awq(4, 32), "the source is in act-order @ found:    a stored group for each input"),
        (Hqq(4, 32), Gptq(4, 32), "the zeros are no whole numbers @ found:    2048 weights with one such as"),
        (Bitstream(4, 1, 32, "f32"), AwqGemvFast(32), "the scale would be rounded"),
        (Q4_0(), Awq(4, 32), "the weights are no values of the other format"),
        (Hqq(4, 32), Dense("bf16"), "the weight would be rounded"),
        (Dense("f32"), Q8_0(), "the two are made in different ways @ found:    'dense' is not a code times a scale"),
        (Bnb4("nf4", 64), Q8_0(), "the codes are of another kind @ found:    table codes\n  expected: integer codes"),
        (Bnb4("nf4", 64), Bnb4("fp4", 64), "the weights are no values of the other format @ would change"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)  # fmt: skip
def test_a_move_that_would_change_weights_is_refused(source: Format, target: Format, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        repack(sample(source), target, "m")
    said = str(error.value)
    assert said.startswith(f"a weight of format '{source.kind}' cannot be stored as '{target.kind}' without loss: ")
    summary, *lines = text.split(" @ ")
    assert all(part in said for part in (f"{summary}\n  where:    m", *lines)), said
