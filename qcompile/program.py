"""A model on its way through the compiler: an FX graph, where its tensors come from, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from qcompile.artifact import Mixture
from qcompile.artifact import Module as Module
from qcompile.artifact import WeightRecord as WeightRecord
from qcompile.dims import Dim
from qcompile.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from qcompile.ledger import Ledger
    from qcompile.report import Report
    from qcompile.sources import TensorSource


@dataclass(frozen=True)
class Input:
    """An input of the graph in order: name, dtype and shape as the graph sees them (a str is a named size)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass
class Program:
    """A captured model.

    `graph` is an FX GraphModule of ATen and qcompile operators. Each placeholder is one of `inputs`, in order, or a
    state tensor named in `states` (after them). Each parameter, buffer or stored tensor is a `get_attr` node whose
    `meta["tensor"]` is its name and whose value is `tensors[name]`; a float parameter not yet read is on the meta device.
    Every node has `meta["val"]` (a FakeTensor), `meta["module"]` (module path, "" at the top) and, when a pass made it,
    `meta["made_by"]`. `sizes` maps each named size to its (least, greatest) value. `weights` has a record for each module
    whose weight a pass has given its place, `mixtures` one for each weight of a mixture of experts.
    """

    graph: torch.fx.GraphModule
    kind: Literal["causal-lm", "module"]
    modules: dict[str, Module]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    sizes: dict[str, tuple[int, int]]
    tensors: dict[str, torch.Tensor]
    source: TensorSource
    ledger: Ledger
    report: Report
    states: dict[str, Input] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    quantization_config: dict[str, Any] | None = None
    weights: dict[str, WeightRecord] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)

    def load(self, name: str, by: str | None = None) -> torch.Tensor:
        """The float tensor `name` as the graph computes with it, read from the source unless that is done already.

        With `by`, the tensor is claimed in the ledger and stays in `tensors`. CheckpointError when it is not in the
        source, or has another shape than the graph.
        """
        known = self.tensors[name]
        if not known.is_meta:
            return known
        stored = self.source.read(name) if by is None else self.ledger.read(name, by)
        encoding = self.source.info(name).encoding
        if encoding:
            stored = self._decoded(name, stored, encoding)
        if stored.shape != known.shape:
            raise CheckpointError(
                f"tensor '{name}' has another shape than the architecture",
                where=self.source.describe(),
                found=list(stored.shape),
                expected=list(known.shape),
                remedy="check that the checkpoint belongs to this config.json",
            )
        value = stored.to(device="cpu", dtype=known.dtype)
        if by is not None:
            self.tensors[name] = value
        return value

    def _decoded(self, name: str, blocks: torch.Tensor, encoding: str) -> torch.Tensor:
        from qcompile.evaluate import dequantize
        from qcompile.format import format_class

        format_, shape = format_class(f"gguf-{encoding}")(), self.tensors[name].shape
        flipped = any(module.weight == name and module.kind == "Conv1D" for module in self.modules.values())
        n, k = shape[::-1] if flipped else shape
        value = dequantize(format_, {format_.stored(n, k)[0].name: blocks}, n, k)
        return value.t() if flipped else value

    def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Runs the graph eagerly, one ATen or qcompile operator after another; outputs by name.

        Inputs and states go by name. Tensors that are not read yet are read for this call only.
        """
        names = [*(i.name for i in self.inputs), *self.states]
        if set(inputs) != set(names):
            raise ConfigError("the inputs are not those of the model", found=sorted(inputs), expected=sorted(names))
        results = _Eager(self).run(*(inputs[name] for name in names), enable_io_processing=False)
        return dict(zip(self.outputs, results, strict=True))


class _Eager(torch.fx.Interpreter):
    def __init__(self, program: Program):
        super().__init__(program.graph)
        self.program = program

    def run_node(self, node: torch.fx.Node) -> Any:
        with torch.no_grad():
            return self.program.load(node.meta["tensor"]) if node.op == "get_attr" else super().run_node(node)
