"""A GPU: kernels loaded and started through the driver's own interface, NVIDIA's here, AMD's in `rocm`, which differs in little;
memory, streams and graphs are torch's.

Nothing but the driver library and torch is needed: no Triton, no compiler. Every call of the driver is checked, and an
error says what was being done, what was found and what to do.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass, field
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
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)

OUT_OF_MEMORY, NO_DEVICE, LAUNCH_OUT_OF_RESOURCES = 2, 100, 701
WRONG_CODE = {200, 209, 218, 221, 222, 223}  # an image or PTX that this GPU or driver cannot take
MEMORY_FAULTS = {700, 714, 715, 716, 717, 718, 719}  # what a kernel does that runs outside its memory
MAX_DYNAMIC_SHARED = 8  # an attribute of functions
LOG_BUFFER, LOG_SIZE = 5, 6  # options of module loading
LOG_BYTES = 8192


@dataclass(frozen=True)
class Interface:
    """What a vendor calls the functions of its driver, and where it draws its lines; numbers of errors are the same for all.

    `function` names the one called `name` in this file. A warp has `warp` threads. A kernel may have `free_shared` bytes of
    shared memory without asking for more, and what the device attribute `most_shared` says at most. The grid has at most
    `most_threads` threads along an axis. `family` is that of its targets, `status` the program that tells how the driver does,
    `build` what torch.version calls the platform that it was built for.
    """

    vendor: str
    family: str
    status: str
    build: str
    prefix: str
    warp: int
    free_shared: int
    most_shared: int
    most_threads: int
    names: Mapping[str, str] = field(default_factory=dict)

    def function(self, name: str) -> str:
        return self.prefix + self.names.get(name, name)


CUDA = Interface("NVIDIA", "cuda", "nvidia-smi", "cuda", "cu", 32, 48 * 1024, most_shared=97, most_threads=2**41)


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

    interface = CUDA

    def __init__(self, library: Library | None = None):
        self.library = self._open() if library is None else library
        vendor, init = self.interface.vendor, self.interface.function("Init")
        code = self._function("Init")(0)
        if code == NO_DEVICE:
            raise ArtifactError(f"this machine has no {vendor} GPU", where=init, found=self._text(code),
                                expected="a GPU that the driver sees", remedy=ANYWHERE)  # fmt: skip
        if code:
            raise ArtifactError(f"the {vendor} driver does not start", where=init, found=self._text(code),
                                expected="a working driver",
                                remedy=f"{self.interface.status} says more; {ANYWHERE}")  # fmt: skip

    def _function(self, name: str) -> Callable[..., int]:
        found: Callable[..., int] = getattr(self.library, self.interface.function(name))
        return found

    def call(self, name: str, *args: Any, where: str = "") -> None:
        """Calls a function of the driver; what went wrong is an error that names `where`."""
        code = self._function(name)(*args)
        if code:
            function = self.interface.function(name)
            raise self._error(code, where or function, function)

    @property
    def _again(self) -> str:
        return f"compile for this GPU (target='{self.interface.family}'); {ANYWHERE}"

    def _error(self, code: int, where: str, function: str) -> QCompileError:
        found = f"{function}: {self._text(code)}"
        if code == OUT_OF_MEMORY:
            remedy = "a smaller batch or length, or a GPU with more memory"
            return ArtifactError("not enough memory on the GPU", where=where, found=found, remedy=remedy)
        if code in WRONG_CODE:
            remedy = f"compile for it (target='{self.interface.family}'), or a newer driver; {ANYWHERE}"
            return ArtifactError("a kernel is not for this GPU or driver", where=where, found=found,
                                 expected="code for this GPU", remedy=remedy)  # fmt: skip
        if code == LAUNCH_OUT_OF_RESOURCES:
            return ArtifactError("a kernel needs more of this GPU than it has", where=where, found=found,
                                 expected="registers and shared memory enough for it", remedy=self._again)  # fmt: skip
        if code in MEMORY_FAULTS:
            blocking = f"{self.interface.build.upper()}_LAUNCH_BLOCKING=1"
            return InternalError("a kernel ran outside its memory", where=where, found=found,
                                 remedy="the process cannot use the GPU any more: start it again; it may have been an "
                                        f"earlier kernel, which {blocking} tells")  # fmt: skip
        return InternalError(f"the {self.interface.vendor} driver refuses a call", where=where, found=found)

    def _text(self, code: int) -> str:
        name, text = c_char_p(), c_char_p()
        self._function("GetErrorName")(code, byref(name))
        self._function("GetErrorString")(code, byref(text))
        return " ".join(
            [name.value.decode() if name.value else f"error {code}", f"({text.value.decode()})" if text.value else ""]
        ).strip()

    def attribute(self, index: int, attribute: int) -> int:
        """A number that describes the device `index`."""
        value = c_int()
        self.call("DeviceGetAttribute", byref(value), attribute, self._device(index))
        return value.value

    def context(self, index: int) -> int:
        """The context of the device `index` that torch uses as well, held until the process ends."""
        context = c_void_p()
        self.call("DevicePrimaryCtxRetain", byref(context), self._device(index))
        return context.value or 0

    def _device(self, index: int) -> c_int:
        device = c_int()
        self.call("DeviceGet", byref(device), index)
        return device

    def enter(self, context: int) -> None:
        """Makes a context this thread's current one, if it is not yet."""
        current = c_void_p()
        self.call("CtxGetCurrent", byref(current))
        if current.value != context:
            self.call("CtxSetCurrent", c_void_p(context))

    def load(self, name: str, kernel: Built, most_shared: int) -> Kernel:
        """The function of a kernel's machine code or PTX, allowed the shared memory that it needs."""
        launch = kernel.launch
        if launch is None:
            raise ArtifactError("a kernel is not for a GPU", where=name, expected="how it is started")
        if launch.shared > most_shared:
            raise ArtifactError("a kernel needs more shared memory than this GPU has", where=name,
                                found=f"{launch.shared} bytes", expected=f"at most {most_shared}",
                                remedy=self._again)  # fmt: skip
        module, function = c_void_p(), c_void_p()
        log = ctypes.create_string_buffer(LOG_BYTES)
        options, values = (c_int * 2)(LOG_BUFFER, LOG_SIZE), (c_void_p * 2)(ctypes.addressof(log), LOG_BYTES)
        try:
            # PTX is text that ends with a zero; an object says itself how long it is.
            self.call("ModuleLoadDataEx", byref(module), kernel.object + b"\0", 2, options, values, where=name)
        except QCompileError as error:
            said = log.value.decode(errors="replace").strip()
            found = error.found + (f"; {said[:500]}" if said else "")
            raise type(error)(error.summary, where=error.where, found=found, expected=error.expected,
                              remedy=error.remedy) from None  # fmt: skip
        self.call("ModuleGetFunction", byref(function), module, kernel.entry.encode(), where=name)
        if launch.shared > self.interface.free_shared:
            self.call("FuncSetAttribute", function, MAX_DYNAMIC_SHARED, launch.shared, where=name)
        return Kernel(name, function.value or 0, launch)

    def launcher(self, kernel: Kernel, grid: tuple[int, int, int], pointers: Table, numbers: Table) -> Start:
        """What starts a kernel with the pointers and numbers that the tables (i64, contiguous) hold at that time.

        The driver reads each argument where its address in a list says: a pointer all of its entry, a number the low
        half of it. The null pointers behind them are the scratch memory that no kernel of ours uses.
        """
        if 0 in grid:
            return lambda stream: None
        threads = kernel.launch.warps * self.interface.warp
        limit = (min(MOST_PROGRAMS[0], self.interface.most_threads // threads), *MOST_PROGRAMS[1:])
        if any(not 0 < count <= most for count, most in zip(grid, limit, strict=True)):
            raise ArtifactError("a kernel needs more programs than a GPU starts at once", where=kernel.name,
                                found=grid, expected=f"1 to {limit}",
                                remedy="a smaller batch or length")  # fmt: skip
        null = np.zeros(1, dtype=np.int64)
        entries = [table.ctypes.data + 8 * i for table in (pointers, numbers) for i in range(len(table))]
        entries += [null.ctypes.data] * kernel.launch.scratch
        arguments = (c_void_p * len(entries))(*entries)
        shared, function = kernel.launch.shared, kernel.function
        kept = (pointers, numbers, null)  # the list points into them
        start = self._function("LaunchKernel")

        def run(stream: int, kept: Any = kept) -> None:
            code = start(function, *grid, threads, 1, 1, shared, stream, arguments, None)
            if code:
                raise self._error(code, kernel.name, self.interface.function("LaunchKernel"))

        return run

    def _library(self) -> str:
        """The file that the driver library is in."""
        return "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"

    def _open(self) -> Library:
        """The driver library with the types of the functions that are called often; ArtifactError where there is none."""
        name = self._library()
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise ArtifactError(f"this machine has no {self.interface.vendor} driver", where=name, found=error,
                                expected="a GPU with its driver", remedy=ANYWHERE) from None  # fmt: skip
        types = {
            "LaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
            "ModuleLoadDataEx": [c_void_p, c_char_p, c_uint, c_void_p, c_void_p],
            "ModuleGetFunction": [c_void_p, c_void_p, c_char_p],
            "FuncSetAttribute": [c_void_p, c_int, c_int],
        }
        for function, arguments in types.items():
            getattr(library, self.interface.function(function)).argtypes = arguments
        return library


class CudaDevice:
    """One GPU of this machine through torch and the driver. `index` is torch's (None: its current device)."""

    def __init__(self, index: int | None = None, driver: Driver | None = None):
        self.driver = Driver() if driver is None else driver
        build = self.driver.interface.build
        built = getattr(torch.version, build)
        if not torch.cuda.is_available() or built is None:
            name = {"cuda": "CUDA", "hip": "ROCm"}[build]
            raise ArtifactError(
                "torch cannot use the GPU of this machine", where="torch.cuda.is_available()",
                found=f"torch {torch.__version__}" + (f" for {name} {built}" if built else f" without {name}"),
                expected=f"a torch for the driver's {name} version", remedy=f"install such a torch; {ANYWHERE}",
            )  # fmt: skip
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.torch = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.context = self.driver.context(self.torch.index)
        self.last: torch.cuda.Stream | None = None

    def load(self, kernels: Mapping[str, Built]) -> list[Kernel]:
        self.driver.enter(self.context)
        most = self.driver.attribute(self.torch.index, self.driver.interface.most_shared)
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
