"""A device for the CUDA session on which compiled PTX runs, through the real driver class and a driver library that evaluates it.

Every access of a kernel has to lie inside of what its arguments are said to be.
"""

from __future__ import annotations

from collections.abc import Mapping

from fake_device import FakeDevice
from gpu import compiled
from gpu.libcuda import STREAM, Libcuda, ranges

from qcompile.artifact import Built, KernelSpec, Launch
from qcompile.lowering.triton.templates import emit, extents
from qcompile.runtime.codes import coded
from qcompile.runtime.cuda import Driver, Kernel, Start
from qcompile.runtime.cuda_session import CudaSession
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.plan import Table
from qcompile.target import PTX, Target


class Evaluated(FakeDevice):
    """Runs kernels in the library that `Driver` finds, which a test has put there; `specs` says what they may touch."""

    def __init__(self, specs: Mapping[str, KernelSpec]):
        super().__init__({})
        self.driver, self.specs = Driver(), specs
        self.context = self.driver.context(0)

    def load(self, kernels: Mapping[str, Built]) -> list[Kernel]:
        self.driver.enter(self.context)
        most = self.driver.attribute(0, self.driver.interface.most_shared)
        return [self.driver.load(name, kernel, most) for name, kernel in kernels.items()]

    def launcher(self, kernel: Kernel, grid: tuple[int, int, int], pointers: Table, numbers: Table) -> Start:
        start, touched = self.driver.launcher(kernel, grid, pointers, numbers), extents(self.specs[kernel.name])
        library = self.driver.library
        assert isinstance(library, Libcuda)

        def begin(stream: int) -> None:
            given, dims = tuple(pointers.tolist()), tuple(numbers.tolist())
            self.launches.append((kernel.name, given, dims))
            with library.allowing(ranges(given, touched(dims, 1))):
                start(stream)

        return begin

    def enter(self) -> None:
        self.driver.enter(self.context)

    def stream(self) -> int:
        return STREAM


class Lazily(Evaluated):
    """Runs the kernels that are called as Triton compiles them for `place`, in place of those that it is given."""

    def __init__(self, specs: Mapping[str, KernelSpec], place: Target):
        super().__init__(specs)
        self.place, self.made = place, dict[str, Kernel]()

    def load(self, kernels: Mapping[str, Built]) -> list[Kernel]:
        sources = {name: emit(self.specs[name], self.place) for name in kernels}
        return [Kernel(name, 0, Launch(source.grid, source.warps)) for name, source in sources.items()]

    def launcher(self, kernel: Kernel, grid: tuple[int, int, int], pointers: Table, numbers: Table) -> Start:
        if kernel.name not in self.made:
            source = emit(self.specs[kernel.name], self.place)
            made = compiled.kernel(source, self.place)
            launch = Launch(source.grid, made.warps, made.shared, made.scratch)
            (self.made[kernel.name],) = super().load(
                {kernel.name: Built(source.text, made.text.encode(), made.entry, launch)}
            )
        return super().launcher(self.made[kernel.name], grid, pointers, numbers)


def evaluated(model: CompiledModel, place: Target = PTX) -> tuple[CompiledModel, Evaluated]:
    """`model` made to run here, on its PTX or as it would be for another GPU; and the device that it runs on."""
    executable, contents = model.artifact.executable, model.contents
    assert executable is not None
    specs = executable.kernels
    device = Evaluated(specs) if place == PTX else Lazily(specs, place)
    kernels = {name: contents.kernels[coded(name, model.target)] for name in specs}
    model.__dict__["session"] = CudaSession(
        executable, contents.tensors, kernels, device, sizes=model.artifact.sizes, bounds=model.bounds
    )
    return model, device
