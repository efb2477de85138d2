"""Pointwise kernels against eager: every operator, dtypes, broadcasting, strided views, odd sizes, regions."""

from __future__ import annotations

import math

import pytest
import torch
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
SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 1e-30, 1e30, -7.25, 88.0, -88.0, math.inf, -math.inf, math.nan]
)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


UNARY = {
    "abs": torch.abs, "neg": torch.neg, "sign": torch.sign, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round,
    "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "log2": torch.log2,
    "exp2": torch.exp2, "tanh": torch.tanh, "erf": torch.erf, "sigmoid": torch.sigmoid,
    "silu": functional.silu, "relu": torch.relu, "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "leaky_relu": functional.leaky_relu,
    "elu": functional.elu, "hardtanh": functional.hardtanh, "relu6": functional.relu6, "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid, "softplus": functional.softplus, "mish": functional.mish,
    "square": torch.square, "clamp": lambda x: x.clamp(-1.0, 2.0), "clamp_min": lambda x: x.clamp_min(0.5),
    "cube": lambda x: x**3, "half power": lambda x: x**0.5, "power": lambda x: x**2.5, "whole power": lambda x: x**5.0,
    "rsub": lambda x: 1.0 - x, "scaled": lambda x: torch.add(x, x, alpha=0.25), "isnan": torch.isnan,
    "isinf": torch.isinf, "compare": lambda x: x > 0.5, "at least": lambda x: x >= 0.5,
    "not": lambda x: torch.logical_not(x), "masked_fill": lambda x: x.masked_fill(x < 0, -math.inf),
    "half": lambda x: x.to(torch.float16), "bool to int": lambda x: (x > 0).to(torch.int32),
    "like": lambda x: torch.zeros_like(x) + torch.full_like(x, 2.5),
    "new": lambda x: x.new_zeros(len(x) + 9, 40) + x.new_full((40,), 2.5),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    x = torch.cat([SPECIAL, values(41)])
    smooth = name in ("hardswish", "mish", "gelu", "gelu_tanh", "silu")  # infinities times 0 differ by formula
    x = x[x.isfinite() & (x.abs() < 1e20)] if smooth else x
    agrees(UNARY[name], x, rtol=2e-5 if "power" in name else 2e-6)


BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "pow": lambda x, y: x.abs() ** y, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt,
    "le": torch.le, "gt": torch.gt, "ge": torch.ge, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "where": lambda x, y: torch.where(x > y, x, y * 2), "floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3), "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
}  # fmt: skip


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
    every = torch.arange(256, dtype=torch.uint8).view(DTYPES[dtype]).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:] + every[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf)), every])
    most = torch.tensor(
        [464.0, 465.0, 479.9, 480.0, 57344.0, 61439.0, 61440.0, 65536.0, 1e30, 1e-30, math.inf, math.nan]
    )
    x = torch.cat([near, most, -most, values(1000) * 100, values(1000) * 1e-3])
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


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2) + 1.0,
    "permuted": lambda x: x.permute(2, 0, 1) * 2.0,
    "sliced": lambda x: x[:, 1:6, 2::3] - 1.0,
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1) * 3.0,
    "two views": lambda x: x[:, 1:] * x[:, :-1],
    "selected": lambda x: x[:, 2] + x[:, 0],
}


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
