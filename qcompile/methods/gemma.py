"""Gemma's quantized checkpoints: integer weights and embeddings, inputs and outputs rounded in fixed steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

_LINEAR = {"weight": "weight", "scale": "weight_scale"}
_EMBEDDING = {"weight": "embedding_quantized", "scale": "embedding_scale"}
_STEPS = ("input_activation_scale", "output_activation_scale")
_CACHE = ("k_cache_scale", "v_cache_scale")
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class GemmaConfig(MethodConfig):
    """The fields of transformers' GemmaQuantizationConfig.

    `module_quant_configs` maps regular expressions, searched in a module's name, to {"num_bits": 2, 4 or 8}; of several
    that match, the one that matches furthest to the left holds, then the first.
    """

    method: ClassVar[str] = "gemma"

    num_bits: int = 4
    quantize_embeddings: bool = False
    module_quant_configs: dict[str, dict[str, Any]] | None = None
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self.require(self.num_bits in _BITS, "num_bits", "2, 4 or 8")
        self.require_bools("quantize_embeddings")
        self.require_patterns("modules_to_not_convert")
        known = self.module_quant_configs
        ok = known is None or (
            isinstance(known, Mapping)
            and all(isinstance(value, Mapping) and value.keys() <= {"num_bits"} for value in known.values())
            and all(value.get("num_bits", 4) in _BITS for value in known.values())
        )
        self.require(ok, "module_quant_configs", "None or {regular expression: {'num_bits': 2, 4 or 8}}")
        for pattern in known or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    "the gemma config has a pattern that is not a regular expression",
                    where="field 'module_quant_configs'",
                    found=f"{pattern!r} ({error})",
                    expected="a regular expression",
                ) from None

    def bits(self, path: str) -> int:
        """The bits of a module's weight."""
        places = [
            (match.start(), index, own.get("num_bits", self.num_bits))
            for index, (pattern, own) in enumerate((self.module_quant_configs or {}).items())
            if (match := re.search(pattern, path))
        ]
        return cast(int, min(places)[2]) if places else self.num_bits


class Gemma(Method):
    """quant_method "gemma".

    Inputs and outputs whose stored step is 0 were not calibrated and stay as they are. Everything is computed in float32,
    where the original computes in the dtype of the model. Scales of the KV cache are not used, by the original neither.
    """

    name = "gemma"
    source = "https://huggingface.co/docs/transformers/main/en/quantization/overview"
    Config = GemmaConfig
    formats = ("gemma", "int8")

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith((".weight_scale", "embedding_quantized")) for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(GemmaConfig, config)
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        patterns = config.modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        kinds = ("Linear", "Embedding") if config.quantize_embeddings else ("Linear",)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns, kinds=kinds)
        return Skip(dense) if dense else Quantized(_format(config.bits(module.path), "f32", 0))

    def _stored(self, config: GemmaConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        official = _EMBEDDING if _EMBEDDING["weight"] in names else _LINEAR
        cache = self._cache(module, source)
        if official is _LINEAR and "weight_scale" not in names:
            stored.require(names, ("weight",), module, self.name)
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, tuple(official.values()), module, self.name)
        scale = source.info(names[official["scale"]])
        runs = scale.shape[-1] if len(scale.shape) == 2 else 1
        fmt = _format(config.bits(module.path), scale.dtype, module.k // runs if runs > 1 else 0)
        used = {name: names[own] for name, own in official.items()}
        stored.expect_all(fmt, used, source, module)
        steps = [names[name] for name in _STEPS if name in names]
        return Quantized(fmt, used, (*steps, *cache))

    def _cache(self, module: Module, source: TensorSource) -> tuple[str, ...]:
        """The scale of the KV cache that belongs to what a key or value projection makes."""
        parent, _, own = module.path.rpartition(".")
        names = [f"{parent}.{name}" for name in _CACHE if own == f"{name[0]}_proj"]
        return tuple(name for name in names if name in source.names())

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        packed, names = super().read(config, module, selected, source), stored.tensors(source, module)
        before, after = (
            _rounding(names[name], source, module) if name in names and module.kind == "Linear" else ()
            for name in _STEPS
        )
        return replace(packed, before=before, after=after)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        raise ConfigError(
            "gemma has no form without calibration: its steps of inputs and outputs come from training",
            where=module.path,
            found="a float weight",
            expected="a checkpoint that gemma's own tools have quantized",
            remedy="choose bitsandbytes, hqq, quanto or torchao for a float model",
        )

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        official = _EMBEDDING if module.kind == "Embedding" else _LINEAR
        out = {official[name]: tensor for name, tensor in packed.tensors.items()}
        if module.kind != "Embedding":
            for name, around in zip(_STEPS, (packed.before, packed.after), strict=True):
                out[name] = around[0].tensors["scale"].reshape(()) if around else torch.zeros(())
        return out


def _format(bits: int, scale: str, columns: int) -> Format:
    from qcompile.formats.gemma import Gemma as Few
    from qcompile.formats.integer import Int8

    return Int8(scale=scale, columns=columns) if bits == 8 else Few(cast(Any, bits), columns, scale)


def _rounding(name: str, source: TensorSource, module: Module) -> tuple[Applied, ...]:
    """The rounding to int8 in the stored step; none where that is 0."""
    from qcompile.transform import Applied
    from qcompile.transforms.round_int import RoundInt

    shape = source.info(name).shape
    stored.expect(name, source, ("f32", "bf16", "f16"), shape if shape in ((), (1,)) else (), module)
    step = stored.finite(source.read(name), name, module).reshape(1).float()
    return (Applied(RoundInt(per="tensor", scale="f32"), {"scale": step}),) if bool(step != 0) else ()
