"""The native half of the executor: the loop over kernel calls and the workers' waiting, as LLVM IR; and loaded objects.

`@run` is called once for a run of native calls. Every thread walks the same table of steps `{kernel, args, dims}`
(three pointers) and meets the others at a barrier behind each, so a kernel sees what those before it wrote.
A waiting worker spins for a moment, since the next token is a few microseconds away, then sleeps on a condition
variable, so that an idle process costs nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm

from qcompile.artifact import Built
from qcompile.errors import ArtifactError, ToolchainError

POOL_BYTES = 1024
# Indices of i64 fields in a pool; those that different threads write lie on lines of their own.
EPOCH, ARRIVED, PHASE, SLEEPERS, STEPS, COUNT, THREADS, STOP, MUTEX, CONDITION = 0, 8, 16, 24, 32, 33, 34, 35, 64, 96
SPINS = 2000

_PAUSE = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "AMD64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
    "arm64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}
_NEEDED: tuple[str, ...] = ("sched_yield", "pthread_mutex_init", "pthread_mutex_lock", "pthread_mutex_unlock")
_NEEDED += ("pthread_cond_init", "pthread_cond_wait", "pthread_cond_broadcast")

_TEXT = f"""
%step = type {{ ptr, ptr, ptr }}
declare i32 @sched_yield()
declare i32 @pthread_mutex_init(ptr, ptr)
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i32 @pthread_cond_init(ptr, ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_cond_broadcast(ptr)
DECLARE_PAUSE

; Returns when all threads of the pool have come here. The last one resets the count, then opens the next phase.
define internal void @barrier(ptr %pool, i64 %threads) {{
entry:
  %alone = icmp eq i64 %threads, 1
  br i1 %alone, label %done, label %arrive
arrive:
  %phase.p = getelementptr i64, ptr %pool, i64 {PHASE}
  %phase = load atomic i64, ptr %phase.p acquire, align 8
  %arrived.p = getelementptr i64, ptr %pool, i64 {ARRIVED}
  %before = atomicrmw add ptr %arrived.p, i64 1 acq_rel
  %here = add i64 %before, 1
  %last = icmp eq i64 %here, %threads
  br i1 %last, label %open, label %spin
open:
  store atomic i64 0, ptr %arrived.p monotonic, align 8
  %next = add i64 %phase, 1
  store atomic i64 %next, ptr %phase.p release, align 8
  br label %done
spin:
  %i = phi i64 [ 0, %arrive ], [ %i.next, %again ]
  %now = load atomic i64, ptr %phase.p acquire, align 8
  %moved = icmp ne i64 %now, %phase
  br i1 %moved, label %done, label %wait
wait:
  %i.next = add i64 %i, 1
  %patient = icmp ult i64 %i, {SPINS}
  br i1 %patient, label %rest, label %yield
rest:
  CALL_PAUSE
  br label %again
yield:
  call i32 @sched_yield()
  br label %again
again:
  br label %spin
done:
  ret void
}}

define internal void @execute(ptr %pool, ptr %steps, i64 %count, i64 %thread, i64 %threads) {{
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %i.next, %loop ]
  %step = getelementptr %step, ptr %steps, i64 %i
  %args.p = getelementptr %step, ptr %step, i64 0, i32 1
  %dims.p = getelementptr %step, ptr %step, i64 0, i32 2
  %kernel = load ptr, ptr %step
  %args = load ptr, ptr %args.p
  %dims = load ptr, ptr %dims.p
  call void %kernel(ptr %args, ptr %dims, i64 %thread, i64 %threads)
  call void @barrier(ptr %pool, i64 %threads)
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}}

define void @prepare(ptr %pool) {{
  %mutex = getelementptr i64, ptr %pool, i64 {MUTEX}
  %condition = getelementptr i64, ptr %pool, i64 {CONDITION}
  call i32 @pthread_mutex_init(ptr %mutex, ptr null)
  call i32 @pthread_cond_init(ptr %condition, ptr null)
  ret void
}}

; Starts a new epoch and wakes whoever sleeps. Both sides order their store before their load, so no wake-up is lost.
define internal void @announce(ptr %pool) {{
  atomicrmw add ptr %pool, i64 1 seq_cst
  %sleepers.p = getelementptr i64, ptr %pool, i64 {SLEEPERS}
  %sleepers = load atomic i64, ptr %sleepers.p seq_cst, align 8
  %asleep = icmp ne i64 %sleepers, 0
  br i1 %asleep, label %wake, label %done
wake:
  %mutex = getelementptr i64, ptr %pool, i64 {MUTEX}
  %condition = getelementptr i64, ptr %pool, i64 {CONDITION}
  call i32 @pthread_mutex_lock(ptr %mutex)
  call i32 @pthread_cond_broadcast(ptr %condition)
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br label %done
done:
  ret void
}}

define void @run(ptr %pool, ptr %steps, i64 %count) {{
  %threads.p = getelementptr i64, ptr %pool, i64 {THREADS}
  %threads = load i64, ptr %threads.p
  %alone = icmp eq i64 %threads, 1
  br i1 %alone, label %execute, label %share
share:
  %steps.p = getelementptr i64, ptr %pool, i64 {STEPS}
  store ptr %steps, ptr %steps.p
  %count.p = getelementptr i64, ptr %pool, i64 {COUNT}
  store i64 %count, ptr %count.p
  call void @announce(ptr %pool)
  br label %execute
execute:
  call void @execute(ptr %pool, ptr %steps, i64 %count, i64 0, i64 %threads)
  ret void
}}

