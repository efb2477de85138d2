"""Constant code tables, by the names that formats use."""

from __future__ import annotations

import functools

import torch

# QLoRA's 4-bit normal float (bitsandbytes functional.py), as float32.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A 3-bit one (sinq dual_shift.py).
NF3 = (
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0, 0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
)  # fmt: skip


@functools.cache
def entries(name: str) -> tuple[float, ...]:
    """The f32 entries of "nf4", "fp4" (bitsandbytes, 16 entries) or "dynamic" (its signed 8-bit map, 256 entries)."""
    return {"nf4": lambda: NF4, "fp4": _fp4, "dynamic": _dynamic}[name]()


def _fp4() -> tuple[float, ...]:
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return tuple(torch.cat([positive, 0 - positive]).tolist())  # 0 - 0 is +0.0, as the package has it


def _dynamic() -> tuple[float, ...]:
    """Seven decades, decade i with 2**i means of neighbouring points of linspace(0.1, 1), their negatives, 0 and 1."""
    out = [0.0, 1.0]
    for i in range(7):
        points = torch.linspace(0.1, 1, 2**i + 1)
        means = ((points[:-1] + points[1:]) / 2.0 * 10 ** (i - 6)).tolist()
        out += means + [-mean for mean in means]
    return tuple(sorted(out))
