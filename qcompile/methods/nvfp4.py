"""NVFP4 on the fly: e2m1 codes, an e4m3 scale for 16 inputs, one float scale for the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from qcompile.errors import ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.fp4 import codes

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

_GROUP = 16


@dataclass(frozen=True)
class Nvfp4Config(MethodConfig):
    """The field of transformers' NVFP4Config."""

    method: ClassVar[str] = "nvfp4"

    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self.require_patterns("modules_to_not_convert")


class Nvfp4(Method):
    """quant_method "nvfp4", as the kernel kernels-community/nvfp4-gemm computes: W4A4.

    x is rounded to bf16 and then like a weight, by the maximum of the whole call; the result is rounded to bf16. The
    kernel takes calls of one or two rows with x in bf16 alone: here they are rounded like any other, so that a token's
    result does not depend on how many come with it. Its reciprocals are approximate: single codes at the edge of two may
    differ. transformers defines no checkpoint for this method; compressed-tensors and torchao store such weights.
    """

    name = "nvfp4"
    source = "https://huggingface.co/kernels-community/nvfp4-gemm"
    Config = Nvfp4Config
    formats = ("fp4",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return False

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        from qcompile.formats.minifloat import Fp4

        patterns = cast(Nvfp4Config, config).modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns)
        if dense is None and module.bias is not None:
            dense = "nvfp4 converts layers without a bias only"
        if dense is None and (module.n % 16 or module.k % _GROUP):
            dense = f"its sizes [{module.n}, {module.k}] are no multiples of 16"
        return Skip(dense) if dense else Quantized(Fp4(_GROUP, "f8e4m3", "divide"))

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        from qcompile.formats.minifloat import Fp4
        from qcompile.pack import pack
        from qcompile.transform import Applied
        from qcompile.transforms.cast import RoundTo
        from qcompile.transforms.fp_quant import encode
        from qcompile.transforms.round_float import RoundNvfp4

        weight = stored.usable(weight, module).bfloat16().float()
        whole = 448.0 * 6.0 / weight.abs().amax().clamp(min=1e-12)
        values, scale, _ = encode(weight.reshape(module.n, -1, _GROUP), whole, "nvfp4", "abs_max", False)
        fmt = Fp4(_GROUP, "f8e4m3", "divide")
        fields = {
            "code": codes(values).flatten(1),
            "scale": scale.squeeze(-1).repeat_interleave(_GROUP, 1),
            "tensor_scale": whole.reshape(1, 1),
        }
        packed = stored.packed(fmt, pack(fmt, fields, module.n, module.k), module)
        before = (Applied(RoundTo()), Applied(RoundNvfp4(_GROUP, "divide", "")))
        return replace(packed, before=before, after=(Applied(RoundTo()),))

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        raise ConfigError(
            "transformers defines no checkpoint for nvfp4: it quantizes while it loads a float model",
            where=module.path,
            expected="a method with a checkpoint",
            remedy="choose compressed-tensors (nvfp4-pack-quantized), torchao or fouroversix to write one",
        )
