"""Runs kernels on arrays that end, or begin, at a page that nobody may touch: `python guarded.py`, cases on stdin.

Input: lines of JSON, [template, params, [dims, ...], how many elements the arrays lack]. Output: a line before each run,
so that the last one says what was running where the process dies. Arrays hold random bytes, indices and positions too.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from collections.abc import Sequence

import torch
from kernel_bench import Kernel

from qcompile.artifact import Extent, KernelSpec
from qcompile.dtypes import DTYPES
from qcompile.lowering.mlir import templates
from qcompile.target import native

PAGE = mmap.PAGESIZE
THREADS = 3


class Guarded:
    """An array of random bytes between two pages that may not be touched, at the `end` or the beginning of its own."""

    def __init__(self, extent: Extent, end: bool):
        size = extent.elements * DTYPES[extent.dtype].itemsize
        inside = max(PAGE, -(-size // PAGE) * PAGE)
        self.memory = mmap.mmap(-1, inside + 2 * PAGE)
        whole = torch.frombuffer(self.memory, dtype=torch.uint8)
        start = PAGE + (inside - size if end else 0)
        whole[start : start + size] = torch.randint(0, 256, (size,), dtype=torch.uint8)
        self.address = whole.data_ptr() + start
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for page in (whole.data_ptr(), whole.data_ptr() + PAGE + inside):
            assert protect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0, "mprotect failed"

    def data_ptr(self) -> int:
        return self.address


def run(kernel: Kernel, touched: Sequence[Extent], dims: Sequence[int]) -> None:
    for end in (True, False):
        arrays = [Guarded(extent, end) for extent in touched]
        kernel(arrays, dims, threads=THREADS)  # type: ignore[arg-type]


def main() -> None:
    torch.manual_seed(0)
    for line in sys.stdin:
        template, params, every, less = json.loads(line)
        spec = KernelSpec(template, params)
        kernel = Kernel(templates.emit(spec, native()), templates.entry(spec))
        extents = templates.extents(spec)
        for dims in every:
            print(template, dims, flush=True)
            touched = [extent._replace(elements=extent.elements - less) for extent in extents(tuple(dims), THREADS)]
            run(kernel, touched, dims)


if __name__ == "__main__":
    main()
