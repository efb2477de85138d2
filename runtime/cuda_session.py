"""Runs a lowered program on a GPU: one launch after another on torch's stream, a decode step as one graph."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import torch

from qcompile.artifact import Built, Executable
from qcompile.dims import evaluate
from qcompile.errors import ArtifactError
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.cuda import Device, Kernel, Start
from qcompile.runtime.plan import Native, Plan
from qcompile.runtime.planned import Binding, PlannedSession
from qcompile.runtime.runner import Outputs
from qcompile.runtime.state import State

log = logging.getLogger("qcompile")

POINTER_ALIGNMENT = 16
GRAPHS = 4  # of one plan: a conversation has a graph of its own, since its cache lies elsewhere
# Operators that look at what a tensor holds, so that a graph cannot record them.
WAITING = frozenset(
    {"qcompile.cached_attention.default", "qcompile.experts.default", "aten.nonzero.default",
     "aten.masked_scatter.default", "aten.repeat_interleave.Tensor"}
)  # fmt: skip


def waiting(executable: Executable) -> tuple[str, ...]:
    """The operators of a program that keep its decode step from being one graph."""
    calls = {call.kernel for step in executable.steps for variant in step.variants for call in variant.calls}
    return tuple(sorted(calls & WAITING))


class _Launches(Binding):
    """A binding with what starts each kernel call of the plan, and the graphs recorded of it by the addresses in them."""

    def __init__(self, plan: Plan, executable: Executable, slots: int, keeps: bool, starts: list[Start]):
        super().__init__(plan, executable, slots, keeps)
        self.starts = starts
        self.graphs: OrderedDict[tuple[int, ...], Callable[[], None] | None] = OrderedDict()


class CudaSession(PlannedSession):
    """An executable in the memory of a GPU. With graphs=False every step is launched call by call.

    A call with one new position for each sequence (a decode step) is recorded the second time that it meets the same
    plan and state, and replayed from then on. `uncaptured` says why that is not done; it is empty where it is.
    """

    ahead = 1

    def __init__(
        self,
        executable: Executable,
        weights: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Built],
        device: Device,
        *,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        bounds: Bounds | None = None,
        graphs: bool = True,
    ):
        self.gpu = device
        found = waiting(executable)
        self.uncaptured = "" if graphs else "graphs are off"
        if graphs and found:
            self._give_up(f"{', '.join(found)} waits for the GPU")
        super().__init__(executable, weights, kernels, device.torch, sizes=sizes, bounds=bounds)

    def _give_up(self, reason: str) -> None:
        self.uncaptured = reason
        log.warning("decode steps are launched call by call, not as one CUDA graph: %s", reason)

    def _load(self, kernels: Mapping[str, Built]) -> dict[str, int]:
        self.kernels = self.gpu.load(kernels)
        return {kernel.name: index for index, kernel in enumerate(self.kernels)}

    def _bind(self, plan: Plan, slots: int) -> Binding:
        _check(plan, self.kernels)
        starts, grids = [], dict[tuple[int, ...], tuple[int, int, int]]()
        for row, (index, first, second) in enumerate(plan.steps.tolist()):
            ends = plan.steps[row + 1, 1:].tolist() if row + 1 < len(plan.steps) else [len(plan.args), len(plan.dims)]
            kernel, numbers = self.kernels[index], plan.dims[second : ends[1]]
            key = (index, *numbers.tolist())
            if key not in grids:
                grids[key] = _grid(kernel, key[1:])
            starts.append(self.gpu.launcher(kernel, grids[key], plan.args[first : ends[0]], numbers))
        return _Launches(plan, self.executable, slots, slots == 1 and not self.uncaptured, starts)

    def _native(self, binding: Binding, start: int, count: int) -> None:
        assert isinstance(binding, _Launches)
        stream = self.gpu.stream()
        for run in binding.starts[start : start + count]:
            run(stream)

    def _hold(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            return super()._hold(weights)
        except ArtifactError as error:
            found = f"{sum(tensor.nbytes for tensor in weights.values())} bytes of weights; {error.found}"
            raise ArtifactError("the weights do not fit into the GPU's memory", where=str(self.device), found=found,
                                remedy="a GPU with more memory, or a smaller format") from error  # fmt: skip

    def _wait(self) -> None:
        self.gpu.synchronize()

    def _accept(
        self, inputs: Mapping[str, torch.Tensor], state: State | None
    ) -> tuple[Binding, Mapping[str, torch.Tensor]]:
        self.gpu.enter()
        return super()._accept(inputs, state)

    def _run(self, binding: Binding) -> None:
        assert isinstance(binding, _Launches)
        if not binding.keeps or self.uncaptured:
            super()._run(binding)
            return
        key, graphs = binding.addresses, binding.graphs
        if key in graphs:
            graphs.move_to_end(key)
            run = graphs[key] = graphs[key] or self._captured(lambda: super(CudaSession, self)._run(binding))
            run()
            return
        super()._run(binding)  # what a kernel or operator makes at its first use may not be recorded
        graphs[key] = None
        if len(graphs) > GRAPHS:
            graphs.popitem(last=False)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """What replays `run`; `run` itself where that cannot be recorded."""
        try:
            return self.gpu.capture(run)
        except RuntimeError as error:
            self._give_up(str(error).split("\n")[0])
            return run

    def repeated(
        self, inputs: Mapping[str, torch.Tensor], state: State, then: Callable[[Outputs], None]
    ) -> Callable[[], None]:
        """As `Runner.repeated`: from the second step on, a step and its `then` are one graph."""
        run: Callable[[], None] | None = None
        first, capacity, slots = True, 0, 0

        def step() -> None:
            nonlocal run, first, capacity, slots
            with self._lock, torch.no_grad():
                self.gpu.enter()
                state.reserve(state.length + slots, self.signature.longest)
                if run is None or state.capacity != capacity:
                    run, slots = self._unit(inputs, state, then)
                    first, capacity = True, state.capacity
                elif first:
                    run, first = (run if self.uncaptured else self._captured(run)), False
                run()
                state.length += slots

        return step

    def _unit(
        self, inputs: Mapping[str, torch.Tensor], state: State, then: Callable[[Outputs], None]
    ) -> tuple[Callable[[], None], int]:
        """One step and its `then` as a function that may be run or recorded at any time, and the slots it fills.

        It has a binding, and so a table, of its own, and holds on to the memory that the table points into.
        """
        usual, accepted = self._accept(inputs, state)
        plan = dataclasses.replace(usual.plan, args=np.zeros_like(usual.plan.args))
        binding = self._binding(plan, usual.slots)
        binding.keeps = False
        made = self._place(binding, accepted, state, {})
        assert not binding.staged  # a copy would not see what `then` writes
        memory = (self._arena, self._counters)

        def unit(memory: object = memory) -> None:
            super(CudaSession, self)._run(binding)
            outputs = self._results(binding, made)
            state.past += binding.slots
            then(outputs)

        return unit, binding.slots

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return self.gpu.fetch(tensor)


def _check(plan: Plan, kernels: list[Kernel]) -> None:
    """ArtifactError unless every pointer is one of 16 bytes and every number fits an i32, as the kernels assume."""

    def call(column: int, at: int) -> str:
        row = int(np.searchsorted(plan.steps[:, column], at, side="right")) - 1
        names = [
            name for item, each in zip(plan.items, plan.names, strict=True) if isinstance(item, Native) for name in each
        ]
        return f"step {names[row]!r}, kernel {kernels[plan.steps[row, 0]].name!r}"

    for at in np.flatnonzero(plan.offsets % POINTER_ALIGNMENT):
        raise ArtifactError("a kernel's argument does not start on a boundary", where=call(1, int(at)),
                            found=f"byte {plan.offsets[at]} of its buffer",
                            expected=f"a multiple of {POINTER_ALIGNMENT}")  # fmt: skip
    for at in np.flatnonzero((plan.dims < -(2**31)) | (plan.dims >= 2**31)):
        raise ArtifactError("a number is too large for a kernel", where=call(2, int(at)), found=plan.dims[at],
                            expected="less than 2^31", remedy="a smaller batch or length")  # fmt: skip


def _grid(kernel: Kernel, numbers: tuple[int, ...]) -> tuple[int, int, int]:
    sizes = {f"d{i}": number for i, number in enumerate(numbers)}
    x, y, z = (evaluate(dim, sizes) for dim in kernel.launch.grid)
    return x, y, z
