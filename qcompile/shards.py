"""Writes safetensors files tensor by tensor: one file, or shards with an index when there is much to write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from qcompile.errors import CheckpointError
from qcompile.safetensors_folder import INDEX, SAFETENSORS_DTYPES, SINGLE

SHARD_BYTES = 5 * 10**9
CHUNK = 2**24
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Shards:
    """The weights of a checkpoint on their way into `folder`; only the tensor being added is in memory.

    The data of a file are collected beside it, because its header, which comes first, names them all. `metadata` goes
    into every header. With `indexed` a single file is a shard too.
    """

    def __init__(
        self, folder: Path, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES, *, indexed: bool = False
    ):
        self.folder, self.metadata, self.shard_bytes = folder, dict(metadata), shard_bytes
        self.indexed = indexed
        self.files: list[tuple[Path, dict[str, Any]]] = []
        self.names: set[str] = set()
        self._data: BinaryIO | None = None
        self._at = 0

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._data is not None:
            self._data.close()
        if error is None:
            self._finish()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor; CheckpointError when its name is taken or its dtype has none in such files."""
        if name in self.names:
            raise CheckpointError("a tensor is written twice", where=str(self.folder), found=name)
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                "a dtype cannot be stored", where=name, found=tensor.dtype, expected=", ".join(_NAMES.values())
            )
        if self._data is None or (self._at and self._at + tensor.nbytes > self.shard_bytes):
            self._next()
        assert self._data is not None
        header = self.files[-1][1]
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [self._at, self._at + tensor.nbytes]}
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for begin in range(0, len(data), CHUNK):
            self._data.write(data[begin : begin + CHUNK].data)
        self._at += tensor.nbytes
        self.names.add(name)

    def _next(self) -> None:
        if self._data is not None:
            self._data.close()
        path = self.folder / f"{len(self.files) + 1}.data"
        self.files.append((path, {}))
        self._data, self._at = path.open("xb"), 0

    def _finish(self) -> None:
        if not self.files:
            self._next()
            assert self._data is not None
            self._data.close()
        count, weight_map, total = len(self.files), dict[str, str](), 0
        whole = count == 1 and not self.indexed
        for at, (path, header) in enumerate(self.files, 1):
            name = SINGLE if whole else f"model-{at:05}-of-{count:05}.safetensors"
            text = json.dumps({"__metadata__": self.metadata, **header}, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with (self.folder / name).open("xb") as out, path.open("rb") as data:
                out.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(data, out, CHUNK)
            total += path.stat().st_size
            path.unlink()
            weight_map |= dict.fromkeys(header, name)
        if not whole:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
