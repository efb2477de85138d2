"""Vector functions against float64: the bounds that vecmath's docstring states, and special values."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_bench import Kernel

from qcompile.lowering.mlir import toolchain, vecmath
from qcompile.lowering.mlir.text import Text
from qcompile.target import CPU_LEVELS

EXACT = {
    "exp": torch.exp, "tanh": torch.tanh, "erf": torch.erf, "sigmoid": torch.sigmoid, "relu": torch.relu,
    "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}  # fmt: skip


def text(name: str) -> str:
    t = Text("f")
    source, to = t.arg(0), t.arg(1)
    with t.loop(0, t.dim(0), 16) as i:
        t.store(getattr(vecmath, name)(t.load(source.at(i, "f32"), "vector<16xf32>")), to.at(i, "f32"))
    return t.finish()


def run(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    Kernel(text(name), "f")([x, y], [x.numel()])
    return y


@pytest.mark.parametrize("name", EXACT)
def test_error(name: str) -> None:
    x = torch.cat([torch.linspace(-87, 88.7, 40000), torch.linspace(-5, 5, 40000), torch.logspace(-30, 0, 2000)])
    x = x[: x.numel() // 16 * 16].contiguous()
    exact = EXACT[name](x.double())
    error = (run(name, x).double() - exact).abs()
    if name in ("erf", "gelu", "gelu_tanh"):
        assert (error / exact.abs().clamp(min=1)).max() < 8e-7
    else:
        assert (error / exact.abs().clamp(min=1e-37)).max() < 3 * 2**-23


@pytest.mark.parametrize("name", EXACT)
def test_special_values(name: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 200.0, -200.0, 1e38, -1e38] * 2)
    y, exact = run(name, x), EXACT[name](x)
    finite_input = exact.isfinite() | x.isfinite() | (name in ("exp", "tanh", "erf", "relu", "sigmoid"))
    assert torch.allclose(y[finite_input], exact[finite_input], rtol=1e-6, equal_nan=True)
    assert y[2].isnan()


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_compiles_everywhere(level: str) -> None:
    assert toolchain.compile_module(text("gelu"), CPU_LEVELS[level])
