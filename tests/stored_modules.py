"""Modules of real checkpoints for tests of methods: what is stored, what a method makes of it, and calls of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import config as model_config
from in_memory import linear
from safetensors.torch import load_file

from qcompile.evaluate import dequantize
from qcompile.format import Packed
from qcompile.methods.base import Method, MethodConfig, Quantized
from qcompile.methods.index import parse_config
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder

DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True)
class StoredModule:
    """A quantized module of a folder: `source_weight` was quantized to `packed`, whose true value is `weight`.

    `probe` is an input of the real package's layer and its output, where the folder has them.
    """

    method: Method
    config: Any
    module: Module
    source: SafetensorsFolder
    packed: Packed
    weight: torch.Tensor
    source_weight: torch.Tensor
    probe: tuple[torch.Tensor, torch.Tensor] | None

    def stored(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors by their names within the module."""
        start = f"{self.module.path}."
        return {name[len(start) :]: self.source.read(name) for name in self.source.names() if name.startswith(start)}


def stored_modules(folder: Path) -> Iterator[StoredModule]:
    """The modules of a folder whose weight before quantization is known."""
    source, said = SafetensorsFolder(folder), model_config(folder)
    dtype = DTYPES[str(said.get("dtype") or said["torch_dtype"])]
    found = parse_config(None, said["quantization_config"], source)  # type: ignore[arg-type]
    assert found is not None
    data = load_file(folder / "reference.safetensors")
    for name, weight in data.items():
        path = name.removeprefix("source.").removesuffix(".weight").removesuffix(".weight_original")
        if name not in (f"source.{path}.weight", f"{path}.weight_original"):
            continue
        module = linear(path, *weight.shape, dtype=dtype)
        selected = found[0].select(found[1], module, source, {path: module})
        assert isinstance(selected, Quantized)
        x = data.get(f"probe.{path}.input", data.get(f"{path}.probe_input"))
        y = data.get(f"probe.{path}.output", data.get(f"{path}.probe_output"))
        yield StoredModule(
            *found, module, source, found[0].read(found[1], module, selected, source), data[f"{path}.weight"].float(),
            weight, None if x is None or y is None else (x.float(), y.float()),
        )  # fmt: skip


def value(packed: Packed) -> torch.Tensor:
    """The weight f32 [N, K] that a packed one stands for."""
    return dequantize(packed.format, packed.tensors, packed.N, packed.K)


def call(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """What the layer makes of x, f32, without a bias."""
    for each in packed.before:
        x = each(x)
    y: torch.Tensor = x @ value(packed).t()
    for each in packed.after:
        y = each(y)
    return y


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """True when the tensors have equal names, dtypes, shapes and bytes."""

    def same(x: torch.Tensor, y: torch.Tensor) -> bool:
        equal = x.dtype == y.dtype and x.shape == y.shape
        return equal and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y)))

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def read(method: Method, config: MethodConfig, module: Module, source: Any) -> Packed:
    """What a method reads of a module."""
    selected = method.select(config, module, source, {module.path: module})
    assert isinstance(selected, Quantized), selected
    return method.read(config, module, selected, source)
