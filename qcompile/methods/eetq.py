"""EETQ: int8 codes with one scale per output, data-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.formats.eetq import Eetq as EetqFormat
    from qcompile.program import Module
    from qcompile.sources import TensorSource


@dataclass(frozen=True)
class EetqConfig(MethodConfig):
    """The fields of transformers' EetqConfig: `weights` is "int8"."""

    method: ClassVar[str] = "eetq"

    weights: str = "int8"
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self.require(self.weights == "int8", "weights", "'int8'")
        self.require_patterns("modules_to_not_convert")


class Eetq(Method):
    """quant_method "eetq"."""

    name = "eetq"
    source = "https://github.com/NetEase-FuXi/EETQ"
    Config = EetqConfig
    formats = ("eetq",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".weight_scales") or name == "weight_scales" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(EetqConfig, config)
        if self.prequantized(config, source):
            return self._stored(module, source)
        patterns = config.modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns)
        if dense:
            return Skip(dense)
        fmt, note = self._format(module.dtype), ""
        if module.dtype not in ("f16", "f32"):
            note = f"eetq itself refuses {module.dtype} weights: quantized as float32"
        stored.legal(fmt, module, self.name)
        return Quantized(fmt, note=note)

    def _format(self, scale: str) -> EetqFormat:
        from qcompile.formats.eetq import Eetq as EetqFormat

        return EetqFormat(scale=scale if scale == "f16" else "f32")

    def _stored(self, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        if "weight_scales" not in names:
            stored.require(names, ("weight",), module, self.name)
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, ("weight", "weight_scales"), module, self.name)
        fmt = self._format(source.info(names["weight_scales"]).dtype)
        stored.legal(fmt, module, self.name)
        used = {s.name: names[s.name] for s in fmt.stored(module.n, module.k)}
        stored.expect_all(fmt, used, source, module)
        return Quantized(fmt, used)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Codes round half away from zero with the unrounded float32 scale absmax / 128, as the original's do.

        An output of zeros gets code 127 and scale 0; the largest positive weight is clipped to code 127.
        """
        from qcompile.pack import pack

        fmt = self._format(module.dtype)
        stored.legal(fmt, module, self.name)
        weight = stored.usable(weight, module)
        scale = weight.abs().amax(1, keepdim=True) * (1 / 128)
        ratio = weight / scale
        code = torch.trunc(ratio.double() + torch.copysign(torch.tensor(0.5, dtype=torch.float64), ratio.double()))
        code = torch.where(ratio.isnan(), 127, code.clamp(-128, 127)).to(torch.int32)
        dtype = torch.float16 if fmt.scale == "f16" else torch.float32
        fields = {"code": code + 128, "scale": scale.to(dtype).expand_as(code)}
        return stored.packed(fmt, pack(fmt, fields, module.n, module.k), module)
