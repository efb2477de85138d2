"""What compiling a model would give, from headers alone: formats, sizes, kernels and every reason why it would fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qcompile.backend import backend_for
from qcompile.errors import QCompileError
from qcompile.format import Format
from qcompile.formats.dense import Dense
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import parse_config
from qcompile.original import beside
from qcompile.passes.base import Context
from qcompile.passes.quantize import Weights
from qcompile.program import Module, Program
from qcompile.report import Report, WeightRow, plain_console, weight_table
from qcompile.stand_in import StandIns
from qcompile.target import Target
from qcompile.target import target as target_of

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 8  # problems in one error
BYTES_AT_WORK = 24  # for each weight of a layer, while it is quantized and laid out: six float32 copies at a time


@dataclass(frozen=True)
class PlanRow(WeightRow):
    """One module's weight [n, k]; `bytes` are those of the layout at most. `problem` is why `compile` fails at it."""

    problem: str = ""

    @property
    def why(self) -> str:
        return self.problem or self.reason


@dataclass(frozen=True)
class Plan:
    """What `compile` would make: about `output` bytes of weights, for which tensors take about `peak` bytes at a time.

    The process itself (about 0.5 GB of libraries) comes on top of that.
    """

    target: str
    method: str
    rows: tuple[PlanRow, ...]
    output: int
    peak: int

    @property
    def problems(self) -> list[PlanRow]:
        """The modules that would make `compile` fail."""
        return [row for row in self.rows if row.problem]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """The rows as a rich table, equal layers counted once."""
        return weight_table(self.rows)

    def __str__(self) -> str:
        console = plain_console()
        with console.capture() as capture:
            console.print(self.table())
            sizes = f"about {self.output / 1e6:.1f} MB, at the peak about {self.peak / 1e6:.1f} MB of tensors"
            console.print(f"{self.target}, {self.method or 'no method'}: {len(self.rows)} weights, {sizes}")
            console.print(f"{len(self.problems)} problems" if self.problems else "no problem")
        return capture.get()


def plan(
    model: Any,
    config: Any = None,
    *,
    target: str | Target | Sequence[str] = "cpu",
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Plan:
    """What `compile` with the same arguments would make of every weight, without reading or quantizing any.

    Errors that concern the whole config or checkpoint are raised; those of single modules are in the plan.
    """
    from qcompile.capture import capture

    place = target_of(target)
    program = capture(model, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    chosen = parse_config(config, program.quantization_config, program.source, program.model_config)
    backend = backend_for(place)
    ctx = Context(Report(), backend, *(chosen or (None, None)))
    linears = StandIns(program, place, backend, *(chosen or (None, None)))
    rows, seen = [], dict[tuple[str, str], str]()
    for module, found in survey(program, ctx):
        row = _row(module, found, linears, chosen[0].name if chosen else "")
        first = seen.setdefault((module.weight, row.format), module.path)
        rows.append(row if first == module.path else replace(row, bytes=0, reason=f"stored once, with {first}"))
    weights = {module.weight for module in program.modules.values()}
    others = sum(4 * tensor.numel() for name, tensor in program.tensors.items() if name not in weights)
    output = sum(row.bytes for row in rows) + others
    largest = max((row.n * row.k for row in rows), default=0)
    return Plan(place.name, chosen[0].name if chosen else "", tuple(rows), output, output + largest * BYTES_AT_WORK)


def survey(program: Program, ctx: Context) -> list[tuple[Module, Quantized | Skip | QCompileError]]:
    """What the method says of each module that the graph uses, or the error it raises."""
    weights = Weights.of(program, ctx)
    used = {node.meta["tensor"] for node in program.graph.graph.nodes if node.op == "get_attr"}
    out: list[tuple[Module, Quantized | Skip | QCompileError]] = []
    for module in program.modules.values():
        if module.weight in used:
            try:
                out.append((module, weights.decide(module)))
            except QCompileError as error:
                out.append((module, error))
    return out


def check(program: Program, ctx: Context) -> None:
    """Raises the first error of `survey`, with all the others named in it: before any weight is read."""
    errors = {str(found): found for _, found in survey(program, ctx) if isinstance(found, QCompileError)}
    if errors:
        first, *others = errors.values()
        raise first.along_with(others[:SHOWN], len(others))


def _row(module: Module, found: Quantized | Skip | QCompileError, linears: StandIns, method: str) -> PlanRow:
    n, k = module.n * max(module.experts, 1), module.k
    if isinstance(found, QCompileError):
        remedy = f"; {found.remedy}" if found.remedy else ""
        problem = f"{found.summary}: found {found.found}, expected {found.expected}{remedy}"
        return PlanRow(module.path, method, "", n, k, problem=problem)
    quantized = isinstance(found, Quantized)
    reason = found.note if isinstance(found, Quantized) else found.reason
    format_ = found.format if isinstance(found, Quantized) else _dense(linears.program, module)
    layout, why, tier = format_, "", "eager"
    if linears.target.backend != "reference":
        if module.kind != "Embedding":
            formed = linears.backend.form(format_, n, k)
            layout, why = (format_, formed) if isinstance(formed, str) else (formed, "")
        layout, before = linears.treated(module, found, layout)
        tier = linears.tier(module, layout, before)
    bits = layout.bits_per_weight(n, k)
    kept = beside(format_, n, k) if layout is not format_ else frozenset()
    more = sum(s.nbytes for s in format_.stored(n, k) if s.name in kept)
    reason = "; ".join(filter(None, (reason, why if layout is format_ else "")))
    return PlanRow(
        module.path, method if quantized else "none", format_.kind, n, k, layout.kind, bits,
        math.ceil(bits * n * k / 8) + more, tier=tier, reason=reason,
    )  # fmt: skip


def _dense(program: Program, module: Module) -> Format:
    """The format of a weight that stays as the source stores it."""
    from qcompile.format import format_class

    there = module.weight in program.source.names()
    info = program.source.info(module.weight) if there else None
    if info is not None and info.encoding:
        return format_class(f"gguf-{info.encoding}")()
    return Dense(info.dtype if info is not None and info.dtype in ("f16", "bf16") else "f32")
