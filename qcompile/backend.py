"""What passes may ask about a target: the layout it wants for a packed weight, and what its linear kernels can take in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qcompile.format import Format, Packed


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
    """A target as the passes see it. `regions` is true when pointwise chains are to become regions."""

    regions: bool

    def layout(self, packed: Packed) -> Layout:
        """The layout of one weight for this target; the same weight, value for value."""
        ...

    def join(self, parts: Sequence[tuple[Format, int]]) -> str | None:
        """Why weights of these (format, N) cannot be one linear node; None when they can."""
        ...

    def accuracy(self, format: Format) -> str:
        """The accuracy of a linear whose weight is in `format`: "exact" or "int8"."""
        ...

    def prologue(self, format: Format, op: str) -> str | None:
        """Why a linear cannot take the norm `op` in; None when it can."""
        ...

    def epilogue(self, format: Format, op: str) -> str | None:
        """Why a linear cannot take the step `op` in; None when it can."""
        ...


@dataclass(frozen=True)
class ReferenceBackend:
    """Eager operators: any format as it is stored, any prologue and epilogue."""

    regions: bool = False

    def layout(self, packed: Packed) -> Layout:
        return Layout(packed)

    def join(self, parts: Sequence[tuple[Format, int]]) -> str | None:
        return None

    def accuracy(self, format: Format) -> str:
        return "exact"

    def prologue(self, format: Format, op: str) -> str | None:
        return None

    def epilogue(self, format: Format, op: str) -> str | None:
        return None
