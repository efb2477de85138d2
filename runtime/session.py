"""Runs a lowered program on the CPU: checks and binds inputs, plans once for each set of sizes, runs the plan."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import torch

from qcompile import operators
from qcompile.artifact import Built, Executable, Port
from qcompile.dtypes import DTYPES
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime import native
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.inputs import LENGTH, Signature, bind_weights
from qcompile.runtime.memory import ALIGNMENT, aligned, allocate, empty
from qcompile.runtime.plan import Eager, Native, Plan, Window, is_eager, make_plan
from qcompile.runtime.state import State
from qcompile.runtime.threads import default_threads, pool

PLANS = 32


class _Binding:
    """A plan, the addresses it was last run with, its eager calls ready to go, and the state slots that it fills."""

    def __init__(self, plan: Plan, executable: Executable, slots: int):
        self.plan, self.slots, self.table = plan, slots, plan.steps.ctypes.data
        self.moving = tuple(name for name in plan.bound if executable.buffers[name].kind != "weight")
        self.addresses: list[int] = []
        self.bases = np.zeros(1 + len(plan.bound), dtype=np.int64)
        self.calls: dict[int, Callable[[], None]] = {}


class Session:
    """An executable in memory, for any number of calls from any thread (they take turns).

    `weights` are the weight buffers' tensors by name, `kernels` the built kernels; `sizes` bounds the named sizes.
    `bounds` says what the kernels may touch; None trusts them.
    """

    def __init__(
        self,
        executable: Executable,
        weights: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Built],
        *,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        threads: int | None = None,
        bounds: Bounds | None = None,
    ):
        self.bounds = bounds
        self.executable, self.threads = executable, threads or default_threads()
        self.limits = dict(sizes or {})
        self.signature = Signature(executable.inputs, executable.buffers, self.limits)
        self.states = tuple(buffer for buffer in executable.buffers.values() if buffer.kind == "state")
        self.weights = {name: aligned(tensor) for name, tensor in bind_weights(executable.buffers, weights).items()}
        called = {
            c.kernel for step in executable.steps for v in step.variants for c in v.calls if not is_eager(c.kernel)
        }
        missing = sorted(called - set(kernels))
        if missing:
            raise ArtifactError(
                "a kernel is missing", found=", ".join(missing[:5]), expected="every kernel that a step calls"
            )
        self.loaded = native.load_objects({name: kernels[name] for name in sorted(called)})
        self._names = {port.view.buffer: port.name for port in reversed(executable.outputs)}
        self._plans: OrderedDict[tuple[int, ...], _Binding] = OrderedDict()
        self._arena = allocate(0)
        self._staged: dict[str, torch.Tensor] = {}
        self._lock = threading.RLock()

    def new_state(self, batch: int) -> State:
        """An empty conversation of `batch` sequences."""
        return State(self.states, batch)

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        state: State | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Outputs by name for `inputs` by name; a program with states continues `state`, which gives past and start.

        An output is written to the tensor of `out` that has its name, if shape and dtype fit (so that a loop allocates
        nothing), else to a new one. ConfigError for inputs that do not fit.
        """
        with self._lock, torch.no_grad():
            binding, made = self._prepare(inputs, state, out or {})
            plan = binding.plan
            workers = pool(self.threads)
            table = binding.table
            for index, item in enumerate(plan.items):
                if isinstance(item, Native):
                    workers.run(table + item.start * 24, item.count)
                else:
                    binding.calls[index]()
            return self._finish(binding, made, state)

    def profile(self, inputs: Mapping[str, torch.Tensor], state: State | None = None) -> list[tuple[str, float]]:
        """(step name, seconds) of each call of one run, each call started by itself."""
        times = []
        with self._lock, torch.no_grad():
            binding, made = self._prepare(inputs, state, {})
            workers, table = pool(self.threads), binding.table
            for index, (item, names) in enumerate(zip(binding.plan.items, binding.plan.names, strict=True)):
                for at, name in enumerate(names):
                    begin = time.perf_counter()
                    if isinstance(item, Native):
                        workers.run(table + (item.start + at) * 24, 1)
                    else:
                        binding.calls[index]()
                    times.append((name, time.perf_counter() - begin))
            self._finish(binding, made, state)
        return times

    def plan(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for `sizes` (the program's named sizes but `threads`)."""
        return make_plan(self.executable, {**sizes, "threads": self.threads}, self.loaded.addresses, self.bounds)

    def _bound(self, sizes: dict[str, int]) -> _Binding:
        key = tuple(sizes.values())  # ports give sizes in one order
        binding = self._plans.get(key)
        if binding is None:
            plan = make_plan(self.executable, sizes, self.loaded.addresses, self.bounds)
            binding = self._plans[key] = _Binding(plan, self.executable, sizes.get(LENGTH, 0))
            for index, name in enumerate(plan.bound):
                if name in self.weights:
                    binding.bases[1 + index] = self.weights[name].data_ptr()
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return binding

    def _prepare(
        self, inputs: Mapping[str, torch.Tensor], state: State | None, out: Mapping[str, torch.Tensor]
    ) -> tuple[_Binding, dict[str, torch.Tensor]]:
        if state is not None and state.buffers != self.states:
            raise ConfigError("a state belongs to another model", remedy="continue it with the model that made it")
        inputs, sizes = self.signature.accept(inputs, state, bool(self.states))
        sizes["threads"] = self.threads
        binding = self._bound(sizes)
        plan = binding.plan
        if plan.arena > self._arena.numel():
            self._arena = allocate(plan.arena)
        tensors = {port.view.buffer: self._input(port, inputs[port.name]) for port in self.executable.inputs}
        if state is not None:
            tensors.update(state.tensors)
        for name in binding.moving:
            if name not in tensors:
                given = out.get(self._names.get(name, ""))
                tensors[name] = _output(plan.shapes[name], DTYPES[self.executable.buffers[name].dtype], given)
        addresses = [self._arena.data_ptr(), *[tensors[name].data_ptr() for name in binding.moving]]
        if addresses != binding.addresses:
            binding.bases[: len(addresses)] = addresses
            np.add(binding.bases[plan.owners], plan.offsets, out=plan.args)
            binding.calls = {i: self._call(e, plan, tensors) for i, e in enumerate(plan.items) if isinstance(e, Eager)}
            binding.addresses = addresses
        return binding, tensors

    def _input(self, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        dtype = DTYPES[self.executable.buffers[port.view.buffer].dtype]
        if tensor.dtype == dtype and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_cpu:
            return tensor
        staged = self._staged.get(port.name)
        if staged is None or staged.shape != tensor.shape:
            staged = self._staged[port.name] = empty(tensor.shape, dtype)
        return staged.copy_(tensor)

    def _window(self, window: Window, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        name = window.buffer
        base = tensors.get(name, self.weights.get(name))
        if base is None:
            buffer = self.executable.buffers[name]
            size = DTYPES[buffer.dtype].itemsize
            for dim in plan.shapes[name]:
                size *= dim
            place = plan.places[name]
            base = self._arena[place : place + size].view(DTYPES[buffer.dtype])
        return base.detach().as_strided(window.shape, window.strides, base.storage_offset() + window.offset)

    def _call(self, item: Eager, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        operator = operators.eager(item.operator)
        views = [self._window(window, plan, tensors) for window in item.windows]
        names = {"view": lambda i: views[i], "dtype": operators.dtype, "float": operators.number}
        arguments = operators.resolve(item.literals[0], names)
        keywords = {name: operators.resolve(literal, names) for name, literal in item.literals[1].items()}
        targets = [views[index] for index in item.writes]

        def call() -> None:
            results = operator(*arguments, **keywords)
            for target, result in zip(
                targets, results if isinstance(results, (tuple, list)) else (results,), strict=False
            ):
                target.copy_(result)

        return call

    def _finish(
        self, binding: _Binding, tensors: Mapping[str, torch.Tensor], state: State | None
    ) -> dict[str, torch.Tensor]:
        if state is not None:
            state.advance(binding.slots)
        results: dict[str, torch.Tensor] = {}
        given: set[str] = set()
        for port, window in zip(self.executable.outputs, binding.plan.outputs, strict=True):
            buffer = self.executable.buffers[window.buffer]
            if buffer.kind == "output" and port.dtype == buffer.dtype and window.whole and buffer.name not in given:
                results[port.name] = tensors[buffer.name]
                given.add(buffer.name)
            else:
                view = self._window(window, binding.plan, tensors)
                results[port.name] = view.to(DTYPES[port.dtype], copy=True, memory_format=torch.contiguous_format)
        return results


def _output(shape: tuple[int, ...], dtype: torch.dtype, given: torch.Tensor | None) -> torch.Tensor:
    """`given` where it fits, else a new tensor; not zeroed, since the program writes it all."""
    if given is not None and given.shape == shape and given.dtype == dtype and aligned(given) is given:
        return given
    made = torch.empty(shape, dtype=dtype)
    return made if made.data_ptr() % ALIGNMENT == 0 else empty(shape, dtype)
