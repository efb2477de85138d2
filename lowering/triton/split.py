"""Split-K as Triton text: programs store the parts of a sum, and the last to arrive adds them in order and goes on.

Results do not depend on who is last. The counters of arrivals, one a tile of y, are zero before and after.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.artifact import Extent, View
from qcompile.dims import Dim, times
from qcompile.lowering.base import Context
from qcompile.lowering.triton.linear import Pointer, Section, Shape
from qcompile.target import Target

LEAST = 16  # rows and columns of the smallest tile of y
POINTERS = [Pointer("parts", "f32"), Pointer("arrivals", "i32")]
"""The scratch of a kernel that splits K in more than one part."""


def scratch(ctx: Context, shape: Shape, m: Dim, split_k: int, least: int = LEAST) -> list[View]:
    """The views of `POINTERS`, enough for any tiles of `least` rows or more; none where K is not split."""
    if split_k == 1:
        return []
    rows: Dim = -(-m // least) if isinstance(m, int) else f"({m} + {least - 1})//{least}"
    return [ctx.temp((split_k, m, shape.n), "f32"), ctx.counters((times(_columns(shape), rows),))]


def extents(shape: Shape, m: int, split_k: int, least: int = LEAST) -> list[Extent]:
    """Of `POINTERS`."""
    if split_k == 1:
        return []
    return [Extent("f32", split_k * m * shape.n, True), Extent("i32", _columns(shape) * -(-m // least), True)]


def _columns(shape: Shape) -> int:
    """Tiles of y beside each other, at most."""
    return sum(-(-section.rows // LEAST) for section in shape.sections())


def add_up(
    shape: Shape,
    section: Section,
    sums: Sequence[str],
    split_k: int,
    ending: Sequence[str],
    target: Target,
    *,
    ragged: bool = True,
) -> list[str]:
    """The statements that add the f32 tensors `sums` of all programs of a tile, and run `ending` on them in one of them.

    Programs of one tile differ in tl.program_id(2) alone, the part of K. n, m and `ragged` are as in `epilogue.finish`.
    """
    if split_k == 1:
        return list(ending)
    lines = [
        f"whole = d0.to(tl.int64) * {shape.n}",
        f"inside = (m < d0) & (n < {section.rows})" if ragged else "inside = m < d0",
    ]
    starts = [sum(shape.rows[:part]) + first for part, first in section.streams]
    for y, start in zip(sums, starts, strict=True):
        lines.append(f"at_{y} = m.to(tl.int64) * {shape.n} + {f'(n + {start})' if start else 'n'}")
        lines.append(f"tl.store(parts + tl.program_id(2) * whole + at_{y}, {y}, mask=inside)")
    lines += [
        *_stored(target),
        "tl.debug_barrier()",
        "arrived = arrivals + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)",
        f"if tl.atomic_add(arrived, 1) == {split_k - 1}:",
        "    tl.store(arrived, 0)",
    ]
    for y in sums:
        # Other multiprocessors wrote these: the first-level cache does not know.
        read = f'tl.load(parts + part * whole + at_{y}, mask=inside, other=0.0, cache_modifier=".cg")'
        lines += [
            f"    {y} = tl.zeros({y}.shape, tl.float32)",
            f"    for part in range({split_k}):",
            f"        {y} += {read}",
        ]
    return [*lines, *(f"    {line}" for line in ending)]


def _stored(target: Target) -> list[str]:
    """The statements after which what a warp has stored is where an atomic operation of another one publishes it.

    AMD's barriers wait for shared memory alone, and an atomic operation for the stores of its own warp.
    """
    if target.isa != "gcn":
        return []
    wait = "s_waitcnt vmcnt(0)\\n\\tv_mov_b32 $0, $1"
    lanes = f"[tl.arange(0, {target.warp})]"
    return [f'tl.inline_asm_elementwise("{wait}", "=v,v,~{{memory}}", {lanes}, dtype=tl.int32, is_pure=False, pack=1)']
