"""What the main loop of each kind of linear kernel may cost, held by a test of its machine code, and what it is modelled to.

An H100 starts 8.9 lane instructions for each byte it can read, so a weight of 4.25 bits leaves 4.7 for all that is done
with it: how many a kernel spends decides whether memory or the schedulers end first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompile.formats.fragments import SHORTEST
from qcompile.lowering.triton.tiles import Problem, Schedule


@dataclass(frozen=True)
class Budget:
    """Bounds on a kernel's machine code: instructions a weight in its main loop, bits of a load of weights, spilled bytes.

    `short` is what each weight may cost more where a scale is for 16 inputs alone.
    """

    instructions: float
    short: float = 0.0
    load_bits: int = 128
    tensor_cores: bool = True
    spilled: int = 0


BUDGETS: dict[tuple[str, str, int], Budget] = {
    ("skinny", "int", 2): Budget(2.1),
    ("skinny", "int", 3): Budget(3.7),
    ("skinny", "int", 4): Budget(3.0),
    ("skinny", "int", 8): Budget(2.5),
    ("skinny", "table", 4): Budget(3.9, short=1.0),
    ("skinny", "fp", 8): Budget(3.2),
    ("mid", "int", 2): Budget(3.6),
    ("mid", "int", 3): Budget(4.8),
    ("mid", "int", 4): Budget(3.3),
    ("mid", "int", 8): Budget(3.4),
    ("mid", "table", 4): Budget(5.3, short=1.4),
    ("mid", "fp", 8): Budget(3.9),
    ("large", "int", 2): Budget(4.7),
    ("large", "int", 3): Budget(5.6),
    ("large", "int", 4): Budget(4.3),
    ("large", "int", 8): Budget(4.2),
    ("large", "table", 4): Budget(6.5, short=2.0),
    ("large", "fp", 8): Budget(6.2),
    ("int8", "int", 8): Budget(3.0),
    ("fp8", "fp", 8): Budget(3.0),
    ("codebook", "k2x1", 2): Budget(3.0),
    ("codebook", "k2x1", 3): Budget(2.9),
    ("codebook", "k2x1", 4): Budget(2.9),
    ("codebook", "k8x1", 2): Budget(1.9),
    ("codebook", "k8x2", 2): Budget(2.6),
    ("codebook", "k16x4", 2): Budget(4.0),
    ("codebook", "n4x1", 3): Budget(3.8),
    ("codebook", "n8x1", 2): Budget(2.5),
    ("codebook", "n8x2", 2): Budget(4.2),
    ("codebook", "n8x2", 3): Budget(4.2),
    ("codebook", "n16x2", 2): Budget(3.1),
}
"""By (kind, value, bits), on capability 9.0; "n8x2" is two books of eight weights along n. On others, kernels of more than 32
rows spend up to `OTHERS` times that: tensor cores take an instruction for 8 rows of x, or, from 10.0 on, read weights from a
memory of their own."""

OTHERS = 1.25
GENERIC = 14.0  # what plain arithmetic on a weight costs, about


def budget(kind: str, value: str, bits: int, capability: int, group: int = 0) -> Budget | None:
    """The bounds of a kernel; None for kinds that have none."""
    found = BUDGETS.get((kind, value, bits))
    if found is None:
        return None
    most = found.instructions + (found.short if group == SHORTEST else 0.0)
    other = kind in ("mid", "large") and capability // 10 != 9
    return replace(found, instructions=most * OTHERS if other else most)


def instructions_per_weight(problem: Problem, schedule: Schedule) -> float:
    """What the cost model reckons with: the budget of the kind, or that of plain arithmetic."""
    found = budget(problem.kind, problem.value, problem.bits, 90, problem.group)
    base = GENERIC if found is None else found.instructions
    # Each instruction of a tensor core takes 16 rows of x.
    return base + 0.02 * schedule.block_m
