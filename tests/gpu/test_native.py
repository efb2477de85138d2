"""Linears over codes on both sides, in Triton's interpreter against the reference's float computation."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from gpu.device import interpreted
from gpu.interpret import run

import qcompile
from qcompile.artifact import KernelSpec
from qcompile.dtypes import DTYPES
from qcompile.errors import ArtifactError
from qcompile.evaluate import dequantize
from qcompile.format import Format, Packed
from qcompile.formats.bitnet import Ternary
from qcompile.formats.eetq import Eetq
from qcompile.formats.integer import Int8
from qcompile.formats.minifloat import Fp8
from qcompile.formats.native import Native, native_codes, native_for
from qcompile.lowering.triton import templates, toolchain
from qcompile.lowering.triton.linear import Shape
from qcompile.lowering.triton.sass import Profile, profile
from qcompile.target import target
from qcompile.transform import Transform
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_float import RoundFloat
from qcompile.transforms.round_int import RoundInt

TARGET = target("cuda:interpret")
PLAIN = RoundInt()


def weight(format: Format, n: int, k: int) -> Packed:
    """A weight of random codes and scales around 0.02."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for stored in format.stored(n, k):
        dtype = DTYPES[stored.dtype]
        if stored.dtype.startswith("f8"):
            value = torch.randn(stored.shape, generator=generator)
        elif dtype.is_floating_point:
            value = torch.rand(stored.shape, generator=generator) * 0.02 + 0.01
        elif stored.dtype == "u8":  # four codes of two bits, of which none is 3
            value = (torch.randint(0, 3, (*stored.shape, 4), generator=generator) * torch.tensor([1, 4, 16, 64])).sum(
                -1
            )
        else:
            value = torch.randint(-127, 128, stored.shape, generator=generator)
        made[stored.name] = value.to(dtype)
    return Packed(format, made, n, k)


def laid_out(format: Format, n: int, k: int, rounding: Transform) -> Packed:
    found = native_for(weight(format, n, k), (rounding,))
    assert isinstance(found, Packed)
    return found


def spec(template: str, params: dict[str, Any]) -> KernelSpec:
    return KernelSpec(template, json.loads(json.dumps(params)))


LAYOUTS: list[tuple[Format, Transform, Native]] = [
    (Int8(), PLAIN, Native()),
    (Eetq(scale="f32"), PLAIN, Native()),
    (Int8(scale="bf16", columns=32), RoundInt(per="group", size=64), Native(group=32)),
    (Ternary(), PLAIN, Native("int", 2, 1, 128)),
    (Fp8("f8e5m2", "u8", 0, 64), RoundFloat(element="f8e5m2"), Native("f8e5m2", group=64)),
    (Fp8(rows=16, columns=32), RoundFloat("group", 64), Native("f8e4m3", group=32, rows=16)),
]


@pytest.mark.parametrize(("format", "rounding", "layout"), LAYOUTS, ids=lambda each: getattr(each, "kind", ""))
def test_layout_holds_the_same_weight(format: Format, rounding: Transform, layout: Native) -> None:
    before = weight(format, 64, 128)
    after = native_for(before, (rounding,))
    assert isinstance(after, Packed) and after.format == layout
    after.check()
    expected = dequantize(format, before.tensors, 64, 128)
    assert torch.equal(dequantize(after.format, after.tensors, 64, 128), expected)


@pytest.mark.parametrize(
    ("format", "rounding", "reason"),
    [
        (Int8(), RoundFloat(), "its codes are int, those of its inputs f8e4m3"),
        (Int8(), RoundInt(symmetric=False), "its inputs are rounded with a zero point"),
        (Int8(columns=24), PLAIN, "24 inputs that share a scale are no multiple of 32"),
        (Int8(rounding="product-bf16"), PLAIN, "a weight is not just a code times a scale"),
        (Int8(zero="i8"), PLAIN, "its zeros differ"),
    ],
)
def test_why_there_is_no_layout(format: Format, rounding: Transform, reason: str) -> None:
    assert native_for(weight(format, 16, 72), (rounding,)) == reason


