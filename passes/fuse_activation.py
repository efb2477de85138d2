"""Activations that a model spells out in arithmetic become one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.passes.base import Context, Pass
from qcompile.passes.pattern import Pattern, rewrite
from qcompile.program import Program

aten = torch.ops.aten
mul, add = aten.mul.Tensor, aten.add.Tensor
SLOPE, CUBE = math.sqrt(2.0 / math.pi), 0.044715


def _silu(x: Any) -> Any:
    return mul(x, aten.sigmoid.default(x))


def _gelu_erf(x: Any) -> Any:
    return mul(mul(x, 0.5), add(aten.erf.default(aten.div.Tensor(x, math.sqrt(2.0))), 1.0))


def _gelu_new(x: Any) -> Any:
    inner = mul(add(x, mul(aten.pow.Tensor_Scalar(x, 3.0), CUBE)), SLOPE)
    return mul(mul(x, 0.5), add(aten.tanh.default(inner), 1.0))


def _gelu_fast(x: Any) -> Any:
    inner = mul(mul(x, SLOPE), add(mul(mul(x, CUBE), x), 1.0))
    return mul(mul(x, 0.5), add(aten.tanh.default(inner), 1.0))


def _gelu_tanh(x: Any) -> Any:
    return aten.gelu.default(x, approximate="tanh")


PATTERNS = (
    Pattern("silu", _silu, aten.silu.default, key=aten.sigmoid.default),
    Pattern("gelu", _gelu_erf, aten.gelu.default, key=aten.erf.default),
    Pattern("gelu-new", _gelu_new, _gelu_tanh, key=aten.tanh.default),
    Pattern("gelu-fast", _gelu_fast, _gelu_tanh, key=aten.tanh.default),
)


@dataclass(frozen=True)
class FuseActivation(Pass):
    """x * sigmoid(x) becomes silu, and the three ways to write GELU become gelu."""

    name: ClassVar[str] = "fuse-activation"

    def run(self, program: Program, ctx: Context) -> int:
        return rewrite(program, ctx, *PATTERNS)
