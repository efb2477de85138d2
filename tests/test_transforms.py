"""The roundings of activations: each against its formula written out, and traced as the CPU pipeline traces them."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.transform import Applied, Transform, transform_from_json
from qcompile.transforms.round_float import RoundFloat, RoundMx, RoundNvfp4
from qcompile.transforms.round_int import RoundInt
from qcompile.transforms.rounding import power_of_two, to_element

F8 = torch.float8_e4m3fn
STATIC = {"scale": torch.tensor([0.02]), "zero": torch.tensor([-7], dtype=torch.int8)}


def rows(*shape: int) -> torch.Tensor:
    """Values of many sizes, one row of zeros and one outlier."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape, generator=generator))
    x[..., 1, :] = 0.0
    x[..., 0, 3] = 40.0
    return x


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(F8).float()


def nearest(x: torch.Tensor, values: list[float]) -> torch.Tensor:
    """The nearest value of a list by distance, ties to the one at an even place (the one with an even code)."""
    table = torch.tensor(values, dtype=torch.float64)
    distance = (x.abs().double()[..., None] - table).abs()
    best = distance.amin(-1, keepdim=True)
    at = torch.arange(len(values))
    even = torch.where((distance == best) & (at % 2 == 0), at, -1).amax(-1)
    place = torch.where(even >= 0, even, distance.argmin(-1))
    return torch.copysign(table[place].float(), x)


def minifloat(exponents: int, mantissa: int, bias: int) -> list[float]:
    values = []
    for code in range(1 << (exponents + mantissa)):
        e, m = code >> mantissa, code & ((1 << mantissa) - 1)
        step = 2.0 ** (max(e, 1) - bias - mantissa)
        values.append((m if e == 0 else m + (1 << mantissa)) * step)
    return values


@pytest.mark.parametrize(
    ("element", "values"),
    [("e2m1", minifloat(2, 1, 1)), ("e2m3", minifloat(2, 3, 1)), ("e3m2", minifloat(3, 2, 3))],
)
def test_small_floats_are_the_nearest_ties_to_even(element: str, values: list[float]) -> None:
    x = torch.cat([torch.linspace(-33, 33, 4001), torch.tensor(values), -torch.tensor(values), rows(4, 64).flatten()])
    middles = (torch.tensor(values[1:]) + torch.tensor(values[:-1])) / 2
    x = torch.cat([x, middles, -middles])
    assert torch.equal(to_element(x, element), nearest(x, values))
    assert torch.equal(to_element(x.bfloat16(), element).float(), nearest(x.bfloat16().float(), values))


def test_powers_of_two() -> None:
    x = torch.tensor([0.0, 1.0, 1.49, 1.5, 1.74, 1.75, 1.9375, 2.0, 3.0, 5e-39])
    assert power_of_two(x, "floor").tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 2, 0]
    assert power_of_two(x, "ceil")[:9].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 4]
    assert power_of_two(x, "even1")[:9].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert power_of_two(x, "even3")[:9].tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2]


def token_symmetric(x: torch.Tensor) -> torch.Tensor:
    s = x.abs().amax(-1, keepdim=True) / 127.5
    s = torch.where(s == 0, torch.finfo(torch.float32).eps, s)
    return torch.clamp(torch.round(x / s), -128, 127) * s


def token_asymmetric(x: torch.Tensor) -> torch.Tensor:
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = ((hi - lo) / 255).clamp(min=torch.finfo(torch.float32).eps)
    z = torch.clamp(-128 - torch.round(lo / s), -128, 127)
    return (torch.clamp(torch.round(x * (1 / s)) + z, -128, 127) - z) * s


def compressed_asymmetric(x: torch.Tensor) -> torch.Tensor:
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = (hi - lo) / 15
    s = torch.where(s == 0, torch.finfo(torch.float32).eps, s)
    z = torch.round(torch.clamp(-8 - lo / s, -8, 7))
    return (torch.round(torch.clamp(x / s + z, -8, 7)) - z) * s


