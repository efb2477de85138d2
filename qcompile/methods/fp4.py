"""FP4 weights: the codes of e2m1 values, and the FP4 blocks of methods that keep one scale for 16 or 32 inputs."""

from __future__ import annotations

import torch

from qcompile.formats.minifloat import E2M1


def codes(values: torch.Tensor) -> torch.Tensor:
    """The codes, i32, of e2m1 values: the sign in bit 3 (of -0.0 too), the magnitude's index below.

    >>> codes(torch.tensor([0.0, 0.5, 6.0, -1.5, -0.0])).tolist()
    [0, 1, 7, 11, 8]
    """
    index = torch.searchsorted(torch.tensor(E2M1[:8]), values.abs().contiguous(), out_int32=True)
    return index + torch.signbit(values).to(torch.int32) * 8
