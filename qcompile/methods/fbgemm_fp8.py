"""FBGEMM FP8: E4M3 weights with one scale per output, rows of x rounded to E4M3 as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.formats.minifloat import Fp8
    from qcompile.program import Module
    from qcompile.sources import TensorSource

SCALES = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class FbgemmFp8Config(MethodConfig):
    """The fields of transformers' FbgemmFp8Config: |x| counts up to `activation_scale_ub` for the scale of a row."""

    method: ClassVar[str] = "fbgemm_fp8"
    loading: ClassVar[tuple[str, ...]] = ("activation_scale_ub",)

    activation_scale_ub: float = 1200.0
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        bound = self.activation_scale_ub
        ok = isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound) and bound > 0
        self.require(ok, "activation_scale_ub", "a positive number")
        self.require_patterns("modules_to_not_convert")


class FbgemmFp8(Method):
    """quant_method "fbgemm_fp8".

    x is rounded as FBGEMM's CUDA operator rounds it: s = max(min(max|x|, bound) / 448, 1 / (448 * 512)), codes
    E4M3(x / s) saturating. Deviations: the original rounds x and y to bfloat16 and its tensor cores keep about 14 bits of
    the sum; here both stay float32. Weights are quantized by FBGEMM's own Python (and Triton) formula; its CUDA operator
    gives other codes for about one weight in a thousand.
    """

    name = "fbgemm_fp8"
    source = "https://github.com/pytorch/FBGEMM"
    Config = FbgemmFp8Config
    formats = ("fp8",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".weight_scale") or name == "weight_scale" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(FbgemmFp8Config, config)
        if self.prequantized(config, source):
            return self._stored(module, source)
        patterns = config.modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns)
        return Skip(dense) if dense else Quantized(_format())

    def _stored(self, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        stored.require(names, ("weight",), module, self.name)
        if "weight_scale" not in names and source.info(names["weight"]).dtype != "f8e4m3":
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, ("weight", "weight_scale"), module, self.name)
        stored.expect(names["weight_scale"], source, SCALES, (module.n, 1), module)
        fmt = _format(source.info(names["weight_scale"]).dtype)
        used = {"weight": names["weight"], "scale": names["weight_scale"]}
        stored.expect_all(fmt, used, source, module)
        # Older files hold the bound, which is in the config too.
        return Quantized(fmt, used, tuple(names[name] for name in ("input_scale_ub",) if name in names))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        return self._rounding(config, super().read(config, module, selected, source))

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """a = 448 / max(max|w|, 1e-12) for each output of the weight in bfloat16; codes E4M3(w * a), stored scale 1 / a."""
        weight = stored.usable(weight, module).to(torch.bfloat16)  # the original runs in no other dtype
        factor = 448 / weight.abs().amax(1, keepdim=True).clamp(min=1e-12).float()
        codes = (weight.float() * factor).to(torch.float8_e4m3fn)
        packed = stored.packed(_format(), {"weight": codes, "scale": 1 / factor}, module)
        return self._rounding(config, packed)

    def _rounding(self, config: MethodConfig, packed: Packed) -> Packed:
        """The weight with the rounding of x before it."""
        from qcompile.transform import Applied
        from qcompile.transforms.round_float import RoundFloat

        bound = cast(FbgemmFp8Config, config).activation_scale_ub
        packed.before = (Applied(RoundFloat(per="token", most=bound, floor=1 / (448 * 512))),)
        return packed

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        return {"weight": packed.tensors["weight"], "weight_scale": packed.tensors["scale"].float()}


def _format(scale: str = "f32") -> Fp8:
    from qcompile.formats.minifloat import Fp8

    return Fp8(scale=scale, rows=1, columns=0)