def bitnet(x: torch.Tensor) -> torch.Tensor:
    s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return torch.clamp(torch.round(x * s), -128, 127) / s


def static_int(x: torch.Tensor) -> torch.Tensor:
    s, z = STATIC["scale"], STATIC["zero"].float()
    return (torch.clamp(torch.round(x / s + z), -128, 127) - z) * s


def group_float(x: torch.Tensor) -> torch.Tensor:
    parts = []
    for part in x.split(48, -1):  # the last one is short
        s = part.abs().amax(-1, keepdim=True) / 448
        parts.append(e4m3(part / s.clamp(min=1e-12)) * s.clamp(min=1e-12))
    return torch.cat(parts, -1)


def bounded(x: torch.Tensor) -> torch.Tensor:
    s = torch.clamp(x.abs().amax(-1, keepdim=True).clamp(max=5.0) / 448, min=1 / (448 * 512))
    return e4m3(x / s) * s


def inverse_float(x: torch.Tensor) -> torch.Tensor:
    a = 448 / x.abs().amax(-1, keepdim=True).clamp(1e-12, 1200.0)
    return e4m3(x * a) * (1 / a)


def position(x: torch.Tensor) -> torch.Tensor:
    s = x.abs().amax((0, 2), keepdim=True) / 448
    s = torch.where(s == 0, 2.0**-23, s)
    return e4m3(x / s) * s


def e5m2(x: torch.Tensor) -> torch.Tensor:
    s = x.abs().amax() / 57344
    return (x / s).clamp(-57344, 57344).to(torch.float8_e5m2).float() * s


def mx(x: torch.Tensor) -> torch.Tensor:
    """OCP's even rule: the maximum rounded to a power of two at one bit of mantissa, two binades below it."""
    x = x.unflatten(-1, (-1, 32)).double()
    most = x.abs().amax(-1, keepdim=True)
    e = torch.where(most > 0, torch.floor(torch.log2(most * (8 / 7) * (1 + 1e-12))), -124.0)
    e = torch.where(most * 1.0 >= 1.75 * 2.0 ** torch.floor(torch.log2(most)), torch.floor(torch.log2(most)) + 1, e)
    s = 2.0 ** (e - 2)
    return (nearest(x / s, minifloat(2, 1, 1)).double() * s).flatten(-2).float()


def mx_ceiling(x: torch.Tensor) -> torch.Tensor:
    x = x.unflatten(-1, (-1, 32))
    e = torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 448)).clamp(min=-126)
    return (e4m3(x / 2.0**e) * 2.0**e).flatten(-2)


def mx_thirds(x: torch.Tensor) -> torch.Tensor:
    x = x.unflatten(-1, (-1, 32))
    s = 2.0 ** torch.floor(torch.log2(x.abs().amax(-1, keepdim=True) + 1e-8))
    return (nearest(x / s * 3, minifloat(2, 1, 1)) * (s / 3)).flatten(-2)


def nvfp4_divide(x: torch.Tensor) -> torch.Tensor:
    x, g = x.unflatten(-1, (-1, 16)), torch.tensor(300.0)
    s = e4m3(g * (x.abs().amax(-1, keepdim=True) / 6))
    s = torch.where(s == 0, 0.125, s) / g
    return (nearest(x / s, minifloat(2, 1, 1)) * s).flatten(-2)


def nvfp4_multiply(x: torch.Tensor) -> torch.Tensor:
    g = x.abs().amax() / (448 * 6)
    x = x.unflatten(-1, (-1, 16))
    s = (x.abs().amax(-1, keepdim=True) / 6 / g).clamp(2.0**-6, 448).to(F8).float()
    return (nearest(x * (1 / g / s), minifloat(2, 1, 1)) * (g * s)).flatten(-2)


