"""Programs made from small modules, for tests of passes: captured by torch.export alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import Dim, export

from qcompile.capture.flatten import flatten
from qcompile.capture.module import aliases, weight_modules
from qcompile.dtypes import NAMES
from qcompile.ledger import Ledger
from qcompile.passes.base import Context, Pass, check, run_pipeline
from qcompile.program import Input, Program
from qcompile.report import Report
from qcompile.sources import ModuleState


def program(module: torch.nn.Module, *examples: torch.Tensor, dynamic: dict[int, str] | None = None) -> Program:
    """The Program of a module called with `examples`; dimension i of each is the size named `dynamic[i]`."""
    dims = {i: Dim(name, min=1, max=512) for i, name in (dynamic or {}).items()}
    shapes: Any = tuple({i: d for i, d in dims.items() if i < x.dim()} for x in examples)
    shapes = (shapes,) if isinstance(module, Call) else shapes  # its forward takes *inputs
    exported = export(module.eval(), examples, dynamic_shapes=shapes if dims else None, strict=False)
    source, first = ModuleState(module), aliases(module)
    state = {name: source.read(first[name]) for name in first}
    flat = flatten(exported, lambda name: first.get(name, name), lambda name, fake: state.get(name, fake))
    modules = weight_modules(module, source)
    inputs = tuple(
        Input(name, NAMES[x.dtype], tuple((dynamic or {}).get(i, s) for i, s in enumerate(x.shape)))
        for name, x in zip(flat.inputs, examples, strict=True)
    )
    made = Program(
        graph=flat.graph, kind="module", modules=modules, inputs=inputs, outputs=("y",),
        sizes={name: (1, 512) for name in (dynamic or {}).values()}, tensors=dict(flat.tensors),
        source=source, ledger=Ledger(source), report=Report(),
    )  # fmt: skip
    check(made)
    return made


def ops(made: Program) -> list[str]:
    """The graph's operators in order, without the stored tensors."""
    return [str(node.target).removesuffix(".default") for node in made.graph.graph.nodes if node.op.startswith("call")]


def run(made: Program, *inputs: torch.Tensor) -> torch.Tensor:
    """The graph's first output, run eagerly."""
    with torch.no_grad():
        made.graph.recompile()
        result = made.graph(*inputs)
    return result[0] if isinstance(result, (tuple, list)) else result


def apply(made: Program, *passes: Pass, ctx: Context | None = None) -> Context:
    """Runs passes and gives the context, whose report holds counts and refusals."""
    ctx = ctx or Context(made.report)
    run_pipeline(made, passes, ctx)
    return ctx


def same(made: Program, passes: Sequence[Pass], inputs: Sequence[torch.Tensor], **context: Any) -> Context:
    """Runs passes and asserts that the result did not change (to 1e-5)."""
    before = run(made, *inputs)
    ctx = apply(made, *passes, ctx=Context(made.report, **context))
    torch.testing.assert_close(run(made, *inputs), before, rtol=1e-5, atol=1e-5)
    return ctx


def reasons(ctx: Context) -> list[str]:
    """The reasons of all refusals."""
    return [refusal.reason for refusal in ctx.report.refusals]


class Call(torch.nn.Module):
    """A module that calls a function on its inputs, with parameters given by name."""

    def __init__(self, function: Callable[..., torch.Tensor], **parameters: torch.Tensor):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, **{name: value for name, value in self.named_parameters()})
