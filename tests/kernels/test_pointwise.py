"""Pointwise kernels against eager: every operator, dtypes, broadcasting, strided views, odd sizes, regions."""

from __future__ import annotations

import math

import pytest
import torch
from glue_cases import BINARY, SMOOTH, SPECIAL, UNARY, VIEWS, around_codes, values
from kernel_bench import Kernel
from lowered import Lowered, agrees

from qcompile.artifact import View
from qcompile.dtypes import DTYPES
from qcompile.lowering import pointwise
from qcompile.lowering.mlir import elementary, scalar_ops, toolchain
from qcompile.lowering.mlir.pointwise import emit
from qcompile.lowering.mlir.text import Text
from qcompile.passes.form_regions import FormRegions
from qcompile.target import CPU_LEVELS, native

functional = torch.nn.functional


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    x = torch.cat([SPECIAL, values(41)])
    x = x[x.isfinite() & (x.abs() < 1e20)] if name in SMOOTH else x
    agrees(UNARY[name], x, rtol=2e-5 if "power" in name else 2e-6)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(
    "shapes", [((3, 7, 33), (33,)), ((5, 1, 6), (4, 1)), ((2, 3, 16), (2, 1, 1)), ((1,), (1,)), ((), (19,))]
)
def test_binary_with_broadcasting(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = (values(*shape, seed=i) for i, shape in enumerate(shapes))
    agrees(BINARY[name], x, y, rtol=2e-5 if name == "pow" else 2e-6)


@pytest.mark.parametrize("source", ["f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"])
@pytest.mark.parametrize("target", ["f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"])
def test_conversion(source: str, target: str) -> None:
    x = (values(3, 19).abs() * 9).to(DTYPES[source]).t()
    agrees(lambda x: x.to(DTYPES[target], copy=True), x, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_rounded_after_every_operator(dtype: torch.dtype) -> None:
    x, y = values(4, 37).to(dtype), values(4, 37, seed=1).to(dtype)
    agrees(lambda x, y: (x * y + x) * 0.3, x, y, rtol=0, atol=0, passes=[FormRegions()])


def test_bf16_rounding_of_special_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 3.3895e38, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -0.0, 1e-40])
    agrees(lambda x: x.to(torch.bfloat16), x, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["f8e4m3", "f8e5m2", "f8e8m0"])
def test_every_8_bit_float_is_read(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[dtype])
    agrees(lambda x: x.to(torch.float32), codes, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["f8e4m3", "f8e5m2"])
def test_rounding_to_8_bit_floats(dtype: str) -> None:
    x = around_codes(dtype)
    agrees(lambda x: x.to(DTYPES[dtype]).to(torch.float32), x, rtol=0, atol=0)


