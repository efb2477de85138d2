"""Small functions on their way to kernels and back: captured, lowered by the CPU rules, compiled and run by a session."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tiny_programs import Call, program
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from qcompile.artifact import Built, KernelSpec
from qcompile.backend import ReferenceBackend
from qcompile.dtypes import NAMES
from qcompile.lowering.lower import lower
from qcompile.lowering.mlir.build import Builder
from qcompile.passes.base import Context, Pass, run_pipeline
from qcompile.program import Input, Program
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.session import Session
from qcompile.target import native


@functools.cache
def _built(text: str) -> Built:
    template, params = json.loads(text)
    return Builder().build({"kernel": (KernelSpec(template, params), native().name)})["kernel"]


class Lowered:
    """A function compiled for `examples`; calling it gives the first output. No operation may be left to ATen."""

    def __init__(
        self, function: Callable[..., Any], *examples: torch.Tensor, dynamic: dict[int, str] | None = None,
        passes: Sequence[Pass] = (), threads: int = 2, **parameters: torch.Tensor,
    ):  # fmt: skip
        self._lower(program(Call(function, **parameters), *examples, dynamic=dynamic), passes, threads)

    @classmethod
    def traced(cls, function: Callable[..., Any], *examples: torch.Tensor, threads: int = 2) -> Lowered:
        """For operators that write to an input, which export would replace; `function` calls overloads of operators."""
        made, graph = cls.__new__(cls), torch.fx.symbolic_trace(function)
        output = graph.graph.output_node()
        output.args = ((output.args[0],),)
        with FakeTensorMode() as mode:
            FakeTensorProp(graph, mode).propagate(*examples)
        nodes = graph.graph.find_nodes(op="placeholder")
        inputs = [Input(n.name, NAMES[x.dtype], tuple(x.shape)) for n, x in zip(nodes, examples, strict=True)]
        base = program(Call(lambda x: x + 1), examples[0])
        made._lower(replace(base, graph=graph, inputs=tuple(inputs)), (), threads)
        return made

    def _lower(self, given: Program, passes: Sequence[Pass], threads: int) -> None:
        self.program = given
        if passes:
            run_pipeline(self.program, passes, Context(self.program.report, ReferenceBackend(regions=True)))
        self.executable, weights = lower(self.program, native(), "exact", strict=True)
        kernels = {
            name: _built(json.dumps([spec.template, spec.params])) for name, spec in self.executable.kernels.items()
        }
        bounds = Bounds.of(self.executable.kernels, Builder(), ours=True)
        self.session = Session(self.executable, weights, kernels, threads=threads, bounds=bounds)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        names = [item.name for item in self.program.inputs]
        outputs = self.session(dict(zip(names, inputs, strict=True)))
        return next(iter(outputs.values()))

    @property
    def kernels(self) -> list[str]:
        """Templates in the order of their calls (of the last variant of each step)."""
        specs = self.executable.kernels
        return [specs[call.kernel].template for step in self.executable.steps for call in step.variants[-1].calls]


def agrees(
    function: Callable[..., Any], *inputs: torch.Tensor, rtol: float = 2e-6, atol: float = 2e-6, **options: Any
) -> Lowered:
    """Asserts that the kernels give what eager gives: same dtype and shape, values to the tolerances."""
    made = Lowered(function, *inputs, **options)
    parameters = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    expected = function(*inputs, **parameters)
    found = made(*inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    return made
