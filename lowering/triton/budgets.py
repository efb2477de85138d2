"""What the main loop of each kind of linear kernel may cost, held by a test of its machine code, and what it is modelled to.

An H100 starts 8.9 lane instructions for each byte it can read, so a weight of 4.25 bits leaves 4.7 for all that is done
with it: how many a kernel spends decides whether memory or the schedulers end first.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.lowering.triton.tiles import Problem, Schedule


@dataclass(frozen=True)
class Budget:
    """Bounds on a kernel's machine code: instructions a weight in its main loop, bits of a load of weights, spilled bytes."""

    instructions: float
    load_bits: int = 128
    tensor_cores: bool = True
    spilled: int = 0


BUDGETS: dict[tuple[str, str, int], Budget] = {
    ("skinny", "int", 2): Budget(3.0),
    ("skinny", "int", 3): Budget(4.5),
    ("skinny", "int", 4): Budget(3.5),
    ("skinny", "int", 8): Budget(4.5),
    ("skinny", "table", 4): Budget(4.5),
    ("skinny", "fp", 4): Budget(4.5),
    ("skinny", "fp", 8): Budget(5.0),
    ("mid", "int", 2): Budget(4.5),
    ("mid", "int", 3): Budget(5.5),
    ("mid", "int", 4): Budget(4.5),
    ("mid", "int", 8): Budget(5.0),
    ("mid", "table", 4): Budget(6.5),
    ("mid", "fp", 4): Budget(5.5),
    ("mid", "fp", 8): Budget(5.5),
    ("large", "int", 4): Budget(6.0),
    ("large", "int", 8): Budget(6.0),
    ("large", "table", 4): Budget(7.0),
    ("large", "fp", 4): Budget(7.0),
    ("large", "fp", 8): Budget(7.0),
    ("int8", "int", 8): Budget(3.0),
    ("fp8", "fp", 8): Budget(3.0),
}
"""By (kind, value, bits), on capability 90; older tensor cores take smaller tiles, and spend up to `OLDER` times that."""

OLDER = 2.0
GENERIC = 14.0  # what plain arithmetic on a weight costs, about


def budget(kind: str, value: str, bits: int, capability: int) -> Budget | None:
    """The bounds of a kernel; None for kinds that have none."""
    found = BUDGETS.get((kind, value, bits))
    if found is None or capability >= 90:
        return found
    return Budget(found.instructions * OLDER, found.load_bits, found.tensor_cores, found.spilled)


def instructions_per_weight(problem: Problem, schedule: Schedule) -> float:
    """What the cost model reckons with: the budget of the kind, or that of plain arithmetic."""
    found = BUDGETS.get((problem.kind, problem.value, problem.bits))
    base = GENERIC if found is None else found.instructions
    # Each instruction of a tensor core takes 16 rows of x.
    return base + 0.02 * schedule.block_m
