"""FourOverSix: NVFP4 weights and activations whose blocks are scaled to 4 or to 6, and plain NVFP4 and MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.fp4 import codes

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.formats.fouroversix import FourOverSix as Format
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

_DTYPES = ("nvfp4", "mxfp4")
_RULES = ("mse", "mae", "abs_max", "static_6", "static_4")
_OUTPUTS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_NAMES = {name: f"quantized_weight_{name}" for name in ("values", "scale_factors", "amax")}
_METADATA = "quantized_weight_metadata"
_TRAINING = "gradients are not computed here"


@dataclass(frozen=True)
class FourOverSixConfig(MethodConfig):
    """The fields of transformers' FourOverSixConfig.

    A field of `module_config_overrides` that is left out has its default, not the model's value.
    """

    method: ClassVar[str] = "fouroversix"
    steering: ClassVar[Mapping[str, str]] = {
        "matmul_backend": "the target's own kernels are used",
        "quantize_backend": "one implementation, as the PyTorch backend computes",
        "gradient_dtype": _TRAINING,
        "gradient_scale_rule": _TRAINING,
    }
    foreign: ClassVar[Mapping[str, str]] = {
        "pre_quantized_model_config_type": "checkpoints of other methods are read by those methods"
    }

    activation_dtype: str | None = None
    activation_scale_rule: str | None = None
    dtype: str = "nvfp4"
    gradient_dtype: str | None = None
    gradient_scale_rule: str | None = None
    keep_master_weights: bool = False
    matmul_backend: str | None = None
    output_dtype: str = "bfloat16"
    quantize_backend: str | None = None
    scale_rule: str = "mse"
    weight_dtype: str | None = None
    weight_scale_2d: bool = False
    weight_scale_rule: str | None = None
    module_config_overrides: dict[str, dict[str, Any]] | None = None
    modules_to_not_convert: list[str] | None = field(default_factory=lambda: ["lm_head"])

    def __post_init__(self) -> None:
        self.require_bools("keep_master_weights", "weight_scale_2d")
        self.require_patterns("modules_to_not_convert")
        for what in ("", "weight_", "activation_", "gradient_"):
            dtype, rule = f"{what}dtype", f"{what}scale_rule"
            none = ", or None" if what else ""
            self._one_of(dtype, (*_DTYPES, *([None] if what else [])), " or ".join(map(repr, _DTYPES)) + none)
            self._one_of(rule, (*_RULES, *([None] if what else [])), ", ".join(map(repr, _RULES)) + none)
        self._one_of("output_dtype", tuple(_OUTPUTS), ", ".join(map(repr, _OUTPUTS)))
        self._one_of("matmul_backend", (None, "cutlass", "triton", "pytorch"), "None, 'cutlass', 'triton' or 'pytorch'")
        backends = (None, "cuda", "triton", "pytorch", "transformer_engine")
        self._one_of("quantize_backend", backends, "None, 'cuda', 'triton', 'pytorch' or 'transformer_engine'")
        for what in ("weight", "activation"):
            dtype, rule = self.of(what)
            static = "'static_6' or 'static_4': the adaptive rules are for nvfp4"
            name = "scale_rule" if getattr(self, f"{what}_scale_rule") is None else f"{what}_scale_rule"
            self.require(dtype == "nvfp4" or rule.startswith("static"), name, f"with mxfp4, {static}")
        overrides = self.module_config_overrides
        ok = overrides is None or (
            isinstance(overrides, Mapping) and all(isinstance(value, Mapping) for value in overrides.values())
        )
        self.require(ok, "module_config_overrides", "None or {module name: {field: value}}")
        for path, fields in (overrides or {}).items():
            self._override(path, fields)

    def _one_of(self, name: str, allowed: tuple[str | None, ...], text: str) -> None:
        self.require(getattr(self, name) in allowed, name, text)

    def _override(self, path: str, fields: Mapping[str, Any]) -> FourOverSixConfig:
        try:
            return FourOverSixConfig.from_dict({"modules_to_not_convert": [], **fields})
        except ConfigError as error:
            where = f"field 'module_config_overrides', {path!r}" + (f", {error.where}" if error.where else "")
            raise ConfigError(
                error.summary, where=where, found=error.found, expected=error.expected, remedy=error.remedy
            ) from None

    def of(self, what: str) -> tuple[str, str]:
        """The dtype and the scale rule of the "weight" or the "activation"."""
        return getattr(self, f"{what}_dtype") or self.dtype, getattr(self, f"{what}_scale_rule") or self.scale_rule

    def layer(self, path: str) -> FourOverSixConfig:
        """The config that holds for one module."""
        fields = (self.module_config_overrides or {}).get(path)
        return self if fields is None else self._override(path, fields)


class FourOverSix(Method):
    """quant_method "fouroversix": W4A4.

    Activations are rounded like weights, by one maximum over the whole call: what a token gives depends on those beside
    it. They are computed in float32 and the result is rounded to `output_dtype` after the bias, where the package rounds
    before it and again after: at most one more unit in the last place. A code that would be 8 saturates to 6, and scales of
    mxfp4 below 2**-24 are kept, as the CUDA kernels have it; the PyTorch backend wraps such codes to -0. Sums of errors
    that tie to the last bit may choose the other scale. Master weights are quantized once, and written out quantized.
    """

    name = "fouroversix"
    source = "https://github.com/mit-han-lab/fouroversix"
    Config = FourOverSixConfig
    formats = ("fouroversix",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        master = cast(FourOverSixConfig, config).keep_master_weights
        return master or any(name.endswith(_NAMES["values"]) for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(FourOverSixConfig, config)
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        self._check_names(config, modules)
        dense = self._dense(config, module)
        return Skip(dense) if dense else Quantized(_format(config.layer(module.path)))

    def _check_names(self, config: FourOverSixConfig, modules: Mapping[str, Module]) -> None:
        """Names that match no module are errors, but for the default, which not every model has."""
        if not config.is_default("modules_to_not_convert"):
            skip.check("modules_to_not_convert", config.modules_to_not_convert or (), modules, self.name, str.__eq__)
        skip.check("module_config_overrides", config.module_config_overrides or (), modules, self.name, str.__eq__)

    def _dense(self, config: FourOverSixConfig, module: Module) -> str | None:
        if module.kind != "Linear":
            return f"{module.kind} is not converted by the method (only Linear)"
        named = module.path in (config.modules_to_not_convert or ())
        return f"modules_to_not_convert has {module.path!r}" if named else None

    def _stored(self, config: FourOverSixConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        names, layer = stored.tensors(source, module), config.layer(module.path)
        stored.refuse_both(names, _NAMES["values"], module, self.name)
        stored.need_dense(names, _NAMES["values"], module, self.name)
        fmt = _format(layer)
        if _NAMES["values"] not in names:
            dense = self._dense(config, module)
            dense = dense or (None if config.keep_master_weights else "the checkpoint stores its weight dense")
            return Skip(dense) if dense else Quantized(fmt, {}, (module.weight,), "from its master weight")
        stored.require(names, (*_NAMES.values(), _METADATA), module, self.name)
        used = {s.name: names[_NAMES[s.name]] for s in fmt.stored(module.n, module.k)}
        stored.expect_all(fmt, used, source, module)
        if "amax" not in used:
            stored.expect(names[_NAMES["amax"]], source, ("f32", "f16", "bf16"), (1,), module)
        stored.expect(names[_METADATA], source, ("i64", "i32"), (6,), module)
        found, expected = source.read(names[_METADATA]).tolist(), _metadata(fmt, module.n, module.k)
        if found != expected:
            raise CheckpointError(
                "the metadata of a quantized weight is not that of its module",
                where=f"{names[_METADATA]} (module {module.path})",
                found=found,
                expected=f"{expected}: outputs, inputs, both padded, codes packed, scales in tiles",
                remedy="the checkpoint does not belong to this architecture, or the file is damaged",
            )
        return Quantized(fmt, used, tuple(names[name] for name in (_NAMES["amax"], _METADATA)))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        if not selected.names:
            return self.quantize(config, module, source.read(module.weight))
        return self._around(config, module, super().read(config, module, selected, source))

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        from qcompile.pack import pack

        layer, weight = cast(FourOverSixConfig, config).layer(module.path), stored.usable(weight, module)
        fmt = _format(layer)
        fields = _encode(weight, fmt, layer.of("weight")[1], layer.weight_scale_2d)
        packed = stored.packed(fmt, pack(fmt, fields, module.n, module.k), module)
        return self._around(config, module, packed)

    def _around(self, config: MethodConfig, module: Module, packed: Packed) -> Packed:
        from qcompile.transform import Applied
        from qcompile.transforms.cast import RoundTo

        layer = cast(FourOverSixConfig, config).layer(module.path)
        output = _OUTPUTS[layer.output_dtype]
        after = (Applied(RoundTo(cast(Any, output))),) if output != "f32" else ()
        return replace(packed, before=(_activation(*layer.of("activation")),), after=after)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        from qcompile.dtypes import DTYPES

        fmt = cast("Format", packed.format)
        amax = {} if fmt.dtype == "nvfp4" else {_NAMES["amax"]: torch.ones(1, dtype=DTYPES[module.dtype])}
        return {
            **{_NAMES[name]: tensor for name, tensor in packed.tensors.items()},
            **amax,
            _METADATA: torch.tensor(_metadata(fmt, packed.N, packed.K)),
        }

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        return config.to_dict() | {"keep_master_weights": False}


def _format(layer: FourOverSixConfig) -> Format:
    from qcompile.formats.fouroversix import FourOverSix as Format
    from qcompile.transforms.four_over_six import limits

    dtype, rule = layer.of("weight")
    largest, scales = limits(rule)
    return Format() if dtype == "nvfp4" and rule == "mse" else Format(cast(Any, dtype), largest * scales)


def _metadata(fmt: Format, N: int, K: int) -> list[int]:
    from qcompile.formats.fouroversix import padded

    return [N, K, *padded(N, K, fmt.group), 1, 1]


def _activation(dtype: str, rule: str) -> Applied:
    from qcompile.transform import Applied
    from qcompile.transforms.four_over_six import RoundFourOverSix, limits
    from qcompile.transforms.round_float import RoundMx

    if dtype == "mxfp4":
        return Applied(RoundMx(rule="ceil", shift=0, divisor=limits(rule)[0]))
    return Applied(RoundFourOverSix(cast(Any, rule)))


def _encode(weight: torch.Tensor, fmt: Format, rule: str, square: bool) -> dict[str, torch.Tensor]:
    """The fields of a weight f32 [N, K]; `square`: one scale for as many outputs as inputs."""
    from qcompile.transforms.four_over_six import encode, limits
    from qcompile.transforms.rounding import power_of_two, to_element

    N, K = weight.shape
    group = fmt.group
    whole = torch.nn.functional.pad(weight, (0, -K % group, 0, -N % group if square else 0))
    rows = group if square else 1
    blocks = whole.reshape(-1, rows, whole.shape[1] // group, group).transpose(1, 2).flatten(2)
    amax = weight.abs().amax().reshape(1, 1)
    if fmt.dtype == "nvfp4":
        values, scale = encode(blocks, torch.where(amax > 0, amax, 1.0), rule)
    else:
        scale = power_of_two(blocks.abs().amax(-1, keepdim=True) / limits(rule)[0], "ceil")
        values = to_element(blocks / torch.where(scale > 0, scale, 1.0), "e2m1")
    values = values.reshape(*values.shape[:2], rows, group).transpose(1, 2).reshape(whole.shape)
    scale = scale.squeeze(-1).repeat_interleave(rows, 0).repeat_interleave(group, 1)
    stored_scale = torch.float8_e4m3fn if fmt.dtype == "nvfp4" else torch.float8_e8m0fnu
    fields = {"code": codes(values)[:N, :K], "scale": scale[:N, :K].to(stored_scale)}
    return fields | ({"amax": amax} if fmt.dtype == "nvfp4" else {})
