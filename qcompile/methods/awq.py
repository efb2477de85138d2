"""AWQ: affine codes in groups along K, four storage orders; without calibration data, round-to-nearest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.gptq import AUTO_ROUND, GptqConfig

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

FORMATS = ("gemm", "gemv", "gemv_fast", "llm-awq")
BACKENDS = (
    "autoawq", "auto", "auto_trainable", "machete", "marlin", "exllama_v2", "exllama_v1", "gemm", "gemm_triton", "gemv",
    "gemv_fast", "torch_awq", "torch_fused_awq",
)  # fmt: skip
NOTE = "round-to-nearest: quantized from the weight alone, without AWQ's activation-aware scales and clipping"
# Activations that AWQ scaled, as their modules are called, and the layers that read them.
ACTIVATIONS = ("act", "gelu_impl")
READERS = ("c_proj", "dense_4h_to_h", "fc_out", "down_proj")
_GPTQ = "a field that AWQ inherits from GPTQ and does not use"
_INHERITED = {
    f.name: f.default for f in fields(GptqConfig) if f.name not in ("unused", "bits", "group_size", "backend", "format")
}  # fmt: skip
_PROVENANCE = ""  # says who wrote a checkpoint and how: nothing to report


@dataclass(frozen=True)
class AwqConfig(MethodConfig):
    """The fields of transformers' AwqConfig.

    `bits` 2 to 8; `group_size` inputs share a scale, -1 is the whole row; `format` (also called `version`) is the order
    of storage: "gemm" (any width), "gemv", "gemv_fast" and "llm-awq" (4 bits).
    """

    method: ClassVar[str] = "awq"
    steering: ClassVar[Mapping[str, str]] = {"backend": "kernels are generated: no other package's kernel is chosen"}
    foreign: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys((*_INHERITED, "damp_auto_increment", "static_groups"), _GPTQ),
        **dict.fromkeys(
            ("method", "meta", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "quantizer",
             "data_type", "to_quant_block_names", "extra_config", *AUTO_ROUND), _PROVENANCE),
    }  # fmt: skip

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    backend: str = "auto"
    modules_to_not_convert: list[str] | None = None
    format: str = "gemm"

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        data.pop("checkpoint_format", None)
        older = data.pop("version", None)
        if older is not None:
            data["format"] = older
        for name in ("format", "backend"):
            if isinstance(data.get(name), str):
                # An enum of transformers is a str whose text is its value.
                data[name] = str.__str__(getattr(data[name], "value", data[name])).lower()
        if data.get("backend") == "llm-awq":
            data |= {"backend": "auto", "format": "llm-awq"}
        if data.get("backend") == "autoawq":
            data["backend"] = "auto"
        # transformers writes GPTQ's fields too: their defaults say nothing.
        return {name: value for name, value in data.items() if name not in _INHERITED or value != _INHERITED[name]}

    def __post_init__(self) -> None:
        self.require(type(self.bits) is int and 2 <= self.bits <= 8, "bits", "an integer from 2 to 8")
        group = self.group_size
        self.require(
            type(group) is int and (group == -1 or group > 0), "group_size", "-1 (the whole row) or a positive integer"
        )
        self.require_bools("zero_point")
        self.require(self.format in FORMATS, "format", ", ".join(FORMATS))
        self.require(self.backend in BACKENDS, "backend", ", ".join(BACKENDS))
        self.require_patterns("modules_to_not_convert")
        self.require(self.format == "gemm" or self.bits == 4, "bits", f"4, the only width of format {self.format!r}")

    @property
    def interleaved(self) -> bool:
        """Whether outputs are stored in AWQ's order of eight: at 4 bits, and by AutoRound at 5 to 7 too."""
        theirs = (
            "autoround" in str(self.unused.get("provider", "")).replace("-", "") or "autoround_version" in self.unused
        )
        return self.bits == 4 or (theirs and self.bits in (5, 6, 7))

    def to_dict(self) -> dict[str, Any]:
        order = {"provider": "auto-round"} if self.interleaved and self.bits != 4 else {}
        return super().to_dict() | {"version": self.format} | order


