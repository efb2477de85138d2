"""Which schedule a linear kernel gets: a table's entry where there is one, else the cost model's fastest.

`split_k` changes buffers, so it follows from the shape alone (`split`) and is a parameter of the kernel; all else depends on
the GPU, and is chosen where the text is made (`choose`). What an instruction count may be at most is in `budgets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from qcompile.lowering.triton import cost
from qcompile.lowering.triton.devices import device
from qcompile.lowering.triton.tables import Table, shipped
from qcompile.lowering.triton.tiles import Problem, Schedule, candidates

__all__ = ["BUCKETS", "OPEN", "Problem", "Schedule", "choose", "split", "using", "watched"]

OPEN = 2048
"""The bucket of all M above the others; its schedules are chosen for this many rows."""

BUCKETS = (4, 32, 128, OPEN)
"""The greatest M of each variant of a linear. Within a bucket a program's own `block_m` may be smaller."""

GRANULE = 128
"""K is split at multiples of this many inputs, so that no part cuts a group or a step in two."""

MOST_PARTS = 16
"""The most programs that share K."""

ENOUGH, MOST_PARTS = 400, 16  # programs, and parts of K

_in_use: ContextVar[Table | None] = ContextVar("schedules", default=None)

_chosen: ContextVar[list[tuple[Problem, Schedule]] | None] = ContextVar("chosen", default=None)


@contextmanager
def watched() -> Iterator[list[tuple[Problem, Schedule]]]:
    """The problems that `choose` is asked in here, and what it answers, in order."""
    found: list[tuple[Problem, Schedule]] = []
    token = _chosen.set(found)
    try:
        yield found
    finally:
        _chosen.reset(token)


@contextmanager
def using(table: Table) -> Iterator[None]:
    """While kernels' text is made in here, `choose` looks in `table` first."""
    token = _in_use.set(table)
    try:
        yield
    finally:
        _in_use.reset(token)


def may_split(k: int, split_k: int) -> bool:
    """Whether a kernel's `split_k` is one: that many programs share K inputs in whole granules."""
    return split_k == 1 or (1 < split_k <= MOST_PARTS and k % (split_k * GRANULE) == 0)


def split(n: int, k: int, m_bucket: int) -> int:
    """How many parts K is summed in, which later are added in order; 1 where the outputs alone make work enough.

    Enough are 400 programs of 64 outputs, three for each multiprocessor of a large GPU. A part has 512 inputs or more, and
    is whole granules.

    >>> split(4096, 4096, 4), split(28672, 4096, 4), split(4096, 14336, 4), split(4096, 4096, OPEN), split(576, 576, 4)
    (8, 1, 7, 1, 1)
    """
    wanted = math.ceil(ENOUGH / (math.ceil(n / 64) * math.ceil(m_bucket / 128)))
    granules, rest = divmod(k, GRANULE)
    if rest:
        return 1
    possible = [
        parts for parts in range(1, MOST_PARTS + 1) if granules % parts == 0 and (parts == 1 or k // parts >= 512)
    ]
    return min((parts for parts in possible if parts >= wanted), default=possible[-1])


def choose(
    kind: str,
    n: int,
    k: int,
    m_bucket: int,
    bits: int,
    capability: int,
    *,
    value: str = "int",
    group: int = 0,
    split_k: int = 1,
    streams: int = 1,
) -> Schedule:
    """The schedule of a linear kernel: the entry of the table in use, else of the shipped one, else the model's fastest.

    `split_k` is the kernel's parameter, made by `split`; the others are as in `Problem`. Capability 0 is the interpreter, for
    which the smallest tile is taken. ValueError where no schedule can be made.
    """
    problem = Problem(kind, n, k, m_bucket, bits, value, group, split_k, streams)
    in_use, seen = _in_use.get(), _chosen.get()
    found = (in_use and in_use.find(problem, capability)) or shipped().find(problem, capability)
    chosen = found or _modelled(problem, capability)
    if seen is not None:
        seen.append((problem, chosen))
    return chosen


def _modelled(problem: Problem, capability: int) -> Schedule:
    gpu = device(capability)
    legal = list(candidates(problem, gpu))
    if not legal:
        raise ValueError(f"no schedule can be made for {problem}")
    if capability == 0:
        return min(legal, key=lambda each: (each.block_n * each.block_m * each.block_k, each.stages, each.warps))
    # A bucket's kernel runs for fewer rows as well: it is to be fast for half of them too.
    half = replace(problem, m=max(problem.m // 2, 1))
    return min(legal, key=lambda each: cost.microseconds(problem, each, gpu) * cost.microseconds(half, each, gpu))
