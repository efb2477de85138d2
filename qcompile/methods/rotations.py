"""Matrices that a checkpoint holds for its activations, as transforms: butterflies where they are Hadamard matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qcompile.transform import Applied


def rotation(matrix: torch.Tensor, width: int) -> tuple[Applied, ...]:
    """The transforms of rows [width] whose blocks are multiplied by `matrix` [size, size] from the right.

    Sylvester's matrix over the root of its size, with other signs of rows and columns, becomes a `Hadamard` between
    scales of 1 and -1, of which those without effect are left out; any other matrix a `Rotate`, in f32.
    """
    from qcompile.transform import Applied
    from qcompile.transforms.linear import Hadamard, Rotate, Scale

    size = len(matrix)
    signs = _signs(matrix.double() * size**0.5)
    if signs is None:
        return (Applied(Rotate(size, "f32"), {"matrix": matrix.t().float().contiguous()}),)
    scales = [Applied(Scale("f32"), {"scale": sign.float().repeat(width // size)}) for sign in signs]
    before, after = (() if bool((sign == 1).all()) else (each,) for sign, each in zip(signs, scales, strict=True))
    return (*before, Applied(Hadamard(size)), *after)


def _signs(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Signs of rows and of columns with which Sylvester's matrix is `matrix`; None where there are none.

    >>> _signs(torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
    (tensor([ 1., -1.]), tensor([ 1., -1.]))
    """
    size = len(matrix)
    if size & (size - 1) or not torch.allclose(matrix.abs(), torch.ones_like(matrix), rtol=0, atol=1e-6):
        return None
    whole = torch.ones(1, 1, dtype=matrix.dtype)
    while len(whole) < size:
        whole = torch.cat((torch.cat((whole, whole), 1), torch.cat((whole, -whole), 1)))
    columns = matrix[0].sign()
    rows = matrix[:, 0].sign() * columns[0]
    if bool((columns == -1).all()):  # one scale is enough
        rows, columns = -rows, -columns
    return (rows, columns) if torch.equal(rows[:, None] * whole * columns, matrix.sign()) else None
