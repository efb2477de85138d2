"""Runs Triton kernels on CPU tensors: Triton's interpreter in place of a GPU (TRITON_INTERPRET is set in conftest.py)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qcompile.dims import evaluate
from qcompile.lowering.triton.source import Source


@functools.cache
def function(text: str, entry: str) -> Any:
    """The interpreted function of a kernel's text; Triton wants to find its source in a file."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(text)
    scope: dict[str, Any] = {"__name__": Path(file.name).stem, "__file__": file.name}
    exec(compile(text, file.name, "exec"), scope)
    return scope[entry]


def run(source: Source, args: Sequence[torch.Tensor], dims: Sequence[int] = ()) -> None:
    """Starts the kernel as the runtime would: one tensor a pointer, contiguous from its first element on."""
    assert len(args) == len(source.pointers) and len(dims) == source.dims
    sizes = {f"d{i}": value for i, value in enumerate(dims)}
    grid = tuple(evaluate(dim, sizes) for dim in source.grid)
    if 0 not in grid:
        function(source.text, source.entry)[grid](*args, *dims)
