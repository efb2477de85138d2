"""Small programs for runtime tests: kernels written in LLVM IR, assembled for this machine."""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding as llvm

from qcompile.artifact import Buffer, Built, Call, Executable, KernelSpec, Port, Step, Variant, View

_LOOP = """
define void @entry(ptr %args, ptr %dims, i64 %thread, i64 %threads) {{
entry:
  %n = load i64, ptr %dims
  %x = load ptr, ptr %args
  %y.p = getelementptr ptr, ptr %args, i64 1
  %y = load ptr, ptr %y.p
  %z.p = getelementptr ptr, ptr %args, i64 2
  %z = load ptr, ptr %z.p
  br label %loop
loop:
  %i = phi i64 [ %thread, %entry ], [ %next, %body ]
  %inside = icmp slt i64 %i, %n
  br i1 %inside, label %body, label %done
body:
  %a.p = getelementptr float, ptr %x, i64 %i
  %a = load float, ptr %a.p
  %b.p = getelementptr float, ptr %y, i64 {second}
  %b = load float, ptr %b.p
  %c = {operation} float %a, %b
  %c.p = getelementptr float, ptr %z, i64 %i
  store float %c, ptr %c.p
  %next = add i64 %i, %threads
  br label %loop
done:
  ret void
}}
"""
# mirror: reads x from the other end, so that a missing barrier shows.
SOURCES = {
    "add": _LOOP.format(second="%i", operation="fadd"),
    "mul": _LOOP.format(second="%i", operation="fmul"),
    "mirror": _LOOP.format(second="%j", operation="fadd").replace(
        "  %b.p", "  %m = sub i64 %n, 1\n  %j = sub i64 %m, %i\n  %b.p"
    ),
}


@functools.cache
def built(name: str) -> Built:
    """The kernel z[i] = x[i] op y[i] over dims[0] floats."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=3, reloc="pic", codemodel="small")
    return Built(SOURCES[name], machine.emit_object(llvm.parse_assembly(SOURCES[name])), "entry")


def kernels() -> dict[str, Built]:
    return {name: built(name) for name in SOURCES}


SPECS = {name: KernelSpec(name, {}) for name in SOURCES}


def flat(buffer: str, count: Any) -> View:
    return View(buffer, (count,), (1,))


def binary(kernel: str, x: str, y: str, z: str, count: Any = "b*4") -> Call:
    return Call(kernel, (flat(x, count), flat(y, count), flat(z, count)), (count,), (2,))


def step(name: str, *calls: Call) -> Step:
    return Step(name, "", (Variant(None, calls),))


def buffer(name: str, kind: Any, shape: tuple[Any, ...] = ("b", 4), dtype: str = "f32") -> Buffer:
    return Buffer(name, dtype, shape, kind)


def port(name: str, shape: tuple[Any, ...] = ("b", 4), dtype: str = "f32") -> Port:
    strides: list[Any] = [1]
    for dim in reversed(shape[1:]):
        strides.insert(
            0, strides[0] * dim if isinstance(dim, int) and isinstance(strides[0], int) else f"({strides[0]})*{dim}"
        )
    return Port(name, View(name, shape, tuple(strides[: len(shape)])), dtype)


def executable(buffers: list[Buffer], steps: list[Step], inputs: list[Port], outputs: list[Port]) -> Executable:
    used = {c.kernel for s in steps for v in s.variants for c in v.calls} & set(SPECS)
    specs = {name: SPECS[name] for name in sorted(used)}
    return Executable({b.name: b for b in buffers}, tuple(inputs), tuple(outputs), tuple(steps), specs)


def arithmetic() -> Executable:
    """y = ((x + w) * x + (x + w)) with two native calls, one ATen call between them, and a temporary each."""
    view = flat("t1", "b*4")
    aten = Call(
        "aten.mul.Tensor", (view, flat("x", "b*4"), flat("t2", "b*4")), (), (2,), ([{"view": 0}, {"view": 1}], {})
    )
    return executable(
        [
            buffer("x", "input"),
            buffer("w", "weight", (2, 4)),
            buffer("t1", "temp"),
            buffer("t2", "temp"),
            buffer("y", "output"),
        ],
        [
            step("add", binary("add", "x", "w", "t1", 8)),
            step("mul", aten),
            step("sum", binary("add", "t2", "t1", "y", 8)),
        ],
        [port("x")],
        [port("y")],
    )
