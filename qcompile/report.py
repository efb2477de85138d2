"""What happened to every weight and node of a model, as data: formats, kernels, and the reason wherever there is none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qcompile import codec
from qcompile.errors import InternalError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch.fx import Node


@dataclass(frozen=True)
class Refusal:
    """A pattern that agreed with the graph at `node` and failed below it, for `reason`. `module` is the node's module path."""

    pattern: str
    node: str
    module: str
    reason: str


@dataclass(frozen=True)
class Fallback:
    """A node that no kernel covers: it runs through ATen as `op`."""

    node: str
    op: str
    module: str
    reason: str


@dataclass(frozen=True)
class WeightRow:
    """One module's weight [n, k].

    `format` is how the source stores it and `layout` how the compiled model does (formats' kinds); `bits` counts the stored
    bits a weight in `layout`, scales included, and `bytes` its share of the weights file. `kernel` and `tier` come from
    lowering; the tier is "native" (integer dot products), "lanes" (the layout's own decoding), "generic" (decoding for any
    format), "aten" (no kernel) or "eager" (the reference target). `reason` says why the weight was not quantized, or why
    its layout or kernel is not the fast one. `around` says what happens to the layer's input and output beside the matmul.
    """

    path: str
    method: str
    format: str
    n: int
    k: int
    layout: str = ""
    bits: float = 0.0
    bytes: int = 0
    kernel: str = ""
    tier: str = ""
    reason: str = ""
    around: str = ""

    @property
    def why(self) -> str:
        """What a table says of the row."""
        return self.reason


@dataclass(frozen=True)
class NodeRow:
    """One lowered node and the kernels that its steps may run."""

    node: str
    op: str
    module: str
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class KernelRow:
    """One kernel's machine code for a GPU.

    `code` says which ("sm_90"); `tier` is that of a linear kernel. `tile` is the outputs, rows and inputs a step of one program,
    empty where a kernel has no schedule. `registers` of a thread, `spills` bytes of it that lie in memory instead, `shared`
    bytes of a program; `instructions` of the main loop a weight, 0 where that is not known.
    """

    kernel: str
    code: str
    tier: str = ""
    tile: tuple[int, ...] = ()
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: float = 0.0


@dataclass(frozen=True)
class LaunchRow:
    """What one token of one sequence starts in each of `count` layers whose paths differ in a number: "model.layers.*".

    `kernels` and `aten` operators are those of the layer with most.
    """

    layers: str
    count: int
    kernels: int
    aten: int


@dataclass
class Report:
    """The record of one compilation. Passes and lowering add to it; it is written as `report.json`."""

    target: str = ""
    accuracy: str = ""
    method: str = ""
    weights: dict[str, WeightRow] = field(default_factory=dict)
    nodes: list[NodeRow] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    passes: list[tuple[str, int]] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    launches: list[LaunchRow] = field(default_factory=list)

    def weight(self, row: WeightRow) -> None:
        """Adds the row of a module; InternalError when it has one."""
        if row.path in self.weights:
            raise InternalError("a module's weight is reported twice", where=row.path)
        self.weights[row.path] = row

    def update_weight(self, path: str, **changes: Any) -> None:
        """Changes fields of a module's row; `reason` is appended to what is there."""
        row = self.weights[path]
        if row.reason and "reason" in changes:
            changes["reason"] = "; ".join(filter(None, (row.reason, changes["reason"])))
        self.weights[path] = replace(row, **changes)

    def note(self, text: str) -> None:
        """Adds a line, once."""
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, refusal: Refusal) -> None:
        """Keeps a refusal, once."""
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def lowered(self, node: Node, kernels: Iterable[Iterable[str]]) -> None:
        """Notes the kernels (a list for each step) that `node` became."""
        names = tuple(dict.fromkeys(name for step in kernels for name in step))
        self.nodes.append(NodeRow(node.name, str(node.target), node.meta.get("module", ""), names))

    def fallback(self, node: Node, reason: str) -> None:
        """Notes that `node` runs through ATen, and why."""
        self.fallbacks.append(Fallback(node.name, str(node.target), node.meta.get("module", ""), reason))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data; `Report.from_json` reads it back."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists in place of tuples
        return data

    @staticmethod
    def from_json(data: Any) -> Report:
        """The report that `to_json` gave; ArtifactError where a field is unknown, missing or mistyped."""
        report: Report = codec.decode(Report, data, "report.json")
        return report

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that have a row."""
        return sum(row.bytes for row in self.weights.values())

    def why_not(self, path: str) -> list[str]:
        """Every recorded reason that concerns the module `path`: its weight's, the refusals at it, the fallbacks in it."""
        lines = [self.weights[path].reason] if path in self.weights and self.weights[path].reason else []
        lines += [f"{r.pattern}: {r.reason}" for r in self.refusals if r.module == path]
        return lines + [f"{f.op}: {f.reason}" for f in self.fallbacks if f.module == path]

    def table(self) -> Table:
        """The weights as a rich table, equal layers counted once."""
        return weight_table(self.weights.values())

    def kernel_table(self) -> Table:
        """The kernels for GPUs as a rich table, one row each code."""
        from rich.table import Table

        columns = (
            "kernel",
            "code",
            "tier",
            "tile",
            "warps",
            "stages",
            "registers",
            "spilled",
            "shared",
            "instr/weight",
        )
        table = Table(*columns)
        for row in self.kernels:
            numbers = (row.warps, row.stages, row.registers, row.spills, row.shared)
            counted = f"{row.instructions:.2f}" if row.instructions else ""
            table.add_row(row.kernel, row.code, row.tier, " x ".join(map(str, row.tile)), *map(str, numbers), counted)
        return table

    def __str__(self) -> str:
        console = plain_console()
        with console.capture() as capture:
            console.print(self.table())
            console.print(f"{len(self.weights)} weights, {self.weight_bytes / 1e6:.1f} MB")
            if self.kernels:
                console.print(self.kernel_table())
            for row in self.launches:
                through = f" and {row.aten} operators of ATen" if row.aten else ""
                console.print(f"{row.count} x {row.layers}: {row.kernels} kernels a token{through}")
            for (op, reason), count in Counter((f.op, f.reason) for f in self.fallbacks).items():
                console.print(f"through ATen, {count} x {op}: {reason}")
            for note in self.notes:
                console.print(f"note: {note}")
        return capture.get()


def plain_console() -> Console:
    """A rich console that prints tables as text, and names as they are: none of them is markup."""
    from rich.console import Console

    return Console(width=160, color_system=None, markup=False, emoji=False)


def weight_table(rows: Iterable[WeightRow]) -> Table:
    """The rows as a rich table, equal layers counted once."""
    from rich.table import Table

    groups: dict[tuple[str, ...], list[WeightRow]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row.path.split("."))
        kernel = f"{row.kernel} ({row.tier})" if row.kernel and row.tier else row.kernel or row.tier
        key = (pattern, f"{row.n} x {row.k}", row.format, row.layout, f"{row.bits:.2f}", kernel, row.why)
        groups.setdefault(key, []).append(row)
    table = Table("weight", "count", "shape", "format", "layout", "bits", "MB", "kernel", "reason")
    for (pattern, shape, format_, layout, bits, kernel, why), found in groups.items():
        size = f"{sum(row.bytes for row in found) / 1e6:.2f}"
        table.add_row(pattern, str(len(found)), shape, format_, layout, bits, size, kernel, why)
    return table
