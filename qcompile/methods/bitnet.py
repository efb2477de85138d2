"""BitNet b1.58: ternary weights, and activations rounded to int8 for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

FLOATS = ("bf16", "f16", "f32")
NORM = "rms_norm.weight"


@dataclass(frozen=True)
class BitNetConfig(MethodConfig):
    """The fields of transformers' BitNetQuantConfig."""

    method: ClassVar[str] = "bitnet"

    modules_to_not_convert: list[str] | None = None
    linear_class: str = "bitlinear"
    quantization_mode: str = "offline"
    use_rms_norm: bool = False
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        self.require_patterns("modules_to_not_convert")
        self.require(self.linear_class in ("bitlinear", "autobitlinear"), "linear_class", "bitlinear, autobitlinear")
        self.require(self.quantization_mode in ("online", "offline"), "quantization_mode", "online, offline")
        self.require_bools("use_rms_norm")
        eps = self.rms_norm_eps
        self.require(type(eps) in (int, float) and eps >= 0, "rms_norm_eps", "a number, 0 or more")

    @property
    def online(self) -> bool:
        """True where a checkpoint holds weights that are still to be rounded; only "autobitlinear" knows that."""
        return self.linear_class == "autobitlinear" and self.quantization_mode == "online"

    @property
    def inverse(self) -> bool:
        """True where a checkpoint holds the inverse of the scale."""
        return self.linear_class == "bitlinear"


