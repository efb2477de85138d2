"""A device for the CUDA session that runs a compiled model's kernels in Triton's interpreter, on the memory of CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fake_device import FakeDevice, at
from gpu.interpret import function

from qcompile.artifact import KernelSpec
from qcompile.lowering.triton.templates import emit
from qcompile.runtime.codes import one_code
from qcompile.runtime.cuda_session import CudaSession
from qcompile.runtime.model import CompiledModel
from qcompile.target import INTERPRET


def _kernel(spec: KernelSpec) -> Callable[[tuple[int, ...], Sequence[int], Sequence[int]], None]:
    source = emit(spec, INTERPRET)

    def run(grid: tuple[int, ...], pointers: Sequence[int], numbers: Sequence[int]) -> None:
        assert len(numbers) == source.dims
        # The interpreter asks a tensor for no more than where it is.
        places = [at(address, dtype) for address, dtype in zip(pointers, source.pointers, strict=True)]
        if 0 not in grid:
            function(source.text, source.entry)[grid](*places, *numbers)

    return run


class Interpreter(FakeDevice):
    """Runs the kernels made from `specs`."""

    def __init__(self, specs: Mapping[str, KernelSpec]):
        super().__init__({name: _kernel(spec) for name, spec in specs.items()})


def interpreted(model: CompiledModel, graphs: bool = True) -> tuple[CompiledModel, Interpreter]:
    """`model`, which was compiled for cuda:interpret, made to run here; and the device that it runs on."""
    artifact, contents = model.artifact, model.contents
    assert artifact.executable is not None
    device = Interpreter(artifact.executable.kernels)
    kernels = one_code(contents.kernels, artifact.executable.kernels, INTERPRET)
    model.__dict__["session"] = CudaSession(
        artifact.executable, contents.tensors, kernels, device, sizes=artifact.sizes, bounds=model.bounds, graphs=graphs
    )
    return model, device
