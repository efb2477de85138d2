"""How transformers' metal method and MLX round a weight to codes, scales and offsets."""

from __future__ import annotations

import torch

from qcompile.formats.minifloat import E2M1


def min_max(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """transformers' codes, scales and offsets of f32 [..., group]: the least value is code 0, the greatest the last."""
    top = 2**bits - 1
    offset = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - offset) / top).clamp(min=1e-8)
    return ((groups - offset) / scale).round().clamp_(0, top), scale, offset


def edge_first(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MLX's codes, scales and offsets of f32 [..., group]: the value of greatest magnitude and 0 are both exact.

    Scales are negative where that value is positive.
    """
    top = 2**bits - 1
    lo, hi = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    low = lo.abs() > hi.abs()
    scale = ((hi - lo) / top).clamp(min=1e-7)
    scale = torch.where(low, scale, -scale)
    edge = torch.where(low, lo, hi)
    steps = torch.round(edge / scale)
    offset = torch.where(steps != 0, edge, 0.0)
    scale = torch.where(steps != 0, edge / torch.where(steps != 0, steps, 1.0), scale)
    return ((groups - offset) / scale).round().clamp_(0, top), scale, offset


def power_of_two(groups: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """MLX's scale of f32 [..., group]: groups over it (at most `largest`), and its exponent + 127, u8 [..., 1]."""
    most = groups.abs().amax(-1, keepdim=True)
    exponent = torch.where(most > 0, torch.ceil(torch.log2(most / largest)) + 127, 127).clamp(0, 254)
    # As float64, since 2 ** -127 is no normal number of float32.
    scaled = groups.double() / torch.exp2(exponent.double() - 127)
    return scaled.float(), exponent.to(torch.uint8)


def e4m3_scale(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MLX's nvfp4 scale of f32 [..., group]: groups over it (0 where it is 0), and the scale, f8e4m3 [..., 1]."""
    scale = (groups.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn)
    wide = scale.float()
    return torch.where(wide > 0, groups / torch.where(wide > 0, wide, 1.0), 0.0), scale


def nearest_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """The code (i32) of the nearest E2M1 value; a tie goes to the smaller magnitude, and zero is +0."""
    values = torch.tensor(E2M1[:8])
    between = (values[1:] + values[:-1]) / 2
    code = torch.bucketize(scaled.abs(), between).to(torch.int32)
    return torch.where((scaled < 0) & (code > 0), code + 8, code)
