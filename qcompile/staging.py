"""What a compile keeps on disk instead of in memory: tensors it holds, and packed weights that outlive an interruption."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.format import Packed, format_from_json
from qcompile.transform import Applied, transform_from_json

SMALLEST = 1 << 16  # bytes; what is smaller stays in memory
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def give_back_freed_memory() -> None:
    """Large blocks that this process frees from now on go back to the system at once (glibc; elsewhere no change).

    glibc raises its threshold with every large block that is freed, and then keeps holes too small for the next tensor.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, SMALLEST)


class Spilled(dict[str, Tensor]):
    """Tensors by name, the large ones in files of `folder` that only this process sees and that go when it ends.

    They are mapped as shared memory: the system takes their pages back whenever it needs them.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Tensor]):
        super().__init__()
        self.folder = folder
        for name, tensor in entries.items():
            self[name] = tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, self._kept(tensor))

    def _kept(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta or tensor.nbytes < SMALLEST or tensor.device.type != "cpu":
            return tensor
        handle, path = tempfile.mkstemp(dir=self.folder, suffix=".tensor")
        os.close(handle)
        try:
            bytes_ = torch.from_file(path, shared=True, size=tensor.nbytes, dtype=torch.uint8)
        finally:
            os.unlink(path)
        kept = bytes_.view(tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor)


@dataclass(frozen=True)
class Stage:
    """A folder with packed weights, each in a file named after everything that it was made from."""

    folder: Path

    def key(self, weight: Tensor, facts: Any) -> str:
        """The name for what `facts` (JSON) make of a float weight."""
        digest = hashlib.sha256(json.dumps([str(weight.dtype), list(weight.shape), facts], sort_keys=True).encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).reshape(-1).numpy().data)
        return digest.hexdigest()

    def get(self, key: str) -> Packed | None:
        """The packed weight that was put under `key`; None where there is none, or its file is not whole."""
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["packed"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            packed = _packed(facts, tensors)
            packed.check(path.name)
        except (SafetensorError, QCompileError, LookupError, TypeError, ValueError):
            return None
        return packed

    def clear(self) -> None:
        """Removes what was put here, and the folder when nothing else is in it."""
        for path in [*self.folder.glob("*.safetensors"), *self.folder.glob("*.half")]:
            if re.fullmatch("[0-9a-f]{64}", path.stem):
                path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def put(self, key: str, packed: Packed) -> None:
        """Keeps a packed weight; the file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        facts, tensors = _facts(packed)
        half = self.folder / f"{key}.half"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, half, {"packed": json.dumps(facts)})
        half.rename(self.folder / f"{key}.safetensors")


def _facts(packed: Packed) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A packed weight as JSON and named tensors."""
    tensors = {f"tensors.{name}": tensor for name, tensor in packed.tensors.items()}
    facts: dict[str, Any] = {"format": packed.format.to_json(), "n": packed.N, "k": packed.K}
    places = {"before": packed.before, "after": packed.after, "residual": (packed.residual,) if packed.residual else ()}
    for place, applied in places.items():
        facts[place] = [each.transform.to_json() for each in applied]
        for i, each in enumerate(applied):
            tensors |= {f"{place}.{i}.{name}": tensor for name, tensor in each.tensors.items()}
    return facts, tensors | ({} if packed.bias is None else {"bias": packed.bias})


def _packed(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    def below(start: str) -> dict[str, Tensor]:
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    def applied(place: str) -> tuple[Applied, ...]:
        described = enumerate(facts[place])
        return tuple(Applied(transform_from_json(data), below(f"{place}.{i}.")) for i, data in described)

    format_, residual = format_from_json(facts["format"]), applied("residual")
    # A format's tensors have an order, which files do not keep.
    held = below("tensors.")
    order = {stored.name: held[stored.name] for stored in format_.stored(facts["n"], facts["k"])}
    return Packed(
        format_, order, facts["n"], facts["k"], applied("before"), applied("after"),
        residual[0] if residual else None, tensors.get("bias"),
    )  # fmt: skip
