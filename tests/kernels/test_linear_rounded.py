"""Linears whose method rounds x to integers: their kernels against the eager operator, bit for bit where sums are exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from int8_linears import HERE, Run, close, weight

from qcompile import ops
from qcompile.dtypes import DTYPES
from qcompile.formats.lanes import Lanes, pack_lanes
from qcompile.lowering.base import Refuse
from qcompile.lowering.mlir.linear_int8_rule import lower_int8
from qcompile.ops import LinearSpec, Part
from qcompile.target import Target
from qcompile.transform import Transform
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_int import RoundInt

N = 40
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """A rounding with the numbers that it stores, and the weight [N, k] behind it."""

    how: Transform
    format: Lanes
    numbers: tuple[float, ...] = ()
    k: int = 256

    def run(
        self, x: torch.Tensor, weight: Tensors, target: Target = HERE[0], n: int = N, **spec: object
    ) -> torch.Tensor:
        what, extras = self.what(n, weight, **spec)
        run = Run(torch.full((len(x), n), torch.nan), target, 2)
        lower_int8(SimpleNamespace(args=(x, list(weight.values()), extras, "")), what, run)  # type: ignore[arg-type]
        return run.y

    def eager(self, x: torch.Tensor, weight: Tensors, n: int = N, **spec: object) -> torch.Tensor:
        what, extras = self.what(n, weight, **spec)
        y: torch.Tensor = ops.linear(x, list(weight.values()), extras, what.to_text())
        return y

    def what(self, n: int, weight: Tensors, **spec: object) -> tuple[LinearSpec, list[torch.Tensor]]:
        made = LinearSpec(self.k, (Part(self.format.to_json(), n, len(weight)),), before=(self.how.to_json(),))
        stored = zip(self.how.stored(self.k), self.numbers, strict=True)
        return replace(made, **spec), [torch.tensor([number]).to(DTYPES[s.dtype]) for s, number in stored]  # type: ignore[arg-type]


INTX = RoundInt(symmetric=False, zero_first=False, arithmetic="reciprocal", floor=2.0**-126)
UNSIGNED = RoundInt(per="tensor", scale="f32", zero="u8", low=0, high=255, symmetric=False, zero_first=False)
CASES = {
    "token": Rounded(RoundInt(), Lanes(8, 256, zero=128.0)),
    "long": Rounded(RoundInt(symmetric=False), Lanes(3, 1000, zero=4.0), k=1000),
    "int4": Rounded(INTX, Lanes(4, 32, zero=8.0)),
    "stored-zeros": Rounded(RoundInt(symmetric=False), Lanes(4, 64, zero="u8", scale="f16")),
    "static": Rounded(RoundInt(per="tensor", scale="bf16"), Lanes(8, 256), (0.25,)),
    "unsigned": Rounded(UNSIGNED, Lanes(8, 256, zero=128.0), (0.25, 100.0)),
    "groups": Rounded(RoundInt(per="group", size=64, floor=1e-7, arithmetic="reciprocal"), Lanes(8, 256, zero=128.0)),
    "ternary": Rounded(RoundInt(divisor=127.0, arithmetic="inverse", least=1e-5), Lanes(2, 256, zero=1.0)),
    "llm-int8": Rounded(LlmInt8(0.0), Lanes(8, 256, factor=0.5)),
}
every = pytest.mark.parametrize("name", CASES)


@every
def test_random_numbers(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, tensors = torch.randn(6, case.k), weight(N, case.format, case.k)
    y, expected = case.run(x, tensors), case.eager(x, tensors)
    close(y, expected, 1e-6)
    # One row alone, from another kernel and on every processor, gives the same bits.
    for target in HERE:
        assert torch.equal(case.run(x[:1], tensors, target), y[:1])


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("ternary", "llm-int8")]
)  # scales are rounded twice
def test_sums_are_exact(name: str) -> None:
    """Scales that are powers of two and sums below 2^24: float32 adds them without an error, in any order."""
    torch.manual_seed(1)
    case = CASES[name]
    groups = case.k // case.format.group
    codes = torch.randint(1 << case.format.bits, (N, case.k), dtype=torch.uint8)
    zeros = torch.randint(1 << case.format.bits, (N, groups))
    tensors = pack_lanes(case.format, codes, torch.full((N, groups), 0.5), zeros)
    x = torch.rand(6, case.k) * 50 - 25
    x[:, ::40], x[:, 1::40] = -25.0, 38.75  # a range of 255 quarters
    if getattr(case.how, "symmetric", False):
        x[:, 1::40] = 31.875  # half of that
    for m, target in ((6, HERE[0]), *((1, target) for target in HERE)):
        assert torch.equal(case.run(x[:m], tensors, target), case.eager(x[:m], tensors))


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
def test_the_largest_sum_is_exact(target: Target) -> None:
    k = 33024
    case = Rounded(replace(UNSIGNED, low=-128, high=127, zero="i8"), Lanes(8, k), (1.0, -128.0), k)
    tensors = pack_lanes(case.format, torch.full((16, k), 255, dtype=torch.uint8), torch.ones(16, 1))
    assert case.run(torch.full((1, k), 255.0), tensors, target, 16).eq(255 * 255 * k).all()
    with pytest.raises(Refuse, match="a sum of 33028 products may need more than 32 bits"):
        Rounded(case.how, Lanes(8, k + 4), case.numbers, k + 4).run(torch.zeros(1, k + 4), tensors, target, 16)


@pytest.mark.parametrize("name", ["token", "int4", "static", "llm-int8"])
@pytest.mark.parametrize("m", [1, 6])
def test_what_is_not_a_number_reaches_its_row(name: str, m: int) -> None:
    case, x = CASES[name], torch.randn(m, 256)
    x[0, 40] = torch.nan
    y = case.run(x, weight(N, case.format, 256))
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("m", [3, 9])
def test_norm_zeros_of_x_gate_and_residual(m: int) -> None:
    torch.manual_seed(2)
    case = Rounded(UNSIGNED, Lanes(4, 64, zero=8.0), (1 / 32, 128.0))
    tensors, (norm, bias, residual) = (
        weight(96, case.format, 256),
        (torch.rand(256), torch.randn(96), torch.randn(m, 48)),
    )
    spec = {
        "bias": True, "prologue": {"op": "rms_norm", "eps": 1e-5, "offset": 0.0},
        "epilogue": ({"op": "glu", "act": "silu"}, {"op": "add"}),
    }  # fmt: skip
    what, numbers = case.what(96, tensors, **spec)
    operands = torch.randn(m, 256), list(tensors.values()), [bias, norm, *numbers, residual]
    run = Run(torch.full((m, 48), torch.nan), HERE[0], 2)
    lower_int8(SimpleNamespace(args=(*operands, "")), what, run)  # type: ignore[arg-type]
    # The norm's last bit may differ, and an input between two codes then takes the other one.
    close(run.y, ops.linear(*operands, what.to_text()), 1e-2)


@pytest.mark.parametrize(
    "case, reason",
    [
        (Rounded(LlmInt8(6.0), Lanes(8, 256)), "columns with outliers stay floats"),
        (Rounded(RoundInt(per="tensor"), Lanes(8, 256)), "its inputs share a scale per tensor"),
        (Rounded(RoundInt(scale="f32", heads=4), Lanes(8, 256), (1.0,)), "its inputs share a scale per head"),
        (Rounded(RoundInt(dtype="bf16"), Lanes(8, 256)), "its inputs are rounded in bf16"),
        (Rounded(RoundInt(low=-200, high=55), Lanes(8, 256)), "its inputs are rounded to -200 .. 55"),
        (Rounded(RoundInt(low=0, high=255), Lanes(8, 256)), "its inputs are rounded to 0 .. 255"),
        (Rounded(RoundInt(per="group", size=48), Lanes(8, 256)), "do not nest in 256 inputs"),
        (Rounded(RoundInt(), Lanes(8, 254), k=254), "254 inputs that share scales are no multiple of 4"),
        (Rounded(RoundInt(), Lanes(4, 256, tuple(map(float, range(16))))), "a weight is an entry of a table"),
        (Rounded(RoundInt(), Lanes(8, 256, rounding="product-bf16")), "not just a code times a scale, but rounded"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_refusals(case: Rounded, reason: str) -> None:
    with pytest.raises(Refuse, match=reason):
        case.run(torch.randn(1, case.k), weight(N, case.format, case.k))
