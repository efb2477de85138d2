"""An NVIDIA GPU: kernels loaded and started through the driver's own interface; memory, streams and graphs are torch's.

Nothing but the driver library and torch is needed: no Triton, no compiler. Every call of the driver is checked, and an
error says what was being done, what was found and what to do.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qcompile.artifact import Built, Launch
from qcompile.errors import ArtifactError, InternalError, QCompileError
from qcompile.runtime.plan import Table

Start = Callable[[int], None]
"""Starts a kernel on a stream (its handle)."""

ANYWHERE = "target='reference' runs anywhere"
DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that a kernel may have without asking for more
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)

OUT_OF_MEMORY, NO_DEVICE, LAUNCH_OUT_OF_RESOURCES = 2, 100, 701
WRONG_CODE = {200, 209, 218, 221, 222, 223}  # an image or PTX that this GPU or driver cannot take
MEMORY_FAULTS = {700, 714, 715, 716, 717, 718, 719}  # what a kernel does that runs outside its memory
MAX_DYNAMIC_SHARED, MOST_SHARED = 8, 97  # attributes of functions and devices
LOG_BUFFER, LOG_SIZE = 5, 6  # options of module loading
LOG_BYTES = 8192


class Library(Protocol):
    """The driver's functions; each returns 0 or the number of an error."""

    def __getattr__(self, name: str) -> Callable[..., int]: ...


@dataclass(frozen=True)
class Kernel:
    """A kernel in the GPU's memory. `function` is the driver's handle."""

    name: str
    function: int
    launch: Launch


