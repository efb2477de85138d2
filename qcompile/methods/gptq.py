"""GPTQ: affine codes in groups along K; checkpoints of every version and width, and plain round-to-nearest."""

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
    from qcompile.format import Packed
    from qcompile.formats.gptq import Gptq as GptqFormat
    from qcompile.program import Module
    from qcompile.sources import TensorSource

FORMATS = ("gptq", "gptq_v2", "gptq_p")
WORDS = {"int32": 32, "int16": 16, "int8": 8}
BLOCKS = (
    "transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers",
    "h", "decoder.layers", "layers",
)  # fmt: skip
NOTE = "round-to-nearest: quantized from the weight alone, without GPTQ's calibration"
_CALIBRATION = "it steers calibration, which is not run here"
_PROVENANCE = ""  # says who wrote a checkpoint and how: nothing to report
# How AutoRound tuned the weights: it writes this into every config, its exports to GPTQ and AWQ among them.
AUTO_ROUND = (
    "provider", "autoround_version", "amp", "batch_size", "dataset", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "enable_quanted_input", "gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "nsamples", "scale_dtype", "seqlen",
    "lr", "minmax_lr", "act_data_type", "act_dynamic", "act_sym", "act_group_size", "super_group_size",
    "static_kv_granularity", "static_attention_granularity",
)  # fmt: skip


@dataclass(frozen=True)
class GptqConfig(MethodConfig):
    """The fields of transformers' GPTQConfig, and those that gptqmodel adds and that say how tensors are stored.

    `bits` 2 to 8 (5, 6 and 7 exist in gptqmodel only); `group_size` inputs share a scale, -1 is the whole row;
    `format` "gptq" (stores zero - 1), "gptq_v2" or "gptq_p" (zero plain; planes of bits). `dynamic` maps patterns of
    module paths to overrides of bits, group_size, sym and desc_act, or (prefix "-:") leaves them dense.
    """

    method: ClassVar[str] = "gptq"
    steering: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("tokenizer", "dataset", "damp_percent", "act_group_aware", "true_sequential", "model_seqlen", "batch_size",
             "module_name_preceding_first_block", "pad_token_id", "cache_block_outputs"), _CALIBRATION),
        "backend": "kernels are generated: no other package's kernel is chosen",
        "max_input_length": "a buffer of another package's kernel: nothing here needs it",
    }  # fmt: skip
    foreign: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("method", "quantizer", "damp_auto_increment", "static_groups", "mse", "model_name_or_path",
         "model_file_base_name", "is_marlin_format", "offload_to_disk", "pack_impl", "use_exllama", "exllama_config",
         "disable_exllama", "use_cuda_fp16", "modules_to_not_convert", "cache_examples_on_gpu", "data_type",
         "to_quant_block_names", *AUTO_ROUND),
        _PROVENANCE)  # fmt: skip

    bits: int
    tokenizer: Any = None
    dataset: list[str] | str | None = None
    group_size: int = 128
    damp_percent: float = 0.1
    desc_act: bool = False
    act_group_aware: bool = True
    sym: bool = True
    true_sequential: bool = True
    format: str = "gptq"
    meta: dict[str, Any] | None = None
    backend: str | None = "auto"
    model_seqlen: int | None = None
    block_name_to_quantize: str | None = None
    module_name_preceding_first_block: list[str] | None = None
    batch_size: int = 1
    pad_token_id: int | None = None
    max_input_length: int | None = None
    cache_block_outputs: bool = True
    modules_in_block_to_quantize: list[list[str]] | None = None
    dynamic: Mapping[str, Mapping[str, Any]] | None = None
    lm_head: bool = False
    pack_dtype: str = "int32"

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        older = data.pop("checkpoint_format", None)
        if older is not None:
            data["format"] = older
        if isinstance(data.get("format"), str):
            data["format"] = data["format"].lower()
        return data

    def __post_init__(self) -> None:
        self.require(self.bits in range(2, 9) and type(self.bits) is int, "bits", "an integer from 2 to 8")
        group = self.group_size
        self.require(
            type(group) is int and (group == -1 or group > 0), "group_size", "-1 (the whole row) or a positive integer"
        )
        self.require(
            isinstance(self.damp_percent, (int, float)) and 0 < self.damp_percent < 1,
            "damp_percent",
            "a number between 0 and 1",
        )
        self.require_bools("desc_act", "act_group_aware", "sym", "true_sequential", "lm_head", "cache_block_outputs")
        known = ("wikitext2", "c4", "c4-new")
        ok = self.dataset is None or self.dataset in known if not isinstance(self.dataset, list) else True
        self.require(ok, "dataset", f"None, a list of texts, or one of {', '.join(known)}")
        self.require(
            self.format in FORMATS, "format", ", ".join(FORMATS), "convert a marlin or bitblas checkpoint back to gptq"
        )
        self.require(self.pack_dtype in WORDS, "pack_dtype", ", ".join(WORDS))
        if self.desc_act:  # as transformers does: the two orders exclude each other
            object.__setattr__(self, "act_group_aware", False)
        for pattern, override in (self.dynamic or {}).items():
            self._require_override(pattern, override)

    def _require_override(self, pattern: str, override: Mapping[str, Any]) -> None:
        try:
            re.compile(pattern[2:] if pattern[:2] in ("-:", "+:") else pattern)
        except re.error as error:
            raise ConfigError(
                "the gptq config has a pattern that is not a regular expression",
                where="field 'dynamic'",
                found=f"{pattern!r} ({error})",
                expected="a regular expression of module paths",
            ) from None
        data = {"bits": self.bits, "group_size": self.group_size} | {
            k: v for k, v in override.items() if k in self.names()
        }
        try:
            GptqConfig(**data)
        except ConfigError as error:
            raise ConfigError(
                "the gptq config has a value out of range",
                where=f"field 'dynamic', {pattern!r}, {error.where}",
                found=error.found,
                expected=error.expected,
            ) from None

    def to_dict(self) -> dict[str, Any]:
        tokenizer = (
            self.tokenizer if isinstance(self.tokenizer, str | None) else getattr(self.tokenizer, "name_or_path", None)
        )
        return super().to_dict() | {"checkpoint_format": self.format, "tokenizer": tokenizer}

    def override(self, path: str) -> Mapping[str, Any] | None:
        """What `dynamic` says about a module: None leaves it dense, else the fields that differ (perhaps none)."""
        dynamic = self.dynamic or {}
        if any(p.startswith("-:") and re.match(p[2:], path) for p in dynamic):
            return None
        hits = (v for p, v in dynamic.items() if not p.startswith("-:") and re.match(p.removeprefix("+:"), path))
        return next(hits, {})


