"""Runs a kernel: blocks in batches, threads in step as long as they go the same way, barriers where they wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from gpu.ptx import access, together
from gpu.ptx.arithmetic import pure
from gpu.ptx.lanes import Lanes
from gpu.ptx.memory import Memory
from gpu.ptx.parser import CARRY, Fault, Function, Instruction, Module, Operand, Register, Symbol
from gpu.ptx.values import Array

BATCH = 4096  # threads that run side by side
Step = Callable[[Lanes, Array | None], None]


def run(
    module: Module, entry: str, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[int], memory: Memory,
    order: int | None = None,
) -> None:  # fmt: skip
    """Runs `grid` blocks of `threads` threads, with `shared_bytes` of dynamic shared memory, on `memory`.

    `arguments` are what the launch passes, one integer for each parameter. Without `order` blocks and warps go in step; a
    number draws another order: of blocks, and of warps, each of which then runs until it waits for others. Fault where a
    GPU would fail, or where it could give something else another time.
    """
    function = module.entries[entry]
    if len(arguments) != len(function.parameters):
        raise Fault(f"{entry} has {len(function.parameters)} parameters and was given {len(arguments)} arguments")
    if function.threads not in (0, threads):
        raise Fault(f"{entry} must be started with {function.threads} threads, not {threads}")
    constants = {name: np.frombuffer(data, np.uint8).copy() for name, data in module.constants.items()}
    for name, data in constants.items():
        memory.add(data.ctypes.data, len(data), name)
    named = dict(zip(function.parameters, arguments, strict=True))
    blocks, random = np.arange(prod(grid)), None if order is None else np.random.default_rng(order)
    if random is not None:
        random.shuffle(blocks)
    count = max(BATCH // threads, 1)
    steps = [_step(each) for each in function.instructions]
    try:
        with np.errstate(all="ignore"):
            for at in range(0, len(blocks), count):
                lanes = Lanes(
                    module, function, blocks[at : at + count], (grid[0], grid[1], grid[2]), threads, shared_bytes, named, memory,
                    {name: data.ctypes.data for name, data in constants.items()},
                )  # fmt: skip
                _Batch(lanes, steps).run(random)
    finally:
        for data in constants.values():
            memory.remove(data.ctypes.data)


class _Batch:
    """Blocks that run side by side. Of the threads that go different ways those that are furthest behind go on."""

    def __init__(self, lanes: Lanes, steps: list[Step | None]):
        self.lanes, self.steps = lanes, steps
        self.alive = np.ones(lanes.count, bool)
        self.waiting: dict[int, Array] = {}  # at which instruction a barrier holds which threads

    def run(self, random: np.random.Generator | None) -> None:
        ready = {0: self.alive.copy()}
        while ready:
            for part in self._parts(random):
                self._run({at: mask & part for at, mask in ready.items() if (mask & part).any()})
            ready = self._released()

    def _parts(self, random: np.random.Generator | None) -> list[Array]:
        """The threads that are run one set after the other between barriers."""
        if random is None:
            return [np.ones(self.lanes.count, bool)]
        groups = any(ins.name[0] == "wgmma" for ins in self.lanes.function.instructions)
        part = self.lanes.lane % self.lanes.threads // (128 if groups else 32)
        return [part == each for each in random.permutation(part.max() + 1)]

    def _run(self, ready: dict[int, Array]) -> None:
        """Runs threads until each waits or has ended; `ready` says from which instruction on."""
        instructions, labels = self.lanes.function.instructions, self.lanes.function.labels
        while ready:
            at = min(ready)
            mask = ready.pop(at)
            stop, all_ = min(ready, default=len(instructions)), None if mask.all() else mask
            while at < stop:
                ins, step = instructions[at], self.steps[at]
                try:
                    if step is not None:
                        step(self.lanes, all_)
                        at += 1
                        continue
                    if (left := self._control(ins, at, mask, ready, labels)) is None:
                        break
                except Fault as fault:
                    raise ins.fault(str(fault)) from None
                if left is not mask:
                    mask, all_ = left, None if left.all() else left
                at += 1
                stop = min(ready, default=len(instructions))
            else:
                if at == len(instructions):
                    self.alive &= ~mask
                else:
                    ready[at] = ready[at] | mask if at in ready else mask

    def _control(
        self, ins: Instruction, at: int, mask: Array, ready: dict[int, Array], labels: dict[str, int]
    ) -> Array | None:
        """A branch, end or barrier: the threads that go on with the next instruction, None for none."""
        taken = mask if ins.guard is None else mask & (self.lanes.full(ins.guard[0], "pred") != ins.guard[1])
        if not taken.any():
            return mask
        if ins.name[0] in ("ret", "exit"):
            self.alive &= ~taken
        elif ins.name[0] == "bra":
            assert isinstance(ins.operands[-1], Symbol)
            to = labels[ins.operands[-1].name]
            ready[to] = ready[to] | taken if to in ready else taken
        elif ins.name[0] == "trap":
            raise Fault("a thread gave up")
        else:
            self.waiting[at] = self.waiting[at] | taken if at in self.waiting else taken
        left = mask & ~taken
        return left if left.any() else None

    def _released(self) -> dict[int, Array]:
        """The threads of blocks all of whose threads wait, behind their barrier; Fault where some can never come."""
        ready, waiting = {}, self.waiting
        for at, mask in waiting.items():
            missing = self.alive & ~mask
            blocks = np.zeros(self.lanes.block[-1] + 1, bool)
            blocks[self.lanes.block[mask]] = True
            blocks[self.lanes.block[missing]] = False
            free = mask & blocks[self.lanes.block]
            if not free.any():
                lane = int(np.flatnonzero(mask)[0])
                others = int((missing & (self.lanes.block == self.lanes.block[lane])).sum())
                raise self.lanes.function.instructions[at].fault(
                    f"a barrier that {others} threads of the block never reach"
                )
            ready[at + 1] = free
            waiting[at] = mask & ~free
        self.waiting = {at: mask for at, mask in waiting.items() if mask.any()}
        return ready


def _step(ins: Instruction) -> Step | None:
    """What an instruction does; None for one that says where threads go on. Fault, when it is run, where it is not known."""
    kind = ins.name[0]
    if kind in ("bra", "ret", "exit", "bar", "barrier", "trap") and "warp" not in ins.name:
        return None
    operation = _operation(ins)
    if ins.guard is None:
        return lambda lanes, mask: operation(lanes, ins, mask)
    register, negated = ins.guard

    def guarded(lanes: Lanes, mask: Array | None) -> None:
        chosen = lanes.full(register, "pred") != negated
        chosen = chosen if mask is None else chosen & mask
        if chosen.any():
            operation(lanes, ins, None if chosen.all() else chosen)

    return guarded


def _operation(ins: Instruction) -> access.Operation:
    for length in (3, 2, 1):
        name = ".".join(ins.name[:length])
        for table in (access.OPERATIONS, together.OPERATIONS):
            if name in table:
                return table[name]
    if ins.name[:2] == ("bar", "warp"):
        return lambda lanes, ins, mask: None
    if ins.name[0] == "mov" and any(isinstance(each, tuple) for each in ins.operands):
        return _repack
    found = pure(ins.name)
    if found is None:
        return _unknown
    to = ins.operands[0]
    results: tuple[Operand | None, ...] = to if isinstance(to, tuple) else (to,)
    operands = ins.operands[1:]
    if "cc" in ins.name:
        results += (Register(CARRY, "pred"),)
    if ins.name[0] == "madc":
        operands += (Register(CARRY, "pred"),)
    types, compute = found.operands, found.compute
    if ins.name[0] in ("min", "max") and len(operands) == 3:
        types, compute = types[:1] * 3, lambda a, b, c: found.compute(found.compute(a, b), c)
    if len(types) != len(operands):
        return _unknown

    def operation(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
        values = compute(*map(lanes.read, operands, types))
        if isinstance(values, tuple):
            for each, value in zip(results, values, strict=False):
                lanes.write(each, value, mask)
        else:
            lanes.write(to, values, mask)

    return operation


def _unknown(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    raise Fault("an instruction that is not known")


def _repack(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    """mov between a register and its parts."""
    to, source = ins.operands
    if isinstance(to, tuple):
        parts = lanes.full(source, ins.name[-1])[:, None].view(f"u{int(ins.name[-1][1:]) // 8 // len(to)}")
        for i, each in enumerate(to):
            lanes.write(each, np.ascontiguousarray(parts[:, i]), mask)
        return
    assert isinstance(source, tuple)
    width = int(ins.name[-1][1:]) // len(source)
    parts = np.stack([lanes.full(each, f"b{width}") for each in source], -1)
    lanes.write(to, parts.view(f"u{width // 8 * len(source)}")[:, 0], mask)


def run_lines(function: Function, registers: dict[Register, Array], count: int) -> Lanes:
    """Runs instructions without branches on `count` threads whose registers hold what is given."""
    lanes = Lanes(Module(), function, np.zeros(1, int), (1, 1, 1), count, 0, {}, Memory(), {})
    for register, values in registers.items():
        lanes.write(register, values, None)
    with np.errstate(all="ignore"):
        for ins in function.instructions:
            step = _step(ins)
            assert step is not None
            step(lanes, None)
    return lanes
