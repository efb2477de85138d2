"""Puts packed weights into the graph: every linear and embedding reads stored tensors through their format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile import __version__
from qcompile.artifact import Origin, TransformRecord, WeightRecord
from qcompile.dtypes import NAMES
from qcompile.errors import CheckpointError, InternalError
from qcompile.evaluate import dequantize
from qcompile.format import Packed, format_class, format_from_json
from qcompile.formats.dense import Dense
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import args_of, arguments, call, is_call, substitute, tensor_node, unused_name
from qcompile.program import Module, Program
from qcompile.report import WeightRow
from qcompile.sources import TensorSource
from qcompile.transform import Applied

aten, qc = torch.ops.aten, torch.ops.qcompile


@dataclass(frozen=True)
class _Site:
    """A node that uses the weight of a module."""

    node: Node
    module: Module


def _weight_of(node: Node) -> tuple[Node, bool] | None:
    """The stored tensor that a linear or embedding node reads, and whether it is transposed ([K, N])."""
    weight = args_of(node)[1 if is_call(node, aten.linear.default) else 0]
    transposed = is_call(weight, aten.t.default)
    weight = weight.args[0] if transposed else weight
    known = isinstance(weight, Node) and weight.op == "get_attr" and weight.meta["val"].dim() == 2
    return (weight, transposed) if known else None


def _sites(program: Program) -> list[_Site]:
    by_tensor: dict[str, list[Module]] = {}
    for module in program.modules.values():
        by_tensor.setdefault(module.weight, []).append(module)
    sites = []
    for node in program.graph.graph.nodes:
        if not is_call(node, aten.linear.default, aten.embedding.default):
            continue
        found = _weight_of(node)
        if found is None:
            continue
        weight, transposed = found
        name, path = weight.meta["tensor"], node.meta.get("module", "")
        owners = by_tensor.get(name, [])
        kind = "Embedding" if is_call(node, aten.embedding.default) else "Conv1D" if transposed else "Linear"
        owners = [m for m in owners if m.path == path] or [m for m in owners if m.kind == kind]
        sites.append(_Site(node, owners[0] if owners else _unowned(node, name, kind)))
    return sites


def _unowned(node: Node, name: str, kind: Any) -> Module:
    """A description of a weight that is a bare parameter: no method sees it, and it stays dense."""
    found = _weight_of(node)
    assert found is not None  # the caller has looked
    rows, columns = found[0].meta["val"].shape
    n, k = (columns, rows) if found[1] else (rows, columns)
    return Module(name.removesuffix(".weight"), kind, n, k, name)


@dataclass(frozen=True)
class Around:
    """A transform in the graph: its JSON and the nodes of its stored tensors."""

    transform: str
    stored: tuple[Node, ...]


@dataclass(frozen=True)
class Placed:
    """A packed weight whose tensors are in the graph, and what its method does around the matmul."""

    record: WeightRecord
    stored: list[Node]
    before: tuple[Around, ...]
    after: tuple[Around, ...]
    residual: Around | None
    bias: Node | None
    around: str

    @property
    def is_bare(self) -> bool:
        """True when nothing happens around the matmul."""
        return not (self.before or self.after or self.residual is not None or self.bias is not None)


@dataclass
class Weights:
    """The packed weights made so far, by source tensor and format ("" for dense)."""

    program: Program
    ctx: Context
    prequantized: bool
    modules: dict[str, Module]
    placed: dict[tuple[str, str], Placed] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, ctx: Context) -> Weights:
        """No weight yet; the modules are those of the program, and the layers that mixtures of experts are made of."""
        method, config = ctx.method, ctx.config
        prequantized = method is not None and config is not None and method.prequantized(config, program.source)
        layers = {m.path: m for module in program.modules.values() for m in expert_layers(module, program.source)}
        return Weights(program, ctx, prequantized, program.modules | layers)

    def decide(self, module: Module) -> Quantized | Skip:
        """What the method says about a module."""
        method, config = self.ctx.method, self.ctx.config
        if method is None or config is None:
            return Skip("no quantization was asked for")
        if module.path not in self.modules:
            return Skip("a bare parameter, which belongs to no layer")
        if module.parts and self.prequantized:  # the layers of all experts, which are alike
            first, *_ = [self.decide(self.modules[path]) for path in module.parts]
            return first
        if module.kind == "Experts" and not method.experts:
            stored = "the checkpoint stores its weight dense"
            return Skip(stored if self.prequantized else "the method does not convert fused experts")
        return method.select(config, module, self.program.source, self.modules)

    def place(self, module: Module, selected: Quantized | Skip) -> Placed:
        """The record and the graph's nodes of a module's weight, stored when it is not yet."""
        key = (module.weight, "" if isinstance(selected, Skip) else json.dumps(selected.format.to_json()))
        known = self.placed.get(key)
        if known is not None and (isinstance(selected, Skip) or not module.tied):
            return known
        packed = self.pack(module, selected)
        if known is not None and known.is_bare and packed.is_bare:
            return known
        packed.check(module.path)
        made = place(self.program, module, packed)
        # What is done around a tied weight is each module's own.
        return self.placed.setdefault(key, made) if known is None else made

    def pack(self, module: Module, selected: Quantized | Skip) -> Packed:
        """The weight of a module, of all its experts where it has those, as the method says."""
        method, config = self.ctx.method, self.ctx.config
        if isinstance(selected, Skip) or method is None or config is None:
            return _dense(self.program, module)
        if not self.prequantized:
            return self._quantize(method, config, module, _float_weight(self.program, module))
        for name in (*selected.names.values(), *selected.also_claims):
            self.program.ledger.claim(name, module.weight)
        for name in selected.keeps:
            self.program.ledger.claim(name, name)
        return method.read(config, module, selected, self.program.source)

    def quantize_experts(self, module: Module) -> list[Packed]:
        """The float weight of every expert, quantized."""
        method, config = self.ctx.method, self.ctx.config
        assert method is not None and config is not None  # who else has chosen to quantize them
        weights = torch.split(_float_weight(self.program, module), module.n)
        return [self._quantize(method, config, expert(module, e), weight) for e, weight in enumerate(weights)]

    def _quantize(self, method: Method, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """The float weight quantized, or what an earlier compile that was interrupted has made of it."""
        stage = self.ctx.stage
        if stage is None:
            return method.quantize(config, module, weight)
        key = stage.key(weight, [config.to_dict(), asdict(module), __version__])
        packed = stage.get(key)
        if packed is None:
            packed = method.quantize(config, module, weight)
            stage.put(key, packed)
        return packed


def expert(module: Module, number: int) -> Module:
    """One expert of a mixture as a layer of its own."""
    return replace(module, path=f"{module.path}.{number}", kind="Linear", experts=0, transposed=False, parts=())


def expert_layers(module: Module, source: TensorSource) -> Iterator[Module]:
    """The layers that the source has for the experts of a mixture, one by one."""
    there = set(source.names()) if module.parts else set()
    several = len(module.parts) // max(module.experts, 1)
    for path in module.parts:
        weight = f"{path}.weight"
        dtype = source.info(weight).dtype if weight in there else "f32"
        yield Module(path, "Linear", module.n // several, module.k, weight, None, dtype)


@dataclass(frozen=True)
class Quantize(Pass):
    """Every linear reads `qcompile.dequantize` of stored tensors, every embedding becomes `qcompile.embedding`.

    The method decides for each module: its own format, read from the checkpoint or computed from the float weight, or dense
    as the source stores it. The reason for each dense one is in the report. A weight that several modules share is stored
    once for each format it is wanted in.
    """

    name: ClassVar[str] = "quantize"

    def run(self, program: Program, ctx: Context) -> int:
        method, config = ctx.method, ctx.config
        weights = Weights.of(program, ctx)
        if method is not None and config is not None:
            ctx.report.method = method.name
            for name, note in method.effects(config):
                ctx.report.note(f"{method.name} config, {name}: {note}")
        count = 0
        for site in _sites(program):
            if not ctx.take():
                break
            path = site.module.path
            ctx.working(self.name, path)
            selected = weights.decide(site.module)
            placed = weights.place(site.module, selected)
            self._replace(site, placed)
            count += 1
            if path not in program.weights:
                keep_record(program, ctx, site.module, selected, placed)
        return count

    def _replace(self, site: _Site, placed: Placed) -> None:
        node, record = site.node, placed.record
        weight = (placed.stored, json.dumps(record.format), record.n, record.k)
        if is_call(node, aten.embedding.default):
            made = call(node, qc.embedding.default, (node.args[1], *weight), self.name)
        else:
            made = layer(node, arguments(node)["input"], arguments(node)["bias"], placed, self.name)
        made.meta["module"] = site.module.path
        substitute(node, made)


def keep_record(program: Program, ctx: Context, module: Module, selected: Quantized | Skip, placed: Placed) -> None:
    """Notes where the weight of a module lies, in the program and in the report."""
    record = placed.record
    shared = next((path for path, other in program.weights.items() if other.tensors == record.tensors), "")
    skipped = isinstance(selected, Skip)
    reasons = (
        selected.reason if isinstance(selected, Skip) else selected.note,
        shared and f"stored once, with {shared}",
    )
    bits = format_from_json(record.format).bits_per_weight(record.n, record.k)
    assert record.origin is not None  # every weight that is placed has one
    origin = replace(record.origin, module=module, quantized=not skipped)
    program.weights[module.path] = replace(record, origin=origin)
    ctx.report.weight(
        WeightRow(
            module.path,
            "none" if skipped else ctx.report.method,
            record.format["kind"],
            module.n,
            module.k,
            record.format["kind"],
            bits,
            0 if shared else round(bits * record.n * record.k / 8),
            reason="; ".join(filter(None, reasons)),
            around=placed.around,
        )
    )


def layer(node: Node, x: Node, bias: Node | None, placed: Placed, made_by: str) -> Node:
    """A linear layer in front of `node`, with what its method does around the matmul."""
    for each in placed.before:
        x = transformed(node, x, each, made_by)
    record = placed.record
    weight = (placed.stored, json.dumps(record.format), record.n, record.k)
    dense = call(node, qc.dequantize.default, weight, made_by)
    made = call(node, aten.linear.default, (x, dense, bias if placed.bias is None else placed.bias), made_by)
    if placed.residual is not None:
        made = call(node, aten.add.Tensor, (made, transformed(node, x, placed.residual, made_by)), made_by)
    for each in placed.after:
        made = transformed(node, made, each, made_by)
    return made


def transformed(node: Node, x: Node, each: Around, made_by: str) -> Node:
    """A transform of x in front of `node`."""
    return call(node, qc.transform.default, (x, list(each.stored), each.transform), made_by)


def _blocks(program: Program, module: Module) -> Packed | None:
    """The module's weight where the source stores it in blocks (GGUF); None where it is a plain matrix."""
    encoding = program.source.info(module.weight).encoding
    if not encoding:
        return None
    format_ = format_class(f"gguf-{encoding}")()
    (blocks,) = format_.stored(module.n, module.k)
    return Packed(format_, {blocks.name: program.ledger.read(module.weight, module.weight)}, module.n, module.k)


