"""From MLIR text to object code: torch-mlir lowers and translates, llvmlite optimizes and assembles, in this process.

The same text, target and compiler versions give the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qcompile.errors import ToolchainError
from qcompile.lowering.mlir import literals
from qcompile.target import Target

if TYPE_CHECKING:
    import llvmlite.binding as llvm

# func, scf, arith, math, vector, memref and llvm operations all end in the llvm dialect.
PIPELINE = (
    "builtin.module(func.func(convert-vector-to-scf),convert-scf-to-cf,convert-vector-to-llvm,expand-strided-metadata,"
    "lower-affine,convert-math-to-llvm,convert-arith-to-llvm,finalize-memref-to-llvm,convert-index-to-llvm,"
    "convert-func-to-llvm,convert-cf-to-llvm,convert-ub-to-llvm,reconcile-unrealized-casts,canonicalize,cse)"
)
_llvm_lock = threading.Lock()  # llvmlite's global context is not for several threads at once


def key(text: str, target: Target) -> str:
    """A name for the object that `text` gives on `target`: a digest of the text, the target, the compilers and this code."""
    parts = (text, repr(target), *_versions())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    own = (Path(__file__), Path(literals.__file__))
    return (
        *(f"{name} {version(name)}" for name in ("torch-mlir", "llvmlite")),
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in own),
    )


def compile_module(text: str, target: Target, pipeline: str = PIPELINE) -> bytes:
    """The relocatable ELF object of an MLIR module's text; ToolchainError names a file with the text that failed."""
    return compile_llvm(to_llvm(text, pipeline), target)


def to_llvm(text: str, pipeline: str = PIPELINE) -> str:
    """LLVM IR text of an MLIR module's text."""
    ir, passmanager, dialect = _bindings()
    with ir.Context():
        try:
            module = ir.Module.parse(text)
            passmanager.PassManager.parse(pipeline).run(module.operation)
            return literals.portable(str(dialect.translate_module_to_llvmir(module.operation)))
        except (ir.MLIRError, ValueError, RuntimeError) as error:
            _fail("MLIR refused a kernel's text", text, ".mlir", error)


def compile_llvm(text: str, target: Target) -> bytes:
    """The relocatable ELF object of LLVM IR text, optimized for `target`."""
    with _llvm_lock:
        machine = _machine(target)
        return bytes(machine.emit_object(_optimized(text, target, machine)))


def assembly(text: str, target: Target, pipeline: str = PIPELINE) -> str:
    """The machine code of an MLIR module's text, to read and to count."""
    source = to_llvm(text, pipeline)
    with _llvm_lock:
        machine = _machine(target)
        return str(machine.emit_assembly(_optimized(source, target, machine)))


def _optimized(text: str, target: Target, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    import llvmlite.binding as llvm

    try:
        module = llvm.parse_assembly(text)
        module.triple, module.data_layout = target.triple, str(machine.target_data)
        module.verify()
    except RuntimeError as error:
        _fail("LLVM refused a kernel's text", text, ".ll", error)
    options = llvm.create_pipeline_tuning_options(speed_level=2)  # 3 takes longer and finds no more here
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


@functools.cache
def _initialize() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def _machine(target: Target) -> llvm.TargetMachine:
    import llvmlite.binding as llvm

    _initialize()
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(
        cpu=target.processor, features=target.features, opt=3, reloc="pic", codemodel="small"
    )


def _bindings() -> tuple[Any, Any, Any]:
    try:
        from torch_mlir import ir, passmanager
        from torch_mlir.dialects import llvm
    except ImportError as error:
        raise ToolchainError(
            "compiling for a CPU needs torch-mlir", found=error, remedy="pip install torch-mlir, or target='reference'"
        ) from error
    return ir, passmanager, llvm


def _fail(summary: str, text: str, suffix: str, error: Exception) -> NoReturn:
    with tempfile.NamedTemporaryFile("w", prefix="qcompile-", suffix=suffix, delete=False) as file:
        file.write(text)
    raise ToolchainError(summary, where=str(Path(file.name)), found=str(error)[:2000]) from error
