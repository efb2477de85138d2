"""How long a linear kernel takes with a schedule, by a roofline model: memory, instructions, tensor cores, latency.

The model is for choosing among schedules where nothing was measured: it knows how work spreads over multiprocessors, how
many bytes are on their way, what decoding costs and what a split adds. Its microseconds are no promise.
"""

from __future__ import annotations

import math

from qcompile.lowering.triton.budgets import instructions_per_weight
from qcompile.lowering.triton.devices import Device
from qcompile.lowering.triton.tiles import KINDS, Problem, Schedule, registers, shared_bytes

START = 2.0e-6  # s: a kernel's first load until its first result
LATENCY = 0.8e-6  # s: of memory under load
SPLIT = 1.5e-6  # s: partial sums out, the counter, and partial sums in again
ATTAINABLE = 0.92  # of the bandwidth that a data sheet names
L2_PORT = 64  # bytes a clock into one multiprocessor
EDGES = 400  # instructions of a thread around its loop
STEP = 60  # instructions of a thread around a step's decoding: waits, barriers, addresses
PER_WARP = 0.4  # of a scheduler's issue slots that one warp fills


def resident(problem: Problem, schedule: Schedule, gpu: Device) -> int:
    """Programs that one multiprocessor holds at a time."""
    by_shared = gpu.processor_shared // max(shared_bytes(problem, schedule, gpu) + 1024, 1)
    by_registers = 65536 // (32 * schedule.warps * registers(problem, schedule, gpu))
    return max(1, min(by_shared, by_registers, gpu.warps // schedule.warps))


def microseconds(problem: Problem, schedule: Schedule, gpu: Device) -> float:
    """The modelled time of the kernel on `gpu` with its weights in memory, not in the cache."""
    n_tiles, m_tiles = math.ceil(problem.n / schedule.block_n), math.ceil(problem.m / schedule.block_m)
    programs = n_tiles * m_tiles * problem.split_k
    inputs = problem.k / problem.split_k
    steps = math.ceil(inputs / schedule.block_k)
    share = math.ceil(programs / gpu.processors)
    together = min(resident(problem, schedule, gpu), share)

    outputs = problem.streams * schedule.block_n
    step_bytes = schedule.block_k * (outputs * problem.stored_bits / 8 + 2 * schedule.block_m)
    weights = problem.streams * problem.n * problem.k * problem.stored_bits / 8
    rows = 2 * problem.m * problem.k + 4 * problem.m * problem.n
    ahead = max(schedule.stages - 1, 1) if KINDS[problem.kind].pipelined else 1
    flowing = gpu.processors * together * ahead * step_bytes / LATENCY
    memory = max(
        (weights + rows) / min(ATTAINABLE * gpu.bandwidth, flowing),
        share * steps * step_bytes / (L2_PORT * gpu.clock),
    )

    warps = schedule.warps * together / 4
    lanes = gpu.instructions / gpu.processors * min(1.0, PER_WARP * warps)
    decoded = outputs * steps * schedule.block_k * instructions_per_weight(problem, schedule)
    issue = share * (decoded + (EDGES + STEP * steps) * 32 * schedule.warps) / lanes

    faster = {"int8": gpu.int8, "fp8": gpu.fp8}.get(problem.kind, 1.0)
    dots = 2 * outputs * schedule.block_m * steps * schedule.block_k
    tensor = share * dots / (0.7 * faster * gpu.dense / gpu.processors)

    parts = (memory, issue, tensor)
    overlap = max(parts) + 0.15 * (sum(parts) - max(parts))
    return 1e6 * (START + overlap + (SPLIT if problem.split_k > 1 else 0.0))


def limit(problem: Problem, gpu: Device) -> float:
    """The least time that memory and tensor cores allow, in microseconds: bytes at full bandwidth, or dots at full rate."""
    count = problem.streams * problem.n * problem.k
    rows = 2 * problem.m * (problem.k + problem.n)
    faster = {"int8": gpu.int8, "fp8": gpu.fp8}.get(problem.kind, 1.0)
    read = (count * problem.stored_bits / 8 + rows) / gpu.bandwidth
    return 1e6 * max(read, 2 * problem.m * count / (faster * gpu.dense))