def kernels(
    packed: Packed, rounding: Transform, most: int, epilogue: tuple[dict[str, Any], ...] = (), split_k: int = 1
) -> list[KernelSpec]:
    """The kernels that round x and multiply."""
    layout, k = packed.format, packed.K
    assert isinstance(layout, Native)
    found = native_codes((rounding,))
    assert not isinstance(found, str)
    outliers = isinstance(rounding, LlmInt8)
    how = {"k": k, "padded": layout.padded(k), "prologue": None, "transforms": [rounding.to_json()], "out": "codes"}
    how |= {"whole": "given" if outliers else "none", "rest": "f16"}
    shape = Shape((layout.to_json(),), (packed.N,), k, True, None, epilogue, "f16")
    linear = shape.params(group=found[1], most=most, split_k=split_k, outliers=outliers)
    return [spec("activation", how), spec("linear-native", linear)]


GLU = ({"op": "glu", "act": "silu"},)
CASES: list[tuple[Format, int, int, Transform, tuple[dict[str, Any], ...]]] = [
    (Int8(), 37, 72, PLAIN, ()),
    (Int8(columns=32), 37, 128, RoundInt(per="group", size=64), ({"op": "relu"},)),
    (Ternary(), 70, 200, RoundInt(divisor=127.0, arithmetic="inverse", least=1e-5), GLU),
    (Fp8(rows=16, columns=128), 37, 256, RoundFloat("group", 128, floor=1e-12), ()),
    (Fp8("f8e5m2"), 37, 80, RoundFloat(element="f8e5m2", per="tensor", scale="f32"), ()),
    (Int8(), 37, 144, LlmInt8(2.5), ()),
]


