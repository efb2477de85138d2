"""An evaluator of PTX modules: a GPU for tests, with the memory of this process as its own.

    memory = Memory(x, y)                                   # what kernels may touch; or memory.add(address, size)
    module = parse(text)                                    # what `compiled.asm["ptx"]` or an artifact's .ptx file holds
    run(module, "linear", grid=(4, 1, 1), threads=128, shared_bytes=4096, arguments=[x.data_ptr(), y.data_ptr(), 3, 0, 0],
        memory=memory)

`arguments` has one integer for each parameter of the entry, in order, those that Triton adds (0, 0) included. `run` returns
when all blocks have ended. `order=` draws another order of blocks and warps. A `Fault` names the line of the PTX: an access
outside of the memory or not aligned, of shared memory that was never written (a copy that was not waited for has not written
yet), a barrier that not all threads reach, a part of a warp where all of it must come, an instruction that is not known.

What is not modelled: time, caches and the weak order of memory between blocks, the precision of approximate functions (they
are rounded once) and of sums inside of tensor cores (exact, then rounded once). A wgmma has ended when it is issued.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gpu.ptx.machine import run, run_lines
from gpu.ptx.memory import Memory
from gpu.ptx.parser import Fault, Module, parse, parse_lines

__all__ = ["Fault", "Memory", "Module", "inline", "parse", "run"]


def inline(lines: Sequence[str], outputs: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The registers $0 .. (u32) of inline PTX whose inputs are $outputs ..., arrays of u32 or u64 of one length."""
    kinds = {f"${outputs + i}": f"b{each.dtype.itemsize * 8}" for i, each in enumerate(inputs)}
    function, registers = parse_lines(list(lines), kinds)
    given = {registers[name]: each for name, each in zip(kinds, inputs, strict=True)}
    lanes = run_lines(function, given, len(inputs[0]))
    return [lanes.read(registers[f"${i}"], "b32") for i in range(outputs)]
