"""What a schedule of a linear kernel is, and which ones can be made: tiles, warps, stages, registers, shared memory.

A linear kernel computes y[m, n], the sum over k of x[m, k] * w[n, k]. One program computes `block_n` outputs of `block_m`
rows over one of `split_k` parts of K, `block_k` inputs a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qcompile.formats.stream import planes
from qcompile.lowering.triton.devices import Device

FEW = 4
"""The most rows of x that a "generic" kernel multiplies without tensor cores, with a sum for each place of a tile."""


@dataclass(frozen=True)
class Schedule:
    """The tile of one program, the warps that share it, and how many steps of loads are under way at once."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """What a schedule is chosen for: a kind of linear kernel, w [n, k], at most m rows of x.

    `bits` are those of one weight; `value` names what codes are worth ("int", "table", "fp", or books as in "k8x2"), on which the
    number of instructions depends; `group` is how many inputs share a scale (0: all). K is summed in `split_k` parts.
    `streams` are the weights of that size that one program multiplies side by side: two for gate and up.
    """

    kind: str
    n: int
    k: int
    m: int
    bits: int
    value: str = "int"
    group: int = 0
    split_k: int = 1
    streams: int = 1

    @property
    def stored_bits(self) -> float:
        """Bits a weight with a 16-bit scale a group."""
        return self.bits + (16 / self.group if self.group else 0)


@dataclass(frozen=True)
class Kind:
    """The tiles that a kind of kernel can be made with; `block_m` of a program is never above `most_m`.

    `pipelined` kinds copy the next steps' weights to shared memory while they compute. In `decoding` ones each warp decodes
    the weights that it multiplies: on tensor cores that warps use by themselves, a tile is to have more outputs than rows.
    """

    block_n: tuple[int, ...]
    block_k: tuple[int, ...]
    warps: tuple[int, ...]
    stages: tuple[int, ...]
    most_m: int
    least_m: int = 16
    pipelined: bool = True
    decoding: bool = False


KINDS: dict[str, Kind] = {
    "generic": Kind((16, 32, 64), (32, 64, 128), (4,), (1, 2), most_m=64, pipelined=False),
    # Two warps: four or more would share one instruction of capability 9.0 and 10.0, which waits for memory more often.
    "skinny": Kind((64,), (128, 256), (2,), (3, 4, 5), most_m=32, least_m=8, decoding=True),
    "mid": Kind((64, 128), (128, 256), (4, 8), (2, 3, 4), most_m=128, decoding=True),
    "large": Kind((64, 128, 256), (128, 256), (4, 8), (2, 3, 4), most_m=128, least_m=32, decoding=True),
    "int8": Kind((64, 128), (64, 128), (4, 8), (2, 3, 4), most_m=128),
    "fp8": Kind((64, 128), (64, 128), (4, 8), (2, 3, 4), most_m=128),
    "codebook": Kind((64,), (128,), (2,), (2, 3), most_m=32),
}


def by_group(gpu: Device) -> bool:
    """Whether four warps share an instruction of tensor cores, which reads x from shared memory while warps do other things."""
    return gpu.capability // 10 in (9, 10)


def registers(problem: Problem, schedule: Schedule, gpu: Device) -> int:
    """The registers of one thread, about: its sums, a step's operands in flight, and addresses."""
    threads = 32 * schedule.warps
    if problem.kind == "generic" and problem.m <= FEW:
        return int(40 + (problem.streams * problem.m + 1) * schedule.block_n * schedule.block_k / threads)
    sums = problem.streams * schedule.block_n * schedule.block_m / threads
    operands = schedule.block_n * min(schedule.block_k, 128) / threads / 2
    if problem.kind == "generic":  # all weights and rows of a step at once, in f32, with what they are made of
        operands = 2 * (problem.streams * schedule.block_n + schedule.block_m) * schedule.block_k / threads
    if problem.kind in ("mid", "large"):
        if by_group(gpu):  # all of a step is decoded at once
            operands = problem.streams * schedule.block_n * schedule.block_k / threads / 2
            # From 10.0 on sums lie in a memory of tensor cores' own until the end.
            return int(64 + sums + operands) if gpu.capability // 10 == 9 else int(40 + max(sums, operands))
        if gpu.capability // 10 == 12 and problem.value == "table":  # its assembler looks entries up far ahead
            operands *= 2
    return int(40 + sums + operands)