def test_bits_of_floats() -> None:
    def power_of_two(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32) * x

    x = values(3, 77).abs() + 1e-6
    agrees(power_of_two, x, rtol=0, atol=0)
    agrees(power_of_two, x, rtol=0, atol=0, passes=[FormRegions()])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_integers(dtype: torch.dtype) -> None:
    x = (values(5, 23) * 20).to(dtype)
    y = (values(5, 23, seed=1) * 20).to(dtype)
    made = agrees(lambda x, y: torch.where(x < y, x * y - 3, x // 7) & 63, x, y, rtol=0, atol=0, passes=[FormRegions()])
    assert made.kernels
    agrees(lambda x, y: (x % 5) + (x > y).to(x.dtype), x, y, rtol=0, atol=0)
    agrees(lambda x, y: x / 4 + y * 0.5, x, y)
    if dtype == torch.int64:
        agrees(lambda x: torch.where(x > 3, x, 2**62 + 1), x, rtol=0, atol=0)


def test_integer_division_by_what_may_be_zero_is_refused() -> None:
    x = torch.arange(1, 9)
    with pytest.raises(Exception, match="may be zero"):
        Lowered(lambda x: x // x, x)


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    agrees(VIEWS[name], values(4, 7, 35))


def test_many_dimensions_that_do_not_collapse() -> None:
    x = values(3, 2, 4, 3, 2, 5)
    agrees(lambda x, y: x.permute(5, 3, 1, 4, 2, 0) + y, x, values(5, 1, 2, 1, 4, 1, seed=3))


def test_a_region_is_one_kernel_for_every_size() -> None:
    x, y = values(2, 9, 40), values(40, seed=2)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gate = functional.silu(x) * y
        return torch.where(gate > 0, gate, torch.tanh(x)) + x.to(torch.float16).to(torch.float32)

    made = Lowered(function, x, dynamic={0: "b", 1: "s"}, passes=[FormRegions()], y=y)
    assert made.kernels == ["pointwise"]
    for b, s in ((2, 9), (1, 1), (3, 33), (5, 2)):
        x = values(b, s, 40, seed=b)
        torch.testing.assert_close(made(x), function(x, y), rtol=2e-6, atol=2e-6)


def test_arange() -> None:
    agrees(lambda x: x + torch.arange(x.shape[0]) * 2, torch.arange(37), rtol=0, atol=0)


def test_threads_change_nothing() -> None:
    x = values(9, 5000)
    one, two = (Lowered(lambda x: torch.exp(x) * x, x, threads=n)(x) for n in (1, 2))
    assert torch.equal(one, two)


def test_nothing_is_written_behind_the_result() -> None:
    class Collect:
        target = native()

        def call(self, template, params, args, dims, writes):  # type: ignore[no-untyped-def]
            return params, dims

    for n in (1, 15, 16, 17, 31):
        x, y = values(n), torch.full((n + 16,), 7.0)
        view = View("x", (n,), (1,))
        operands = [pointwise.Operand(view, "f32")]
        params, dims = pointwise.call(Collect(), operands, operands, [["neg", "f32", [0]]], [1])
        Kernel(emit(params, native()), "pointwise")([x, y], dims)
        assert torch.equal(y[:n], -x) and (y[n:] == 7.0).all()


def test_every_operation_has_a_text() -> None:
    assert set(scalar_ops.OPS) == set(pointwise.OPS)


def test_equal_dimensions_are_found_by_value() -> None:
    assert pointwise.same("b*(s + 1)", "(b + b*s)")
    assert not pointwise.same("b*s", "b*b")
    assert not pointwise.same("b", "s")


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_compiles_everywhere_without_calls(level: str) -> None:
    target = CPU_LEVELS[level]
    ops = [["to", "f16", [1]], ["gelu", "f32", [0]], ["pow", "f32", [3, {"number": 1.5}]], ["sin", "f32", [4]]]
    params = {
        "dims": 2, "inputs": [["f32", "apart"], ["bf16", "unit"]],
        "outputs": [["f16", "unit", 2], ["f32", "apart", 5]], "ops": ops,
    }  # fmt: skip
    text = toolchain.assembly(emit(params, target), target)
    assert not [line for line in text.splitlines() if line.split()[:1] in (["call"], ["callq"], ["bl"])]


def _function(name: str, x: torch.Tensor) -> torch.Tensor:
    t = Text("f")
    source, to = t.arg(0), t.arg(1)
    with t.loop(0, t.dim(0), 16) as i:
        t.store(getattr(elementary, name)(t.load(source.at(i, "f32"), "vector<16xf32>")), to.at(i, "f32"))
    y = torch.empty_like(x)
    Kernel(t.finish(), "f")([x, y], [x.numel()])
    return y


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_angles_of_far_positions(name: str) -> None:
    x = torch.cat([torch.linspace(-2e5, 2e5, 80000), torch.linspace(-10, 10, 16000), torch.logspace(5, 9, 16000)])
    error = (_function(name, x).double() - getattr(torch, name)(x.double())).abs()
    assert error.max() < 2e-7


@pytest.mark.parametrize("name", ["log", "log1p", "expm1"])
def test_elementary_functions(name: str) -> None:
    x = torch.logspace(-37, 1.9, 16000)
    x = torch.cat([x, -x[x < 0.99]]) if name != "log" else torch.cat([x, torch.logspace(-44, 38, 1600)])
    x = x[: x.numel() // 16 * 16]
    exact = getattr(torch, name)(x.double())
    error = (_function(name, x).double() - exact).abs() / exact.abs().clamp(min=1e-37)
    assert error.max() < 2e-7
