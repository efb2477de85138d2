"""What a module would become, found out with stand-ins for its weight: what happens to x, the layout, the tier.

Nothing is decided here: the method says what happens to x, the backend says the layout, and the lowering rule says the tier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.backend import Backend
from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import QCompileError
from qcompile.format import Format, Packed
from qcompile.formats.native import Native
from qcompile.ledger import Ledger
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.ops import LinearSpec, Part
from qcompile.program import Input, Module, Program, WeightRecord
from qcompile.report import Report, WeightRow
from qcompile.sources import Wrapper
from qcompile.target import Target
from qcompile.transform import Transform

qc = torch.ops.qcompile
ROWS = 128  # of a weight that is quantized to see what the method does


class Blank(Wrapper):
    """A source of tensors as the headers of another say, of which nothing is read: floats are 1, whole numbers 0."""

    def read(self, name: str) -> torch.Tensor:
        info = self.info(name)
        dtype = DTYPES.get(info.dtype, torch.float64)
        return torch.full(info.shape, float(dtype.is_floating_point)).to(dtype)


@dataclass
class StandIns:
    """Layout and tier of the linears of `program` on `target`.

    Layers of other numbers that are stored alike are taken to be alike.
    """

    program: Program
    target: Target
    backend: Backend
    method: Method | None = None
    config: MethodConfig | None = None
    packed: dict[str, Packed | None] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)

    def treated(self, module: Module, found: Quantized | Skip, layout: Format) -> tuple[Format, tuple[Transform, ...]]:
        """The layout of a module's weight and what its linear does to x, where `layout` is that of one which leaves x alone."""
        packed = self._packed(module, found) if isinstance(found, Quantized) and not module.experts else None
        before = () if packed is None else tuple(each.transform for each in packed.before)
        if packed is None or not before:
            return layout, ()
        if self.backend.activation(before, packed.format, module.n, module.k) is not None:
            return layout, ()
        chosen = self.backend.layout(packed, before).packed.format
        return chosen if isinstance(chosen, Native) else layout, before

    def tier(self, module: Module, layout: Format, before: Sequence[Transform] = ()) -> str:
        """The tier of the kernel that reads a weight in `layout`: for one row of x, to which it does `before`, or one id."""
        transforms, embedding = [each.to_json() for each in before], module.kind == "Embedding"
        key = json.dumps([layout.to_json(), module.n, module.k, transforms, embedding], sort_keys=True)
        if key not in self.tiers:
            self.tiers[key] = self._lowered(module, layout, before)
        return self.tiers[key]

    def _packed(self, module: Module, found: Quantized) -> Packed | None:
        """What the method makes of a weight like the module's; None where it asks more of a weight than to be like it."""
        names = sorted(name.removeprefix(f"{module.path}.") for name in found.names.values())
        alike = [re.sub(r"\d+", "#", module.path), found.format.to_json(), module.n, module.k, names]
        key = json.dumps(alike, sort_keys=True)
        if key not in self.packed:
            assert self.method is not None and self.config is not None  # who else has chosen to quantize it
            try:
                if self.method.prequantized(self.config, self.program.source):
                    self.packed[key] = self.method.read(self.config, module, found, Blank(self.program.source))
                else:
                    like = replace(module, n=min(module.n, ROWS))
                    weight = torch.linspace(-1, 1, like.n * like.k).reshape(like.n, like.k)
                    self.packed[key] = self.method.quantize(self.config, like, weight)
            except QCompileError:
                self.packed[key] = None
        return self.packed[key]

    def _lowered(self, module: Module, layout: Format, before: Sequence[Transform]) -> str:
        """Lowers a program of this linear or embedding alone, whose tensors have no memory."""
        from qcompile.lowering.lower import lower

        n, k = module.n, module.k
        stored = {f"weight.{s.name}": s for s in layout.stored(n, k)}
        extras = {f"x.{i}.{s.name}": s for i, each in enumerate(before) for s in each.stored(k)}
        tensors = {
            name: torch.empty(s.shape, dtype=DTYPES[s.dtype], device="meta") for name, s in (stored | extras).items()
        }
        graph, root = torch.fx.Graph(), torch.nn.Module()
        embedding = module.kind == "Embedding"
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x = graph.placeholder("x")
            x.meta["val"] = torch.empty(1, dtype=torch.int64) if embedding else torch.empty(1, k)
            nodes = {}
            for name, tensor in tensors.items():
                attribute = name.replace(".", "_")
                root.register_buffer(attribute, tensor)
                nodes[name] = graph.get_attr(attribute)
                nodes[name].meta |= {"tensor": name, "val": mode.from_tensor(tensor)}
            weight, rest = [nodes[name] for name in stored], [nodes[name] for name in extras]
            if embedding:
                y = graph.call_function(qc.embedding.default, (x, weight, json.dumps(layout.to_json()), n, k))
            else:
                part = Part(layout.to_json(), n, len(stored))
                spec = LinearSpec(parts=(part,), k=k, before=tuple(each.to_json() for each in before))
                y = graph.call_function(qc.linear.default, (x, weight, rest, spec.to_text()))
            y.meta |= {"val": torch.empty(1, k if embedding else n), "module": module.path}
        graph.output((y,))
        source, report = self.program.source, Report()
        record = WeightRecord(layout.to_json(), {s.name: name for name, s in stored.items()}, n, k, 0, n)
        report.weight(WeightRow(module.path, "", layout.kind, n, k))
        given = Input("x", NAMES[x.meta["val"].dtype], tuple(x.meta["val"].shape))
        alone = Program(
            graph=torch.fx.GraphModule(root, graph), kind="module", modules={}, inputs=(given,),
            outputs=("y",), sizes={}, tensors=tensors, source=source, ledger=Ledger(source), report=report,
            model_config=self.program.model_config, weights={module.path: record},
        )  # fmt: skip
        lower(alone, self.target, "exact")
        return report.weights[module.path].tier