def shared_bytes(problem: Problem, schedule: Schedule, gpu: Device) -> int:
    """The shared memory of one program: never less than it takes; where w is in fragments, at most `slack` more."""
    kind, bn, bm, bk = KINDS[problem.kind], schedule.block_n, schedule.block_m, schedule.block_k
    sums = 4 * bn * bm  # which change places before they are stored
    if not kind.pipelined:
        return max(4 * bk * (bn + bm), sums)
    codes = problem.kind in ("int8", "fp8")  # on both sides
    x, w = bm * bk * (1 if codes else 2), problem.streams * bn * bk * problem.bits // 8
    # What tensor cores read from shared memory is kept a step longer, where they may not have ended.
    late = problem.kind in ("mid", "large") and gpu.capability // 10 == 9
    late = late or problem.kind == "codebook" or (codes and by_group(gpu))
    held = _ahead(schedule) * (w + x) + (x + w * codes) * late
    return max(held + slack(problem, schedule, gpu), sums)


def slack(problem: Problem, schedule: Schedule, gpu: Device) -> int:
    """What of `shared_bytes` some kernels do not take, in bytes: scales that are loaded past it, room to reorder numbers."""
    groups = max(1, schedule.block_k // problem.group) if problem.group else 0
    scales = 4 * problem.streams * schedule.block_n * groups * _ahead(schedule)
    if problem.kind == "skinny" and problem.m <= FEW:  # x in 32 bits, and the scale and shift of a norm
        scales += (2 * schedule.block_m + 8) * schedule.block_k * _ahead(schedule)
    moved = schedule.block_n == 16 * schedule.warps or 1 in planes(problem.bits)
    if moved and problem.kind in ("mid", "large") and not by_group(gpu):
        return scales + 2 * problem.streams * schedule.block_n * 128  # of decoded weights
    if gpu.capability // 10 == 10:
        x = 2 * schedule.block_m * schedule.block_k  # where w waits for tensor cores as well
        return scales + x + 64 + problem.streams * schedule.block_n * 16 * max(problem.bits, 4)  # of codes
    return scales + 64 + 4 * schedule.block_n  # of scales


def _ahead(schedule: Schedule) -> int:
    """Steps whose loads are under way while one is computed."""
    return max(schedule.stages - 1, 1)


def illegal(problem: Problem, schedule: Schedule, gpu: Device) -> str:
    """Why the kernel cannot be made with this schedule on `gpu`; empty when it can."""
    kind = KINDS[problem.kind]
    if schedule.block_k > problem.k and schedule.block_k > min(kind.block_k):
        return f"a step of {schedule.block_k} inputs is longer than K = {problem.k}"
    if problem.group and schedule.block_k % problem.group and problem.group % schedule.block_k:
        return f"a step of {schedule.block_k} inputs cuts groups of {problem.group}"
    if problem.split_k > 1 and problem.k // problem.split_k % schedule.block_k:
        return f"a step of {schedule.block_k} inputs cuts a part of {problem.k // problem.split_k}"
    if kind.decoding and problem.k // problem.split_k % schedule.block_k and schedule.block_k > min(kind.block_k):
        return f"steps of {schedule.block_k} inputs do not end with K = {problem.k}"
    if schedule.block_n < 16 * schedule.warps and kind.pipelined:
        return f"{schedule.warps} warps share {schedule.block_n} outputs; 16 a warp are the least"
    if kind.decoding and not by_group(gpu) and 2 * schedule.block_m > schedule.block_n:
        return f"{schedule.block_m} rows: warps would share outputs, and decode the same weights"
    if (count := registers(problem, schedule, gpu)) > 220:
        return f"about {count} registers a thread"
    if (bytes_ := shared_bytes(problem, schedule, gpu)) > gpu.shared:
        return f"about {bytes_} bytes of shared memory, {gpu.shared} are the most"
    return ""


def tile_m(kind: str, m: int) -> int:
    """Rows of x in one program: all of a bucket's, in a power of two, as far as the kind goes."""
    bounds = KINDS[kind]
    return min(max(1 << (m - 1).bit_length(), bounds.least_m), bounds.most_m)


def candidates(problem: Problem, gpu: Device) -> Iterator[Schedule]:
    """Every legal schedule, in a fixed order."""
    kind, most = KINDS[problem.kind], tile_m(problem.kind, problem.m)
    rows = [size for size in (8, 16, 32, 64, 128) if kind.least_m <= size <= most and 4 * size >= most]
    for n in kind.block_n:
        for m in rows:
            for k in kind.block_k:
                for warps in kind.warps:
                    for stages in kind.stages:
                        schedule = Schedule(n, m, k, warps, stages)
                        if not illegal(problem, schedule, gpu):
                            yield schedule
