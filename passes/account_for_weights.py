"""The last look at the checkpoint: every tensor of the source ended in exactly one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.errors import InternalError
from qcompile.passes.base import Context, Pass
from qcompile.program import Program


@dataclass(frozen=True)
class AccountForWeights(Pass):
    """CheckpointError when a tensor of the source was not used, or used twice; tensors left out on purpose are notes.

    Every module that holds a weight must have a record of where it is, or a note that the graph does not use it.
    """

    name: ClassVar[str] = "account-for-weights"

    def run(self, program: Program, ctx: Context) -> int:
        for path in program.modules:
            if path not in program.weights and path not in program.mixtures:
                ctx.report.note(f"{path}: the graph does not use its weight")
        for path, record in program.weights.items():
            lost = [name for name in record.tensors.values() if name not in program.tensors]
            if lost:
                raise InternalError("a stored tensor was lost", where=path, found=", ".join(lost))
        for name, reason in program.ledger.ignored.items():
            ctx.report.note(f"tensor '{name}' is not used: {reason}")
        program.ledger.check()
        return 0
