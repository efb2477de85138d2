"""A compiled model as a checkpoint again: the tensors and the config that its method's own package writes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcompile.artifact import Artifact, Checkpoint, Parameter, WeightRecord
from qcompile.dtypes import DTYPES
from qcompile.errors import ConfigError
from qcompile.evaluate import dequantize
from qcompile.export_gguf import FILE, write_gguf
from qcompile.format import Packed
from qcompile.formats.dense import Dense
from qcompile.methods.index import parse_config
from qcompile.original import original
from qcompile.shards import SHARD_BYTES, Shards

if TYPE_CHECKING:
    from qcompile.methods.base import Method, MethodConfig
    from qcompile.program import Program

GENERATION = "generation_config.json"
Tensors = Mapping[str, torch.Tensor]


def remember(program: Program) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """What a checkpoint needs beside the weights, and those of its tensors that the passes left nothing of.

    These are norm weights and biases that were folded or merged, and what a method keeps as it is: not read before an
    export. float64, which artifacts do not hold, becomes float32.
    """
    source, weights = (
        program.source,
        {record.origin.module.weight for record in program.weights.values() if record.origin},
    )
    parameters, lost = {}, {}
    for name, users in program.ledger.claims.items():
        info = source.info(name)
        if users != [name] or name in weights:
            continue
        if name not in program.tensors:
            lost[name] = source.read(name).float() if info.dtype == "float64" else source.read(name)
        parameters[name] = Parameter(name, "f32" if info.encoding or info.dtype == "float64" else info.dtype)
    return Checkpoint(parameters, source.sidecar(GENERATION) or {}), lost


def export_checkpoint(
    artifact: Artifact, tensors: Tensors, folder: str | Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `folder`, which must not hold anything yet: config.json, safetensors, and what else the method defines;
    or the one file model.gguf.

    The folder appears as a whole or not at all. ConfigError where the method defines no checkpoint, or the layout of the
    target has lost what the method stores.
    """
    with new_folder(free_place(folder)) as staged:
        write_checkpoint(artifact, tensors, staged, shard_bytes)


def free_place(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a checkpoint to be written; ConfigError where something is already."""
    path = Path(os.path.abspath(folder))
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError("something else is in the way", where=str(path), expected="an empty folder, or nothing")
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to write to, which is put at `path` as a whole if nothing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staged
        staged.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        os.rename(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class _Weights(Mapping[str, Packed]):
    """The quantized weights as their method packed them, each made when it is looked at."""

    def __init__(self, records: Mapping[str, WeightRecord], tensors: Tensors):
        self.records = {path: r for path, r in records.items() if r.origin is None or r.origin.quantized}
        self.tensors = tensors

    def __getitem__(self, path: str) -> Packed:
        return original(self.records[path], self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def write_checkpoint(artifact: Artifact, tensors: Tensors, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the files of `export_checkpoint` to the empty folder `folder`; an interruption leaves some of them."""
    chosen = None if artifact.quantization_config is None else parse_config(artifact.quantization_config)
    weights = _Weights(artifact.weights, tensors)
    config = {name: value for name, value in artifact.model_config.items() if name != "quantization_config"}
    sidecars, metadata, indexed = dict[str, Any](), {"format": "pt"}, False
    if chosen is not None:
        method, parsed = chosen
        if method.container == "gguf":
            write_gguf(folder / FILE, config, _encodings(weights), _tensors(artifact, tensors, weights, chosen))
            return
        if said := method.stored_config(parsed, weights):
            config["quantization_config"] = said
        config |= method.model_config(parsed, weights)
        indexed = method.indexed
        sidecars, metadata = method.sidecars(parsed, weights), method.metadata(parsed, weights, _dtype(artifact))
    if artifact.checkpoint.generation_config:
        sidecars[GENERATION] = artifact.checkpoint.generation_config
    with Shards(folder, metadata, shard_bytes, indexed=indexed) as out:
        for name, tensor in _tensors(artifact, tensors, weights, chosen):
            if name not in out.names:  # a weight that modules share is one tensor
                out.add(name, tensor)
    for name, content in {"config.json": config, **sidecars}.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _encodings(weights: _Weights) -> dict[str, str]:
    """The encoding of each tensor that holds blocks of a GGUF file."""
    formats = ((weights.records[path].origin, weights[path].format) for path in weights)
    return {
        origin.module.weight: format_.kind.removeprefix("gguf-")
        for origin, format_ in formats
        if origin is not None and not isinstance(format_, Dense)
    }


def _dtype(artifact: Artifact) -> str:
    """The dtype of the model's float tensors, by the first that no method has quantized."""
    kept = (parameter.dtype for parameter in artifact.checkpoint.parameters.values())
    return next((dtype for dtype in kept if dtype in ("f32", "f16", "bf16")), "f32")


def _tensors(
    artifact: Artifact, tensors: Tensors, weights: _Weights, chosen: tuple[Method, MethodConfig] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by its name in the architecture."""
    for path, record in artifact.weights.items():
        module = record.origin.module if record.origin is not None else None
        if path not in weights or chosen is None or module is None:
            yield _dense(original(record, tensors), record)
            continue
        method, config = chosen
        start = module.weight.removesuffix("weight")
        for name, tensor in method.write(config, module, weights[path]).items():
            yield name[1:] if name.startswith("/") else start + name, tensor
    for name, parameter in artifact.checkpoint.parameters.items():
        tensor = tensors[parameter.tensor]
        yield name, tensor.to(DTYPES[parameter.dtype]) if parameter.dtype in DTYPES else tensor


def _dense(packed: Packed, record: WeightRecord) -> tuple[str, torch.Tensor]:
    """A weight that no method has quantized, as the source has it; blocks of a GGUF file as float32."""
    assert record.origin is not None  # else there is no packed weight
    if isinstance(packed.format, Dense):
        weight = packed.tensors["weight"]
    else:
        weight = dequantize(packed.format, packed.tensors, packed.N, packed.K)
    module = record.origin.module
    if module.window:
        return module.weight, module.unflattened(weight)
    if module.experts:
        weight = weight.reshape(module.experts, module.n, module.k)
    return module.weight, weight.transpose(-1, -2) if module.kind == "Conv1D" or module.transposed else weight
