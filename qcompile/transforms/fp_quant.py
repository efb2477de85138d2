"""FP-Quant: rotated rows rounded to FP4 blocks, as QuTLASS' kernels do or as fp_quant's Triton kernel emulates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompile.format import Stored
from qcompile.transform import Transform
from qcompile.transforms.rounding import join, power_of_two, split, to_element

Dtype = Literal["nvfp4", "mxfp4"]
Rule = Literal["abs_max", "quest"]
GROUP = {"nvfp4": 16, "mxfp4": 32}


def encode(blocks: Tensor, whole: Tensor, dtype: str, rule: str, emulated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The e2m1 values of blocks [..., size], their scales [..., 1] as they are stored, and their steps [..., 1].

    Scales are e4m3 numbers (nvfp4) or powers of two (mxfp4). A block is about values * step, which is values * scale /
    whole if `whole` is what the rule takes it for. `emulated`: as the Triton kernel rounds, ties toward zero.
    """
    if rule == "quest":
        mean, square = blocks.mean(-1, keepdim=True), (blocks * blocks).mean(-1, keepdim=True)
        variance = square - mean * mean
        spread = torch.sqrt(variance.clamp(min=0.0)) * (2.92247856 / 6.0) + 1e-8
        step = scale = power_of_two(torch.where(variance < 0, 1.0, spread), "floor")
    else:
        most = blocks.abs().amax(-1, keepdim=True)
        if dtype == "mxfp4":
            scale = power_of_two(most if emulated else most + 1e-8, "floor")
            step = scale / 3.0
        else:
            wanted = whole * most / 6.0 if emulated else whole * (most * (1.0 / 6.0))
            scale = wanted.clamp(max=448.0).to(torch.float8_e4m3fn).to(torch.float32)
            step = scale / whole if emulated else scale * (1.0 / whole)
    safe = torch.where(step > 0, step, 1.0)
    if emulated:
        return toward_zero(blocks / safe), scale, step
    # The kernels for nvfp4 multiply by the inverse.
    ratio = blocks * (1.0 / safe) if dtype == "nvfp4" else blocks / safe
    return to_element(ratio, "e2m1"), scale, step


def toward_zero(x: Tensor) -> Tensor:
    """x rounded to the nearest e2m1 value, ties to the one nearer to zero.

    >>> toward_zero(torch.tensor([0.25, 0.75, 1.75, -2.5, 5.0, 99.0])).tolist()
    [0.0, 0.5, 1.5, -2.0, 4.0, 6.0]
    """
    size = x.abs().clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.sign(x) * torch.ceil(size / step - 0.5).abs() * step  # abs: -0.0 has a sign of its own


@dataclass(frozen=True)
class RoundFpQuant(Transform):
    """x rounded to FP4 blocks of 16 (nvfp4) or 32 inputs (mxfp4), with a scale for each token and block.

    weight_global_scale and act_global_scale bf16 [1]. Not `emulated`, the product of both scales is undone by a bf16
    factor, 1 over it, whose error belongs to the method: it is part of the result here.
    """

    kind: ClassVar[str] = "round-fp-quant"
    dtype: Dtype = "nvfp4"
    rule: Rule = "abs_max"
    emulated: bool = False

    def stored(self, K: int) -> tuple[Stored, ...]:
        return (Stored("weight_global_scale", "bf16", (1,)), Stored("act_global_scale", "bf16", (1,)))

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        whole = t["act_global_scale"].to(torch.float32)
        values, scale, step = encode(split(x, GROUP[self.dtype]), whole, self.dtype, self.rule, self.emulated)
        if self.emulated:
            return join(values * step, x.shape[-1])
        weight = t["weight_global_scale"].to(torch.float32)
        product = (whole * weight).to(torch.bfloat16).to(torch.float32)
        factor = (1.0 / product).to(torch.bfloat16).to(torch.float32)
        return join(values * scale, x.shape[-1]) * (factor * weight)

    def summary(self) -> str:
        return f"{self.dtype} by {self.rule}"
