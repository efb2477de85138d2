"""Loads, stores, copies and atomic operations: what an instruction does to the memory of its threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gpu.ptx.lanes import Copy, Lanes
from gpu.ptx.memory import Own, atomic
from gpu.ptx.parser import Address, Fault, Instruction, Operand, Symbol
from gpu.ptx.tensor import matrices
from gpu.ptx.values import DTYPES, Array

Operation = Callable[[Lanes, Instruction, Array | None], None]


def addresses(lanes: Lanes, operand: Operand | None, kind: str, at: Array) -> Array:
    assert isinstance(operand, Address)
    return lanes.full(operand.base, kind)[at] + np.array(operand.offset).astype(DTYPES[kind])


def _space(name: tuple[str, ...]) -> str:
    for part in name:
        if part.split("::")[0] in ("global", "shared", "local", "param"):
            return part.split("::")[0]
    raise Fault("an access without a space")


def _elements(
    lanes: Lanes, space: str, address: Operand | None, at: Array, type_: str, count: int = 1
) -> tuple[Array, Array, Own | None]:
    """Where accesses of `count` elements begin, in bytes; all elements of that memory; whose it is, None for the global one."""
    dtype = np.dtype(DTYPES[type_])
    if space == "global":
        places = lanes.memory.places(addresses(lanes, address, "u64", at), dtype.itemsize * count)
        return places, lanes.memory.view(dtype), None
    own, owners = (lanes.shared, lanes.block[at]) if space == "shared" else (lanes.local, at)
    places = own.places(owners, addresses(lanes, address, "u32", at), dtype.itemsize * count)
    return places, own.bytes.view(dtype), own


def _shape(name: tuple[str, ...]) -> tuple[str, int]:
    """The type of an access and how many elements it has."""
    return name[-1], next((int(part[1:]) for part in name if part in ("v2", "v4", "v8")), 1)


def load(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    to, address = ins.operands[:2]
    space, (type_, count) = _space(ins.name), _shape(ins.name)
    if space == "param":
        assert isinstance(address, Address) and isinstance(address.base, Symbol)
        value = lanes.arguments[address.base.name] & ((1 << 8 * np.dtype(DTYPES[type_]).itemsize) - 1)
        return lanes.write(to, np.array(value, DTYPES["u64"]).astype(DTYPES[type_]), mask)
    at = lanes.chosen(mask)
    size = np.dtype(DTYPES[type_]).itemsize
    places, whole, own = _elements(lanes, space, address, at, type_, count)
    if own is not None:
        for i in range(count):
            own.check(places + size * i, size)
    for i, each in enumerate(to if isinstance(to, tuple) else (to,)):
        values = whole[places // size + i]
        if mask is not None:
            values, found = np.zeros(lanes.count, values.dtype), values
            values[at] = found
        lanes.write(each, values, mask)


def store(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    address, given = ins.operands[:2]
    space, (type_, count) = _space(ins.name), _shape(ins.name)
    at, size = lanes.chosen(mask), np.dtype(DTYPES[type_]).itemsize
    places, whole, own = _elements(lanes, space, address, at, type_, count)
    if own is not None:
        for i in range(count):
            own.mark(places + size * i, size)
    for i, each in enumerate(given if isinstance(given, tuple) else (given,)):
        whole[places // size + i] = lanes.full(each, type_)[at]


def atom(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    """Threads come one after the other, in the order of blocks and of their numbers."""
    to, (address, *given) = (None, ins.operands) if ins.name[0] == "red" else (ins.operands[0], ins.operands[1:])
    space, type_ = _space(ins.name), ins.name[-1]
    kind = next(
        part for part in ins.name if part in ("add", "and", "or", "xor", "exch", "min", "max", "cas", "inc", "dec")
    )
    at, size, change = lanes.chosen(mask), np.dtype(DTYPES[type_]).itemsize, atomic(kind, DTYPES[type_])
    places, whole, own = _elements(lanes, space, address, at, type_)
    if own is not None:
        own.check(places, size)
    values = [lanes.full(each, type_) for each in given]
    old = np.zeros(lanes.count, DTYPES[type_])
    for i, place in zip(at, places // size, strict=True):
        old[i] = whole[place]
        whole[place] = change(old[i], *(each[i] for each in values), *[None] * (2 - len(values)))
    if to is not None:
        lanes.write(to, old, mask)


def copy(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    """cp.async: nobody may read what it writes before its group has been waited for."""
    to, source, count = ins.operands[:3]
    size = int(lanes.read(count, "u32"))
    at = lanes.chosen(mask)
    given = lanes.full(ins.operands[3], "u32")[at] if len(ins.operands) > 3 else np.full(len(at), size, np.uint32)
    places = lanes.shared.places(lanes.block[at], addresses(lanes, to, "u32", at), size)
    data = np.zeros((len(at), size), np.uint8)
    # Without bytes to read there is no address either.
    some = given > 0
    read = addresses(lanes, source, "u64", at)[some]
    at_global = lanes.memory.places(read, size)[:, None] + np.arange(size)
    kept = np.arange(size) < given[some][:, None]
    data[some] = np.where(kept, lanes.memory.view(np.dtype(np.uint8))[at_global], 0)
    lanes.shared.mark(places, size if size < 8 else 8, written=False)
    if size == 16:
        lanes.shared.mark(places + 8, 8, written=False)
    lanes.copies.append(Copy(at, places, data, lanes.group[at].copy()))


def commit(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    lanes.group[lanes.chosen(mask)] += 1


def wait(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    """Copies of these threads are there, but for the last `n` groups of each."""
    everything = "wait_all" in ins.name
    last = 0 if everything else int(lanes.read(ins.operands[0], "u32"))
    waits = np.zeros(lanes.count, bool)
    waits[lanes.chosen(mask)] = True
    left = []
    for each in lanes.copies:
        done = waits[each.lanes] & (everything | (each.group < lanes.group[each.lanes] - last))
        places = each.places[done][:, None] + np.arange(each.data.shape[1])
        lanes.shared.bytes[places] = each.data[done]
        lanes.shared.mark(places, 1)
        if not done.all():
            left.append(Copy(*(part[~done] for part in (each.lanes, each.places, each.data, each.group))))
    lanes.copies = left


def fence(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    if "proxy" in ins.name:
        lanes.shared.fence(np.unique(lanes.block[lanes.chosen(mask)]))


def matrix(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    """ldmatrix and stmatrix of half-words."""
    loads = ins.name[0] == "ldmatrix"
    registers, address = ins.operands if loads else ins.operands[::-1]
    assert isinstance(registers, tuple)
    if ins.name[-1] != "b16" or "m8n8" not in ins.name:
        raise Fault("matrices of something else than half-words")
    warps, count = lanes.warps(mask), len(registers)
    thread, place = matrices(count, "trans" in ins.name)
    at = warps.reshape(-1)
    rows = addresses(lanes, address, "u32", at).reshape(-1, 32)[:, : 8 * count]
    owners = np.broadcast_to(lanes.block[warps[:, :1]], rows.shape)
    starts = lanes.shared.places(owners, rows, 16)
    places = starts[:, thread] + 2 * place  # [warps, 32, count, 2]
    if loads:
        lanes.shared.check(places, 2)
        halves = lanes.shared.bytes.view(np.uint16)[places // 2]
        words = np.ascontiguousarray(halves).view(np.uint32)[..., 0]
    for i, each in enumerate(registers):
        if loads:
            values = np.zeros(lanes.count, np.uint32)
            values[warps] = words[:, :, i]
            lanes.write(each, values, mask)
        else:
            halves = np.ascontiguousarray(lanes.full(each, "b32")[warps])[..., None].view(np.uint16)
            lanes.shared.bytes.view(np.uint16)[places[:, :, i] // 2] = halves
            lanes.shared.mark(places[:, :, i], 2)


OPERATIONS: dict[str, Operation] = {
    "ld": load, "st": store, "atom": atom, "red": atom, "ldmatrix": matrix, "stmatrix": matrix, "fence": fence, "membar": fence,
    "cp.async.ca": copy, "cp.async.cg": copy, "cp.async.commit_group": commit, "cp.async.wait_group": wait,
    "cp.async.wait_all": wait,
}  # fmt: skip
