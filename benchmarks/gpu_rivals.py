"""What else multiplies by the same weights on a GPU: cuBLAS, decoding first, and the kernels of other packages.

Making or calling one that is not installed fails, in whatever way its package likes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_weights import KINDS, TABLES, Weights, pairs

Layer = Callable[[torch.Tensor], torch.Tensor]
"""bf16 [M, K] -> [M, N]."""


@dataclass(frozen=True)
class Rival:
    """A contender: the kinds of weights that it takes, and how its layer is made on a device."""

    name: str
    kinds: tuple[str, ...]
    make: Callable[[str, Weights, torch.device], Layer]


def cublas(kind: str, weights: Weights, device: torch.device) -> Layer:
    dense = KINDS[kind].dense(weights.to(device)).bfloat16()
    return lambda x: nn.functional.linear(x, dense)


def decode(kind: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 [N, K] from codes (two in a byte where they have 4 bits) and scales [N, groups]."""
    real = torch.exp2(scales.float() - 127) if kind == "mxfp4" else scales.float()
    if kind in ("int8", "fp8"):
        values = codes.float()
    else:
        both = torch.stack((codes & 15, codes >> 4), 2).flatten(1).int()
        values = both - 8.0 if kind == "int4" else torch.tensor(TABLES[kind], device=codes.device)[both]
    n, groups = scales.shape
    return (values.reshape(n, groups, -1) * real[:, :, None]).reshape(n, -1).bfloat16()


@functools.cache
def _compiled(kind: str) -> Callable[..., torch.Tensor]:
    return torch.compile(functools.partial(decode, kind), dynamic=False)


def dequantize_first(kind: str, weights: Weights, device: torch.device) -> Layer:
    """One kernel (torch.compile's) that writes bf16 weights, then cuBLAS."""
    codes = (weights.codes if kind in ("int8", "fp8") else pairs(weights.codes, 0)).to(device)
    scales = weights.scales.to(device)
    return lambda x: nn.functional.linear(x, _compiled(kind)(codes, scales))


def tinygemm(kind: str, weights: Weights, device: torch.device) -> Layer:
    """torch's own int4 kernel, which torchao's tile-packed weights use."""
    scales = weights.scales.float().to(device)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs(weights.codes, 4).to(device), 8)
    # It computes (code - 8) * scale + zero.
    both = torch.stack((scales.T, torch.zeros_like(scales.T)), 2).bfloat16().contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, both)


def torchao_int4(kind: str, weights: Weights, device: torch.device) -> Layer:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    n, k = weights.codes.shape
    layer = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(KINDS[kind].dense(weights.to(device)).bfloat16(), requires_grad=False)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return layer


def gemlite(kind: str, weights: Weights, device: torch.device) -> Layer:
    from gemlite import DType, GemLiteLinear

    n, k = weights.codes.shape
    layer: Any = GemLiteLinear(4, 128, k, n, input_dtype=DType.BF16, output_dtype=DType.BF16)
    scales = weights.scales.bfloat16().to(device)
    layer.pack(weights.codes.to(device), scales, torch.full_like(scales, 8), None)
    return layer


def bitsandbytes(kind: str, weights: Weights, device: torch.device) -> Layer:
    import bitsandbytes as bnb

    n, k = weights.codes.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(KINDS[kind].dense(weights), requires_grad=False, quant_type="nf4")
    return layer.to(device)


def marlin(kind: str, weights: Weights, device: torch.device) -> Layer:
    """gptqmodel's build of Marlin."""
    from gptqmodel.nn_modules.qlinear import marlin as module

    # Versions before 2026 have another name for it.
    made = getattr(module, "MarlinLinear", None) or module.MarlinQuantLinear
    n, k = weights.codes.shape
    stored = KINDS[kind].store(weights)
    layer = made(bits=4, group_size=128, desc_act=False, sym=True, in_features=k, out_features=n)
    layer.qweight.data, layer.scales.data = stored["qweight"], stored["scales"]
    layer.qzeros.data, layer.g_idx.data = stored["qzeros"], (torch.arange(k) // 128).int()
    layer = layer.to(device)
    layer.post_init()
    layer.scales.data = layer.scales.data.bfloat16()
    return layer


CUBLAS = Rival("cuBLAS bf16", tuple(KINDS), cublas)
RIVALS = (
    CUBLAS,
    Rival("dequantize + cuBLAS", tuple(KINDS), dequantize_first),
    Rival("tinygemm", ("int4",), tinygemm),
    Rival("torchao int4", ("int4",), torchao_int4),
    Rival("gemlite", ("int4",), gemlite),
    Rival("bitsandbytes", ("nf4",), bitsandbytes),
    Rival("gptqmodel Marlin", ("int4",), marlin),
)