class Awq(Method):
    """quant_method "awq"."""

    name = "awq"
    source = "https://arxiv.org/abs/2306.00978"
    Config = AwqConfig
    formats = ("awq", "awq-gemv", "awq-gemv-fast")

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".qweight") or name == "qweight" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(AwqConfig, config)
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        patterns = config.modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns, add_defaults=True)
        if dense:
            return Skip(dense)
        fmt = self._format(config, module, "f16")
        stored.legal(fmt, module, self.name)
        return Quantized(fmt, note=NOTE)

    def _format(self, config: AwqConfig, module: Module, scale: str) -> Format:
        from qcompile.formats import awq as formats

        group = module.k if config.group_size == -1 else config.group_size
        if config.format == "gemm":
            return formats.Awq(bits=config.bits, group=group, interleaved=config.interleaved, scale=scale)
        return formats.AwqGemv(group=group) if config.format == "gemv" else formats.AwqGemvFast(group=group)

    def _stored(self, config: AwqConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        if module.kind != "Linear":
            return Skip(f"{module.kind} is not converted by the method (only Linear)")
        names = stored.tensors(source, module)
        stored.need_dense(names, "qweight", module, self.name)
        stored.refuse_both(names, "qweight", module, self.name)
        if "qweight" not in names:
            return Skip("the checkpoint stores its weight dense")
        zeros = "scaled_zeros" if config.format == "llm-awq" else "qzeros"
        stored.require(names, ("qweight", zeros, "scales"), module, self.name)
        scale = source.info(names["scales"]).dtype
        fmt = self._format(config, module, scale if scale == "bf16" and config.format == "gemm" else "f16")
        stored.legal(fmt, module, self.name)
        used = {s.name: names[zeros if s.name == "qzeros" else s.name] for s in fmt.stored(module.n, module.k)}
        stored.expect_all(fmt, used, source, module)
        scaled = _scaled_activation(module, source)
        if scaled is not None:
            stored.expect(scaled, source, ("f16", "bf16", "f32"), (module.k,), module)
        return Quantized(fmt, used, () if scaled is None else (scaled,))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        """The weight; x is divided by the scales of the activation before it, where AWQ scaled that."""
        from qcompile.transform import Applied
        from qcompile.transforms.linear import Scale

        packed = super().read(config, module, selected, source)
        for name in selected.also_claims:
            scales = stored.finite(source.read(name), name, module).float()
            scale = Scale("f32", of=name.removesuffix(".scales"))
            packed = replace(packed, before=(Applied(scale, {"scale": 1 / scales}),))
        return packed

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Round to nearest with AWQ's own scale and zero, in float16 as the original computes them."""
        from qcompile.pack import pack

        config = cast(AwqConfig, config)
        n, k, bits = module.n, module.k, config.bits
        fmt = self._format(config, module, "f16")
        stored.legal(fmt, module, self.name)
        group = k if config.group_size == -1 else config.group_size
        groups = stored.usable(weight, module).half().reshape(n, -1, group)
        half, top = 2 ** (bits - 1), 2**bits - 1
        if config.zero_point:
            lo, hi = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = (hi - lo).clamp(min=1e-5) / top
            zero = (-torch.round(lo / scale)).clamp(0, top)
        else:
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-5) / (half - 1)
            zero = torch.full_like(scale, half)
        code = (torch.round(groups / scale) + zero).clamp_(0, top)
        fields = {"code": code, "zero": zero, "scale": scale}
        dtypes = {"code": torch.int32, "zero": torch.int32, "scale": torch.float16}
        if config.format in ("gemv_fast", "llm-awq"):  # their zero is a float: minus the rounded product
            del fields["zero"], dtypes["zero"]
            fields["offset"], dtypes["offset"] = -(scale * zero), torch.float16
        wide = {name: part.expand_as(groups).reshape(n, k).to(dtypes[name]) for name, part in fields.items()}
        return stored.packed(fmt, pack(fmt, wide, n, k), module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        """The stored tensors; the scales of an activation lie outside of the module, so their name is a whole one."""
        renamed = {"qzeros": "scaled_zeros"} if cast(AwqConfig, config).format == "llm-awq" else {}
        out = {renamed.get(name, name): part for name, part in packed.tensors.items()}
        for each in packed.before:
            out[f"/{each.transform.to_json()['of']}.scales"] = (1 / each.tensors["scale"]).half()
        return out


def _scaled_activation(module: Module, source: TensorSource) -> str | None:
    """The scales of the activation that a module reads, if AWQ scaled it (in models without a gated unit)."""
    parent, _, name = module.weight.removesuffix(".weight").rpartition(".")
    names = (f"{parent}.{act}.scales" for act in ACTIVATIONS)
    known = source.names() if name in READERS else ()
    return next((name for name in names if name in known), None)
