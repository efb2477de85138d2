"""Linears with integer activations, run by their rule outside of a program: a context whose views are tensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from kernel_bench import Kernel

from qcompile import dims
from qcompile.artifact import KernelSpec
from qcompile.dtypes import DTYPES
from qcompile.formats.lanes import Lanes, pack_lanes
from qcompile.lowering.mlir import templates
from qcompile.target import CPU_LEVELS, Target

HERE = [level for level in CPU_LEVELS.values() if not level.missing()]
Call = tuple[str, dict[str, Any], list[torch.Tensor], list[dims.Dim]]


@functools.cache
def kernel(template: str, params: str, target: Target) -> Kernel:
    spec = KernelSpec(template, json.loads(params))
    return Kernel(templates.emit(spec, target), templates.entry(spec), target)


class Run:
    """A lowering context whose views are tensors: `variants` runs the first choice that holds, at once."""

    def __init__(self, y: torch.Tensor, target: Target, threads: int):
        self.y, self.target, self.threads, self.ran = y, target, threads, list[str]()

    def shape(self, x: torch.Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def contiguous(self, x: torch.Tensor, dtype: str | None = None) -> torch.Tensor:
        return x.contiguous() if dtype is None else x.to(DTYPES[dtype]).contiguous()

    def as_float(self, x: torch.Tensor) -> torch.Tensor:
        return self.contiguous(x, "f32")

    def output(self, node: Any) -> torch.Tensor:
        return self.y

    def temp(self, shape: Sequence[dims.Dim], dtype: str) -> torch.Tensor:
        return torch.full([self.size(item) for item in shape], 0x7F, dtype=torch.int32).view(DTYPES[dtype])

    def size(self, item: dims.Dim) -> int:
        return dims.evaluate(item, {"threads": self.threads, "m": 5})

    def call(self, template: str, params: dict[str, Any], args: Any, sizes: Any, writes: Any) -> Call:
        return template, params, args, sizes

    def variants(self, choices: Any) -> None:
        calls = next(calls for when, calls in choices if when is None or self.size(when[0]) <= when[1])
        for template, params, args, sizes in calls:
            self.ran.append(template)
            run = kernel(template, json.dumps(params, sort_keys=True), self.target)
            run(args, [self.size(item) for item in sizes], self.threads)


def weight(n: int, format: Lanes, k: int) -> dict[str, torch.Tensor]:
    groups = k // format.group
    codes = torch.randint(len(format.table) if format.table else 1 << format.bits, (n, k), dtype=torch.uint8)
    zeros = torch.randint(1 << format.bits, (n, groups)) + (0.25 if format.zero in ("f16", "f32") else 0)
    return pack_lanes(format, codes, torch.rand(n, groups) * 0.02 + 0.001, zeros, torch.randn(n, groups) * 0.05)


def close(y: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert not y.isnan().any()
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()
