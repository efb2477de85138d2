"""Threads side by side: their registers as arrays with an element for each, and which of them are at work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gpu.ptx.memory import Memory, Own
from gpu.ptx.parser import Fault, Function, Immediate, Module, Operand, Register, Symbol
from gpu.ptx.values import DTYPES, Array

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
STORED = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
NEVER = 0xFFC0_BAD0_FFC0_BAD1  # what a register holds that nothing was written to: NaN as a float
SHARED_BASE = 1024  # the shared address of the first byte


@dataclass
class Copy:
    """Bytes of a cp.async on their way: where they go, and each one's group of its thread."""

    lanes: Array
    places: Array
    data: Array
    group: Array


class Lanes:
    """The threads of some blocks, block after block, in order of their numbers; warps are 32 neighbours each."""

    def __init__(
        self, module: Module, function: Function, blocks: Array, grid: tuple[int, int, int], threads: int,
        shared_bytes: int, arguments: dict[str, int], memory: Memory, constants: dict[str, int],
    ):  # fmt: skip
        self.function, self.memory, self.arguments, self.threads = function, memory, arguments, threads
        self.count = len(blocks) * threads
        self.block = np.repeat(np.arange(len(blocks)), threads)
        self.lane = np.arange(self.count)
        self.registers: list[Array | None] = [None] * len(function.kinds)
        self.shared = Own(len(blocks), module.shared_bytes + shared_bytes, SHARED_BASE)
        self.local = Own(self.count, function.local_bytes, 0)
        self.copies: list[Copy] = []
        self.group = np.zeros(self.count, np.int64)
        thread = self.lane % threads
        self.symbols: dict[str, Array | int] = {
            "%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1,
            "%laneid": thread % 32, "%warpid": thread // 32,
        }  # fmt: skip
        for axis, number in zip("xyz", np.unravel_index(blocks, grid, "F"), strict=True):
            self.symbols[f"%ctaid.{axis}"] = number[self.block]
        self.symbols |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        self.symbols |= {name: at + SHARED_BASE for name, at in module.shared.items()}
        self.symbols |= function.local | constants

    def read(self, operand: Operand | None, type_: str) -> Array:
        """The operand of each thread, or one of no dimension that is the same for all."""
        dtype = DTYPES[type_]
        if isinstance(operand, Register):
            held = self.registers[operand.slot]
            if held is None:
                held = self.registers[operand.slot] = np.full(self.count, NEVER, np.uint64).astype(STORED[operand.kind])
            if held.dtype.itemsize == np.dtype(dtype).itemsize:
                return held.view(dtype)
            return held.astype(UNSIGNED[np.dtype(dtype).itemsize]).view(dtype)
        if isinstance(operand, Immediate):
            if type_ == "pred":
                return np.array(bool(operand.bits))
            size = np.dtype(dtype).itemsize
            return np.array(operand.bits & ((1 << 8 * size) - 1), UNSIGNED[size]).view(dtype)
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return np.asarray(self.symbols[operand.name]).astype(dtype)
        raise Fault(f"an operand that is not known: {operand}")

    def write(self, to: Operand | None, values: Array, mask: Array | None) -> None:
        """Gives a register the values, for all threads or those of `mask`; the rest keep theirs."""
        if to is None:
            return
        if not isinstance(to, Register):
            raise Fault(f"a result that goes to {to}")
        stored = STORED[to.kind]
        values = np.asarray(values)
        if values.dtype.itemsize != np.dtype(stored).itemsize:  # extended by its sign, or by zeros
            signed = values.dtype.kind == "i"
            values = values.astype(f"i{np.dtype(stored).itemsize}" if signed else stored)
        values = values.view(stored)
        if values.ndim == 0:
            values = np.full(self.count, values)
        old = self.registers[to.slot]
        if mask is not None and old is None:
            old = np.full(self.count, NEVER, np.uint64).astype(stored)
        self.registers[to.slot] = values if mask is None else np.where(mask, values, old)

    def full(self, operand: Operand | None, type_: str) -> Array:
        """As `read`, with an element for each thread."""
        held = self.read(operand, type_)
        return held if held.ndim else np.full(self.count, held)

    def chosen(self, mask: Array | None) -> Array:
        """The numbers of the threads at work."""
        return self.lane if mask is None else np.flatnonzero(mask)

    def warps(self, mask: Array | None) -> Array:
        """The numbers [warps, 32] of threads at work, of an instruction that a whole warp must execute together."""
        at = self.chosen(mask)
        if len(at) % 32 or not np.array_equal(at.reshape(-1, 32), (at[::32, None] // 32 * 32) + np.arange(32)):
            raise Fault("a part of a warp executes what all of it must")
        return at.reshape(-1, 32)
