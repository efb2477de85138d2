"""Runs Triton kernels on CPU tensors: Triton's interpreter in place of a GPU (TRITON_INTERPRET is set in conftest.py)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from qcompile.dims import evaluate
from qcompile.dtypes import DTYPES
from qcompile.lowering.triton.source import Source


def _correct(name: str) -> None:
    """Makes a comparison give booleans: Triton's interpreter leaves them in the dtype of what was compared."""
    compare = getattr(InterpreterBuilder, name)

    def booleans(builder: Any, left: Any, right: Any) -> Any:
        return TensorHandle(compare(builder, left, right).data.astype(bool), tl.int1)

    setattr(InterpreterBuilder, name, booleans)


for _name in [name for name in vars(InterpreterBuilder) if name.startswith(("create_fcmp", "create_icmp"))]:
    _correct(_name)


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
    # Some texts read bools and 8-bit floats as bytes.
    given = [x.view(DTYPES[dtype]) if dtype == "u8" else x for x, dtype in zip(args, source.pointers, strict=True)]
    if 0 not in grid:
        function(source.text, source.entry)[grid](*given, *dims)
