"""Every error qcompile raises on purpose, in one tree.

QCompileError
├── ConfigError       a quantization config, or an argument of compile(), is wrong
├── CheckpointError   a tensor is missing, left over, or has the wrong shape, dtype or content
├── CaptureError      the model cannot be exported to a graph
├── LoweringError     a node or layer has no kernel on the target (only under strict)
├── ArtifactError     a compiled artifact is damaged, unknown, or not for this machine
├── ToolchainError    a compiler component is missing or failed
└── InternalError     qcompile broke one of its own rules: please report it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Self


class QCompileError(Exception):
    """Base of all errors: a message of up to four labelled lines (where, found, expected, try).

    Attributes: `where`, `found`, `expected`, `remedy` (each a string, empty when it does not apply).
    """

    def __init__(self, summary: str, *, where: str = "", found: object = "", expected: object = "", remedy: str = ""):
        self.summary, self.where, self.remedy = summary, where, remedy
        self.found, self.expected = str(found), str(expected)
        lines = [summary]
        for label, text in (("where", where), ("found", self.found), ("expected", self.expected), ("try", remedy)):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        super().__init__("\n".join(lines))

    def along_with(self, others: Sequence[QCompileError], count: int) -> Self:
        """The same error, with `others` named in a line each below it; `count` is how many there are."""
        made = type(self)(self.summary, where=self.where, found=self.found, expected=self.expected, remedy=self.remedy)
        lines = [f"  also:     {e.where}{e.where and ': '}{e.summary}; found {e.found}" for e in others]
        lines += [f"  also:     {count - len(others)} more"] if count > len(others) else []
        made.args = ("\n".join([str(self), *lines]),)
        return made


class ConfigError(QCompileError):
    """A quantization config, or an argument of compile(), is wrong."""


class CheckpointError(QCompileError):
    """A tensor is missing, left over, or has the wrong shape, dtype or content."""


class CaptureError(QCompileError):
    """The model cannot be exported to a graph."""


class LoweringError(QCompileError):
    """A node or layer has no kernel on the target, and the caller asked for strict."""


class ArtifactError(QCompileError):
    """A compiled artifact is damaged, unknown, or not for this machine."""


class ToolchainError(QCompileError):
    """A compiler component is missing or failed."""


class InternalError(QCompileError):
    """qcompile broke one of its own rules."""


def near(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """`", did you mean 'x'?"` when a known name is like `name` to at least that share, else an empty string.

    >>> near("gtpq", ["gptq", "awq"])
    ", did you mean 'gptq'?"
    """
    hits = difflib.get_close_matches(name, list(known), n=1, cutoff=least)
    return f", did you mean '{hits[0]}'?" if hits else ""
