"""What the sessions of lowered programs share: inputs bound, one plan for each set of sizes, torch's operators, outputs."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import torch

from qcompile import operators
from qcompile.artifact import Built, Executable, Port
from qcompile.dtypes import DTYPES
from qcompile.errors import ArtifactError, ConfigError
from qcompile.runtime.bounds import Bounds
from qcompile.runtime.inputs import LENGTH, PAST, START, Signature, bind_weights
from qcompile.runtime.memory import aligned, allocate, empty, is_aligned
from qcompile.runtime.plan import Eager, Native, Plan, Window, is_eager, make_plan
from qcompile.runtime.runner import Runner
from qcompile.runtime.state import State

PLANS = 32
GIVEN = (PAST, START)


class Binding:
    """A plan, the addresses it was last run with, its torch operators ready to go, and the state slots that it fills.

    `moving` are the buffers that may be elsewhere in the next call. A binding that `keeps` its places copies inputs to
    tensors of its own, and hands out copies of outputs of its own.
    """

    def __init__(self, plan: Plan, executable: Executable, slots: int, keeps: bool):
        self.plan, self.slots, self.keeps = plan, slots, keeps
        self.moving = tuple(name for name in plan.bound if executable.buffers[name].kind != "weight")
        self.addresses: tuple[int, ...] = ()
        self.bases = np.zeros(2 + len(plan.bound), dtype=np.int64)
        self.calls: dict[int, Callable[[], None]] = {}
        self.staged: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}


class PlannedSession(Runner):
    """An executable in memory on one device, for any number of calls from any thread (they take turns).

    `weights` are the weight buffers' tensors by name, `kernels` the built kernels; `sizes` bounds the named sizes.
    `bounds` says what the kernels may touch; None trusts them.
    """

    threads = 1

    def __init__(
        self,
        executable: Executable,
        weights: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Built],
        device: torch.device,
        *,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        bounds: Bounds | None = None,
    ):
        self.executable, self.device, self.bounds = executable, device, bounds
        self.limits = dict(sizes or {})
        self.signature = Signature(executable.inputs, executable.buffers, self.limits)
        self.states = tuple(buffer for buffer in executable.buffers.values() if buffer.kind == "state")
        called = {
            c.kernel for step in executable.steps for v in step.variants for c in v.calls if not is_eager(c.kernel)
        }
        missing = sorted(called - set(kernels))
        if missing:
            raise ArtifactError(
                "a kernel is missing", found=", ".join(missing[:5]), expected="every kernel that a step calls"
            )
        self._addresses = self._load({name: kernels[name] for name in sorted(called)})
        self.weights = self._hold(bind_weights(executable.buffers, weights))
        self._names = {port.view.buffer: port.name for port in reversed(executable.outputs)}
        self._plans: OrderedDict[tuple[int, ...], Binding] = OrderedDict()
        self._arena, self._counters = allocate(0, device), allocate(0, device)
        self._lock = threading.RLock()

    # -- what a backend adds --

    @abstractmethod
    def _load(self, kernels: Mapping[str, Built]) -> dict[str, int]:
        """Makes the kernels ready; what stands for each in a plan's table."""

    @abstractmethod
    def _native(self, binding: Binding, start: int, count: int) -> None:
        """Runs `count` kernel calls from row `start` of the plan's table on."""

    @abstractmethod
    def _bind(self, plan: Plan, slots: int) -> Binding:
        """A new plan, which fills that many slots of a state, with what the backend needs to run it."""

    def _hold(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights on the device; ArtifactError when they do not fit."""
        return {name: aligned(tensor, self.device) for name, tensor in weights.items()}

    def _wait(self) -> None:
        """Returns when all that was started is done: at once, where every call returns when it is."""

    # -- calls --

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
            binding, accepted = self._accept(inputs, state)
            made = self._place(binding, accepted, state, out or {})
            self._run(binding)
            results = self._results(binding, made)
            if state is not None:
                state.advance(binding.slots)
            return results

    def profile(self, inputs: Mapping[str, torch.Tensor], state: State | None = None) -> list[tuple[str, float]]:
        """(step name, seconds) of each call of one run, each call started by itself."""
        times = []
        with self._lock, torch.no_grad():
            binding, accepted = self._accept(inputs, state)
            made = self._place(binding, accepted, state, {})
            self._wait()
            for index, (item, names) in enumerate(zip(binding.plan.items, binding.plan.names, strict=True)):
                for at, name in enumerate(names):
                    begin = time.perf_counter()
                    if isinstance(item, Native):
                        self._native(binding, item.start + at, 1)
                    else:
                        binding.calls[index]()
                    self._wait()
                    times.append((name, time.perf_counter() - begin))
            self._results(binding, made)  # the program wrote there: nothing may be freed before
            if state is not None:
                state.advance(binding.slots)
        return times

    def again(self, inputs: Mapping[str, torch.Tensor], state: State | None = None) -> Callable[[], None]:
        """A function that does the work of a call on `inputs` once more and nothing else, for timing.

        It holds on to its memory, and is good until the session is called again.
        """
        with self._lock, torch.no_grad():
            binding, accepted = self._accept(inputs, state)
            binding.keeps = False
            held = (self._place(binding, accepted, state, {}), self._arena, self._counters)

        def run(held: object = held) -> None:
            PlannedSession._run(self, binding)

        return run

    def plan(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for `sizes` (the program's named sizes but `threads`)."""
        return make_plan(self.executable, {**sizes, "threads": self.threads}, self._addresses, self.bounds)

    def _run(self, binding: Binding) -> None:
        for index, item in enumerate(binding.plan.items):
            if isinstance(item, Native):
                self._native(binding, item.start, item.count)
            else:
                binding.calls[index]()

    def _accept(
        self, inputs: Mapping[str, torch.Tensor], state: State | None
    ) -> tuple[Binding, Mapping[str, torch.Tensor]]:
        """The binding for these inputs, and all of them, checked; `state` has room for what comes."""
        if state is not None and state.buffers != self.states:
            raise ConfigError("a state belongs to another model", remedy="continue it with the model that made it")
        accepted, sizes = self.signature.accept(inputs, state, bool(self.states))
        key = tuple(sizes.values())  # ports give sizes in one order
        binding = self._plans.get(key)
        if binding is None:
            binding = self._plans[key] = self._binding(self.plan(sizes), sizes.get(LENGTH, 0))
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return binding, accepted

    def _binding(self, plan: Plan, slots: int) -> Binding:
        """A new binding, which knows where the weights are."""
        binding = self._bind(plan, slots)
        for index, name in enumerate(plan.bound):
            if name in self.weights:
                binding.bases[2 + index] = self.weights[name].data_ptr()
        return binding

    def _place(
        self, binding: Binding, inputs: Mapping[str, torch.Tensor], state: State | None, out: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors of what moves, whose addresses are put into the plan's table."""
        plan = binding.plan
        if plan.arena > self._arena.numel():
            self._arena = allocate(plan.arena, self.device)
        if plan.counters > self._counters.numel():
            self._counters = allocate(plan.counters, self.device)
        tensors = {p.view.buffer: self._input(binding, p, inputs[p.name]) for p in self.executable.inputs}
        tensors |= {} if state is None else state.tensors
        for name in binding.moving:
            if name not in tensors:
                tensors[name] = self._output(binding, name, out.get(self._names.get(name, "")))
        fixed = (self._arena.data_ptr(), self._counters.data_ptr())
        addresses = (*fixed, *[tensors[name].data_ptr() for name in binding.moving])
        if addresses != binding.addresses:
            binding.bases[: len(addresses)] = addresses
            np.add(binding.bases[plan.owners], plan.offsets, out=plan.args)
            binding.calls = {i: self._call(e, plan, tensors) for i, e in enumerate(plan.items) if isinstance(e, Eager)}
            binding.addresses = addresses
        return tensors

    def _input(self, binding: Binding, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        dtype = DTYPES[self.executable.buffers[port.view.buffer].dtype]
        # A state, and what it gives, stays where it is from call to call.
        if tensor.dtype == dtype and is_aligned(tensor, self.device) and not (binding.keeps and port.name not in GIVEN):
            return tensor
        if port.name not in binding.staged:
            binding.staged[port.name] = empty(tensor.shape, dtype, self.device)
        return binding.staged[port.name].copy_(tensor)

    def _output(self, binding: Binding, name: str, given: torch.Tensor | None) -> torch.Tensor:
        """The tensor for an output: one that is kept, or `given` where it fits, else a new one.

        It is not zeroed, since the program writes it all.
        """
        shape, dtype = binding.plan.shapes[name], DTYPES[self.executable.buffers[name].dtype]
        if binding.keeps:
            if name not in binding.outputs:
                binding.outputs[name] = empty(shape, dtype, self.device)
            return binding.outputs[name]
        if given is not None and given.shape == shape and given.dtype == dtype and is_aligned(given, self.device):
            return given
        made = torch.empty(shape, dtype=dtype, device=self.device)
        return made if is_aligned(made, self.device) else empty(shape, dtype, self.device)

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
        if operators.takes_device(operator):
            keywords["device"] = self.device
        targets = [views[index] for index in item.writes]

        def call() -> None:
            results = operator(*arguments, **keywords)
            for target, result in zip(
                targets, results if isinstance(results, (tuple, list)) else (results,), strict=False
            ):
                target.copy_(result)

        return call

    def _results(self, binding: Binding, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name: tensors that belong to the caller."""
        results: dict[str, torch.Tensor] = {}
        given: set[str] = set()
        for port, window in zip(self.executable.outputs, binding.plan.outputs, strict=True):
            buffer = self.executable.buffers[window.buffer]
            own = buffer.kind == "output" and port.dtype == buffer.dtype and window.whole and not binding.keeps
            if own and buffer.name not in given:
                results[port.name] = tensors[buffer.name]
                given.add(buffer.name)
            else:
                view = self._window(window, binding.plan, tensors)
                results[port.name] = view.to(DTYPES[port.dtype], copy=True, memory_format=torch.contiguous_format)
        return results
