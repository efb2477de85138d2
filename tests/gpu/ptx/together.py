"""Instructions that the threads of a warp execute together: exchanges, votes, and products on tensor cores."""

from __future__ import annotations

import numpy as np
from gpu.ptx import tensor
from gpu.ptx.access import Operation
from gpu.ptx.lanes import Lanes
from gpu.ptx.parser import Fault, Instruction, Operand
from gpu.ptx.values import DTYPES, Array


def _spread(lanes: Lanes, warps: Array, values: Array) -> Array:
    """Values [warps, 32] as one for each thread."""
    out = np.zeros(lanes.count, values.dtype)
    out[warps] = values
    return out


def shuffle(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    to, given, by, clamp = ins.operands[:4]
    warps, lane = lanes.warps(mask), np.arange(32)
    amount, bound = (lanes.full(each, "u32")[warps].astype(np.int64) for each in (by, clamp))
    segment = bound >> 8 & 31
    most = (lane & segment) | (bound & 31 & ~segment)
    source = {
        "idx": (lane & segment) | (amount & 31 & ~segment), "bfly": lane ^ amount, "up": lane - amount, "down": lane + amount,
    }[ins.name[2]]  # fmt: skip
    inside = source >= most if ins.name[2] == "up" else source <= most
    found = np.take_along_axis(lanes.full(given, "b32")[warps], np.where(inside, source, lane), 1)
    value, valid = to if isinstance(to, tuple) else (to, None)
    lanes.write(value, _spread(lanes, warps, found), mask)
    lanes.write(valid, _spread(lanes, warps, inside), mask)


def reduce(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    to, given = ins.operands[:2]
    warps, kind, type_ = lanes.warps(mask), ins.name[2], ins.name[-1]
    known = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    found = known[kind].reduce(lanes.full(given, type_)[warps], 1, dtype=DTYPES[type_], keepdims=True)
    lanes.write(to, _spread(lanes, warps, np.broadcast_to(found, warps.shape)), mask)


def vote(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    to, given = ins.operands[:2]
    warps, kind = lanes.warps(mask), ins.name[2]
    held = lanes.full(given, "pred")[warps]
    if kind == "ballot":
        found = (held << np.arange(32, dtype=np.uint64)).sum(1, keepdims=True).astype(np.uint32)
    elif kind in ("any", "all"):
        found = (held.any if kind == "any" else held.all)(1, keepdims=True)
    else:
        raise Fault("a vote that is not known")
    lanes.write(to, _spread(lanes, warps, np.broadcast_to(found, warps.shape)), mask)


def _held(lanes: Lanes, operand: Operand | None, type_: str, warps: Array) -> Array:
    """The registers of a list, [warps, 32, registers]."""
    listed = operand if isinstance(operand, tuple) else (operand,)
    return np.stack([lanes.full(each, type_)[warps] for each in listed], -1)


def _sums(lanes: Lanes, to: Operand | None, warps: Array, values: Array, mask: Array | None) -> None:
    assert isinstance(to, tuple)
    for i, each in enumerate(to):
        lanes.write(each, _spread(lanes, warps, values[:, :, i]), mask)


def mma(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    to, a, b, c = ins.operands
    left, right, total = tensor.mma(ins.name)
    warps = lanes.warps(mask)
    product = tensor.multiplied(
        tensor.left(_held(lanes, a, "b32", warps), left), tensor.right(_held(lanes, b, "b32", warps), right),
        _held(lanes, c, total, warps),
    )  # fmt: skip
    _sums(lanes, to, warps, product, mask)


def wgmma(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    """The four warps of a group, each with its 16 rows; what they multiply is read at once, as if it took no time."""
    to, a, b, keep, *numbers = ins.operands
    n, k, total, left, right = tensor.wgmma(ins.name)
    warps = lanes.warps(mask)
    if len(warps) % 4 or (warps[:, 0] // 32 % 4 != np.arange(len(warps)) % 4).any():
        raise Fault("a part of a warp group executes what all of it must")
    groups = warps.reshape(-1, 4, 32)
    signs = [int(lanes.read(each, "s32")) for each in numbers]
    if any(sign != 1 for sign in signs[:2]):
        raise Fault("products with a changed sign")
    turned = [sign == 1 for sign in signs[2:]]  # of A, where that is described, and of B
    held = _held(lanes, to, total, warps)
    kept = lanes.full(keep, "pred")[warps][:, :, None]
    if isinstance(a, tuple):
        rows = tensor.left(_held(lanes, a, "b32", warps), left)
    else:
        rows = _described(lanes, a, groups, 64, k, left, len(turned) == 2 and turned[0]).reshape(-1, 16, k)
    columns = _described(lanes, b, groups, n, k, right, len(turned) > 0 and turned[-1])
    b_all = np.repeat(columns, 4, 0).transpose(0, 2, 1)
    _sums(lanes, to, warps, tensor.multiplied(rows, b_all, np.where(kept, held, held.dtype.type(0))), mask)


def _described(
    lanes: Lanes, operand: Operand | None, groups: Array, rows: int, k: int, name: str, turned: bool
) -> Array:
    """What a descriptor says lies in shared memory: [groups, rows, k] numbers."""
    out, size = np.empty((len(groups), rows, k)), tensor.BITS[name] // 8
    descriptors = lanes.full(operand, "u64")[groups]
    dtype = {"s8": np.int8, "u8": np.uint8}.get(name, np.uint8 if size == 1 else np.uint16)
    for i, group in enumerate(groups):
        if (descriptors[i] != descriptors[i, 0, 0]).any():
            raise Fault("the threads of a warp group have different descriptors")
        places = tensor.described(int(descriptors[i, 0, 0]), rows, k, size, turned)
        block = np.full(places.shape, lanes.block[group[0, 0]])
        at = lanes.shared.places(block, places, size)
        lanes.shared.check(at, size, proxy=True)
        bits = lanes.shared.bytes.view(dtype)[at // size]
        out[i] = bits if name in ("s8", "u8") else tensor.widen(bits, name)
    return out


def _nothing(lanes: Lanes, ins: Instruction, mask: Array | None) -> None:
    pass


OPERATIONS: dict[str, Operation] = {
    "shfl": shuffle, "redux": reduce, "vote": vote, "mma": mma, "wgmma.mma_async": wgmma,
    "wgmma.fence": _nothing, "wgmma.commit_group": _nothing, "wgmma.wait_group": _nothing, "createpolicy": _nothing,
}  # fmt: skip
