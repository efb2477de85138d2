"""Memory that checks who touches it: this process's own as a GPU's global memory, and the memory that blocks or threads have."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable

import numpy as np
import torch
from gpu.ptx.parser import Fault
from gpu.ptx.values import Array


class Memory:
    """The global memory that kernels may touch: ranges of addresses of this process. The last one added is seen first."""

    def __init__(self, *tensors: torch.Tensor):
        self._ranges: dict[int, tuple[int, str]] = {}
        self._starts: Array = np.zeros(0, np.uint64)
        for tensor in tensors:
            self.add_tensor(tensor)

    def add(self, address: int, size: int, name: str = "") -> None:
        """Lets kernels touch `size` bytes from `address` on; ranges do not overlap. `name` is for messages."""
        if size:
            self._ranges[address] = (size, name)
            self._changed()

    def add_tensor(self, tensor: torch.Tensor, name: str = "") -> None:
        self.add(tensor.data_ptr(), tensor.numel() * tensor.element_size(), name)

    def remove(self, address: int) -> None:
        """Takes back what was added at `address`."""
        if self._ranges.pop(address, None):
            self._changed()

    def _changed(self) -> None:
        starts = sorted(self._ranges)
        self._starts = np.array(starts, np.uint64)
        self._ends = np.array([start + self._ranges[start][0] for start in starts], np.uint64)
        if starts:
            # One array over everything, of which only what lies in a range is ever read.
            self._base = starts[0] & ~255
            size = -(-(int(self._ends[-1]) - self._base) // 16) * 16
            self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._base))

    def places(self, addresses: Array, size: int) -> Array:
        """Where accesses of `size` bytes lie in `view`, in bytes; Fault for one outside of all ranges, or not aligned."""
        wrong = addresses % np.uint64(size) != 0
        if wrong.any():
            raise Fault(f"address {int(addresses[wrong][0]):#x} is no multiple of {size}")
        if not len(self._starts):
            raise Fault("there is no memory")
        at = np.searchsorted(self._starts, addresses, "right") - 1
        wrong = (at < 0) | (addresses + np.uint64(size) > self._ends[at])
        if wrong.any():
            raise Fault(f"{size} bytes at {self._said(int(addresses[wrong][0]))}")
        return (addresses - np.uint64(self._base)).astype(np.int64)

    def _said(self, address: int) -> str:
        starts = [int(start) for start in self._starts]
        at = bisect.bisect(starts, address) - 1
        start = starts[max(at, 0)]
        size, name = self._ranges[start]
        return (
            f"{address:#x} are outside of all memory: {address - start} from the start of {size} bytes {name}".rstrip()
        )

    def view(self, dtype: np.dtype) -> Array:
        return self._bytes.view(dtype)


class Own:
    """Memory that each owner (a block, or a thread) has `size` bytes of, at the same addresses from `base` on.

    What was never written must not be read; nor, by tensor cores that read through descriptors (`proxy`), what was written
    since the last fence.
    """

    def __init__(self, owners: int, size: int, base: int):
        self.size, self.base, self.stride = size, base, -(-size // 16) * 16
        self.bytes = np.zeros(owners * self.stride, np.uint8)
        self.written, self.unfenced = np.zeros(owners * self.stride, bool), np.zeros(owners * self.stride, bool)

    def places(self, owners: Array, addresses: Array, size: int) -> Array:
        """Where accesses of `size` bytes lie in `bytes`; Fault as `Memory.places`."""
        at = addresses.astype(np.int64) - self.base
        wrong = (at < 0) | (at + size > self.size)
        if wrong.any():
            raise Fault(f"{size} bytes at {int(at[wrong][0])}, outside of the {self.size} that there are")
        if (wrong := at % size != 0).any():
            raise Fault(f"address {int(at[wrong][0])} is no multiple of {size}")
        return owners * self.stride + at

    def check(self, places: Array, size: int, proxy: bool = False) -> None:
        """Fault where one of the bytes at `places` must not be read."""
        flags = self.written.view(_BYTES[size])[places // size]
        if (wrong := flags != _ALL[size]).any():
            raise Fault(f"reads what was never written, {int(places[wrong][0]) % self.stride} bytes from the start")
        if proxy and self.unfenced[places].any():
            raise Fault("tensor cores read what was written since the last fence.proxy.async")

    def mark(self, places: Array, size: int, written: bool = True) -> None:
        """Notes that the bytes at `places` have been written (or not yet: a copy is on its way)."""
        flags = _ALL[size] if written else 0
        self.written.view(_BYTES[size])[places // size] = flags
        self.unfenced.view(_BYTES[size])[places // size] = _ALL[size]

    def fence(self, owners: Array) -> None:
        self.unfenced.reshape(-1, self.stride)[owners] = False


_BYTES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ALL = {size: _BYTES[size](int.from_bytes(b"\1" * size, "little")) for size in _BYTES}


def atomic(kind: str, dtype: type[np.generic]) -> Callable[[Array, Array, Array | None], Array]:
    """What an atomic operation writes, of what is there and its operands; Fault for one that is not known."""
    unsigned = np.dtype(dtype).kind == "u"
    known: dict[str, Callable[[Array, Array, Array | None], Array]] = {
        "add": lambda old, a, b: old + a, "and": lambda old, a, b: old & a, "or": lambda old, a, b: old | a,
        "xor": lambda old, a, b: old ^ a, "exch": lambda old, a, b: a, "min": lambda old, a, b: np.minimum(old, a),
        "max": lambda old, a, b: np.maximum(old, a), "cas": lambda old, a, b: b if old == a else old,
    }  # fmt: skip
    if kind not in known or (kind in ("and", "or", "xor") and not unsigned):
        raise Fault(f"atom.{kind} is not known")
    return known[kind]
