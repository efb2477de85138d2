"""What passes may ask about a target: the layout it wants for a packed weight, and what its linears can take in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qcompile.format import Format, Packed
from qcompile.formats.fragments import ROWS, Fragments, fragments_for, fragments_form
from qcompile.formats.lanes import LANES, Lanes, LanesDense, lanes_for, lanes_form
from qcompile.formats.native import Native, native_for
from qcompile.formats.runs import CODEBOOKS, runs_for, runs_form
from qcompile.integer_sums import treatment_problem
from qcompile.ops import ROUNDED
from qcompile.row_transforms import problem
from qcompile.target import Target
from qcompile.transform import Transform
from qcompile.transforms.llm_int8 import LlmInt8
from qcompile.transforms.round_int import RoundInt
from qcompile.transforms.sparse import Sparse

NVIDIA_ALONE = "there is a layout for NVIDIA's tensor cores alone"


@dataclass(frozen=True)
class Layout:
    """A packed weight as the target's kernels read it.

    `order`, if any, is i64 [K]: column i of `packed` is input order[i] of the weight. `reason` says why the layout is
    not the target's fast one, and is empty when it is.
    """

    packed: Packed
    order: torch.Tensor | None = None
    reason: str = ""


class Backend(Protocol):
    """A target as the passes see it.

    `regions` is true when pointwise chains are to become regions, `experts` when kernels of mixtures of experts take in
    what is around them; `cache` is the dtype of its key-value caches.
    """

    @property
    def regions(self) -> bool: ...

    @property
    def experts(self) -> bool: ...

    @property
    def cache(self) -> str: ...

    def activation(self, transforms: Sequence[Transform], format: Format, n: int, k: int) -> str | None:
        """Why a linear with a weight [n, k] in `format` cannot do these to its input first; None when it can.

        "": there is no such kernel for any, so that nobody need be told.
        """
        ...

    def transform(self, transform: Transform) -> bool:
        """Whether a kernel computes a transform that is no part of a linear; else it is taken apart into operators."""
        ...

    def layout(self, packed: Packed, before: Sequence[Transform] = ()) -> Layout:
        """The layout of one weight for this target; the same weight, value for value.

        `before` is what every linear that reads it does to its input.
        """
        ...

    def form(self, format: Format, n: int, k: int) -> Format | str:
        """The layout of a weight [n, k] in `format` whose inputs nothing is done to, from the format alone; or why it stays."""
        ...

    def may_join(self, parts: Sequence[tuple[Format, int]]) -> str | None:
        """Why weights of these (format, N) with equal K cannot be one linear; None when they can."""
        ...

    def join(self, parts: Sequence[Packed]) -> tuple[Packed, ...]:
        """The parts of one linear that computes with all these weights, one below the other; `may_join` has allowed it."""
        ...

    def accuracy(self, format: Format) -> str:
        """The accuracy of a linear whose weight is in `format`: "exact" or "int8"."""
        ...

    def prologue(self, formats: Sequence[Format], op: str) -> str | None:
        """Why a linear cannot take the norm `op` in; None when it can."""
        ...

    def epilogue(self, formats: Sequence[Format], op: str) -> str | None:
        """Why a linear cannot take the step `op` in; None when it can."""
        ...


@dataclass(frozen=True)
class ReferenceBackend:
    """Eager operators: any format as it is stored, any prologue and epilogue."""

    regions: bool = False
    experts: bool = False
    cache: str = "f32"

    def activation(self, transforms: Sequence[Transform], format: Format, n: int, k: int) -> str | None:
        return ""

    def transform(self, transform: Transform) -> bool:
        return False

    def layout(self, packed: Packed, before: Sequence[Transform] = ()) -> Layout:
        return Layout(packed)

    def form(self, format: Format, n: int, k: int) -> Format | str:
        return format

    def may_join(self, parts: Sequence[tuple[Format, int]]) -> str | None:
        return None

    def join(self, parts: Sequence[Packed]) -> tuple[Packed, ...]:
        return tuple(parts)

    def accuracy(self, format: Format) -> str:
        return "exact"

    def prologue(self, formats: Sequence[Format], op: str) -> str | None:
        return None

    def epilogue(self, formats: Sequence[Format], op: str) -> str | None:
        return None


@dataclass(frozen=True)
class CpuBackend:
    """CPU kernels: lane layouts where the format has one, joined weights side by side.

    `wanted` is the accuracy asked for: "int8" holds for linears whose weight is an integer code times a scale in a lane layout.
    """

    wanted: str = "exact"
    regions: bool = True
    experts: bool = False
    cache: str = "f32"

    def activation(self, transforms: Sequence[Transform], format: Format, n: int, k: int) -> str | None:
        """A linear makes the integer codes of its input itself where it multiplies them as integers; nothing else."""
        if len(transforms) > 1 or not isinstance(transforms[0], RoundInt | LlmInt8):
            return ""
        layout = lanes_form(format, n, k)
        if not isinstance(layout, Lanes):
            return layout if isinstance(layout, str) else "its weight is no integers times a scale"
        if layout.rounding != "none" and self.wanted == "exact":
            return f"a weight is not just a code times a scale, but rounded: {layout.rounding}"
        return treatment_problem(layout, k, transforms[0]) or None

    def transform(self, transform: Transform) -> bool:
        return False

    def layout(self, packed: Packed, before: Sequence[Transform] = ()) -> Layout:
        found = lanes_for(packed)
        if isinstance(found, str):
            return Layout(packed, reason=found)
        if found[1] is not None and any(isinstance(each, RoundInt) and each.per == "group" for each in before):
            return Layout(packed, reason="groups of its inputs are rounded together, so they keep their order")
        return Layout(*found)

    def form(self, format: Format, n: int, k: int) -> Format | str:
        return lanes_form(format, n, k)

    def may_join(self, parts: Sequence[tuple[Format, int]]) -> str | None:
        first = parts[0][0]
        for format_, _ in parts:
            if not isinstance(format_, Lanes | LanesDense):
                return f"a weight of format '{format_.kind}' has no lane layout"
            if format_ != first:
                return f"their layouts differ: {first} and {format_}"
        ragged = [n for _, n in parts[:-1] if n % LANES]
        return f"{ragged[0]} rows are no multiple of {LANES}" if ragged else None

    def join(self, parts: Sequence[Packed]) -> tuple[Packed, ...]:
        first = parts[0]
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}
        return (Packed(first.format, tensors, sum(part.N for part in parts), first.K),)

    def accuracy(self, format: Format) -> str:
        return self.wanted if isinstance(format, Lanes) and format.code == "int" else "exact"

    def prologue(self, formats: Sequence[Format], op: str) -> str | None:
        return None

    def epilogue(self, formats: Sequence[Format], op: str) -> str | None:
        return f"results are rounded to {op} by a kernel of their own" if op in ROUNDED else None


@dataclass(frozen=True)
class CudaBackend:
    """Kernels for GPUs: codes as they are for native dots where x is rounded, fragment layouts where the format has one, with
    joined weights one below the other in both; any format as it is stored otherwise.

    `fragments` is true where the tensor cores are NVIDIA's, whose order that layout is.
    """

    fragments: bool = True
    regions: bool = True
    experts: bool = True
    cache: str = "bf16"

    def activation(self, transforms: Sequence[Transform], format: Format, n: int, k: int) -> str | None:
        return problem(transforms, k, codes=True) or None

    def transform(self, transform: Transform) -> bool:
        return isinstance(transform, Sparse)

    def layout(self, packed: Packed, before: Sequence[Transform] = ()) -> Layout:
        native = native_for(packed, before)
        if not isinstance(native, str):
            return Layout(native)
        if isinstance(packed.format, CODEBOOKS):
            runs = runs_for(packed)
            return Layout(packed, reason=runs) if isinstance(runs, str) else Layout(runs)
        found = fragments_for(packed) if self.fragments else NVIDIA_ALONE
        return Layout(packed, reason=found) if isinstance(found, str) else Layout(*found)

    def form(self, format: Format, n: int, k: int) -> Format | str:
        if isinstance(format, CODEBOOKS):
            return runs_form(format, n, k)
        return fragments_form(format, n, k) if self.fragments else NVIDIA_ALONE

    def may_join(self, parts: Sequence[tuple[Format, int]]) -> str | None:
        first = parts[0][0]
        differing = next((format_ for format_, _ in parts if format_ != first), None)
        if differing is not None:
            return f"their formats differ: {first} and {differing}"
        rows, why = 1, ""
        if isinstance(first, Native):
            rows, why = first.rows, "that share a scale"
        elif isinstance(first, Fragments):
            rows, why = ROWS, "of a block"
        cut = next((n for _, n in parts[:-1] if n % rows), None)
        return None if cut is None else f"{cut} rows are no multiple of the {rows} {why}"

    def join(self, parts: Sequence[Packed]) -> tuple[Packed, ...]:
        if not isinstance(parts[0].format, Native | Fragments):
            return tuple(parts)
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        return (Packed(parts[0].format, tensors, sum(part.N for part in parts), parts[0].K),)

    def accuracy(self, format: Format) -> str:
        return "exact"

    def prologue(self, formats: Sequence[Format], op: str) -> str | None:
        return None

    def epilogue(self, formats: Sequence[Format], op: str) -> str | None:
        return None


def backend_for(target: Target, accuracy: str = "exact", cache: str = "bf16") -> Backend:
    """What the passes ask about `target`: `accuracy` is the one asked for on a CPU, `cache` the caches' dtype on GPUs."""
    if target.backend == "cpu":
        return CpuBackend(accuracy)
    return CudaBackend(target.family == "cuda", cache=cache) if target.backend == "cuda" else ReferenceBackend()