def _float_weight(program: Program, module: Module) -> torch.Tensor:
    """The module's weight [N, K], of experts [E * N, K], as the source stores it.

    CheckpointError unless it is a float tensor of the module's shape.
    """
    blocks = _blocks(program, module)
    if blocks is not None:
        return dequantize(blocks.format, blocks.tensors, blocks.N, blocks.K)
    weight = program.ledger.read(module.weight, module.weight)
    flipped = module.kind == "Conv1D" or module.transposed
    one = (module.k, module.n) if flipped else (module.n, module.k)
    expected = (module.experts, *one) if module.kind == "Experts" else one
    if tuple(weight.shape) != expected or not weight.is_floating_point():
        raise CheckpointError(
            f"the weight '{module.weight}' is not a float matrix of the layer's shape",
            where=f"{module.path}, {program.source.describe()}",
            found=f"{NAMES.get(weight.dtype, weight.dtype)} {list(weight.shape)}",
            expected=f"f32, f16 or bf16 {list(expected)}",
            remedy="check that the checkpoint belongs to this architecture, and give the config it was quantized with",
        )
    weight = weight.transpose(-1, -2).contiguous() if flipped else weight
    return weight.reshape(-1, module.k)


def _dense(program: Program, module: Module) -> Packed:
    """The module's weight as the source stores it: a float matrix, or its blocks."""
    blocks = _blocks(program, module)
    if blocks is not None:
        return blocks
    weight = _float_weight(program, module)
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        weight = weight.float()
    return Packed(Dense(NAMES[weight.dtype]), {"weight": weight.contiguous()}, len(weight), module.k)