class Device(Protocol):
    """A GPU as a session needs it; `torch` is where torch puts its tensors."""

    torch: torch.device

    def load(self, kernels: Mapping[str, Built]) -> list[Kernel]:
        """Makes kernels ready, in order; ArtifactError for code that is not for this device."""

    def launcher(self, kernel: Kernel, grid: tuple[int, int, int], pointers: Table, numbers: Table) -> Start:
        """What starts a kernel with the pointers that the table holds at that time."""

    def enter(self) -> None:
        """To be called before a series of starts and operations: they come after those of the series before."""

    def stream(self) -> int:
        """The handle of torch's current stream."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does again all that `run` starts; now it is only recorded. RuntimeError where it cannot be."""

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What waits for a copy on the CPU of what the tensor holds when all that was started is done."""

    def synchronize(self) -> None:
        """Returns when all that was started is done."""


class Driver:
    """The driver library, its errors turned into ours."""

    def __init__(self, library: Library | None = None):
        self.library = _open() if library is None else library
        code = self.library.cuInit(0)
        if code == NO_DEVICE:
            raise ArtifactError("this machine has no NVIDIA GPU", where="cuInit", found=self._text(code),
                                expected="a GPU that the driver sees", remedy=ANYWHERE)  # fmt: skip
        if code:
            raise ArtifactError("the NVIDIA driver does not start", where="cuInit", found=self._text(code),
                                expected="a working driver", remedy=f"nvidia-smi says more; {ANYWHERE}")  # fmt: skip

    def call(self, function: str, *args: Any, where: str = "") -> None:
        """Calls the driver; what went wrong is an error that names `where`."""
        code = getattr(self.library, function)(*args)
        if code:
            raise self._error(code, where or function, function)

    def _error(self, code: int, where: str, function: str) -> QCompileError:
        found = f"{function}: {self._text(code)}"
        if code == OUT_OF_MEMORY:
            remedy = "a smaller batch or length, or a GPU with more memory"
            return ArtifactError("not enough memory on the GPU", where=where, found=found, remedy=remedy)
        if code in WRONG_CODE:
            expected, remedy = "code for this GPU", f"compile for it (target='cuda'), or a newer driver; {ANYWHERE}"
            return ArtifactError("a kernel is not for this GPU or driver", where=where, found=found, expected=expected,
                                 remedy=remedy)  # fmt: skip
        if code == LAUNCH_OUT_OF_RESOURCES:
            return ArtifactError("a kernel needs more of this GPU than it has", where=where, found=found,
                                 expected="registers and shared memory enough for it",
                                 remedy=f"compile for this GPU (target='cuda'); {ANYWHERE}")  # fmt: skip
        if code in MEMORY_FAULTS:
            return InternalError("a kernel ran outside its memory", where=where, found=found,
                                 remedy="the process cannot use the GPU any more: start it again")  # fmt: skip
        return InternalError("the NVIDIA driver refuses a call", where=where, found=found)

    def _text(self, code: int) -> str:
        name, text = c_char_p(), c_char_p()
        self.library.cuGetErrorName(code, byref(name))
        self.library.cuGetErrorString(code, byref(text))
        return " ".join(
            [name.value.decode() if name.value else f"error {code}", f"({text.value.decode()})" if text.value else ""]
        ).strip()

    def attribute(self, index: int, attribute: int) -> int:
        """A number that describes the device `index`."""
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), attribute, self._device(index))
        return value.value

    def context(self, index: int) -> int:
        """The context of the device `index` that torch uses as well, held until the process ends."""
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(context), self._device(index))
        return context.value or 0

    def _device(self, index: int) -> c_int:
        device = c_int()
        self.call("cuDeviceGet", byref(device), index)
        return device

    def enter(self, context: int) -> None:
        """Makes a context this thread's current one, if it is not yet."""
        current = c_void_p()
        self.call("cuCtxGetCurrent", byref(current))
        if current.value != context:
            self.call("cuCtxSetCurrent", c_void_p(context))

    def load(self, name: str, kernel: Built, most_shared: int) -> Kernel:
        """The function of a kernel's cubin or PTX, allowed the shared memory that it needs."""
        launch = kernel.launch
        if launch is None:
            raise ArtifactError("a kernel is not for a GPU", where=name, expected="how it is started")
        if launch.shared > most_shared:
            raise ArtifactError("a kernel needs more shared memory than this GPU has", where=name,
                                found=f"{launch.shared} bytes", expected=f"at most {most_shared}",
                                remedy=f"compile for this GPU (target='cuda'); {ANYWHERE}")  # fmt: skip
        module, function = c_void_p(), c_void_p()
        log = ctypes.create_string_buffer(LOG_BYTES)
        options, values = (c_int * 2)(LOG_BUFFER, LOG_SIZE), (c_void_p * 2)(ctypes.addressof(log), LOG_BYTES)
        try:
            # PTX is text that ends with a zero; an object says itself how long it is.
            self.call("cuModuleLoadDataEx", byref(module), kernel.object + b"\0", 2, options, values, where=name)
        except QCompileError as error:
            said = log.value.decode(errors="replace").strip()
            found = error.found + (f"; {said[:500]}" if said else "")
            raise type(error)(error.summary, where=error.where, found=found, expected=error.expected,
                              remedy=error.remedy) from None  # fmt: skip
        self.call("cuModuleGetFunction", byref(function), module, kernel.entry.encode(), where=name)
        if launch.shared > DEFAULT_SHARED:
            self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, launch.shared, where=name)
        return Kernel(name, function.value or 0, launch)

    def launcher(self, kernel: Kernel, grid: tuple[int, int, int], pointers: Table, numbers: Table) -> Start:
        """What starts a kernel with the pointers and numbers that the tables (i64, contiguous) hold at that time.

        The driver reads each argument where its address in a list says: a pointer all of its entry, a number the low
        half of it. The null pointers behind them are the scratch memory that no kernel of ours uses.
        """
        if 0 in grid:
            return lambda stream: None
        if any(not 0 < count <= most for count, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise ArtifactError("a kernel needs more programs than a GPU starts at once", where=kernel.name,
                                found=grid, expected=f"1 to {MOST_PROGRAMS}",
                                remedy="a smaller batch or length")  # fmt: skip
        null = np.zeros(1, dtype=np.int64)
        entries = [table.ctypes.data + 8 * i for table in (pointers, numbers) for i in range(len(table))]
        entries += [null.ctypes.data] * kernel.launch.scratch
        arguments = (c_void_p * len(entries))(*entries)
        threads, shared, function = kernel.launch.warps * 32, kernel.launch.shared, kernel.function
        kept = (pointers, numbers, null)  # the list points into them
        start = self.library.cuLaunchKernel

        def run(stream: int, kept: Any = kept) -> None:
            code = start(function, *grid, threads, 1, 1, shared, stream, arguments, None)
            if code:
                raise self._error(code, kernel.name, "cuLaunchKernel")

        return run


def _open() -> Library:
    """The driver library with the types of the functions that are called often; ArtifactError where there is none."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise ArtifactError("this machine has no NVIDIA driver", where=name, found=error,
                            expected="a GPU with its driver", remedy=ANYWHERE) from None  # fmt: skip
    library.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    library.cuModuleLoadDataEx.argtypes = [c_void_p, c_char_p, c_uint, c_void_p, c_void_p]
    library.cuModuleGetFunction.argtypes = [c_void_p, c_void_p, c_char_p]
    library.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    return library


class CudaDevice:
    """One GPU of this machine through torch and the driver. `index` is torch's (None: its current device)."""

    def __init__(self, index: int | None = None, driver: Driver | None = None):
        self.driver = Driver() if driver is None else driver
        if not torch.cuda.is_available():
            built = torch.version.cuda
            raise ArtifactError(
                "torch cannot use the GPU of this machine", where="torch.cuda.is_available()",
                found=f"torch {torch.__version__}" + (f" for CUDA {built}" if built else " without CUDA"),
                expected="a torch for the driver's CUDA version", remedy=f"install such a torch; {ANYWHERE}",
            )  # fmt: skip
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.torch = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.context = self.driver.context(self.torch.index)
        self.last: torch.cuda.Stream | None = None

    def load(self, kernels: Mapping[str, Built]) -> list[Kernel]:
        self.driver.enter(self.context)
        most = self.driver.attribute(self.torch.index, MOST_SHARED)
        return [self.driver.load(name, kernel, most) for name, kernel in kernels.items()]

    def launcher(self, kernel: Kernel, grid: tuple[int, int, int], pointers: Table, numbers: Table) -> Start:
        return self.driver.launcher(kernel, grid, pointers, numbers)

    def enter(self) -> None:
        self.driver.enter(self.context)
        stream = torch.cuda.current_stream(self.torch)
        if self.last is not None and self.last != stream:
            stream.wait_stream(self.last)
        self.last = stream

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.torch).cuda_stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.torch)
        stream = torch.cuda.Stream(self.torch)  # type: ignore[no-untyped-call]
        try:
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            # What ends a recording that failed fails as well; what failed first says why.
            raise error if error.__context__ is None else error.__context__ from None
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves the other one current
        return graph.replay

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        copy = tensor.to("cpu", non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.torch))

        def wait() -> Tensor:
            done.synchronize()
            return copy

        return wait

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)