define void @stop(ptr %pool) {{
  %stop.p = getelementptr i64, ptr %pool, i64 {STOP}
  store atomic i64 1, ptr %stop.p seq_cst, align 8
  call void @announce(ptr %pool)
  ret void
}}

; A worker's whole life: wait for an epoch, take part in it, until stopped.
define void @work(ptr %pool, i64 %thread) {{
entry:
  %stop.p = getelementptr i64, ptr %pool, i64 {STOP}
  %steps.p = getelementptr i64, ptr %pool, i64 {STEPS}
  %count.p = getelementptr i64, ptr %pool, i64 {COUNT}
  %threads.p = getelementptr i64, ptr %pool, i64 {THREADS}
  %threads = load i64, ptr %threads.p
  br label %idle
idle:
  %seen = phi i64 [ 0, %entry ], [ %epoch, %busy ]
  br label %spin
spin:
  %i = phi i64 [ 0, %idle ], [ %i.next, %rest ]
  %now = load atomic i64, ptr %pool acquire, align 8
  %moved = icmp ne i64 %now, %seen
  br i1 %moved, label %begin, label %wait
wait:
  %i.next = add i64 %i, 1
  %patient = icmp ult i64 %i, {SPINS}
  br i1 %patient, label %rest, label %sleep
rest:
  CALL_PAUSE
  br label %spin
sleep:
  %mutex = getelementptr i64, ptr %pool, i64 {MUTEX}
  %condition = getelementptr i64, ptr %pool, i64 {CONDITION}
  %sleepers.p = getelementptr i64, ptr %pool, i64 {SLEEPERS}
  call i32 @pthread_mutex_lock(ptr %mutex)
  atomicrmw add ptr %sleepers.p, i64 1 seq_cst
  br label %check
check:
  %later = load atomic i64, ptr %pool seq_cst, align 8
  %changed = icmp ne i64 %later, %seen
  br i1 %changed, label %awake, label %doze
doze:
  call i32 @pthread_cond_wait(ptr %condition, ptr %mutex)
  br label %check
awake:
  atomicrmw sub ptr %sleepers.p, i64 1 seq_cst
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br label %begin
begin:
  %epoch = phi i64 [ %now, %spin ], [ %later, %awake ]
  %stop = load atomic i64, ptr %stop.p seq_cst, align 8
  %ends = icmp ne i64 %stop, 0
  br i1 %ends, label %done, label %busy
busy:
  %steps = load ptr, ptr %steps.p
  %count = load i64, ptr %count.p
  call void @execute(ptr %pool, ptr %steps, i64 %count, i64 %thread, i64 %threads)
  br label %idle
done:
  ret void
}}
"""


def text() -> str:
    """The executor's LLVM IR for this machine; ToolchainError where it has no rule for the processor."""
    machine = platform.machine()
    if machine not in _PAUSE:
        raise ToolchainError(
            "the native executor does not know this processor",
            found=machine,
            expected=", ".join(sorted(_PAUSE)),
            remedy='target="reference"',
        )
    declare, call = _PAUSE[machine]
    return _TEXT.replace("DECLARE_PAUSE", declare).replace("CALL_PAUSE", call)


@functools.cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _engine(module: Any) -> Any:
    return llvm.create_mcjit_compiler(module, _machine().create_target_machine(opt=3, jit=True))


@dataclass(frozen=True)
class Executor:
    """The compiled entry points; each releases the interpreter lock while it runs."""

    engine: Any
    prepare: Any
    run: Any
    stop: Any
    work: Any


@functools.cache
def executor() -> Executor:
    """The native executor, compiled once a process."""
    process = ctypes.CDLL(None) if os.name == "posix" else None
    for symbol in _NEEDED:
        found = getattr(process, symbol, None)
        if found is None:
            raise ToolchainError(
                "this system lacks a function that the native executor needs",
                where=symbol,
                expected="POSIX threads",
                remedy='target="reference"',
            )
        llvm.add_symbol(symbol, ctypes.cast(found, ctypes.c_void_p).value)
    _machine()
    module = llvm.parse_assembly(text())
    module.verify()
    engine = _engine(module)
    engine.finalize_object()
    i64, pointer = ctypes.c_int64, ctypes.c_void_p

    def function(name: str, *arguments: Any) -> Any:
        return ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(name))

    return Executor(
        engine,
        function("prepare", pointer),
        function("run", pointer, pointer, i64),
        function("stop", pointer),
        function("work", pointer, i64),
    )


@dataclass(frozen=True)
class Loaded:
    """Kernels in memory: `addresses` by name; `engines` own the code and must live as long as it is called."""

    addresses: dict[str, int]
    engines: tuple[Any, ...]


def load_objects(kernels: Mapping[str, Built]) -> Loaded:
    """Link each kernel's object and find its entry; ArtifactError where there is none.

    Each object is linked by itself: equal names in two of them do not meet. Only objects built here or trusted by the
    caller may come in: an object is a program.
    """
    addresses, engines = {}, []
    for name, kernel in kernels.items():
        _machine()
        try:
            engine = _engine(llvm.parse_assembly(""))
            engine.add_object_file(llvm.ObjectFileRef.from_data(kernel.object))
            engine.finalize_object()
            address = engine.get_function_address(kernel.entry)
        except RuntimeError as error:
            raise ArtifactError("a kernel's object file cannot be linked", where=name, found=error) from error
        if not address:
            raise ArtifactError(
                "a kernel's object file lacks its function", where=name, expected=f"a function {kernel.entry!r}"
            )
        addresses[name] = address
        engines.append(engine)
    return Loaded(addresses, tuple(engines))