CASES = [
    (RoundInt(), {}, token_symmetric),
    (RoundInt(symmetric=False, floor=2.0**-23, zero_first=False, arithmetic="reciprocal"), {}, token_asymmetric),
    (RoundInt(low=-8, high=7, symmetric=False), {}, compressed_asymmetric),
    (RoundInt(divisor=127.0, least=1e-5, arithmetic="inverse"), {}, bitnet),
    (RoundInt(per="tensor", scale="f32", zero="i8"), STATIC, static_int),
    (RoundFloat(per="group", size=48, floor=1e-12), {}, group_float),
    (RoundFloat(most=5.0, floor=1 / (448 * 512)), {}, bounded),
    (RoundFloat(least=1e-12, most=1200.0, arithmetic="inverse"), {}, inverse_float),
    (RoundFloat(per="position"), {}, position),
    (RoundFloat(per="tensor", element="f8e5m2"), {}, e5m2),
    (RoundMx(), {}, mx),
    (RoundMx(element="f8e4m3", rule="ceil", shift=0, divisor=448.0), {}, mx_ceiling),
    (RoundMx(rule="floor", shift=0, more=1e-8, steps=3.0), {}, mx_thirds),
    (RoundNvfp4(), {"tensor_scale": torch.tensor([300.0])}, nvfp4_divide),
    (RoundNvfp4(tensor="multiply", stored_scale="", floor=2.0**-6), {}, nvfp4_multiply),
]


@pytest.mark.parametrize(("transform", "tensors", "formula"), CASES, ids=[case[2].__name__ for case in CASES])
def test_a_rounding_is_its_formula(transform: Transform, tensors, formula) -> None:
    x = rows(2, 5, 320)
    applied = Applied(transform_from_json(transform.to_json()), tensors)
    applied.check(320)
    found = applied(x)
    assert torch.equal(found, formula(x)) and found.dtype == torch.float32
    assert transform.weight(x, tensors) is x
    names = list(tensors)

    def traced(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return transform.apply(x, dict(zip(names, given, strict=True)))

    graph = make_fx(traced, tracing_mode="symbolic")(x, *tensors.values())
    longer = rows(3, 4, 320)
    assert torch.equal(graph(longer, *tensors.values()), formula(longer))


def test_scales_of_heads() -> None:
    """Keys [B, heads, S, D]: one scale for each head of a sequence, or a stored one for each head."""
    x = rows(2, 3, 4, 16)
    s = x.abs().amax((2, 3), keepdim=True) / 448
    assert torch.equal(RoundFloat(per="head").apply(x, {}), e4m3(x / s) * s)
    stored = torch.tensor([0.01, 0.1, 0.02]).reshape(3, 1, 1)
    static = Applied(RoundFloat(per="tensor", scale="f32", heads=3), {"scale": stored})
    static.check(16)
    assert torch.equal(static(x), e4m3(x / stored) * stored)
    zero = torch.tensor([1, -3, 0], dtype=torch.int8).reshape(3, 1, 1)
    codes = torch.round(x / stored + zero).clamp(-128, 127)
    whole = Applied(RoundInt(per="tensor", scale="f32", zero="i8", heads=3), {"scale": stored, "zero": zero})
    assert torch.equal(whole(x), (codes - zero) * stored)


def test_arithmetic_of_16_bits_rounds_each_step() -> None:
    x = rows(2, 5, 64)
    half = x.bfloat16()
    s = half.abs().amax(-1, keepdim=True) / 127.5
    s = torch.where(s == 0, 2.0**-23, s)
    assert torch.equal(RoundInt(dtype="bf16").apply(x, {}), (torch.round(half / s).clamp(-128, 127) * s).float())


def test_what_the_report_says() -> None:
    assert RoundInt().summary() == "int8 per token"
    assert RoundInt(low=-8, high=7, scale="f32").summary() == "int4 static"
    assert RoundFloat(per="group", size=128).summary() == "f8e4m3 per group of 128"
    assert RoundMx().summary() == "mx e2m1 per group of 32"
    assert RoundNvfp4().summary() == "nvfp4 per group of 16"
