"""Norms, softmax and reductions against eager: odd widths, views, dtypes, many rows."""

from __future__ import annotations

import math

import pytest
import torch
from glue_cases import REDUCTIONS, values
from lowered import Lowered, agrees

from qcompile import ops
from qcompile.lowering.mlir import norm, reduce, toolchain
from qcompile.target import CPU_LEVELS

functional = torch.nn.functional
assert ops


@pytest.mark.parametrize("width", [1, 7, 16, 33, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(width: int, offset: float) -> None:
    agrees(lambda x, w: torch.ops.qcompile.rms_norm(x, w, 1e-5, offset), values(2, 5, width), w=values(width, seed=1))


@pytest.mark.parametrize("width", [1, 7, 16, 33, 384])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(width: int, affine: bool) -> None:
    x = values(3, 5, width) + 10.0
    if affine:
        w, b = values(width, seed=1), values(width, seed=2)
        agrees(lambda x, w, b: functional.layer_norm(x, (width,), w, b, 1e-6), x, rtol=1e-5, atol=2e-5, w=w, b=b)
    else:
        agrees(lambda x: functional.layer_norm(x, (width,)), x, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width", [1, 7, 16, 33, 200])
def test_softmax(width: int) -> None:
    x = values(3, 5, width)
    x[0, 0, 0], x[1, 1, -1] = -math.inf if width > 1 else 0.0, 90.0
    agrees(lambda x: torch.softmax(x, -1), x)
    agrees(lambda x: torch.log_softmax(x, -1), x, rtol=1e-5, atol=1e-5)


def test_a_norm_of_a_view_and_every_size() -> None:
    w = values(24, seed=1)
    made = Lowered(
        lambda x, w: torch.ops.qcompile.rms_norm(x.transpose(0, 1), w, 1e-6, 0.0), values(4, 3, 24),
        dynamic={0: "b", 1: "s"}, w=w,
    )  # fmt: skip
    for b, s in ((4, 3), (1, 1), (2, 7)):
        x = values(b, s, 24, seed=b)
        torch.testing.assert_close(made(x), torch.ops.qcompile.rms_norm(x.transpose(0, 1), w, 1e-6, 0.0))


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 5, 7), (2, 17, 33), (1, 2, 160)])
def test_reduction(name: str, shape: tuple[int, ...]) -> None:
    agrees(REDUCTIONS[name], values(*shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float16])
def test_sum_of_narrow_elements(dtype: torch.dtype) -> None:
    x = (values(3, 45).abs() * 30).to(dtype)
    agrees(lambda x: x.sum(-1), x, rtol=1e-3 if dtype.is_floating_point else 0, atol=0)
    if not dtype.is_floating_point:
        agrees(lambda x: x.amax(-1), x, rtol=0, atol=0)


def test_argmax_takes_the_first_of_equals_and_nan() -> None:
    x = torch.zeros(4, 37)
    x[1, 20] = x[1, 35] = 5.0
    x[2, 30], x[2, 3] = math.nan, math.inf
    x[3] = -math.inf
    made = Lowered(lambda x: x.argmax(-1), x)
    assert made(x).tolist() == [0, 20, 30, 0]


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_compiles_everywhere(level: str) -> None:
    target = CPU_LEVELS[level]
    for op in ("softmax", "log_softmax", "layer_norm"):
        assert toolchain.compile_module(norm.emit({"op": op, "eps": 1e-5, "x": "bf16", "y": "f16"}, target), target)
    for op in ("sum", "argmax", "all"):
        text = toolchain.assembly(reduce.emit({"op": op, "x": "f32", "y": "f32"}, target), target)
        assert not [line for line in text.splitlines() if line.split()[:1] in (["call"], ["callq"], ["bl"])]
