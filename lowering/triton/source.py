"""A Triton kernel before it is compiled: its text, what it is called with, and how it is started."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.dims import Dim


@dataclass(frozen=True)
class Source:
    """A Python module with one `@triton.jit` function called `entry`, and all that compiling and starting it needs.

    The function takes one pointer for each of `pointers` (the dtype of its elements; every one is a multiple of 16 bytes),
    then `dims` i32 numbers called d0, d1 ...; whatever else it knows is written into its text. `grid` is the number of
    programs along each axis, in terms of d0, d1 .... Where `fusion` holds, a product and a sum may become one operation,
    with one rounding.
    """

    text: str
    entry: str
    pointers: tuple[str, ...]
    dims: int
    grid: tuple[Dim, Dim, Dim]
    warps: int = 4
    stages: int = 2
    fusion: bool = True
