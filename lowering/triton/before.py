"""Rows of x made by the kernel that multiplies them: normalised, transformed and rounded by every program for itself.

Few rows are cheaper made again in each program than by a kernel in front. All programs write the same bytes to the same
place in memory, and each reads what it has written itself: there is no order between them that anything depends on. The
text is that of the template "activation", so codes and scales are the same bits; only sums over a row (norms) may be added
in another order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcompile.artifact import Extent, View
from qcompile.lowering.extents import outside
from qcompile.lowering.triton import activation
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import as_docstring
from qcompile.lowering.triton.transform_functions import functions
from qcompile.row_transforms import alone
from qcompile.target import Target

FEW = 4  # rows of x that each program makes for itself
HELD = 1024  # inputs of a row that a warp holds at once


@dataclass(frozen=True)
class Before:
    """What a linear kernel does to x first: the parameters of "activation", and the views that it reads for that.

    What that template would write, the linear kernel has among its arguments: they are scratch that it writes itself.
    """

    params: dict[str, Any]
    read: tuple[View, ...]


def problem(params: activation.Params | None, k: int, most: int, out: str, padded: int = 0, groups: int = 0) -> str:
    """Why no linear kernel of K = k for at most `most` rows can do this first; empty when it can.

    It reads rows in the form `out`; "codes" are rows of `padded`, under `groups` scales.
    """
    if params is None:
        return ""
    if params.k != k or most > FEW:
        return f"rows of {params.k} inputs, at most {most} of them"
    reads = outside(
        params,
        whole=params.whole != "given",
        most=not params.most,
        out=params.out == out,
        padded=params.padded == (padded or k),
    )
    found = params.problem() or reads or alone(params.steps)
    return found or (f"{params.groups} scales of a row" if groups and params.groups != groups else "")


def extents(params: activation.Params | None, m: int) -> list[Extent]:
    """Of the pointers that are read, the last of the kernel's."""
    if params is None:
        return []
    return [extent for extent in activation.extents(params, (m,), 0) if not extent.written]


def joined(source: Source, params: dict[str, Any] | None, results: Sequence[str], parts: int, target: Target) -> Source:
    """The kernel `source` with rows made first; its arguments `results` are what "activation" writes, in order.

    Programs differ in tl.program_id(2), below `parts`, only in the part of K that they read.
    """
    if params is None:
        return source
    p = activation.parsed(params)
    width = HELD * source.warps
    held = parts == 1 and p.padded <= width
    text = activation.Text(p, target, 0 if held else width, parts)
    lines = [*text.all_rows(), "for m in range(0, d0):", *(f"    {line}" for line in text.row())]
    match = re.search(rf"^def {source.entry}\((.*), d0\):$", source.text, re.MULTILINE)
    assert match is not None
    arguments, own = match[1], [name for name, _ in text.read()]
    given = [*(f"own_{name}" for name in own), *results]
    entry = f"rows_and_{source.entry}"
    made = _MODULE.format(
        source=source.text.strip(),
        helpers=functions("\n".join(lines)),
        about=as_docstring(text.summary()),
        row=", ".join([*own, *(name for name, _ in text.written())]),
        lines="\n".join(f"    {line}" for line in lines),
        entry=entry,
        linear=source.entry,
        arguments=arguments,
        given=", ".join(given),
        own=", ".join(given[: len(own)]),
    )
    types = (*source.pointers, *(dtype for _, dtype in text.read()))
    # A product and a sum as one operation would round otherwise than the method does.
    return replace(source, text=made, entry=entry, pointers=types, fusion=False)


_MODULE = '''{source}


{helpers}


@triton.jit
def make_rows({row}, d0):
    """{about}"""
{lines}


@triton.jit
def {entry}({arguments}, {own}, d0):
    make_rows({given}, d0)
    tl.debug_barrier()
    {linear}({arguments}, d0)
'''
