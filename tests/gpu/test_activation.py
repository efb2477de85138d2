"""Rows of x in Triton's interpreter: the same codes and floats, bit for bit, as the transforms themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.interpret import run

from qcompile.artifact import KernelSpec
from qcompile.dtypes import DTYPES
from qcompile.formats.fragments import Fragments
from qcompile.formats.minifloat import E2M1
from qcompile.formats.native import native_codes
from qcompile.lowering.triton import activation, templates
from qcompile.lowering.triton.linear import Shape
from qcompile.lowering.triton.toolchain import compile_sources
from qcompile.target import target
from qcompile.transform import Transform
from qcompile.transforms.cast import RoundTo
from qcompile.transforms.four_over_six import RoundFourOverSix
from qcompile.transforms.fp_quant import RoundFpQuant
from qcompile.transforms.linear import Hadamard, Permute, Rotate, Scale
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.norm import RmsNorm
from qcompile.transforms.round_float import RoundFloat, RoundMx, RoundNvfp4
from qcompile.transforms.round_int import RoundInt

TARGET = target("cuda:interpret")
K = 72


def rows(m: int = 3, k: int = K) -> torch.Tensor:
    """Rows with a large number, ties, tiny numbers and one of zeros."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
    x[0, 5], x[0, 7:11] = 37.5, torch.tensor([0.5, -1.5, 2.5, 1e-9])
    x[-1] = 0 if m > 1 else x[-1]
    return x


def tensors(transforms: tuple[Transform, ...], k: int) -> list[torch.Tensor]:
    made = []
    generator = torch.Generator().manual_seed(1)
    for each in transforms:
        for stored in each.stored(k):
            if stored.name == "order":
                made.append(torch.randperm(k, generator=generator))
            elif stored.name == "zero":
                made.append(torch.full(stored.shape, 3).to(DTYPES[stored.dtype]))
            else:
                value = torch.rand(stored.shape, generator=generator) * 0.1 + 0.02
                made.append(value.to(DTYPES[stored.dtype]))
    return made


def applied(transforms: tuple[Transform, ...], x: torch.Tensor, held: list[torch.Tensor]) -> torch.Tensor:
    held = list(held)
    for each in transforms:
        names = [stored.name for stored in each.stored(x.shape[-1])]
        x = each.apply(x, {name: held.pop(0) for name in names})
    return x


