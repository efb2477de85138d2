"""Whether the kernels of a plan stay inside their arguments: what they may touch against what the buffers hold.

A kernel gets pointers and numbers, and trusts them. For kernels that are built here the compiler says what each may
touch, and the calls of every plan are compared with that before any is run. Objects that are trusted have no such
bounds: they are programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompile.artifact import Buffer, Call, Extents, KernelSpec
from qcompile.errors import ArtifactError, InternalError
from qcompile.runtime.cache import Builder


@dataclass(frozen=True)
class Bounds:
    """What each kernel may touch. `ours`: the calls were made by this process, so that a wrong one is an InternalError."""

    extents: Mapping[str, Extents]
    ours: bool = False

    @staticmethod
    def of(kernels: Mapping[str, KernelSpec], builder: Builder, ours: bool = False) -> Bounds:
        """The bounds of `kernels`; ArtifactError for parameters that no kernel can be made from."""
        try:
            return Bounds({name: builder.extents(spec) for name, spec in kernels.items()}, ours)
        except ArtifactError as error:
            raise _blame(error, error.where, ours) from error

    def check(
        self, step: str, call: Call, dims: tuple[int, ...], threads: int, buffers: Mapping[str, Buffer],
        held: Sequence[int],
    ) -> None:  # fmt: skip
        """ArtifactError unless the call gives its kernel what that touches; `held[i]` elements lie behind argument i."""
        try:
            self._check(call, dims, threads, [buffers[view.buffer].dtype for view in call.args], held)
        except ArtifactError as error:
            where = f"step {step!r}, kernel {call.kernel!r}" + (f", {error.where}" if error.where else "")
            raise _blame(error, where, self.ours) from error

    def _check(
        self, call: Call, dims: tuple[int, ...], threads: int, dtypes: Sequence[str], held: Sequence[int]
    ) -> None:
        touched = self.extents[call.kernel](dims, threads)
        if len(touched) != len(held):
            raise ArtifactError("a kernel has another number of arguments", found=len(held), expected=len(touched))
        for index, (extent, dtype, count) in enumerate(zip(touched, dtypes, held, strict=True)):
            if extent.elements > count or extent.dtype != dtype:
                raise ArtifactError(
                    "a kernel reaches outside its argument",
                    where=f"argument {index}, {call.args[index].buffer!r}",
                    found=f"{count} elements of {dtype}",
                    expected=f"{extent.elements} elements of {extent.dtype}",
                )
            if extent.written and index not in call.writes:
                raise ArtifactError(
                    "a kernel writes an argument that the call only reads",
                    where=f"argument {index}, {call.args[index].buffer!r}",
                )


def _blame(error: ArtifactError, where: str, ours: bool) -> ArtifactError | InternalError:
    kind = InternalError if ours else ArtifactError
    return kind(error.summary, where=where, found=error.found, expected=error.expected)
