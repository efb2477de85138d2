"""Removes what no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.passes.base import Context, Pass, drop_unused
from qcompile.program import Program


@dataclass(frozen=True)
class DropDeadCode(Pass):
    """Nodes and stored tensors that no output and no cache depends on go."""

    name: ClassVar[str] = "drop-dead-code"

    def run(self, program: Program, ctx: Context) -> int:
        return drop_unused(program)