def params(transforms: tuple[Transform, ...], k: int, out: str, **more: Any) -> dict[str, Any]:
    padded = -(-k // 16) * 16 if out == "codes" else k
    made = {
        "k": k,
        "padded": padded,
        "prologue": None,
        "transforms": [each.to_json() for each in transforms],
        "out": out,
    }
    made |= {"whole": "none", "rest": "bf16"} | more
    assert activation.parsed(made).problem() == ""
    return made


ROUNDINGS: list[Transform] = [
    RoundInt(divisor=127.0, arithmetic="inverse", least=1e-5),
    RoundInt(empty=1.0),
    RoundInt(per="group", size=32, dtype="bf16", floor=1e-5),
    RoundInt(scale="bf16", per="tensor", arithmetic="reciprocal"),
    RoundFloat(floor=1e-12),
    RoundFloat(per="group", size=16, most=20.0),
    RoundFloat(arithmetic="inverse", element="f8e5m2", least=0.1),
    RoundFloat(scale="f32", dtype="f16"),
]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda each: each.summary())
def test_codes_are_those_of_the_transform(rounding: Transform) -> None:
    x, held = rows(), tensors((rounding,), K)
    found = native_codes((rounding,))
    assert not isinstance(found, str)
    kind, size = found
    made = params((rounding,), K, "codes")
    codes = torch.full((3, made["padded"]), 77, dtype=torch.int8 if kind == "int" else torch.uint8)
    scales = torch.zeros(3, -(-K // size) if size else 1)
    run(activation.emit(made, TARGET), [x, *held, codes, scales], [3])
    assert not codes[:, K:].any()
    values = (codes if kind == "int" else codes.view(DTYPES[kind]))[:, :K].float()
    wide = scales.repeat_interleave(size, 1)[:, :K] if size else scales
    expected = applied((rounding,), x, held)
    # A code is a step of 2^-8 of the scale or more: equal values are equal codes.
    exact = rounding.arithmetic == "divide" and rounding.dtype == "f32"
    torch.testing.assert_close(values * wide, expected, rtol=0 if exact else 2.0**-7, atol=0)
    if rounding.dtype == "f32":
        torch.testing.assert_close(values * wide, expected, rtol=1e-6, atol=0)


FLOATS: list[tuple[Transform, ...]] = [
    (Permute(), Scale("f16"), RoundTo("bf16")),
    (RmsNorm(1e-5), RoundInt()),
    (Hadamard(8), RoundMx(size=8)),
    (RoundInt(symmetric=False, zero_first=False, arithmetic="reciprocal", floor=1e-6),),
    (RoundInt(symmetric=False, per="group", size=32),),
    (RoundInt(scale="f32", zero="i8", dtype="bf16"),),
    (RoundInt(dtype="f16"),),
    (RoundMx("e2m3", rule="ceil", shift=0, divisor=7.5),),
    (RoundMx("f8e4m3", rule="even3", shift=8),),
    (RoundNvfp4(),),
    (RoundNvfp4(tensor="multiply", floor=2.0**-6),),
    (RoundFpQuant(),),
    (RoundFpQuant("mxfp4", "quest", True),),
    (RoundFpQuant("mxfp4"), RoundTo()),
]


@pytest.mark.parametrize("transforms", FLOATS, ids=lambda each: ", ".join(t.summary() for t in each))
def test_rows_are_those_of_the_transforms(transforms: tuple[Transform, ...]) -> None:
    x, held, made = rows(), tensors(transforms, K), params(transforms, K, "f32")
    y = torch.zeros(3, K)
    run(activation.emit(made, TARGET), [x, *held, y], [3])
    expected = applied(transforms, x, held)
    close = 1e-6 if isinstance(transforms[0], RmsNorm | Hadamard) else 0
    torch.testing.assert_close(y, expected, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("transforms", "k"),
    [
        ((Rotate(16), RoundFpQuant("mxfp4", "abs_max", True)), 256),
        ((Permute(), Scale("f16"), Rotate(128, "f32"), RoundInt(per="group", size=32)), 4096 + 128),
    ],
    ids=["small", "large"],
)
def test_blocks_are_rotated(transforms: tuple[Transform, ...], k: int) -> None:
    norm = {"op": "layer_norm", "eps": 1e-5}
    x, held, made = rows(2, k), tensors(transforms, k), params(transforms, k, "f32", prologue=norm)
    at = next(at for at, each in enumerate(transforms) if isinstance(each, Rotate))
    matrix, size = held[-1 if at else 0], transforms[at].size  # type: ignore[attr-defined]
    matrix.copy_(torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(4)))[0])
    weight, bias, y = torch.rand(k) + 0.5, torch.rand(k), torch.zeros(2, k)
    run(activation.emit(made, TARGET), [x, weight, bias, *held, y], [2])
    expected = torch.nn.functional.layer_norm(x.double(), (k,), weight.double(), bias.double(), 1e-5).float()
    expected = applied(transforms, expected, held)
    # A number between two codes may become the other one.
    near = (y - expected).abs() <= 1e-5 * (1 + expected.abs())
    assert near.float().mean() > 0.999
    far = (y - expected)[~near].abs()
    assert (far <= 0.05 * expected.abs().amax()).all()


ROTATIONS = [(size, dtype, k) for size in (32, 64, 128) for dtype in ("bf16", "f32") for k in (1024, 4096)]


@pytest.mark.parametrize(
    ("size", "dtype", "k", "capability"),
    [
        pytest.param(*case, capability, marks=[pytest.mark.full] * ((*case, capability) != (128, "f32", 1024, 90)))
        for case in ROTATIONS
        for capability in (80, 90, 100, 120)
    ],
)
def test_rotations_by_a_matrix_stay_in_registers(size: int, dtype: str, k: int, capability: int) -> None:
    code, norm = target(f"cuda:sm_{capability}"), {"op": "rms_norm", "eps": 1e-5, "offset": 0.0}
    made = params((Rotate(size, dtype), RoundFpQuant()), k, "bf16", prologue=norm)
    (built,) = compile_sources([activation.emit(made, code)], code)
    assert built.launch is not None and built.launch.spills == 0


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_outliers_stay_floats(threshold: float) -> None:
    x, llm = rows(), LlmInt8(threshold)
    made = params((llm,), K, "codes", whole="self" if threshold else "none", rest="f16")
    width = made["padded"]
    codes, scales = torch.zeros(3, width, dtype=torch.int8), torch.zeros(3, 1)
    rest, columns = torch.zeros(3, width, dtype=torch.float16), torch.full((width,), 9, dtype=torch.uint8)
    run(activation.emit(made, TARGET), [x, codes, scales, *([rest, columns] if threshold else [])], [3])
    wanted = (x.half().abs() >= threshold).any(0) if threshold else torch.zeros(K, dtype=torch.bool)
    if threshold:
        assert torch.equal(columns[:K] != 0, wanted) and not columns[K:].any()
    expected = llm.apply(x, {})
    torch.testing.assert_close((codes[:, :K] * scales)[:, ~wanted], expected[:, ~wanted], rtol=1e-6, atol=0)
    assert torch.equal(rest[:, :K], torch.where(wanted, x, 0.0).half()) and not codes[:, :K][:, wanted].any()


