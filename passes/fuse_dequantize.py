"""Reads packed weights inside the linear instead of unpacking them first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.ops import LinearSpec, Part
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import value
from qcompile.passes.pattern import Match, Pattern, rewrite
from qcompile.program import Program

aten, qc = torch.ops.aten, torch.ops.qcompile


def _find(x: Any, stored: Any, format: str, n: int, k: int, bias: Any) -> Any:
    return aten.linear.default(x, qc.dequantize.default(stored, format, n, k), bias)


def _replace(x: Any, stored: Any, format: str, n: int, k: int, bias: Any) -> Any:
    spec = LinearSpec(k, (Part(json.loads(format), n, len(stored)),), bias=bias is not None)
    return qc.linear.default(x, stored, [] if bias is None else [bias], spec.to_text())


def _float_input(match: Match) -> str | None:
    found = value(match["x"]).dtype
    return None if found.is_floating_point else f"the input is {found}"


FUSE = Pattern(
    "fuse-dequantize", _find, _replace, _float_input, shared=frozenset({qc.dequantize.default}), key=aten.linear.default
)


@dataclass(frozen=True)
class FuseDequantize(Pass):
    """linear(x, dequantize(stored), bias) becomes one `qcompile.linear` over the stored tensors."""

    name: ClassVar[str] = "fuse-dequantize"

    def run(self, program: Program, ctx: Context) -> int:
        return rewrite(program, ctx, FUSE)
