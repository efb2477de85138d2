"""A tensor source held in memory, and modules and checkpoints for tests of methods."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qcompile.errors import CheckpointError
from qcompile.program import Module
from qcompile.sources import SafetensorsFolder, TensorInfo, dtype_name

CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"


@dataclass
class InMemory:
    """Named tensors; `encodings` names the block types of GGUF tensors."""

    tensors: dict[str, torch.Tensor]
    encodings: dict[str, str] | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.read(name)
        return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), (self.encodings or {}).get(name, ""))

    def read(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"there is no tensor '{name}'")
        return self.tensors[name]

    def describe(self) -> str:
        return "tensors in memory"


def linear(path: str, n: int, k: int, **more: Any) -> Module:
    """A linear module whose weight is called as transformers calls it."""
    return Module(path, "Linear", n, k, f"{path}.weight", **more)


def checkpoint(name: str) -> tuple[dict[str, Any], SafetensorsFolder, dict[str, torch.Tensor]]:
    """config.json, the stored tensors and the reference tensors of a shared checkpoint; skips the test without it."""
    folder = CHECKPOINTS / name
    if not folder.is_dir():
        pytest.skip(f"the checkpoint {name} is not in ../shared/checkpoints")
    config = json.loads((folder / "config.json").read_text())
    return config, SafetensorsFolder(folder), load_file(folder / "reference.safetensors")
