"""Reading GGUF files: metadata and tensors of llama.cpp's container, every size checked against the file."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.errors import CheckpointError
from qcompile.sources import Table, TensorInfo, dtype_name, tensor_at

MAX_TENSORS, MAX_KEYS, MAX_NAME, MAX_RANK = 1_000_000, 100_000, 65_535, 4
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# ggml's type number -> name, weights in a block, bytes of a block (ggml/src/ggml-common.h)
BLOCKS: dict[int, tuple[str, int, int]] = {
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    29: ("iq1_m", 256, 56),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
}


@dataclass(frozen=True)
class _Stored:
    info: TensorInfo
    dtype: torch.dtype
    begin: int
    end: int


class _Cursor:
    """A place in a file that never goes past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str, found: object = "", expected: object = "") -> CheckpointError:
        remedy = "download or convert the file again: it is damaged or not a GGUF file"
        return CheckpointError(
            what, where=f"{self.path}, byte {self.at}", found=found, expected=expected, remedy=remedy
        )

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fail("the file ends too early", f"{len(self.data) - self.at} bytes left", f"{count} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, most: int) -> int:
        value: int = self.number("Q")
        if value > most:
            raise self.fail(f"the file claims too many {what}", value, f"at most {most}")
        return value

    def string(self, most: int | None = None) -> str:
        return self.take(self.count("bytes in a string", len(self.data) if most is None else most)).decode(
            "utf-8", "replace"
        )

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if kind != _ARRAY:
            raise self.fail("a metadata value has an unknown type", kind)
        inner = self.number("I")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            length = self.count("values in an array", len(self.data) // dtype.itemsize)
            return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()
        if inner != _STRING:
            raise self.fail("an array holds values of an unknown type", inner, "numbers or strings")
        return [self.string() for _ in range(self.count("strings in an array", len(self.data) // 8))]


class GgufFile(Table[_Stored]):
    """A GGUF file (version 2 or 3, little endian) as a source of tensors under their GGUF names.

    `metadata` maps keys to numbers, strings and lists. A tensor in blocks is read as u8 [..., bytes of a row] and its
    `TensorInfo.encoding` names the block type ("q4_1"); any other is read as it is. Creation reads the headers only,
    `read` maps the file. CheckpointError when the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise CheckpointError("there is no such file", where=str(path), expected="a .gguf file")
        if path.stat().st_size < 24:
            raise CheckpointError(
                "the file is too short for GGUF", where=str(path), found=f"{path.stat().st_size} bytes"
            )
        with path.open("rb") as file:
            # A private map: torch wants writable memory, and what is written must never reach the file.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        cursor = _Cursor(path, self._data)
        if cursor.take(4) != b"GGUF":
            raise cursor.fail("the file does not start with GGUF", self._data[:4], "GGUF")
        version = cursor.number("I")
        if version not in (2, 3):
            raise cursor.fail("the GGUF version is not known", version, "2 or 3, little endian")
        tensors, keys = cursor.count("tensors", MAX_TENSORS), cursor.count("metadata keys", MAX_KEYS)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.string(MAX_NAME)
            self.metadata[key] = cursor.value(cursor.number("I"))
        self._tensors: dict[str, _Stored] = {}
        headers = [self._header(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise cursor.fail("general.alignment is not an alignment", alignment)
        start = -(-cursor.at // alignment) * alignment
        for name, info, dtype, size, offset in headers:
            if name in self._tensors:
                raise cursor.fail(f"the file holds tensor '{name}' twice")
            if start + offset + size > len(self._data):
                found = f"bytes {start + offset} to {start + offset + size}"
                raise cursor.fail(f"tensor '{name}' does not fit its file", found, f"at most {len(self._data)}")
            self._tensors[name] = _Stored(info, dtype, start + offset, start + offset + size)

    @staticmethod
    def _header(cursor: _Cursor) -> tuple[str, TensorInfo, torch.dtype, int, int]:
        name, rank = cursor.string(MAX_NAME), cursor.number("I")
        if rank > MAX_RANK:
            raise cursor.fail(f"tensor '{name}' has too many dimensions", rank, f"at most {MAX_RANK}")
        shape = tuple(reversed([cursor.count("elements along a dimension", 1 << 48) for _ in range(rank)]))
        kind, offset = cursor.number("I"), cursor.count("bytes before a tensor", 1 << 62)
        if kind in _PLAIN:
            dtype = _PLAIN[kind]
            return name, TensorInfo(dtype_name(dtype), shape), dtype, math.prod(shape) * dtype.itemsize, offset
        if kind not in BLOCKS:
            raise cursor.fail(f"tensor '{name}' has an unknown type", kind, "a type of ggml")
        encoding, weights, size = BLOCKS[kind]
        if not shape or shape[-1] % weights:
            raise cursor.fail(
                f"the rows of tensor '{name}' are no whole blocks", list(shape), f"a multiple of {weights}"
            )
        shape = (*shape[:-1], shape[-1] // weights * size)
        return name, TensorInfo("u8", shape, encoding), torch.uint8, math.prod(shape), offset

    def info(self, name: str) -> TensorInfo:
        return self._held(name).info

    def read(self, name: str) -> torch.Tensor:
        stored = self._held(name)
        return tensor_at(self._data, stored.begin, stored.end, stored.dtype, stored.info.shape)

    def header(self) -> dict[str, str]:
        return {}

    def sidecar(self, name: str) -> dict[str, Any] | None:
        return None

    def describe(self) -> str:
        return f"the file {self.path}"
