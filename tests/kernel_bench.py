"""Runs one kernel outside the runtime: compiles its text, calls it with the ABI of `artifact.Call` on 1..n threads."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence

import llvmlite.binding as llvm
import torch

from qcompile.lowering.mlir import toolchain
from qcompile.target import Target, native


class Kernel:
    """A compiled kernel of this machine: `Kernel(text, "name")([tensors], [dims], threads=2)`.

    Tensors are passed as they are: the kernel sees their `data_ptr()`, so strided ones work as views do.
    """

    def __init__(self, text: str, name: str, target: Target | None = None):
        self.object = toolchain.compile_module(text, target or native())
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly("")
        module.triple = llvm.get_process_triple()
        machine = llvm.Target.from_triple(module.triple).create_target_machine()
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(self.object))
        self._engine.finalize_object()
        address = self._engine.get_function_address(name)
        assert address, f"the object has no function {name}"
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._function = signature(address)

    def __call__(self, args: Sequence[torch.Tensor], dims: Sequence[int] = (), threads: int = 1) -> None:
        pointers = (ctypes.c_void_p * max(1, len(args)))(*(arg.data_ptr() for arg in args))
        sizes = (ctypes.c_int64 * max(1, len(dims)))(*dims)
        where = ctypes.addressof(pointers), ctypes.addressof(sizes)
        others = [threading.Thread(target=self._function, args=(*where, i, threads)) for i in range(1, threads)]
        for other in others:
            other.start()
        self._function(*where, 0, threads)
        for other in others:
            other.join()

    def seconds(self, args: Sequence[Sequence[torch.Tensor]], dims: Sequence[int] = (), repeat: int = 50) -> float:
        """The best time of one single-threaded call, going round `args` so that weights can come from memory."""
        best = float("inf")
        for i in range(repeat):
            chosen = args[i % len(args)]
            start = time.perf_counter()
            self(chosen, dims)
            best = min(best, time.perf_counter() - start)
        return best
