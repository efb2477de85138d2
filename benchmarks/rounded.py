"""One linear layer whose method rounds x to int8 for each row (W8A8): `python -m benchmarks.rounded [--shape NxK] [--seconds S]`.

Integers of x and of the weight are multiplied as integers; beside it stand the same weights with float activations, and torch.
Every contender holds the same weights and rotates over them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

import qcompile
from benchmarks.cpu import shape
from benchmarks.interleave import Work, medians
from benchmarks.layers import ROWS, Layers
from qcompile.format import Packed
from qcompile.formats.integer import Int8
from qcompile.methods.base import Method, MethodConfig, Quantized
from qcompile.methods.index import register_method
from qcompile.program import Module
from qcompile.transform import Applied
from qcompile.transforms.round_int import RoundInt

COUNT = 4  # weights to rotate over


@dataclass(frozen=True)
class RoundedConfig(MethodConfig):
    """`rounds`: x is rounded for each row."""

    method: ClassVar[str] = "benchmark-w8a8"
    rounds: bool = True


class Rounded(Method):
    """Random int8 codes with a scale for each output, whatever weight is given."""

    name = "benchmark-w8a8"
    source = "benchmarks/rounded.py"
    Config = RoundedConfig
    formats = ("int8",)

    def prequantized(self, config: MethodConfig, source: Any) -> bool:
        return False

    def select(self, config: MethodConfig, module: Module, source: Any, modules: Any) -> Quantized:
        return Quantized(Int8())

    def quantize(self, config: MethodConfig, module: Module, weight: Tensor) -> Packed:
        assert isinstance(config, RoundedConfig)
        before = (Applied(RoundInt()),) if config.rounds else ()
        return Packed(Int8(), stored(module.n, module.k, int(module.path[-1])), module.n, module.k, before=before)


register_method(Rounded)


def stored(n: int, k: int, seed: int) -> dict[str, Tensor]:
    """Codes i8 [N, K] and scales f32 [N, 1]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    return {"weight": codes, "scale": torch.rand(n, 1, generator=generator) * 0.01 + 0.002}


def ours(n: int, k: int, rounds: bool) -> qcompile.CompiledModel:
    rows = {0: torch.export.Dim("m", min=1, max=4096)}
    return qcompile.compile(
        Layers(n, k, COUNT), RoundedConfig(rounds), example_inputs=tuple(torch.randn(8, k) for _ in range(COUNT)),
        dynamic_shapes={"inputs": (rows,) * COUNT}, strict=True, threads=torch.get_num_threads(),
    )  # fmt: skip


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=shape, default=(4096, 4096), help="N x K")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each number of rows may take")
    options = parser.parse_args()
    n, k = options.shape
    integers, floats = ours(n, k, True), ours(n, k, False)
    weights = [stored(n, k, i) for i in range(COUNT)]
    dense = [(w["weight"] * w["scale"]).bfloat16() for w in weights]

    def torch_integers(x: Tensor) -> list[Tensor]:
        codes = [rounded(x) for _ in weights]
        return [torch._int_mm(c, w["weight"].T) * s * w["scale"].T for (c, s), w in zip(codes, weights, strict=True)]

    for m in ROWS:
        x = torch.randn(m, k)
        codes, _ = rounded(x)
        found, expected = integers(*[x] * COUNT)[0], torch_integers(x)[0]
        assert (found - expected).norm() < 1e-5 * expected.norm(), "qcompile computes something else"
        work: dict[str, Work] = {
            "qcompile": lambda _, x=x: integers(*[x] * COUNT),
            "qcompile, float x": lambda _, x=x: floats(*[x] * COUNT),
            "torch, int8": lambda _, x=x: torch_integers(x),
            "torch._int_mm alone": lambda _, codes=codes: [torch._int_mm(codes, w["weight"].T) for w in weights],
            "torch, bfloat16": lambda _, x=x: [functional.linear(x.bfloat16(), w) for w in dense],
        }
        times = medians(work, options.seconds, least=5)
        for name, value in times.items():
            print(
                f"M={m:4} {name:20} {value / COUNT * 1e6:10.1f} us  {value / times['qcompile']:6.2f} x qcompile's time"
            )


if __name__ == "__main__":
    main()
