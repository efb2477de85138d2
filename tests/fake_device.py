"""A device for the CUDA session without a GPU: memory is the CPU's, and kernels are whatever a subclass or test makes them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import torch

from qcompile.artifact import Built
from qcompile.dtypes import DTYPES
from qcompile.runtime.cuda import Kernel, Start
from qcompile.runtime.plan import Table

Started = tuple[str, tuple[int, ...], tuple[int, ...]]


def at(address: int, dtype: str, count: int = 1) -> torch.Tensor:
    """The `count` elements that lie at `address`."""
    size = DTYPES[dtype].itemsize * count
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=DTYPES[dtype])


class FakeDevice:
    """Runs a kernel by calling `functions[name](grid, pointers, numbers)`.

    `launches` is what was started, in order; `replays` counts replayed recordings. A recording is what one call of its
    function starts, and a replay calls that function again: it fails where that starts anything else than what was
    recorded, since a GPU would go on doing that.
    """

    def __init__(self, functions: Mapping[str, Callable[[tuple[int, ...], Sequence[int], Sequence[int]], None]]):
        self.torch, self.functions = torch.device("cpu"), functions
        self.launches: list[Started] = []
        self.replays, self.refuses = 0, ""

    def load(self, kernels: Mapping[str, Built]) -> list[Kernel]:
        return [Kernel(name, 0, kernel.launch) for name, kernel in kernels.items() if kernel.launch is not None]

    def launcher(self, kernel: Kernel, grid: tuple[int, int, int], pointers: Table, numbers: Table) -> Start:
        function = self.functions[kernel.name]

        def start(stream: int) -> None:
            self.launches.append((kernel.name, tuple(pointers.tolist()), tuple(numbers.tolist())))
            function(grid, pointers.tolist(), numbers.tolist())

        return start

    def enter(self) -> None:
        pass

    def stream(self) -> int:
        return 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.refuses:
            raise RuntimeError(self.refuses)
        recorded: list[Started] = []

        def replay() -> None:
            self.replays += 1
            before = len(self.launches)
            run()
            started = self.launches[before:]
            assert started == (recorded or started), "a replay would not do what was recorded"
            recorded[:] = started

        return replay

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        copy = tensor.clone()
        return lambda: copy

    def synchronize(self) -> None:
        pass
