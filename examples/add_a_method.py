"""A quantization method of one's own, in one file: `python examples/add_a_method.py`.

"ternary-rows" stores each weight as -1, 0 or 1 with one float16 scale a row, five weights to a byte (3**5 = 243), and
rounds the layer's input to 8 bits. Nothing here is known to qcompile; what it gets for it is the eager reference, the CPU
kernels, checkpoints, reports and everything else that follows from the description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import qcompile
from qcompile.expr import Expr, const, k, n, table
from qcompile.format import Format, Packed, Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.program import Module
from qcompile.sources import TensorSource
from qcompile.transform import Applied
from qcompile.transforms.round_int import RoundInt

POWERS = (1, 3, 9, 27, 81)


@dataclass(frozen=True)
class TernaryRows(Affine):
    """W = (digit - 1) * scale. trits u8 [N, K / 5], five base-3 digits a byte, the first input lowest; scale f16 [N]."""

    kind: ClassVar[str] = "ternary-rows"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("trits", "u8", (N, K // 5)), Stored("scale", "f16", (N,)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": t.trits[n, k // 5] // table(POWERS, k % 5) % 3, "scale": t.scale[n]}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, const(1))

    def check(self, N: int, K: int) -> list[Problem]:
        return [Problem(f"K = {K}", "a multiple of 5", "skip the layer")] if K % 5 else []

    def group_size(self, N: int, K: int) -> int | None:
        return K


@dataclass(frozen=True)
class TernaryConfig(MethodConfig):
    """`threshold`: what is smaller than this share of the row's mean magnitude becomes 0."""

    method: ClassVar[str] = "ternary-rows"

    threshold: float = 0.7
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self.require(0 <= self.threshold < 2, "threshold", "a number from 0 to 2")
        self.require_patterns("modules_to_not_convert")


class TernaryMethod(Method):
    """quant_method "ternary-rows"."""

    name = "ternary-rows"
    source = "examples/add_a_method.py"
    Config = TernaryConfig
    formats = ("ternary-rows",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".trits") for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        assert isinstance(config, TernaryConfig)
        names = stored.tensors(source, module)
        format: Format = TernaryRows()
        if self.prequantized(config, source):
            if "trits" not in names:
                return Skip("the checkpoint stores its weight dense")
            stored.require(names, ("trits", "scale"), module, self.name)
            stored.expect_all(format, names, source, module)
            return Quantized(format, {"trits": names["trits"], "scale": names["scale"]})
        dense = skip.dense(module, modules, "modules_to_not_convert", config.modules_to_not_convert)
        if dense:
            return Skip(dense)
        stored.legal(format, module, self.name)
        return Quantized(format)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        return self._whole(stored.load(selected.format, selected.names, source, module))

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        assert isinstance(config, TernaryConfig)
        weight = stored.usable(weight, module)
        size = weight.abs()
        kept = size >= config.threshold * size.mean(1, keepdim=True)
        scale = (size * kept).sum(1) / kept.sum(1).clamp(min=1)
        digits = (weight.sign() * kept + 1).to(torch.uint8).reshape(module.n, -1, 5)
        trits = (digits * torch.tensor(POWERS, dtype=torch.uint8)).sum(-1).to(torch.uint8)
        return self._whole(stored.packed(TernaryRows(), {"trits": trits, "scale": scale.half()}, module))

    def _whole(self, packed: Packed) -> Packed:
        packed.before = (Applied(RoundInt(divisor=127.0)),)
        return packed


def register() -> None:
    """What an entry point of the group "qcompile.methods" would name."""
    qcompile.register_method(TernaryMethod, formats=[TernaryRows])


def main() -> None:
    register()
    torch.manual_seed(0)
    first = torch.nn.Linear(320, 640)
    model = torch.nn.Sequential(first, torch.nn.GELU(), torch.nn.Linear(640, 10)).eval()
    x = torch.randn(7, 320)
    config = {"quant_method": "ternary-rows", "modules_to_not_convert": ["2"]}
    outputs = {}
    for target in ("reference", "cpu"):
        q = qcompile.compile(model, config, target=target, example_inputs=(x,))
        outputs[target] = q(x)
        for row in q.report.weights.values():
            print(
                f"{target:10} {row.path:4} {row.format:13} {row.bits:5.2f} bits  {row.tier:8} {row.around or row.reason}"
            )
    torch.testing.assert_close(outputs["cpu"], outputs["reference"], rtol=1e-5, atol=1e-5)
    weight, true = q.weight("0"), first.weight.detach()
    print(f"relative error of the weight: {((weight - true).norm() / true.norm()).item():.3f}")


if __name__ == "__main__":
    main()
