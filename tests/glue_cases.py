"""Pointwise operators, views and reductions as functions of tensors: what the kernels of every backend are tested with."""

from __future__ import annotations

import math

import torch

from qcompile.dtypes import DTYPES

functional = torch.nn.functional
SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 1e-30, 1e30, -7.25, 88.0, -88.0, math.inf, -math.inf, math.nan]
)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def around_codes(dtype: str) -> torch.Tensor:
    """f32 numbers that an 8-bit float holds, those halfway between two of them and next to that, and far larger ones."""
    every = torch.arange(256, dtype=torch.uint8).view(DTYPES[dtype]).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:] + every[:-1]) / 2
    near = torch.cat([ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf)), every])
    most = torch.tensor(
        [464.0, 465.0, 479.9, 480.0, 57344.0, 61439.0, 61440.0, 65536.0, 1e30, 1e-30, math.inf, math.nan]
    )
    return torch.cat([near, most, -most, values(1000) * 100, values(1000) * 1e-3])


def rows_in_disorder(dtype: torch.dtype) -> torch.Tensor:
    """[2, 2, 37]: different numbers in each row, with infinities and a NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.linspace(-9, 9, 37)[torch.randperm(37, generator=generator)] for _ in range(4)]
    x = torch.cat(rows).view(2, 2, 37).to(dtype)
    x[0, 0, 7], x[1, 1, 3], x[1, 0, 30] = math.inf, -math.inf, math.nan
    return x


def parts_along(axis: int) -> list[torch.Tensor]:
    """Three tensors that differ in their size along `axis`."""
    shapes = [[2, 3, 5], [2, 3, 5], [2, 3, 5]]
    for i, shape in enumerate(shapes):
        shape[axis] += i
    return [values(*shape, seed=i) for i, shape in enumerate(shapes)]


UNARY = {
    "abs": torch.abs, "neg": torch.neg, "sign": torch.sign, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round,
    "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "log2": torch.log2,
    "exp2": torch.exp2, "tanh": torch.tanh, "erf": torch.erf, "sigmoid": torch.sigmoid,
    "silu": functional.silu, "relu": torch.relu, "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "leaky_relu": functional.leaky_relu,
    "elu": functional.elu, "hardtanh": functional.hardtanh, "relu6": functional.relu6, "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid, "softplus": functional.softplus, "mish": functional.mish,
    "square": torch.square, "clamp": lambda x: x.clamp(-1.0, 2.0), "clamp_min": lambda x: x.clamp_min(0.5),
    "cube": lambda x: x**3, "half power": lambda x: x**0.5, "power": lambda x: x**2.5, "whole power": lambda x: x**5.0,
    "rsub": lambda x: 1.0 - x, "scaled": lambda x: torch.add(x, x, alpha=0.25), "isnan": torch.isnan,
    "isinf": torch.isinf, "compare": lambda x: x > 0.5, "at least": lambda x: x >= 0.5,
    "not": lambda x: torch.logical_not(x), "masked_fill": lambda x: x.masked_fill(x < 0, -math.inf),
    "half": lambda x: x.to(torch.float16), "bool to int": lambda x: (x > 0).to(torch.int32),
    "like": lambda x: torch.zeros_like(x) + torch.full_like(x, 2.5),
    "new": lambda x: x.new_zeros(len(x) + 9, 40) + x.new_full((40,), 2.5),
}  # fmt: skip

SMOOTH = ("hardswish", "mish", "gelu", "gelu_tanh", "silu")
"""Infinities times 0 differ by formula."""

BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "min of two": torch.min, "max of two": torch.max,
    "pow": lambda x, y: x.abs() ** y, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt,
    "le": torch.le, "gt": torch.gt, "ge": torch.ge, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "where": lambda x, y: torch.where(x > y, x, y * 2), "floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3), "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
}  # fmt: skip

VIEWS = {
    "transposed": lambda x: x.transpose(1, 2) + 1.0,
    "permuted": lambda x: x.permute(2, 0, 1) * 2.0,
    "sliced": lambda x: x[:, 1:6, 2::3] - 1.0,
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1) * 3.0,
    "two views": lambda x: x[:, 1:] * x[:, :-1],
    "selected": lambda x: x[:, 2] + x[:, 0],
    "windows": lambda x: x.unfold(1, 3, 2) * 2.0,
    "windows as rows": lambda x: x.unfold(1, 3, 1).permute(0, 1, 3, 2).flatten(2),
    "padded": lambda x: functional.pad(x, (1, 2, 0, 3, 2, 0), value=-2.5),
}

REDUCTIONS = {
    "sum": lambda x: x.sum(-1), "sum of two": lambda x: x.sum((-1, -2)), "mean over the middle": lambda x: x.mean(1),
    "mean keepdim": lambda x: x.mean((0, 2), keepdim=True), "amax": lambda x: x.amax(-1), "amin": lambda x: x.amin(0),
    "argmax": lambda x: x.argmax(-1), "argmin": lambda x: x.argmin(1, keepdim=True), "all of it": lambda x: x.sum(),
    "max": lambda x: x.max(), "any": lambda x: (x > 8).any(-1), "all": lambda x: (x > -8).all(1),
}  # fmt: skip
