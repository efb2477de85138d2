"""A checkpoint of one method as that of another, where both can hold the same weights; with a proof for each of them."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcompile.artifact import Artifact, Checkpoint, Module, Origin, Parameter, TransformRecord, WeightRecord
from qcompile.derive import derived
from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import ConfigError, InternalError, QCompileError
from qcompile.evaluate import dequantize
from qcompile.export import GENERATION, free_place, new_folder, write_checkpoint
from qcompile.export_gguf import FILE, source_of
from qcompile.format import Format, Packed
from qcompile.formats.affine import Affine
from qcompile.formats.dense import Dense
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.index import parse_config
from qcompile.repack import different, repack, weights
from qcompile.safetensors_folder import SafetensorsFolder
from qcompile.sources import Names, TensorInfo, TensorSource

if TYPE_CHECKING:
    from qcompile.program import Program


@dataclass(frozen=True)
class Moved:
    """One module: the kinds of the formats, and how many of its weights were compared bit for bit."""

    path: str
    source: str
    target: str
    weights: int
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """What was converted, and the proof: every weight of `modules` was decoded from both checkpoints and is equal.

    With `rounded` false they were compared before the rounding that each method ends with.
    """

    source: str
    target: str
    modules: tuple[Moved, ...]
    rounded: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        count = sum(row.weights for row in self.modules)
        lines = [f"{row.path}: {row.source} -> {row.target}{row.note and f' ({row.note})'}" for row in self.modules]
        when = "" if self.rounded else " before the rounding of each method"
        proof = (
            f"{count} weights of {len(self.modules)} modules, decoded from both checkpoints: equal bit for bit{when}"
        )
        return "\n".join([*lines, f"{self.source} -> {self.target}: {proof}"])


def convert(
    model: str | os.PathLike[str],
    to: str | Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    rounded: bool = True,
) -> Conversion:
    """Write the quantized checkpoint `model` (a folder, a hub id, a .gguf file) to `folder` as another method stores it.

    `to` is a method's name, whose config is then found from the source's bits and groups, or a config of it. No weight
    changes: what the other method leaves dense is stored dense, exactly. Methods round their weights differently at the
    end: with `rounded=False` it is enough that they are equal before that. ConfigError, with every reason, where the
    weights of one are no weights of the other.
    """
    from qcompile.capture import capture

    path = free_place(folder)
    program = capture(model)
    given = parse_config(None, program.quantization_config, program.source, program.model_config)
    if given is None:
        raise ConfigError(
            "the model is not quantized",
            where=program.source.describe(),
            expected="a quantized checkpoint",
            remedy="compile the float model under the other method's config and export that",
        )
    source = _Source.of(program, *given)
    config = derived(to, source.formats(), source.dense()) if isinstance(to, str) else to
    chosen = parse_config(dict(config))
    assert chosen is not None  # a config is no None
    made = _Made(source, *chosen, rounded)
    with new_folder(path) as staged:
        write_checkpoint(made.artifact(program), made, staged)
        rows = tuple(made.proven(_written(staged)))
    return Conversion(given[0].name, chosen[0].name, rows, rounded)


@dataclass(frozen=True)
class _Source:
    """The quantized modules of the source, each with what its method has selected."""

    method: Method
    config: MethodConfig
    source: TensorSource
    modules: Mapping[str, Module]
    selected: Mapping[str, Quantized]

    @staticmethod
    def of(program: Program, method: Method, config: MethodConfig) -> _Source:
        from qcompile.passes.quantize import expert_layers

        layers = {m.path: m for module in program.modules.values() for m in expert_layers(module, program.source)}
        modules = {path: m for path, m in (program.modules | layers).items() if m.kind != "Experts" or method.experts}
        found = {path: method.select(config, module, program.source, modules) for path, module in modules.items()}
        selected = {path: each for path, each in found.items() if isinstance(each, Quantized)}
        for path in selected:
            if modules[path].kind == "Experts":
                raise ConfigError("fused experts are not converted", where=path, expected="linear layers")
        return _Source(method, config, program.source, modules, selected)

    def formats(self) -> dict[str, Affine]:
        """The formats of the quantized modules that have terms."""
        return {path: each.format for path, each in self.selected.items() if isinstance(each.format, Affine)}

    def dense(self) -> tuple[str, ...]:
        """The linear layers that the source leaves dense."""
        return tuple(path for path, m in self.modules.items() if m.kind != "Embedding" and path not in self.selected)

    def claimed(self) -> set[str]:
        """The tensors that belong to quantized modules."""
        return {name for each in self.selected.values() for name in (*each.names.values(), *each.also_claims)}

    def read(self, path: str) -> Packed:
        return self.method.read(self.config, self.modules[path], self.selected[path], self.source)


@dataclass(frozen=True)
class _Floats:
    """The source as a float checkpoint, for a method to select from: quantized modules have a `weight` again."""

    of: _Source
    floats: Mapping[str, Module]

    @functools.cached_property
    def _names(self) -> Names:
        claimed = self.of.claimed()
        return Names((*(name for name in self.of.source.names() if name not in claimed), *self.floats))

    def names(self) -> Names:
        return self._names

    def info(self, name: str) -> TensorInfo:
        module = self.floats.get(name)
        return self.of.source.info(name) if module is None else TensorInfo(module.dtype, (module.n, module.k))

    def read(self, name: str) -> torch.Tensor:
        module = self.floats.get(name)
        if module is None:
            return self.of.source.read(name)
        packed = self.of.read(module.path)
        return dequantize(packed.format, packed.tensors, packed.N, packed.K).to(DTYPES[module.dtype])

    def header(self) -> Mapping[str, str]:
        return {}

    def sidecar(self, name: str) -> dict[str, Any] | None:
        return None

    def describe(self) -> str:
        return self.of.source.describe()


class _Made(Mapping[str, torch.Tensor]):
    """The tensors of the converted model by name, those of one module in memory at a time."""

    def __init__(self, source: _Source, method: Method, config: MethodConfig, rounded: bool):
        self.source, self.method, self.config, self.rounded = source, method, config, rounded
        modules = {
            path: replace(m, dtype=_dtype(source.selected[path].format)) if path in source.selected else m
            for path, m in source.modules.items()
        }
        floats = _Floats(source, {modules[path].weight: modules[path] for path in source.selected})
        self.modules = modules
        self.targets = {path: method.select(config, modules[path], floats, modules) for path in source.selected}
        self.records: dict[str, WeightRecord] = {}
        self._places: dict[str, tuple[str, str]] = {}
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._convert()

    def _convert(self) -> None:
        """Converts every module once, to know that it can be done, and what comes out."""
        refused = []
        for path in self.targets:
            try:
                packed = self._packed(path)
            except QCompileError as error:
                refused.append(error)
                continue
            self.records[path] = self._record(path, packed)
        if refused:
            first = {error.summary: error for error in reversed(refused)}
            counts = Counter(error.summary for error in refused)
            reasons = [f"{e.where}: {s}; found {e.found}, expected {e.expected}" for s, e in first.items()]
            more = [f" ({counts[summary] - 1} more like it)" if counts[summary] > 1 else "" for summary in first]
            raise ConfigError(
                f"{len(refused)} of {len(self.targets)} modules have no such weight in {self.method.name}",
                where=self.source.source.describe(),
                found="; ".join(reason + tail for reason, tail in zip(reasons, more, strict=True)),
                expected=f"weights that {self.method.name} stores without a change",
                remedy=refused[0].remedy,
            )

    def _packed(self, path: str) -> Packed:
        packed, target = self.source.read(path), self.targets[path]
        if isinstance(target, Quantized):
            return repack(packed, target.format, path, rounded=self.rounded)
        if packed.before or packed.after or packed.residual is not None:
            around = [each.transform.summary() for each in (*packed.before, *packed.after)]
            raise ConfigError(
                f"{self.method.name} leaves this module dense: {target.reason}",
                where=path,
                found=f"a layer whose input or output is changed ({', '.join(around) or 'residual'})",
                expected="a weight alone",
            )
        weight = dequantize(packed.format, packed.tensors, packed.N, packed.K)
        exact = (dtype for dtype in ("f16", "bf16", "f32") if torch.equal(weight.to(DTYPES[dtype]).float(), weight))
        format_ = Dense(next(exact, "f32"))
        return replace(packed, format=format_, tensors={"weight": weight.to(DTYPES[format_.dtype])})

    def _record(self, path: str, packed: Packed) -> WeightRecord:
        """A record whose tensors are names of this mapping."""
        places = {name: f"{path}\0{name}" for name in _flat(packed)}
        self._places |= {place: (path, name) for name, place in places.items()}

        def around(applied: Any, key: str) -> TransformRecord:
            return TransformRecord(
                applied.transform.to_json(), {name: places[f"{key}.{name}"] for name in applied.tensors}
            )

        data = packed.format.to_json()
        after = tuple(around(each, f"after{i}") for i, each in enumerate(packed.after))
        quantized = isinstance(self.targets[path], Quantized)
        origin = Origin(self.modules[path], data, quantized, after=after, bias=places.get("\0bias"))
        return WeightRecord(
            data,
            {name: places[name] for name in packed.tensors},
            packed.N,
            packed.K,
            0,
            packed.N,
            before=tuple(around(each, f"before{i}") for i, each in enumerate(packed.before)),
            residual=None if packed.residual is None else around(packed.residual, "residual"),
            origin=origin,
        )

    def artifact(self, program: Program) -> Artifact:
        """The converted model, as far as a checkpoint is written from it."""
        source, claimed = self.source.source, self.source.claimed()
        rest = {name: Parameter(name, source.info(name).dtype) for name in source.names() if name not in claimed}
        return Artifact(
            target="reference",
            kind=program.kind,
            weights=self.records,
            model_config=program.model_config,
            quantization_config=self.config.to_dict(),
            checkpoint=Checkpoint(rest, source.sidecar(GENERATION) or {}),
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._places:
            return self.source.source.read(name)
        path, part = self._places[name]
        if self._last[0] != path:
            self._last = (path, _flat(self._packed(path)))
        return self._last[1][part]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._places, *self.source.source.names()))

    def __len__(self) -> int:
        return len(self._places) + len(self.source.source.names())

    def proven(self, written: TensorSource) -> Iterator[Moved]:
        """Each module read back from what was written, as any reader would, and compared with the source."""
        config = written.sidecar("config.json") or {}
        chosen = parse_config(None, config.get("quantization_config"), written, config)
        method, parsed = chosen if chosen is not None else (self.method, self.config)
        for path, target in self.targets.items():
            true = self.source.read(path)
            try:
                packed = self._read(path, method, parsed, written)
            except QCompileError as error:
                raise ConfigError(
                    f"{method.name} has no checkpoint that holds these weights",
                    where=path,
                    found=f"{error.summary}: {error.found}",
                    expected=error.expected,
                ) from error
            if not _equal(true, packed, self.rounded):
                raise InternalError("a converted weight differs from its source", where=path, found=packed.format.kind)
            note = f"{method.name} leaves it dense: {target.reason}" if isinstance(target, Skip) else ""
            yield Moved(path, true.format.kind, packed.format.kind, true.N * true.K, note)

    def _read(self, path: str, method: Method, config: MethodConfig, written: TensorSource) -> Packed:
        module = self.modules[path]
        found = method.select(config, module, written, self.modules)
        if isinstance(found, Quantized):
            return method.read(config, module, found, written)
        weight = written.read(module.weight)
        weight = weight.t() if module.kind == "Conv1D" else weight
        return Packed(Dense(NAMES[weight.dtype]), {"weight": weight}, module.n, module.k)


def _written(folder: Path) -> TensorSource:
    """What `write_checkpoint` wrote."""
    file = folder / FILE
    return source_of(file) if file.exists() else SafetensorsFolder(folder)


def _dtype(format_: Format) -> str:
    """The dtype that a weight in this format would have as a float."""
    said = getattr(format_, "scale", getattr(format_, "dtype", "f16"))
    return said if said in ("f16", "bf16", "f32") else "f16" if format_.kind.startswith("gguf") else "f32"


def _flat(packed: Packed) -> dict[str, torch.Tensor]:
    """Every tensor of a packed weight and of what happens around it, by a name within the module."""
    around = {f"before{i}": each for i, each in enumerate(packed.before)}
    around |= {f"after{i}": each for i, each in enumerate(packed.after)}
    around |= {} if packed.residual is None else {"residual": packed.residual}
    out = packed.tensors | {f"{key}.{name}": t for key, each in around.items() for name, t in each.tensors.items()}
    return out if packed.bias is None else out | {"\0bias": packed.bias}


def _equal(left: Packed, right: Packed, rounded: bool) -> bool:
    """Whether two layers are the same, bit for bit: their weights, and what happens around them."""
    same = not bool(different(*(weights(each, rounded) for each in (left, right))).any())
    kinds = [[each.transform for each in (*p.before, *p.after, *filter(None, [p.residual]))] for p in (left, right)]
    parts = [{name: t for name, t in _flat(p).items() if name not in p.tensors} for p in (left, right)]
    return same and kinds[0] == kinds[1] and all(torch.equal(t, parts[1][name]) for name, t in parts[0].items())
