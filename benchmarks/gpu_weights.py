"""Random packed weights of the kinds that are timed on a GPU: as a checkpoint stores them, and as float64 to compare with.

What a weight is worth is written here once more, in plain torch: nothing of qcompile's own decoding is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import qcompile
from qcompile.dtypes import itemsize
from qcompile.format import Format, Packed
from qcompile.formats.bitsandbytes import Bnb4
from qcompile.formats.gptq import Gptq
from qcompile.formats.integer import Int8
from qcompile.formats.minifloat import Fp4, Fp8
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.index import register_method
from qcompile.program import Module
from qcompile.runtime.model import CompiledModel

# bitsandbytes' NormalFloat table and OCP's E2M1, as their papers print them.
TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "mxfp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Codes [N, K] and scales [N, K / group] of one weight."""

    codes: torch.Tensor
    scales: torch.Tensor

    def to(self, device: torch.device) -> Weights:
        return Weights(self.codes.to(device), self.scales.to(device))


@dataclass(frozen=True)
class Kind:
    """A kind of weight: the format that stores it, how it is stored, and what it is worth (`dense`: f32 [N, K], exact).

    `group` is how many inputs share a scale (0: all).
    """

    name: str
    format: Format
    group: int
    store: Callable[[Weights], dict[str, torch.Tensor]]
    dense: Callable[[Weights], torch.Tensor]

    def random(self, n: int, k: int, seed: int = 0) -> Weights:
        """Random codes and scales; products of about 1 / sqrt(K)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (n, k // (self.group or k))
        scales = (torch.rand(shape, generator=generator) + 0.5) * 0.3 / k**0.5
        if self.name == "int8":
            codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
            return Weights(codes, scales / 40)
        if self.name == "fp8":
            return Weights(torch.randn((n, k), generator=generator).to(torch.float8_e4m3fn), scales)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        if self.name == "mxfp4":
            return Weights(codes, (scales.log2().round() + 127).to(torch.uint8))
        return Weights(codes, scales.half() / 4 if self.name == "int4" else scales)

    def packed(self, weights: Weights) -> Packed:
        n, k = weights.codes.shape
        return Packed(self.format, self.store(weights), n, k)

    def size(self, n: int, k: int) -> int:
        """Bytes of a packed weight."""
        return sum(math.prod(item.shape) * itemsize(item.dtype) for item in self.format.stored(n, k))


def each(scales: torch.Tensor, k: int) -> torch.Tensor:
    """A scale for each weight [N, K]."""
    return scales.repeat_interleave(k // scales.shape[1], 1)


def pairs(codes: torch.Tensor, first: int) -> torch.Tensor:
    """Two 4-bit codes a byte, the first at bit `first`."""
    return (codes[:, ::2] << first) | (codes[:, 1::2] << (4 - first))


def _store_int4(weights: Weights) -> dict[str, torch.Tensor]:
    n, k = weights.codes.shape
    columns = weights.codes.T.reshape(k // 8, 8, n)
    words = torch.zeros(k // 8, n, dtype=torch.int32)
    for place in range(8):
        words |= columns[:, place].int() << 4 * place
    zeros = torch.full((weights.scales.shape[1], n // 8), 0x88888888 - 2**32, dtype=torch.int32)
    return {"qweight": words, "qzeros": zeros, "scales": weights.scales.T.contiguous()}


def _dense_int4(weights: Weights) -> torch.Tensor:
    """GPTQ's products are rounded to the dtype of its scales."""
    return ((weights.codes.float() - 8) * each(weights.scales, weights.codes.shape[1]).float()).half().float()


def _table(name: str, weights: Weights, scales: torch.Tensor) -> torch.Tensor:
    entries = torch.tensor(TABLES[name], device=weights.codes.device)
    return entries[weights.codes.int()] * each(scales, weights.codes.shape[1])


def _plain(weights: Weights) -> torch.Tensor:
    return weights.codes.float() * each(weights.scales, weights.codes.shape[1])


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("int4", Gptq(bits=4, group=128, v1=False), 128, _store_int4, _dense_int4),
        Kind(
            "nf4", Bnb4("nf4", 64), 64,
            lambda w: {"weight": pairs(w.codes, 4).reshape(-1, 1), "absmax": w.scales.reshape(-1)},
            lambda w: _table("nf4", w, w.scales),
        ),
        Kind("int8", Int8(), 0, lambda w: {"weight": w.codes, "scale": w.scales}, _plain),
        Kind("fp8", Fp8(), 0, lambda w: {"weight": w.codes, "scale": w.scales}, _plain),
        Kind(
            "mxfp4", Fp4(32), 32, lambda w: {"weight": pairs(w.codes, 0), "scale": w.scales},
            lambda w: _table("mxfp4", w, torch.exp2(w.scales.float() - 127)),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class GivenConfig(MethodConfig):
    """The config of `Given`: `key` names the weights that it stands for."""

    method: ClassVar[str] = "given"
    key: str = ""


class Given(Method):
    """A quantization method whose weights were handed to it: `weights[key](module)` is the packed weight of a layer.

    `as_given` makes its configs.
    """

    name = "given"
    source = "benchmarks/gpu_weights.py"
    Config = GivenConfig
    formats = ()
    weights: ClassVar[dict[str, Callable[[Module], Packed]]] = {}

    def prequantized(self, config: MethodConfig, source: Any) -> bool:
        return False

    def select(self, config: MethodConfig, module: Module, source: Any, modules: Any) -> Any:
        if module.kind != "Linear" or module.output_embedding:
            return Skip("it stays as it is")
        assert isinstance(config, GivenConfig)
        return Quantized(self.weights[config.key](module).format)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        assert isinstance(config, GivenConfig)
        return self.weights[config.key](module)


def as_given(key: str) -> GivenConfig:
    """The config for what lies under `key`; the method is known from now on."""
    register_method(Given)
    return GivenConfig(key=key)


class Layers(nn.Module):
    """Linear layers of sizes (N, K), each with an x of its own; their float weights are never looked at."""

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=False, device="meta") for n, k in sizes)
        for layer in self.layers:
            layer.weight = nn.Parameter(torch.zeros(1).expand(layer.weight.shape), requires_grad=False)

    def forward(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def compiled(packed: Sequence[Packed], target: str, most: int = 4096) -> CompiledModel:
    """y = x @ W.T for each weight, compiled for `target` as one model, for x of 1 to `most` rows; all has a kernel.

    Its inputs and outputs are in the order of the weights.
    """
    Given.weights["layers"] = lambda module: packed[int(module.path.rpartition(".")[2])]
    rows = {0: torch.export.Dim("m", min=1, max=most)}
    return qcompile.compile(
        Layers([(each.N, each.K) for each in packed]), as_given("layers"), target=target,
        example_inputs=([torch.randn(8, each.K) for each in packed],), dynamic_shapes={"xs": [rows] * len(packed)},
        strict=True,
    )  # fmt: skip
