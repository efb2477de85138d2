"""Programs of one `qcompile.linear` or `qcompile.embedding`, lowered and run natively, beside the eager result."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tiny_programs import Call, program, run

from qcompile.artifact import Built, Executable, KernelSpec
from qcompile.experts import ExpertsSpec
from qcompile.format import Format
from qcompile.lowering.lower import lower
from qcompile.lowering.mlir import templates, toolchain
from qcompile.lowering.mlir.build import Builder
from qcompile.ops import LinearSpec, Part
from qcompile.program import Program
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.session import Session
from qcompile.target import Target, native

qc = torch.ops.qcompile
Tensors = dict[str, torch.Tensor]


class _Buffers(Call):
    """A module that calls one operator on stored tensors (buffers) and its inputs."""

    def __init__(self, stored: Sequence[torch.Tensor], extras: Sequence[torch.Tensor]):
        torch.nn.Module.__init__(self)
        self.names: dict[str, list[str]] = {}
        for kind, tensors in (("stored", stored), ("extras", extras)):
            self.names[kind] = [f"{kind}{i}" for i in range(len(tensors))]
            for name, tensor in zip(self.names[kind], tensors, strict=True):
                self.register_buffer(name, tensor)

    def of(self, kind: str) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self.names[kind]]


class _Linear(_Buffers):
    def __init__(self, spec: LinearSpec, stored: Sequence[torch.Tensor], extras: Sequence[torch.Tensor]):
        super().__init__(stored, extras)
        self.spec = spec.to_text()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        x, *more = inputs
        return qc.linear(x, self.of("stored"), [*self.of("extras"), *more], self.spec)


class _Experts(_Buffers):
    def __init__(self, spec: ExpertsSpec, stored: Sequence[torch.Tensor], bias: torch.Tensor | None):
        super().__init__(stored, [] if bias is None else [bias])
        self.spec = spec.to_text()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        x, expert, *share = inputs
        return qc.experts(x, expert, self.of("stored"), next(iter(self.of("extras")), None), self.spec, *share)


class _Embedding(_Buffers):
    def __init__(self, stored: Sequence[torch.Tensor], format: Format, n: int, k: int):
        super().__init__(stored, [])
        self.what = (json.dumps(format.to_json()), n, k)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return qc.embedding(inputs[0], self.of("stored"), *self.what)


class _Decoded(_Buffers):
    def __init__(self, stored: Sequence[torch.Tensor], format: Format, n: int, k: int):
        super().__init__(stored, [])
        self.what = (json.dumps(format.to_json()), n, k)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return qc.dequantize(self.of("stored"), *self.what) + inputs[0]


@functools.cache
def built(template: str, params: str, target: Target) -> Built:
    spec = KernelSpec(template, json.loads(params))
    source = templates.emit(spec, target)
    return Built(source, toolchain.compile_module(source, target), templates.entry(spec))


def build(executable: Executable, target: Target) -> dict[str, Built]:
    return {
        name: built(spec.template, json.dumps(spec.params, sort_keys=True), target)
        for name, spec in executable.kernels.items()
    }


def executable_of(made: Program, target: Target) -> tuple[Executable, Tensors]:
    """The lowered program; LoweringError if anything needs ATen."""
    return lower(made, target, "exact", strict=True)


def native_run(
    made: Program, inputs: Sequence[torch.Tensor], target: Target | None = None, threads: int = 2
) -> torch.Tensor:
    """The program's output from its kernels."""
    target = target or native()
    executable, weights = executable_of(made, target)
    bounds = Bounds.of(executable.kernels, Builder(), ours=True)
    session = Session(executable, weights, build(executable, target), threads=threads, bounds=bounds)
    names = [port.name for port in executable.inputs]
    (y,) = session(dict(zip(names, inputs, strict=True))).values()
    return y


def spec_of(parts: Sequence[tuple[Format, int, Tensors]], k: int, **more: object) -> LinearSpec:
    """The spec of weights given as (format, rows, stored tensors)."""
    made = tuple(Part(format.to_json(), n, len(tensors)) for format, n, tensors in parts)
    return replace(LinearSpec(k, made), **more)


def linear(
    parts: Sequence[tuple[Format, int, Tensors]], k: int, m: int, *, dynamic: bool = False, **more: object
) -> tuple[Program, list[torch.Tensor]]:
    """A program of one linear with random operands, and its inputs: x [m, k], then a tensor for each add and mul."""
    spec = spec_of(parts, k, **more)
    stored = [tensors[s.name] for format, n, tensors in parts for s in format.stored(n, k)]
    extras = [torch.randn(spec.n)] if spec.bias else []
    if spec.prologue is not None:
        extras += [torch.randn(k) for _ in range(1 + (spec.prologue["op"] == "layer_norm"))]
    later = [torch.randn(m, spec.n_out) for step in spec.epilogue if step["op"] in ("add", "mul")]
    inputs = [torch.randn(m, k), *later]
    return program(_Linear(spec, stored, extras), *inputs, dynamic={0: "m"} if dynamic else None), inputs


def embedding(format: Format, n: int, k: int, tensors: Tensors, ids: torch.Tensor) -> Program:
    return program(_Embedding([tensors[s.name] for s in format.stored(n, k)], format, n, k), ids)


def decoded(format: Format, n: int, k: int, tensors: Tensors) -> Program:
    """W + x for a number x."""
    return program(_Decoded([tensors[s.name] for s in format.stored(n, k)], format, n, k), torch.zeros(1))


def experts(
    format: Format,
    tensors: Tensors,
    experts: int,
    n: int,
    k: int,
    m: int,
    *,
    bias: bool = False,
    dynamic: bool = False,
    **more: Any,
) -> tuple[Program, list[torch.Tensor]]:
    """A program of a mixture's linear, and its inputs: x [m, k], the expert of each row, and shares where results are summed."""
    spec = replace(ExpertsSpec(experts, n, k, (Part(format.to_json(), experts * n, len(tensors)),)), **more)
    stored = [tensors[s.name] for s in format.stored(experts * n, k)]
    inputs = [torch.randn(m, k), torch.randint(experts, (m * spec.each,))]
    inputs += [torch.rand(m * spec.each // spec.summed, spec.summed)] if spec.summed else []
    made = _Experts(spec, stored, torch.randn(experts, n) if bias else None)
    return program(made, *inputs, dynamic={0: "m"} if dynamic else None), inputs


def differ(made: Program, inputs: Sequence[torch.Tensor], target: Target | None = None, threads: int = 2) -> float:
    """The greatest difference from the eager result, over the greatest eager number."""
    y, expected = native_run(made, inputs, target, threads), run(made, *inputs)
    assert y.shape == expected.shape
    return float((y - expected).abs().max() / expected.abs().max())