@pytest.mark.parametrize("rows", [3, 37])
@pytest.mark.parametrize(("format", "n", "k", "rounding", "epilogue"), CASES)
def test_sums_are_those_of_floats(
    format: Format, n: int, k: int, rounding: Transform, epilogue: tuple[dict[str, Any], ...], rows: int
) -> None:
    packed = laid_out(format, n, k, rounding)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(2)).half().float()
    held = [torch.tensor([0.01])] if getattr(rounding, "scale", "") else []
    activation, linear = kernels(packed, rounding, 4 if rows <= 4 else 128, epilogue)
    emitted = [templates.emit(each, TARGET) for each in (activation, linear)]
    padded = activation.params["padded"]
    codes = torch.zeros(rows, padded, dtype=torch.int8 if emitted[1].pointers[0] == "i8" else torch.uint8)
    scales = torch.zeros(rows, k // (linear.params["group"] or k))
    columns, rest = torch.zeros(padded, dtype=torch.uint8), torch.zeros(rows, padded, dtype=torch.float16)
    kept = [rest, columns] if linear.params["outliers"] else []
    if kept:
        look = spec("outlier-columns", {"k": k, "padded": padded, "threshold": 2.5})
        run(templates.emit(look, TARGET), [x, columns], [rows])
    run(emitted[0], [x, *held, *kept[1:], codes, scales, *kept[:1]], [rows])
    bias, y = torch.randn(n), torch.full((rows, n // 2 if epilogue == GLU else n), 7.0)
    run(emitted[1], [codes, y, *packed.tensors.values(), bias, scales, *kept], [rows])
    rounded = rounding.apply(x, {"scale": held[0]} if held else {})
    expected = torch.nn.functional.linear(rounded, dequantize(packed.format, packed.tensors, n, k), bias)
    if epilogue == GLU:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    elif epilogue:
        expected = expected.relu()
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))
    for each, arguments in zip((activation, linear), emitted, strict=True):
        assert len(templates.extents(each)((rows,), 1)) == len(arguments.pointers)


LONG: tuple[Format, int, int, Transform, tuple[dict[str, Any], ...]] = (Int8(), 5, 4112, RoundInt("tensor"), ())


@pytest.mark.parametrize(("format", "n", "k", "rounding", "epilogue"), [*CASES[:-1], LONG])
def test_a_kernel_that_rounds_x_itself_gives_the_same_bits(
    format: Format, n: int, k: int, rounding: Transform, epilogue: tuple[dict[str, Any], ...]
) -> None:
    """Of rows that a program holds, and (`LONG`) of a row that it walks, under one scale for all rows."""
    packed, rows = laid_out(format, n, k, rounding), 3
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1.0], [20.0], [0.0]])
    held = [torch.tensor([0.01])] if getattr(rounding, "scale", "") else []
    activation, linear = kernels(packed, rounding, 4, epilogue)
    activation.params["whole"] = "self" if (n, k) == LONG[1:3] else "none"
    both = spec("linear-native", linear.params | {"before": activation.params})
    sources = [templates.emit(each, TARGET) for each in (activation, linear, both)]
    padded, groups = activation.params["padded"], k // (linear.params["group"] or k)
    bias, element = torch.randn(n), torch.int8 if sources[1].pointers[0] == "i8" else torch.uint8
    made = []
    for fused in (False, True):
        codes, scales = torch.full((rows, padded), 99, dtype=element), torch.full((rows, groups), float("nan"))
        y = torch.full((rows, n // 2 if epilogue == GLU else n), 7.0)
        args = [codes, y, *packed.tensors.values(), bias, scales]
        if fused:
            run(sources[2], [*args, x, *held], [rows])
        else:
            run(sources[0], [x, *held, codes, scales], [rows])
            run(sources[1], args, [rows])
        made.append((codes, scales, y))
    for apart, inside in zip(*(each[:2] for each in made), strict=True):
        assert torch.equal(apart, inside)
    # A product and a sum behind the sums of codes may be one operation in one of the kernels.
    torch.testing.assert_close(made[0][2], made[1][2], rtol=1e-6, atol=1e-6 * float(made[0][2].abs().max()))
    longer = spec("linear-native", linear.params | {"before": activation.params | {"padded": padded + 1}})
    with pytest.raises(ArtifactError, match="padded"):
        templates.extents(longer)
    assert len(templates.extents(both)((rows,), 1)) == len(sources[2].pointers)


@pytest.mark.parametrize(
    ("format", "rounding"), [(Ternary(), PLAIN), (Fp8(columns=64), RoundFloat("group", 64))], ids=["whole", "groups"]
)
def test_parts_of_k_are_added_in_order(format: Format, rounding: Transform) -> None:
    packed, x, bias = laid_out(format, 20, 256, rounding), torch.randn(2, 256), torch.randn(20)
    activation, linear = kernels(packed, rounding, 4, split_k=2)
    source = templates.emit(linear, TARGET)
    codes = torch.zeros(2, 256, dtype=torch.int8 if source.pointers[0] == "i8" else torch.uint8)
    scales, y = torch.zeros(2, 256 // (linear.params["group"] or 256)), torch.zeros(2, 20)
    run(templates.emit(activation, TARGET), [x, codes, scales], [2])
    parts, arrivals = torch.zeros(2 * 2 * 20), torch.zeros(2, dtype=torch.int32)
    args = [codes, y, *packed.tensors.values(), bias, scales, parts, arrivals]
    run(source, args, [2])
    both, apart = spec("linear-native", linear.params | {"before": activation.params}), [codes.clone(), y.clone()]
    codes.fill_(99), scales.fill_(99), y.fill_(99)  # type: ignore[func-returns-value]
    run(templates.emit(both, TARGET), [*args, x], [2])
    assert torch.equal(codes, apart[0]) and torch.equal(y, apart[1])
    weight = dequantize(packed.format, packed.tensors, 20, 256)
    expected = torch.nn.functional.linear(rounding.apply(x, {}), weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-4)
    assert not arrivals.any() and len(templates.extents(linear)((2,), 1)) == len(source.pointers)


LARGE: dict[str, tuple[Native, RoundInt | RoundFloat]] = {
    "int8": (Native(), PLAIN),
    "ternary": (Native("int", 2, 1, 128), PLAIN),
    "fp8": (Native("f8e4m3"), RoundFloat()),
    "fp8 blocks": (Native("f8e4m3", group=128, rows=128), RoundFloat("group", 128)),
}


def compiled(capability: int, name: str, most: int) -> Profile:
    """The machine code of a linear kernel over a weight [4096, 4096]; few rows it normalises and rounds itself."""
    layout, rounding = LARGE[name]
    more = {"group": rounding.size if rounding.per == "group" else 0, "most": most, "split_k": 1, "outliers": False}
    if most == 4:
        norm = {"op": "rms_norm", "eps": 1e-5}
        more["before"] = {
            "k": 4096,
            "padded": 4096,
            "prologue": norm,
            "transforms": [rounding.to_json()],
            "out": "codes",
        }
    params = Shape((layout.to_json(),), (4096,), 4096).params(**more)
    place = target(f"cuda:sm_{capability}")
    (built,) = toolchain.compile_sources([templates.emit(spec("linear-native", params), place)], place)
    assert built.launch is not None and built.launch.spills == 0
    return profile(built.object)


@pytest.mark.parametrize(
    ("capability", "name", "most_instructions"),
    [
        (90, "fp8 blocks", 2.2),
        pytest.param(90, "int8", 1.5, marks=pytest.mark.full),
        pytest.param(90, "ternary", 3.0, marks=pytest.mark.full),
        pytest.param(80, "fp8", 6.5, marks=pytest.mark.full),
    ],
)
def test_few_rows_cost_few_instructions(capability: int, name: str, most_instructions: float) -> None:
    """Of 8 bits a weight, an H100 and an A100 read one in the time of about 9 instructions of a lane."""
    found = compiled(capability, name, 4)
    assert found.main.tensor_cores and found.main.loads[128]
    assert found.per_weight(rows=16) <= most_instructions
    # Rows are rounded in a loop of their own, 32 inputs of a thread at a time: what it costs, all outputs of a tile share.
    most = 32 * (45 if capability < 89 else 30)
    assert sum(loop.instructions for loop in found.loops) - found.main.instructions <= most


@pytest.mark.full
@pytest.mark.parametrize("most", [4, 32, 128, 0])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("name", LARGE)
def test_all_compile(name: str, capability: int, most: int) -> None:
    compiled(capability, name, most)


class Gated(torch.nn.Module):
    """A norm in front of a gated unit, and a sum behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(96)
        self.gate, self.up = (torch.nn.Linear(96, 64, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 2.0},
    "fouroversix": {"quant_method": "fouroversix"},  # a scale for all rows, and results rounded to bf16
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_module_is_two_linears_that_round_x_themselves(method: str) -> None:
    torch.manual_seed(0)
    module, x = Gated(), torch.randn(2, 3, 96)
    given = {"example_inputs": (x,), "dynamic_shapes": ({0: torch.export.Dim("b", max=64)},)}
    expected = qcompile.compile(module, CONFIGS[method], target="reference", **given)
    found, _ = interpreted(qcompile.compile(module, CONFIGS[method], target="cuda:interpret", **given), graphs=False)
    served = [(row.layout, row.tier) for row in found.report.weights.values()]
    assert served == [("fragments", "lanes") if method == "fouroversix" else ("native", "native")] * 3
    apart = "x is made ready by a kernel in front: 'llm-int8' looks for columns with outliers in all rows"
    assert [apart in row.reason for row in found.report.weights.values()] == [method == "bitsandbytes"] * 3
    steps = found.artifact.executable.steps
    kinds = [[call.kernel.partition("_")[0] for call in step.variants[0].calls] for step in steps]
    assert kinds == [["activation", "linear"] if method == "bitsandbytes" else ["linear"]] * 2
    for rows in (1, 2):
        x = torch.randn(rows, 3, 96)
        tolerance = {"fp8": 1e-6, "bitsandbytes": 5e-3, "fouroversix": 2e-2}[method]  # bf16: outliers; products
        torch.testing.assert_close(found(x), expected(x), rtol=tolerance, atol=tolerance)
