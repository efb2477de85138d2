"""A tensor source held in memory, and modules, for tests of methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.program import Module
from qcompile.sources import Names, TensorInfo, dtype_name


@dataclass
class InMemory:
    """Named tensors; `encodings` names the block types of GGUF tensors, `notes` are the header's, `sidecars` JSON files."""

    tensors: dict[str, torch.Tensor]
    encodings: dict[str, str] | None = None
    notes: dict[str, str] = field(default_factory=dict)
    sidecars: dict[str, dict[str, Any]] = field(default_factory=dict)

    def names(self) -> Names:
        return Names(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.read(name)
        return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), (self.encodings or {}).get(name, ""))

    def read(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"there is no tensor '{name}'")
        return self.tensors[name]

    def header(self) -> dict[str, str]:
        return self.notes

    def sidecar(self, name: str) -> dict[str, Any] | None:
        return self.sidecars.get(name)

    def describe(self) -> str:
        return "tensors in memory"


def linear(path: str, n: int, k: int, **more: Any) -> Module:
    """A linear module whose weight is called as transformers calls it."""
    return Module(path, "Linear", n, k, f"{path}.weight", **more)