WHOLE: list[Transform] = [
    RoundFloat(per="tensor", floor=1e-12),
    RoundInt(per="tensor", dtype="bf16"),
    RoundNvfp4(stored_scale=""),
    RoundNvfp4(tensor="multiply", stored_scale="", floor=2.0**-6),
    *(RoundFourOverSix(rule) for rule in ("mse", "mae", "abs_max", "static_4")),
]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("whole", ["self", "given"])
@pytest.mark.parametrize("rounding", WHOLE, ids=lambda each: f"{each.summary()} {getattr(each, 'tensor', '')}")
def test_one_scale_for_all_rows(rounding: Transform, whole: str, zeros: bool) -> None:
    x, y, made = rows() * (not zeros), torch.zeros(3, K), params((rounding,), K, "f32", whole=whole)
    most = [torch.zeros(3)] * (whole == "given")
    if most:
        copied = torch.zeros(3, K)
        run(activation.emit(params((), K, "f32", most=True), TARGET), [x, copied, *most], [3])
        assert torch.equal(copied, x) and torch.equal(most[0], x.abs().amax(-1))
    run(activation.emit(made, TARGET), [x, *most, y], [3])
    assert torch.equal(y, rounding.apply(x, {}))


@pytest.mark.parametrize("turn", [(Hadamard(256), RoundMx(size=32)), (Rotate(128, "f32"),)], ids=["signs", "matrix"])
def test_a_linear_makes_the_same_rows_itself(turn: tuple[Transform, ...]) -> None:
    """A row that is walked for its norm, and of which each of two programs then makes one half, which cuts a rotation."""
    transforms, k, n, m = (Permute(), *turn), 768, 16, 2
    # Squares that are added in any order to the same sum.
    x, norm = (rows(m, k) * 8).round().clamp(-64, 64) / 8, {"op": "rms_norm", "eps": 1e-6, "offset": 0.0}
    weight, held = torch.rand(k) + 0.5, tensors(transforms, k)
    layout = Fragments(4, 32, E2M1, scale="f8e8m0")
    codes, scale = (torch.randint(100, 140, each.shape, dtype=torch.int32) for each in layout.stored(n, k))
    shape = Shape((layout.to_json(),), (n,), k, compute="f16", x="f16")
    made = params(transforms, k, "f16", prologue=norm)
    apart, inside = torch.zeros(m, k, dtype=torch.float16), torch.zeros(m, k, dtype=torch.float16)
    run(activation.emit(made, TARGET), [x, weight, *held, apart], [m])
    results = []
    for given, more in ((apart, {}), (inside, {"before": made})):
        y, scratch = torch.zeros(m, n), [torch.zeros(2 * m * n), torch.zeros(1, dtype=torch.int32)]
        spec = KernelSpec("linear-fragments", shape.params(most=4, split_k=2, **more))
        read = [x, weight, *held] if more else []
        run(templates.emit(spec, TARGET), [given, y, codes * 0x1234567, scale.to(torch.uint8), *scratch, *read], [m])
        results.append(y)
    # A library multiplies matrices of other sizes in another order.
    close = 2.0**-9 if isinstance(turn[0], Rotate) else 0.0
    assert apart.any()
    torch.testing.assert_close(inside, apart, rtol=close, atol=close)
    torch.testing.assert_close(*results, rtol=close, atol=16 * close)


def test_norm_in_front() -> None:
    x, weight = rows(), torch.rand(K) + 0.5
    norm = {"op": "rms_norm", "eps": 1e-6, "offset": 1.0}
    y = torch.zeros(3, K, dtype=torch.float16)
    run(activation.emit(params((), K, "f16", prologue=norm), TARGET), [x, weight, y], [3])
    expected = torch.nn.functional.rms_norm(x, (K,), eps=1e-6) * (weight + 1)
    torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=1e-6)