class BitNet(Method):
    """quant_method "bitnet".

    The two linear classes compute the same function: x, after an RMS norm where the config has one, is rounded to int8
    codes by 127 / max|x| for each token, the weights are ternary codes times a scale. They differ in what they store:
    "bitlinear" divides by `weight_scale`, "autobitlinear" multiplies with it, the bias too. Here the product is float32
    throughout. The original in float32 gives the same logits to 3e-6, unless a value lies on a tie of the rounding, which
    moves a logit by about 1e-2. In bfloat16 it rounds the integer product, or the rounded x, to bfloat16: its logits then
    differ from those in float32 by 2 to 3 percent (by norm, tiny models).

    On the fly (the scale is the mean of |W|) helps only models that were trained for it, as transformers, which refuses
    it, says. An online checkpoint is written as an offline "bitlinear" one: the same function, without the unrounded weights.
    """

    name = "bitnet"
    source = "https://arxiv.org/abs/2402.17764"
    Config = BitNetConfig
    formats = ("bitnet",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        names = source.names()
        if any(name.endswith("weight_scale") for name in names):
            return True
        # An online checkpoint looks like a float one; the blocks of a GGUF file are not its weights.
        return cast(BitNetConfig, config).online and not any(source.info(name).encoding for name in names)

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(BitNetConfig, config)
        prequantized = self.prequantized(config, source)
        if prequantized and not config.online:
            return self._stored(config, module, source)
        patterns = config.modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns)
        if dense:
            return Skip(dense)
        if prequantized:
            return self._online(config, module, source)
        self._check_on_the_fly(config, module)
        return Quantized(
            self._format(config, module.dtype), note="useful only for a model trained with ternary weights"
        )

    def _format(self, config: BitNetConfig, scale: str) -> Format:
        from qcompile.formats.bitnet import Ternary

        return Ternary(scale if scale in FLOATS else "f32", config.inverse)

    def _check_on_the_fly(self, config: BitNetConfig, module: Module) -> None:
        if config.use_rms_norm:
            raise ConfigError(
                "bitnet cannot add norms to a model that was trained without them",
                where=f"field 'use_rms_norm', module {module.path}",
                found="a float model",
                expected="a checkpoint that holds rms_norm.weight beside each weight",
                remedy="set use_rms_norm to False",
            )
        self._check_rows(config, module)

    def _check_rows(self, config: BitNetConfig, module: Module) -> None:
        if module.n % 4 and config.inverse:
            raise ConfigError(
                "bitnet cannot store this module's weight",
                where=f"{module.path} [{module.n}, {module.k}]",
                found=f"N = {module.n}",
                expected="a multiple of 4, the rows in a byte of a bitlinear",
                remedy="name the module in modules_to_not_convert, or set linear_class to 'autobitlinear'",
            )

    def _norm(self, config: BitNetConfig, names: Mapping[str, str], source: TensorSource, module: Module) -> list[str]:
        """The norm's tensor, where the config has one."""
        if not config.use_rms_norm:
            return []
        stored.require(names, (NORM,), module, self.name)
        stored.expect(names[NORM], source, FLOATS, (module.k,), module)
        return [names[NORM]]

    def _online(self, config: BitNetConfig, module: Module, source: TensorSource) -> Quantized:
        names = stored.tensors(source, module)
        stored.require(names, ("weight",), module, self.name)
        stored.expect(names["weight"], source, FLOATS, (module.n, module.k), module)
        claims = (names["weight"], *self._norm(config, names, source, module))
        return Quantized(self._format(replace(config, linear_class="bitlinear"), "f32"), also_claims=claims)

    def _stored(self, config: BitNetConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        if "weight_scale" not in names:
            stored.require(names, ("weight",), module, self.name)
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, ("weight", "weight_scale"), module, self.name)
        self._check_rows(config, module)
        weight, whole = names["weight"], (module.n, module.k)
        if not config.inverse and tuple(source.info(weight).shape) == whole:
            stored.expect(weight, source, FLOATS, whole, module)
        else:
            stored.expect(weight, source, ("u8",), (module.n // 4, module.k), module)
        stored.expect(names["weight_scale"], source, FLOATS, (1,), module)
        claims = self._norm(config, names, source, module)
        if not config.inverse and "bias" in names:
            stored.expect(names["bias"], source, FLOATS, (module.n,), module)
            claims.append(names["bias"])
        fmt = self._format(config, source.info(names["weight_scale"]).dtype)
        return Quantized(fmt, {"weight": weight, "scale": names["weight_scale"]}, tuple(claims))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        config, names = cast(BitNetConfig, config), stored.tensors(source, module)
        if not selected.names:
            made = self._rounded(selected.format, module, source.read(names["weight"]))
        else:
            tensors = {name: stored.finite(source.read(full), full, module) for name, full in selected.names.items()}
            tensors["weight"] = _codes(tensors["weight"], selected.names["weight"], module)
            _check_scale(tensors["scale"], selected.names["scale"], module)
            made = stored.packed(selected.format, tensors, module)
            if names.get("bias") in selected.also_claims:
                bias = stored.finite(source.read(names["bias"]), names["bias"], module)
                made.bias = bias.float() * tensors["scale"].float()
        norm = stored.finite(source.read(names[NORM]), names[NORM], module) if config.use_rms_norm else None
        made.before = around(config, norm)
        return made

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Codes W / mean|W| rounded half to even; the scale, or its inverse, in the weight's dtype."""
        config = cast(BitNetConfig, config)
        self._check_on_the_fly(config, module)
        made = self._rounded(self._format(config, module.dtype), module, weight)
        made.before = around(config, None)
        return made

    def _rounded(self, fmt: Format, module: Module, weight: torch.Tensor) -> Packed:
        from qcompile.formats.bitnet import Ternary

        assert isinstance(fmt, Ternary)
        weight = stored.usable(weight, module)
        inverse = 1.0 / weight.abs().mean().clamp(min=1e-5)
        scale = (inverse if fmt.inverse else 1.0 / inverse).to(DTYPES[fmt.scale]).reshape(1)
        codes = (weight * inverse).round().clamp(-1, 1)
        return stored.packed(fmt, {"weight": pack_rows(codes), "scale": scale}, module)

    def effects(self, config: MethodConfig) -> list[tuple[str, str]]:
        config, found = cast(BitNetConfig, config), super().effects(config)
        if config.inverse and not config.is_default("quantization_mode"):
            found.append(("quantization_mode", "a bitlinear has no mode: its checkpoints hold rounded weights"))
        if not config.use_rms_norm and not config.is_default("rms_norm_eps"):
            found.append(("rms_norm_eps", "use_rms_norm is False: there are no norms"))
        return found

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        config = cast(BitNetConfig, config)
        config = replace(config, linear_class="bitlinear") if config.online else config
        self._check_rows(config, module)
        weight, scale = packed.tensors["weight"], packed.tensors["scale"]
        made = {"weight": weight if module.n % 4 == 0 else unpack_rows(weight, module.n).to(scale.dtype)}
        made["weight_scale"] = scale
        for applied in packed.before:
            made |= {NORM: applied.tensors["norm"]} if "norm" in applied.tensors else {}
        if not config.inverse and module.bias is not None:
            if packed.bias is None:
                raise ConfigError(
                    "an offline autobitlinear scales its bias, and this one was not made for that",
                    where=module.path,
                    found="a float model's bias",
                    remedy="quantize with linear_class 'bitlinear', which computes the same",
                )
            made["bias"] = (packed.bias / scale.float()).to(scale.dtype)
        return made

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        config = cast(BitNetConfig, config)
        if config.online:
            config = replace(config, linear_class="bitlinear", quantization_mode="offline")
        return config.to_dict()


def around(config: BitNetConfig, norm: torch.Tensor | None) -> tuple[Applied, ...]:
    """What happens to the input: the norm [K] where there is one, then int8 codes for each token."""
    from qcompile.dtypes import NAMES
    from qcompile.transform import Applied
    from qcompile.transforms.norm import RmsNorm
    from qcompile.transforms.round_int import RoundInt

    rounded = Applied(RoundInt(divisor=127.0, arithmetic="inverse", least=1e-5))
    if norm is None:
        return (rounded,)
    return (Applied(RmsNorm(config.rms_norm_eps, NAMES[norm.dtype]), {"norm": norm}), rounded)


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Codes of -1, 0 and 1 [N, K] as bytes [ceil(N / 4), K] of four rows each; missing rows are 0 bits."""
    rows = -(-len(codes) // 4)
    fields = torch.zeros(4 * rows, codes.shape[1], dtype=torch.uint8)
    fields[: len(codes)] = (codes + 1).to(torch.uint8)
    packed = torch.zeros(rows, codes.shape[1], dtype=torch.uint8)
    for block, part in enumerate(fields.reshape(4, rows, -1)):
        packed |= part << 2 * block
    return packed


def unpack_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The codes of -1, 0 and 1, i8 [rows, K]."""
    return torch.cat([(weight >> shift) & 3 for shift in (0, 2, 4, 6)])[:rows].to(torch.int8) - 1


def _codes(weight: torch.Tensor, name: str, module: Module) -> torch.Tensor:
    """The packed bytes of a weight that is packed or float; CheckpointError when a code is none of -1, 0 and 1."""
    packed = weight.dtype == torch.uint8
    wrong = (weight & weight >> 1 & 0x55) != 0 if packed else (weight != weight.round()) | (weight.abs() > 1)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise CheckpointError(
            "a stored code is not ternary",
            where=f"{name} (module {module.path})",
            found=f"{weight[tuple(place)].item()} at {place}",
            expected="four fields of 0, 1 or 2 in each byte" if packed else "-1, 0 or 1",
            remedy="the file is damaged, or it holds the weights of an online checkpoint: see quantization_mode",
        )
    return weight if packed else pack_rows(weight)


def _check_scale(scale: torch.Tensor, name: str, module: Module) -> None:
    if scale.item() <= 0:
        raise CheckpointError(
            "a scale is not positive",
            where=f"{name} (module {module.path})",
            found=scale.item(),
            expected="a number above 0",
            remedy="the file is damaged, or the quantization that wrote it failed for this module",
        )
