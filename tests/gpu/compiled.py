"""Runs Triton kernels as the PTX that they are compiled to: the evaluator in place of a GPU."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu import ptx

from qcompile.dims import evaluate
from qcompile.dtypes import DTYPES
from qcompile.lowering.triton import toolchain
from qcompile.lowering.triton.source import Source
from qcompile.target import Target


@dataclass(frozen=True)
class Kernel:
    """A module's text and how it is started, as an artifact says it."""

    text: str
    module: ptx.Module
    entry: str
    warps: int
    shared: int
    scratch: int


class _Text(toolchain.Job):
    """A job whose answer is PTX, whatever its target."""

    def request(self) -> dict[str, Any]:
        return super().request() | {"assemble": False}


@functools.cache
def _worker() -> toolchain._Worker:
    return toolchain._Worker().__enter__()


@functools.cache
def kernel(source: Source, place: Target) -> Kernel:
    """The PTX that Triton makes of `source` for the one capability of `place`."""
    answer = _worker().answer(_Text(source, place))
    text = base64.b64decode(answer["object"]).decode()
    scratch = answer["parameters"] - len(source.pointers) - source.dims
    assert answer["shared"] <= toolchain.SHARED[place.capability]
    return Kernel(text, ptx.parse(text), source.entry, answer["warps"], answer["shared"], scratch)


def run(
    source: Source, args: Sequence[torch.Tensor], dims: Sequence[int], place: Target, order: int | None = None
) -> None:
    """Starts the kernel as the runtime would, on nothing but the memory of `args`."""
    assert len(args) == len(source.pointers) and len(dims) == source.dims
    made = kernel(source, place)
    sizes = {f"d{i}": value for i, value in enumerate(dims)}
    grid = tuple(evaluate(dim, sizes) for dim in source.grid)
    memory = ptx.Memory()
    for i, (x, dtype) in enumerate(zip(args, source.pointers, strict=True)):
        assert x.is_contiguous() and x.element_size() == DTYPES[dtype].itemsize
        memory.add_tensor(x, f"(argument {i})")
    if 0 in grid:
        return
    pointers = [x.data_ptr() for x in args]
    arguments = [*pointers, *dims, *[0] * made.scratch]
    ptx.run(made.module, made.entry, grid, made.warps * 32, made.shared, arguments, memory, order)