def in_blocks(config: GptqConfig, module: Module, modules: Mapping[str, Module]) -> str | None:
    """Why a module is outside of what GPTQ quantizes (linear layers of the decoder blocks), or None when it is inside.

    A model without blocks of a known name counts as one block.
    """
    if module.output_embedding:
        return None if config.lm_head else "it is the output embedding and lm_head is false"
    names = (config.block_name_to_quantize,) if config.block_name_to_quantize else BLOCKS
    block = next((b for b in names if any(path.startswith(f"{b}.") for path in modules)), None)
    if block is None and config.block_name_to_quantize:
        raise ConfigError(
            "the gptq config names blocks that do not exist",
            where="field 'block_name_to_quantize'",
            found=repr(config.block_name_to_quantize),
            expected="a prefix of module paths, such as 'model.layers'",
        )
    if block is not None and not module.path.startswith(f"{block}."):
        return f"it is outside of the blocks {block!r}"
    inside = [name for names_ in config.modules_in_block_to_quantize or () for name in names_]
    skip.check("modules_in_block_to_quantize", inside, modules, "gptq", skip.ends)
    if inside and not any(module.path.endswith(name) for name in inside):
        return "modules_in_block_to_quantize does not list it"
    return None


def find(weight: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's scale and zero, f32 [...], of groups f32 [..., inputs]: the range is widened to hold 0.

    A symmetric group without a negative weight uses the upper half of the codes only, as the original does.
    """
    top = 2**bits - 1
    lo, hi = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    if sym:
        hi = torch.maximum(-lo, hi)
        lo = torch.where(lo < 0, -hi, lo)
    flat = (lo == 0) & (hi == 0)
    lo, hi = torch.where(flat, lo - 1, lo), torch.where(flat, hi + 1, hi)
    scale = (hi - lo) / top
    return scale, torch.full_like(scale, (top + 1) / 2) if sym else torch.round(-lo / scale)


class Gptq(Method):
    """quant_method "gptq"."""

    name = "gptq"
    source = "https://arxiv.org/abs/2210.17323"
    Config = GptqConfig
    formats = ("gptq",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".qweight") or name == "qweight" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(GptqConfig, config)
        if module.kind == "Embedding":
            return Skip("Embedding is not converted by the method (only Linear and Conv1D)")
        override = config.override(module.path)
        if self.prequantized(config, source):
            return self._stored(config, module, source, override or {})
        outside = in_blocks(config, module, modules)
        if override is None or outside:
            return Skip(outside or "dynamic leaves it dense")
        fmt = self._format(config, override, module, v1=False, scale="f16", indirect=False)
        stored.legal(fmt, module, self.name)
        return Quantized(fmt, note=NOTE)

    def _format(
        self, config: GptqConfig, override: Mapping[str, Any], module: Module, *, v1: bool, scale: str, indirect: bool
    ) -> GptqFormat:
        from qcompile.formats.gptq import Gptq as GptqFormat

        bits, group = override.get("bits", config.bits), override.get("group_size", config.group_size)
        return GptqFormat(
            bits=bits,
            group=module.k if group == -1 else group,
            v1=v1,
            indirect=indirect,
            planar=config.format == "gptq_p" or bits in (5, 6, 7),
            scale=scale,
            word=WORDS[config.pack_dtype],
        )

    def _stored(
        self, config: GptqConfig, module: Module, source: TensorSource, override: Mapping[str, Any]
    ) -> Skip | Quantized:
        names = stored.tensors(source, module)
        stored.need_dense(names, "qweight", module, self.name)
        stored.refuse_both(names, "qweight", module, self.name)
        if "qweight" not in names:
            return Skip("the checkpoint stores its weight dense")
        desc_act = override.get("desc_act", config.desc_act)
        stored.require(names, ("qweight", "qzeros", "scales", *(["g_idx"] if desc_act else [])), module, self.name)
        scale = source.info(names["scales"]).dtype
        indirect = "g_idx" in names and self._permuted(names["g_idx"], config, override, module, source)
        fmt = self._format(
            config,
            override,
            module,
            v1=config.format == "gptq",
            scale=scale if scale in ("f16", "bf16", "f32") else "f16",
            indirect=indirect,
        )
        stored.legal(fmt, module, self.name)
        used = {s.name: names[s.name] for s in fmt.stored(module.n, module.k)}
        stored.expect_all(fmt, used, source, module)
        redundant = [names["g_idx"]] if "g_idx" in names and not indirect else []
        return Quantized(fmt, used, tuple(redundant))

    def _permuted(
        self, name: str, config: GptqConfig, override: Mapping[str, Any], module: Module, source: TensorSource
    ) -> bool:
        """True when the stored group of each input is not simply `k // group_size`; its range is checked."""
        stored.expect(name, source, ("i32",), (module.k,), module)
        size = override.get("group_size", config.group_size)
        size = module.k if size == -1 else size
        index = source.read(name)
        stored.check_groups(index, -(-module.k // size), name, module)
        return not torch.equal(index.long(), torch.arange(module.k) // size)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Round to nearest with GPTQ's own scale and zero (`find`); scales are stored in float16, as always there."""
        from qcompile.pack import pack

        config = cast(GptqConfig, config)
        override = config.override(module.path) or {}
        fmt = self._format(config, override, module, v1=False, scale="f16", indirect=False)
        stored.legal(fmt, module, self.name)
        bits, sym, n, k = fmt.bits, override.get("sym", config.sym), module.n, module.k
        # Zeros appended to a last short group change nothing: its range holds 0 anyway.
        groups = torch.nn.functional.pad(stored.usable(weight, module), (0, -k % fmt.group)).reshape(n, -1, fmt.group)
        scale, zero = (part[..., None] for part in find(groups, bits, sym))
        code = (torch.round(groups / scale) + zero).clamp_(0, 2**bits - 1)

        def whole(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return part.expand_as(groups).reshape(n, -1)[:, :k].to(dtype)

        tensors = {
            "code": whole(code, torch.int32),
            "zero": whole(zero, torch.int32),
            "scale": whole(scale, torch.float16),
        }
        return stored.packed(fmt, pack(fmt, tensors, n, k), module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        """The tensors with zeros as `format` stores them, and the group of each input, which loaders expect."""
        from qcompile.repack import repack

        fmt, tensors = cast("GptqFormat", packed.format), packed.tensors
        wanted = replace(fmt, v1=cast(GptqConfig, config).format == "gptq")
        if wanted != fmt:
            tensors = repack(packed, wanted).tensors
        return {"g_idx": (torch.arange(packed.K) // fmt.group).to(torch.int32)} | tensors

    def sidecars(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        return {"quantize_config.json": self.stored_config(config, weights)}
