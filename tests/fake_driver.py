"""The libraries of GPUs' drivers as fakes that record what they are asked."""

from __future__ import annotations

import ctypes
import functools

from qcompile.artifact import Built, Launch

NAMES = {
    1: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"), 2: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    100: (b"CUDA_ERROR_NO_DEVICE", b"no CUDA-capable device is detected"),
    209: (b"CUDA_ERROR_NO_BINARY_FOR_GPU", b"no kernel image is available for execution on the device"),
    218: (b"CUDA_ERROR_INVALID_PTX", b"a PTX JIT compilation failed"),
    700: (b"CUDA_ERROR_ILLEGAL_ADDRESS", b"an illegal memory access was encountered"),
    701: (b"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", b"too many resources requested for launch"),
}  # fmt: skip


class FakeDriver:
    """Notes every call; a function named in `errors` returns that number, the others succeed."""

    def __init__(self, **errors):
        self.errors, self.calls, self.attributes, self.log, self.current = errors, [], {97: 101376}, b"", 0

    def __getattr__(self, name):
        return functools.partial(self._call, name)

    def _call(self, name, *args):
        self.calls.append((name, args))
        if self.errors.get(name):
            if name.endswith("ModuleLoadDataEx"):
                ctypes.memmove(args[4][0], self.log, len(self.log))
            return self.errors[name]
        answer = getattr(type(self), f"_{name}", None)
        if answer is not None:
            answer(self, *args)
        return 0

    def _cuGetErrorName(self, code, out):
        out._obj.value = NAMES[code][0] if code in NAMES else None

    def _cuGetErrorString(self, code, out):
        out._obj.value = NAMES[code][1] if code in NAMES else None

    def _cuDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = self.attributes[attribute]

    def _cuDevicePrimaryCtxRetain(self, out, device):
        out._obj.value = 77

    def _cuCtxGetCurrent(self, out):
        out._obj.value = self.current

    def _cuCtxSetCurrent(self, context):
        self.current = context.value

    def _cuModuleLoadDataEx(self, out, image, count, options, values):
        out._obj.value = 1000

    def _cuModuleGetFunction(self, out, module, name):
        out._obj.value = 2000

    def named(self, name):
        return [args for called, args in self.calls if called == name]


class FakeHip(FakeDriver):
    """As `FakeDriver`, under HIP's names."""

    def __init__(self, **errors):
        super().__init__(**errors)
        self.attributes = {74: 65536}

    _hipDrvGetErrorName = FakeDriver._cuGetErrorName
    _hipDrvGetErrorString = FakeDriver._cuGetErrorString
    _hipDeviceGetAttribute = FakeDriver._cuDeviceGetAttribute
    _hipModuleLoadDataEx = FakeDriver._cuModuleLoadDataEx
    _hipModuleGetFunction = FakeDriver._cuModuleGetFunction


def built(shared=0, scratch=2, object_=b"\x7fELF...", entry="kernel"):
    return Built("text", object_, entry, Launch(("d0", 1, 1), warps=4, shared=shared, scratch=scratch))