def place(program: Program, module: Module, packed: Packed) -> Placed:
    """Stores the tensors of a packed weight, and of the transforms around it, under names of the module."""
    if module.kind == "Embedding" and (packed.before or packed.after or packed.residual is not None):
        raise InternalError("a method transforms the input of an embedding", where=module.path)
    whole = len(packed.tensors) == 1 and "weight" in packed.tensors
    stored = [s.name for s in packed.format.stored(packed.N, packed.K)]
    names = {
        name: _keep(program, module, "packed" if whole else name, packed.tensors[name]) for name in stored
    }  # fmt: skip
    before = [_around(program, module, each) for each in packed.before]
    residual = None if packed.residual is None else _around(program, module, packed.residual)
    bias = None if packed.bias is None else _keep(program, module, "bias", packed.bias)
    after = [_around(program, module, each) for each in packed.after]
    record = WeightRecord(
        packed.format.to_json(),
        names,
        packed.N,
        packed.K,
        0,
        module.n,
        before=tuple(before),
        residual=residual,
        origin=Origin(module, packed.format.to_json(), after=tuple(after), bias=bias),
    )
    said = [each.transform.summary() for each in packed.before]
    said += [f"+ {packed.residual.transform.summary()}"] if packed.residual is not None else []
    said += [f"output {each.transform.summary()}" for each in packed.after]
    return Placed(
        record,
        [tensor_node(program, name) for name in names.values()],
        tuple(_nodes(program, each) for each in before),
        tuple(_nodes(program, each) for each in after),
        None if residual is None else _nodes(program, residual),
        None if bias is None else tensor_node(program, bias),
        ", ".join(said),
    )


def _keep(program: Program, module: Module, name: str, tensor: torch.Tensor) -> str:
    """The name under which a tensor of the module is stored now."""
    name = unused_name(program, f"{module.path}.{name}")
    program.tensors[name] = tensor
    return name


def _around(program: Program, module: Module, applied: Applied) -> TransformRecord:
    names = {name: _shared(program, module, name, tensor) for name, tensor in applied.tensors.items()}
    return TransformRecord(applied.transform.to_json(), names)


def _shared(program: Program, module: Module, name: str, tensor: torch.Tensor) -> str:
    """The name of a transform's tensor: that of an equal one, so that layers which treat x alike read one node."""
    for known, other in program.tensors.items():
        if (
            known.endswith(f".{name}")
            and other.dtype == tensor.dtype
            and not other.is_meta
            and torch.equal(other, tensor)
        ):
            return known
    return _keep(program, module, name, tensor)


def _nodes(program: Program, record: TransformRecord) -> Around:
    stored = tuple(tensor_node(program, name) for name in record.tensors.values())
    return Around(json.dumps(record.transform), stored)
