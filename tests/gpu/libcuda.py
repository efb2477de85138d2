"""The driver library for tests, as ctypes finds it: C functions over this process's memory, kernels in PTX that are evaluated.

What real code passes is read as the driver reads it: handles of 64 bits, an array of addresses for a kernel's arguments, as
many bytes of each as its PTX declares, options by number. Calls that the driver refuses are refused with its numbers.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_uint, c_void_p
from typing import Any

from gpu.ptx import Fault, Memory, parse, run

from qcompile.artifact import Extent
from qcompile.dtypes import itemsize

Range = tuple[int, int, bool]
"""An address, a number of bytes, and whether a kernel may write them."""

INVALID_VALUE, INVALID_CONTEXT, NO_BINARY, INVALID_PTX, INVALID_HANDLE, NOT_FOUND, ILLEGAL_ADDRESS = (
    1, 201, 209, 218, 400, 500, 700,
)  # fmt: skip
DEVICE = 3  # what cuDeviceGet makes of the ordinal 0
CONTEXT, STREAM = 0x7F5500001000, 0x7F5500002000  # the only ones
FREE_SHARED = 48 * 1024

OUT, HANDLE, TEXT = c_void_p, c_void_p, POINTER(c_char_p)
PROTOTYPES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, TEXT],
    "cuGetErrorString": [c_int, TEXT],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxSetCurrent": [HANDLE],
    "cuModuleLoadDataEx": [POINTER(c_void_p), c_void_p, c_uint, POINTER(c_int), POINTER(c_void_p)],
    "cuModuleGetFunction": [POINTER(c_void_p), HANDLE, c_char_p],
    "cuFuncSetAttribute": [HANDLE, c_int, c_int],
    "cuLaunchKernel": [HANDLE, *[c_uint] * 7, HANDLE, POINTER(c_void_p), c_void_p],
}


class Libcuda:
    """In place of ctypes.CDLL("libcuda.so.1"). Kernels may touch what `allowing` says and nothing else.

    `attributes` are the device's, by number; `launches` what was started: entry, grid, threads, shared bytes.
    """

    def __init__(self, capability: int = 120, most_shared: int = 99 * 1024, order: int | None = None):
        self.attributes = {75: capability // 10, 76: capability % 10, 97: most_shared}
        self.launches: list[tuple[str, tuple[int, int, int], int, int]] = []
        self.memory, self.order = Memory(), order
        self._here = threading.local()
        self._handles: dict[int, Any] = {}
        self._shared: dict[int, int] = {}
        self._texts: dict[int, bytes] = {}
        self._functions: dict[str, Any] = {}
        # Functions as the loader of a library finds them: addresses, of which ctypes knows no types.
        made = ctypes.CDLL(None)._FuncPtr
        for name, types in PROTOTYPES.items():
            called = ctypes.CFUNCTYPE(c_int, *types)(self._guarded(getattr(self, f"_{name}")))
            self._functions[name] = made(ctypes.cast(called, c_void_p).value)
            self._functions[name].callback = called  # lives as long

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu") and name in self._functions:
            return self._functions[name]
        raise AttributeError(f"undefined symbol: {name}")

    @contextmanager
    def allowing(self, ranges: Sequence[Range]) -> Iterator[None]:
        """Lets kernels touch these bytes; AssertionError where one changes what it may not write."""
        places = _merged(ranges)
        read_only = [
            (address, ctypes.string_at(address, size)) for address, size, written in ranges
            if size and not written and not any(w and a < address + size and address < a + s for a, s, w in ranges)
        ]  # fmt: skip
        for address, size in places:
            self.memory.add(address, size)
        try:
            yield
        finally:
            for address, _ in places:
                self.memory.remove(address)
        for address, before in read_only:
            assert ctypes.string_at(address, len(before)) == before, "a kernel wrote what it only reads"

    def _guarded(self, function: Callable[..., int]) -> Callable[..., int]:
        """`function` as C calls it: what it raises is an error of the driver, whose text says it."""

        def call(*args: Any) -> int:
            try:
                return function(*args)
            except Exception as error:
                code = ILLEGAL_ADDRESS if isinstance(error, Fault) else INVALID_VALUE
                self._texts[code] = f"{type(error).__name__}: {error}".encode()
                return code

        return call

    def _new(self, thing: object) -> int:
        handle = 0x7F5600000000 + 64 * len(self._handles)
        self._handles[handle] = thing
        return handle

    def _cuInit(self, flags: int) -> int:
        return INVALID_VALUE if flags else 0

    def _cuGetErrorName(self, code: int, out: Any) -> int:
        out[0] = b"CUDA_ERROR"
        return 0

    def _cuGetErrorString(self, code: int, out: Any) -> int:
        out[0] = self._texts.setdefault(code, b"")
        return 0

    def _cuDeviceGet(self, out: Any, ordinal: int) -> int:
        out[0] = DEVICE
        return 0 if ordinal == 0 else 101

    def _cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> int:
        assert device == DEVICE
        out[0] = self.attributes[attribute]
        return 0

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> int:
        assert device == DEVICE
        out[0] = CONTEXT
        return 0

    def _cuCtxGetCurrent(self, out: Any) -> int:
        out[0] = getattr(self._here, "context", None)
        return 0

    def _cuCtxSetCurrent(self, context: int) -> int:
        self._here.context = context
        return 0 if context == CONTEXT else INVALID_CONTEXT

    def _cuModuleLoadDataEx(self, out: Any, image: int, count: int, options: Any, values: Any) -> int:
        if getattr(self._here, "context", None) != CONTEXT:
            return INVALID_CONTEXT
        text = ctypes.string_at(image).decode(errors="replace")
        if not text.lstrip().startswith("//"):
            return NO_BINARY
        try:
            module = parse(text)
        except Fault as fault:
            given = {options[i]: values[i] or 0 for i in range(count)}
            said = str(fault).encode()[: given[6] - 1] + b"\0"
            ctypes.memmove(given[5], said, len(said))
            return INVALID_PTX
        out[0] = self._new(module)
        return 0

    def _cuModuleGetFunction(self, out: Any, module: int, name: bytes) -> int:
        if module not in self._handles:
            return INVALID_HANDLE
        if name.decode() not in self._handles[module].entries:
            return NOT_FOUND
        out[0] = self._new((self._handles[module], name.decode()))
        return 0

    def _cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> int:
        if function not in self._handles:
            return INVALID_HANDLE
        if attribute != 8 or value > self.attributes[97]:
            return INVALID_VALUE
        self._shared[function] = value
        return 0

    def _cuLaunchKernel(self, function: int, *rest: Any) -> int:
        x, y, z, threads, deep, wide, shared, stream, arguments, extra = rest
        if function not in self._handles or stream != STREAM:
            return INVALID_HANDLE
        if getattr(self._here, "context", None) != CONTEXT:
            return INVALID_CONTEXT
        module, name = self._handles[function]
        fits = 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16 and 0 < threads <= 1024 and (deep, wide) == (1, 1)
        if not fits or shared > self._shared.get(function, FREE_SHARED) or extra is not None:
            return INVALID_VALUE
        values = [
            int.from_bytes(ctypes.string_at(arguments[at], size), "little")
            for at, size in enumerate(module.entries[name].parameters.values())
        ]
        self.launches.append((name, (x, y, z), threads, shared))
        run(module, name, (x, y, z), threads, shared, values, self.memory, self.order)
        return 0


def ranges(pointers: Sequence[int], extents: Sequence[Extent]) -> list[Range]:
    """What a kernel may touch, given where its arguments lie."""
    return [
        (address, extent.elements * itemsize(extent.dtype), extent.written)
        for address, extent in zip(pointers, extents, strict=True)
    ]


def _merged(ranges: Sequence[Range]) -> list[tuple[int, int]]:
    """The same bytes as ranges that do not overlap."""
    made: list[tuple[int, int]] = []
    for address, size, _ in sorted(ranges):
        if made and address < made[-1][0] + made[-1][1]:
            start, known = made[-1]
            made[-1] = (start, max(known, address + size - start))
        elif size:
            made.append((address, size))
    return made
