"""The weights file: safetensors whose data start on a 64-byte boundary, so that it is used where it is mapped."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from qcompile import codec
from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import ArtifactError
from qcompile.runtime.folder import WEIGHTS
from qcompile.runtime.memory import ALIGNMENT

FILE_NAMES = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "f8e4m3": "F8_E4M3", "f8e5m2": "F8_E5M2", "f8e8m0": "F8_E8M0",
    "i64": "I64", "i32": "I32", "i16": "I16", "i8": "I8", "u8": "U8", "bool": "BOOL",
}  # fmt: skip
_BY_FILE_NAME = {file: name for name, file in FILE_NAMES.items()}
MAX_HEADER = 100 * 10**6
MAX_TENSORS = 200_000
CHUNK = 2**24


def _order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Those that fill whole lines first: each of them, and the first of the rest, starts on a boundary."""
    return sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))


def write_tensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` to `file`, one at a time; the bytes depend on names and contents only."""
    header: dict[str, Any] = {}
    at = 0
    for name in _order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise ArtifactError("a dtype cannot be stored", where=name, found=tensor.dtype, expected=", ".join(DTYPES))
        dtype = FILE_NAMES[NAMES[tensor.dtype]]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = codec.render(header).rstrip(b"\n")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in _order(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for begin in range(0, len(data), CHUNK):
            file.write(data[begin : begin + CHUNK].data)


def read_tensors(memory: mmap.mmap) -> dict[str, torch.Tensor]:
    """The tensors of a mapped weights file, as views of it; ArtifactError, before any is made, for a bad header."""
    if len(memory) < 8:
        raise ArtifactError("the weights file has no header", where=WEIGHTS, found=f"{len(memory)} bytes")
    length = int.from_bytes(memory[:8], "little")
    if length > MAX_HEADER or 8 + length > len(memory):
        most = min(MAX_HEADER, len(memory) - 8)
        raise ArtifactError(
            "the weights file's header is too long", where=WEIGHTS, found=length, expected=f"at most {most}"
        )
    header = codec.parse(memory[8 : 8 + length], WEIGHTS)
    if type(header) is not dict or len(header) > MAX_TENSORS:
        raise ArtifactError(
            "the weights file's header is not a table", where=WEIGHTS, expected=f"at most {MAX_TENSORS} tensors"
        )
    start, total = 8 + length, len(memory) - 8 - length
    places = sorted((_place(name, entry), name) for name, entry in header.items())
    at = 0
    for (begin, end, _, _), name in places:
        if begin != at:
            raise ArtifactError("tensors overlap or leave a hole", where=name, found=f"offset {begin}", expected=at)
        at = end
    if at != total:
        raise ArtifactError("the weights file's data have the wrong length", where=WEIGHTS, found=total, expected=at)
    return {
        name: _view(memory, start + begin, end - begin, dtype, shape) for (begin, end, dtype, shape), name in places
    }


def _place(name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of a header entry."""

    def bad(found: object, expected: str) -> ArtifactError:
        return ArtifactError(
            "a tensor's header is not sound", where=name[:200], found=repr(found)[:80], expected=expected
        )

    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad(entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _BY_FILE_NAME:
        raise bad(dtype, ", ".join(_BY_FILE_NAME))
    if type(shape) is not list or len(shape) > 16 or any(type(d) is not int or not 0 <= d < 2**48 for d in shape):
        raise bad(shape, "a list of sizes")
    if type(offsets) is not list or len(offsets) != 2 or any(type(o) is not int or not 0 <= o < 2**62 for o in offsets):
        raise bad(offsets, "two offsets")
    size = DTYPES[_BY_FILE_NAME[dtype]].itemsize
    for dim in shape:
        size *= dim
    if offsets[1] - offsets[0] != size:
        raise bad(offsets, f"{size} bytes, the size of {dtype} {shape}")
    return offsets[0], offsets[1], _BY_FILE_NAME[dtype], tuple(shape)


def _view(memory: mmap.mmap, start: int, length: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    if length == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    raw = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=length)
    # A dtype wider than a byte cannot be seen at any address: what is not aligned is copied.
    if raw.data_ptr() % ALIGNMENT:
        raw = raw.clone()
    return raw.view(DTYPES[dtype]).view(shape)
