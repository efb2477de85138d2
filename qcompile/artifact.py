"""What a compiled model is, as data: buffers, views, calls, steps, kernels; and the folder that holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from qcompile.dims import Dim

BufferKind = Literal["input", "output", "weight", "state", "temp"]


@dataclass(frozen=True)
class Buffer:
    """A contiguous row-major array. `shape` may name sizes; `weight` buffers have a fixed shape and lie in the weights file.

    `state` buffers outlive a call (the KV cache); `temp` buffers live between their first and last step.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    kind: BufferKind


@dataclass(frozen=True)
class View:
    """A strided window of a buffer; `offset` and `strides` count elements."""

    buffer: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = 0


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel computes, as data: enough for `qcompile.lowering` to generate its text again.

    `template` is one of a closed set of names; `params` is JSON.
    """

    template: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One kernel launch over all threads, or one ATen operator.

    A kernel is `void f(void **args, const int64_t *dims, int64_t thread, int64_t threads)`: `args[i]` points at the
    first element of view i, `dims` are the evaluated `dims`. It splits its own work over the threads and returns when
    its share is done; the executor puts a barrier behind every call.
    An ATen operator (`kernel` starts with "aten.") takes `literals`: JSON in which {"view": i} stands for args[i] and
    {"dim": d} for a dimension; its result is copied to the views listed in `writes`.
    """

    kernel: str
    args: tuple[View, ...]
    dims: tuple[Dim, ...] = ()
    writes: tuple[int, ...] = ()
    literals: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Variant:
    """Calls to use while `when[0] <= when[1]` (always, when it is None)."""

    when: tuple[Dim, int] | None
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Step:
    """One operation of the lowered program: the first variant whose condition holds is run."""

    name: str
    module: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Port:
    """An input or output of the program: the name the caller uses, its buffer, and dtype and shape seen by the caller."""

    name: str
    view: View
    dtype: str


@dataclass(frozen=True)
class Executable:
    """A lowered program: buffers, steps and kernels, for one target."""

    buffers: dict[str, Buffer]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    kernels: dict[str, KernelSpec] = field(default_factory=dict)
