"""Reading folders of safetensors: one file or shards, every size checked against the file."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.sources import Table, TensorInfo, TensorSource, dtype_name, listing, tensor_at

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER, MAX_INDEX, MAX_RANK = 100_000_000, 200_000_000, 16
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_SIDECAR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.json")
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Stored:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _damaged(path: Path, what: str, found: object, expected: object) -> CheckpointError:
    remedy = "download or write the file again: it is damaged or not a safetensors file"
    return CheckpointError(what, where=str(path), found=found, expected=expected, remedy=remedy)


def _load_json(path: Path, text: bytes, what: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the {what} is not JSON", str(error)[:100], "a JSON object") from None
    if not isinstance(data, dict):
        raise _damaged(path, f"the {what} is not a JSON object", type(data).__name__, "a JSON object")
    return data


def _is_sizes(value: object, most: int) -> bool:
    whole = isinstance(value, list) and len(value) <= most
    return whole and all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**62 for x in value)  # type: ignore[attr-defined]


def read_header(path: Path) -> tuple[dict[str, _Stored], dict[str, str]]:
    """Tensor name -> where it lies in a safetensors file, and the file's metadata; sizes are checked before any is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _damaged(path, "the header is longer than the file", f"{length} bytes", f"at most {max(size - 8, 0)}")
        header = _load_json(path, file.read(length), "header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the header's metadata are not texts", repr(metadata)[:100], "an object of strings")
    tensors: dict[str, _Stored] = {}
    for name, entry in header.items():
        known = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
        if not known or entry["dtype"] not in SAFETENSORS_DTYPES:
            found = entry.get("dtype") if isinstance(entry, dict) else entry
            raise _damaged(path, f"tensor '{name}' has an unknown dtype", found, ", ".join(SAFETENSORS_DTYPES))
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _is_sizes(shape, MAX_RANK) or not _is_sizes(offsets, 2) or len(offsets) != 2:
            expected = "a list of sizes and a pair of offsets"
            raise _damaged(path, f"tensor '{name}' has no valid shape", f"{shape}, {offsets}"[:200], expected)
        dtype, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], offsets
        bytes_ = math.prod(shape) * dtype.itemsize
        if end - begin != bytes_ or end > size - 8 - length:
            expected = f"{bytes_} bytes for {entry['dtype']} {shape} inside the file's {size - 8 - length}"
            raise _damaged(path, f"tensor '{name}' does not fit its file", f"bytes {begin} to {end}", expected)
        tensors[name] = _Stored(path, dtype, tuple(shape), 8 + length + begin, 8 + length + end)
    _check_whole(path, tensors, 8 + length, size)
    return tensors, metadata


def _check_whole(path: Path, tensors: Mapping[str, _Stored], at: int, size: int) -> None:
    """Every byte from `at` to the file's end belongs to one tensor, as the format demands."""
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != at:
            raise _damaged(
                path, f"tensor '{name}' overlaps another, or follows a gap", f"byte {stored.begin}", f"byte {at}"
            )
        at = stored.end
    if at != size:
        raise _damaged(path, "the file goes on behind its last tensor", f"{size} bytes", f"{at} bytes")


@dataclass
class SafetensorsFolder(Table[_Stored]):
    """The tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Headers are read and checked on creation; `read` maps the file and copies nothing, unless `mapped` is False: then it
    gives a copy, and nothing of the file stays in the process. CheckpointError when a file is missing, damaged, lies
    outside the folder, or two shards hold the same tensor.
    """

    path: Path
    mapped: bool = True

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self._maps: dict[Path, mmap.mmap] = {}
        self._tensors: dict[str, _Stored] = {}
        self._metadata: dict[str, str] = {}
        if (self.path / SINGLE).is_file():
            self._tensors, self._metadata = read_header(self.path / SINGLE)
        elif (self.path / INDEX).is_file():
            self._read_shards(self.path / INDEX)
        else:
            raise CheckpointError(
                "there are no weights that can be read",
                where=str(self.path),
                found=listing(self.path),
                expected=f"{SINGLE} or {INDEX}",
                remedy="save the model as safetensors: pickled weights are never loaded",
            )

    def _read_shards(self, index: Path) -> None:
        if index.stat().st_size > MAX_INDEX:
            raise _damaged(index, "the index is too large", f"{index.stat().st_size} bytes", f"at most {MAX_INDEX}")
        where = _load_json(index, index.read_bytes(), "index").get("weight_map")
        if not isinstance(where, dict):
            raise _damaged(index, "the index has no weight_map", type(where).__name__, "tensor name -> file name")
        for file in sorted({str(file) for file in where.values()}):
            if not _FILE_NAME.fullmatch(file):
                raise CheckpointError(
                    "the index names a file outside its folder",
                    where=str(index),
                    found=repr(file[:200]),
                    expected="the plain name of a .safetensors file beside the index",
                    remedy="do not load this checkpoint unless you trust who made it",
                )
            if not (self.path / file).is_file():
                remedy = "download the checkpoint again: a shard is missing"
                raise CheckpointError("a shard is missing", where=str(index), expected=file, remedy=remedy)
            tensors, metadata = read_header(self.path / file)
            self._metadata |= metadata
            for name, stored in tensors.items():
                if name in self._tensors:
                    raise _damaged(index, f"tensor '{name}' lies in two files", self._tensors[name].path.name, file)
                self._tensors[name] = stored
        for name, file in where.items():
            found = self._tensors.get(name)
            if found is None or found.path.name != file:
                place = "nowhere" if found is None else found.path.name
                raise _damaged(index, f"tensor '{name}' is not where the index says", place, file)

    def info(self, name: str) -> TensorInfo:
        stored = self._held(name)
        return TensorInfo(dtype_name(stored.dtype), stored.shape)

    def read(self, name: str) -> torch.Tensor:
        stored = self._held(name)
        if not self.mapped:
            copy = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
            with stored.path.open("rb") as file:
                file.seek(stored.begin)
                file.readinto(copy.numpy().data)
            return copy.view(stored.dtype).reshape(stored.shape)
        if stored.path not in self._maps:
            with stored.path.open("rb") as file:
                # A private map: torch wants writable memory, and what is written must never reach the file.
                self._maps[stored.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return tensor_at(self._maps[stored.path], stored.begin, stored.end, stored.dtype, stored.shape)

    def header(self) -> Mapping[str, str]:
        return self._metadata

    def sidecar(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not _SIDECAR.fullmatch(name) or not path.is_file():
            return None
        if path.stat().st_size > MAX_INDEX:
            raise _damaged(path, "the file is too large", f"{path.stat().st_size} bytes", f"at most {MAX_INDEX}")
        return _load_json(path, path.read_bytes(), "file")

    def describe(self) -> str:
        return f"the checkpoint {self.path}"


def unmap(source: TensorSource) -> None:
    """Makes a folder of safetensors, which may be seen through other sources, give copies instead of mapped memory."""
    inner: Any = source
    while inner is not None and not isinstance(inner, SafetensorsFolder):
        inner = getattr(inner, "source", None)
    if inner is not None:
        inner.mapped = False
