"""Small graphs lowered by the CUDA rules, their kernels interpreted one after another: what a session does, without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu.interpret import run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from qcompile.artifact import Call, Executable, View
from qcompile.dims import evaluate
from qcompile.dtypes import DTYPES, NAMES
from qcompile.ledger import Ledger
from qcompile.lowering.lower import lower
from qcompile.lowering.triton import templates
from qcompile.program import Input, Program
from qcompile.report import Report
from qcompile.sources import ModuleState
from qcompile.target import target

INTERPRETED = target("cuda:interpret")


def program_of(function: Callable[..., Any], *examples: torch.Tensor) -> Program:
    """The Program of a function that calls overloads of operators, which may write to its inputs; of a float16 model."""
    graph = torch.fx.symbolic_trace(function)
    output = graph.graph.output_node()
    output.args = ((output.args[0],),)
    with FakeTensorMode() as mode:
        FakeTensorProp(graph, mode).propagate(*examples)
    nodes = graph.graph.find_nodes(op="placeholder")
    inputs = [Input(n.name, NAMES[x.dtype], tuple(x.shape)) for n, x in zip(nodes, examples, strict=True)]
    source = ModuleState(torch.nn.Module())
    return Program(
        graph=graph, kind="module", modules={}, inputs=tuple(inputs), outputs=("y",), sizes={}, tensors={}, source=source,
        ledger=Ledger(source), report=Report(), model_config={"torch_dtype": "float16"},
    )  # fmt: skip


class Interpreted:
    """A lowered program; calling it gives its first output. Inputs that kernels write to are changed in place.

    Memory that no kernel has written yet is NaN, or a large integer.
    """

    def __init__(self, program: Program):
        self.program = program
        self.executable: Executable
        self.executable, self.weights = lower(program, INTERPRETED, "exact", strict=True)

    @property
    def kernels(self) -> list[str]:
        """Templates in the order of their calls (of the last variant of each step)."""
        specs = self.executable.kernels
        calls = [call for step in self.executable.steps for call in step.variants[-1].calls]
        return [specs[call.kernel].template if call.kernel in specs else call.kernel for call in calls]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        sizes: dict[str, int] = {}
        for port, given in zip(self.program.inputs, inputs, strict=True):
            sizes |= {name: size for name, size in zip(port.shape, given.shape, strict=True) if isinstance(name, str)}
        tensors = self.weights | {port.name: x for port, x in zip(self.program.inputs, inputs, strict=True)}
        for name, buffer in self.executable.buffers.items():
            if name not in tensors:
                shape = [evaluate(dim, sizes) for dim in buffer.shape]
                fill = 0 if buffer.kind == "counter" else float("nan") if buffer.dtype in ("f32", "f16", "bf16") else 99
                tensors[name] = torch.full(shape, fill, dtype=DTYPES[buffer.dtype])
        for step in self.executable.steps:
            variants = (v for v in step.variants if v.when is None or evaluate(v.when[0], sizes) <= v.when[1])
            for call in next(variants).calls:
                self._call(call, tensors, sizes)
        return _view(self.executable.outputs[0].view, tensors, sizes)

    def _call(self, call: Call, tensors: dict[str, torch.Tensor], sizes: dict[str, int]) -> None:
        if call.kernel == "qcompile.matmul.default":
            x, w, y = (_view(view, tensors, sizes) for view in call.args)
            y.copy_(torch.ops.qcompile.matmul(x, w))
            return
        spec = self.executable.kernels[call.kernel]
        dims = [evaluate(dim, sizes) for dim in call.dims]
        flat = [tensors[view.buffer].view(-1)[evaluate(view.offset, sizes) :] for view in call.args]
        touched = templates.extents(spec)(tuple(dims), 0)
        for index, (extent, given) in enumerate(zip(touched, flat, strict=True)):
            assert DTYPES[extent.dtype] == given.dtype and extent.elements <= given.numel(), (index, extent)
            assert not extent.written or index in call.writes
        run(templates.emit(spec, INTERPRETED), flat, dims)


def _view(view: View, tensors: dict[str, torch.Tensor], sizes: dict[str, int]) -> torch.Tensor:
    shape, strides = ([evaluate(dim, sizes) for dim in dims] for dims in (view.shape, view.strides))
    return tensors[view.buffer].view(-1).as_strided(shape, strides, evaluate(view.offset, sizes))


def agrees(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], rtol: float = 1e-5, atol: float = 1e-5
) -> Interpreted:
    """Asserts that the kernels give what the operators give, in the output and in every input that they write to."""
    made, mine = Interpreted(program_of(function, *inputs)), [x.clone() for x in inputs]
    given = [x.clone() for x in inputs]
    found, expected = made(*mine), function(*given)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)
    for left, right in zip(mine, given, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol, equal_nan=True)
    return made
