"""FourOverSix: FP4 blocks whose largest value becomes 4 or 6, whichever loses less (arXiv 2512.02010)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompile.transform import Transform
from qcompile.transforms.rounding import join, split, to_element

Rule = Literal["mse", "mae", "abs_max", "static_6", "static_4"]
ADAPTIVE = ("mse", "mae", "abs_max")


def limits(rule: str) -> tuple[float, float]:
    """The value that a block's largest becomes (of the first candidate) and the largest block scale."""
    return {"static_6": (6.0, 448.0), "static_4": (4.0, 448.0)}.get(rule, (6.0, 256.0))


def decode(values: Tensor, scale: Tensor, most: Tensor, rule: str) -> Tensor:
    """What e2m1 values under e4m3 scales are worth; `most` is the largest |x| of the whole tensor."""
    largest, scales = limits(rule)
    return values * scale * most / (largest * scales)


def encode(blocks: Tensor, most: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The e2m1 values of blocks [..., size] and their e4m3 scales [..., 1], both as f32.

    `most` is the largest |x| of the whole tensor, not 0. The adaptive rules also try scales half as large again, and
    take those where the block's squared ("mse"), absolute ("mae") or largest error is smaller.
    """
    largest, scales = limits(rule)
    up = torch.full_like(most, largest * scales) / most  # a number over a tensor would be two roundings
    high = blocks.abs().amax(-1, keepdim=True) / largest * up
    values, scale = _candidate(blocks, high, up)
    if rule in ADAPTIVE:
        other, larger = _candidate(blocks, high * 1.5, up)
        error = _error(decode(values, scale, most, rule) - blocks, rule)
        better = _error(decode(other, larger, most, rule) - blocks, rule) < error
        values, scale = torch.where(better, other, values), torch.where(better, larger, scale)
    return values, scale


def _candidate(blocks: Tensor, scale: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale.to(torch.float8_e4m3fn).to(torch.float32)
    inverse = 1.0 / (1.0 / up * torch.where(scale == 0, 1.0, scale))
    return torch.where(scale == 0, 0.0, to_element(blocks * inverse, "e2m1")), scale


def _error(difference: Tensor, rule: str) -> Tensor:
    if rule == "mse":
        return (difference * difference).sum(-1, keepdim=True)
    size = difference.abs()
    return size.sum(-1, keepdim=True) if rule == "mae" else size.amax(-1, keepdim=True)


@dataclass(frozen=True)
class RoundFourOverSix(Transform):
    """x rounded to e2m1 values under an e4m3 scale for every 16 inputs, and one scale for the whole call."""

    kind: ClassVar[str] = "round-four-over-six"
    rule: Rule = "mse"

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        most = x.abs().amax()
        most = torch.where(most > 0, most, 1.0)  # nothing but zeros: any scale
        values, scale = encode(split(x, 16), most, self.rule)
        return join(decode(values, scale, most, self.rule), x.shape[-1])

    def summary(self) -> str:
        return f"nvfp4 by {self.rule}"
