"""AutoRound: a way to choose integers, stored as GPTQ or AWQ store theirs, and small floats; on the fly, round-to-nearest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import auto_round_floats as floats
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.gptq import AUTO_ROUND, BLOCKS

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

# packing_format -> how zeros are stored: GPTQ's order with the zero less one or as it is, or AWQ's order.
PACKINGS = {
    **dict.fromkeys(("auto_round:gptq", "auto_round:auto_gptq", "auto"), "less one"),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), "as it is"),
    **dict.fromkeys(("auto_round:awq", "auto_round:auto_awq"), "awq"),
}
DEFAULT = "auto_round:gptq"
NOTE = "round to nearest: quantized from the weight alone, without AutoRound's tuning"
DENSE_BITS = 16  # from here on `bits` says that a layer is not quantized


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized."""

    bits: int
    group_size: int
    sym: bool

    def group(self, k: int) -> int:
        """Inputs that share a scale, of `k`."""
        return k if self.group_size == -1 else min(self.group_size, k)


@dataclass(frozen=True)
class AutoRoundConfig(MethodConfig):
    """The fields of transformers' AutoRoundConfig, and those that AutoRound writes and that say what is stored.

    `packing_format` says how. `block_name_to_quantize` holds the beginnings of module names (a string with commas, or a
    list); the decoder's blocks where it is None. `extra_config` maps a module's name, or a regular expression to be found
    in it, to its own bits, group_size and sym (and, of floats, what its input is rounded to); from 16 bits on it stays dense.
    """

    method: ClassVar[str] = "auto-round"
    steering: ClassVar[Mapping[str, str]] = {
        "backend": "kernels are generated: no other package's kernel is chosen",
    }
    foreign: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (*AUTO_ROUND, "layer_config", "regex_config", "quant_block_list", "supported_types", "low_cpu_mem_usage",
         "static_kv_dtype", "static_attention_dtype", "enable_alg_ext", "disable_opt_rtn", "model_dtype"), "",
    )  # fmt: skip

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    backend: str = "auto"
    packing_format: str = DEFAULT
    data_type: str = "int"
    block_name_to_quantize: str | Sequence[Any] | None = None
    extra_config: Mapping[str, Mapping[str, Any]] | None = None
    modules_to_not_convert: list[str] | None = None
    act_bits: int | None = None
    act_data_type: str | None = None
    act_dynamic: bool | None = None
    rotation_config: Any = None
    super_bits: int | None = None

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        older = data.pop("to_quant_block_names", None)
        if older is not None:
            data.setdefault("block_name_to_quantize", older)
        return data

    def __post_init__(self) -> None:
        self.require(type(self.bits) is int and self.bits in range(2, 9), "bits", "an integer from 2 to 8")
        group = self.group_size
        whole = type(group) is int and (group == -1 or group > 0 or (group == 0 and self.data_type == "fp"))
        self.require(whole, "group_size", "-1 (the whole row) or a positive integer")
        self.require_bools("sym")
        self.require_patterns("modules_to_not_convert")
        packings = (*PACKINGS, *floats.PACKINGS)
        self.require(self.packing_format in packings, "packing_format", ", ".join(packings))
        other = "export the model in another scheme: this one is stored in a way that is not read here"
        types = ("int", "int_sym", "int_asym", *floats.TYPES)
        self.require(self.data_type in types, "data_type", ", ".join(types), other)
        if self.data_type in floats.TYPES:
            floats.Floats.parse(self.to_dict())
        else:
            self.require(self.act_bits is None or self.act_bits >= DENSE_BITS, "act_bits", "None or 16", other)
        self.require(not self.rotation_config, "rotation_config", "None", other)
        self.require(self.super_bits is None, "super_bits", "None", other)
        names = self.block_name_to_quantize
        self.require(
            names is None or isinstance(names, (str, list, tuple)), "block_name_to_quantize", "None, a text or a list"
        )
        for name in self.extra_config or {}:
            self._require_layer(name)

    def _require_layer(self, name: str) -> None:
        own = (self.extra_config or {})[name]
        scheme = self._scheme(own)
        if scheme is None:
            return
        try:
            said = {f: self._said(own)[f] for f in ("data_type", "act_bits", "act_data_type", "act_dynamic")}
            AutoRoundConfig(scheme.bits, scheme.group_size, scheme.sym, rotation_config=own.get("rotation_config"),
                            super_bits=own.get("super_bits"), **said)  # fmt: skip
        except ConfigError as error:
            raise ConfigError(
                "the auto-round config has a value out of range",
                where=f"field 'extra_config', {name!r}, {error.where}",
                found=error.found,
                expected=error.expected,
                remedy=error.remedy,
            ) from None

    def _scheme(self, own: Mapping[str, Any]) -> Scheme | None:
        bits = own.get("bits", self.bits)
        if type(bits) is int and bits >= DENSE_BITS:
            return None
        return Scheme(bits, own.get("group_size", self.group_size), own.get("sym", self.sym))

    def _said(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The config's fields with a layer's own entries in their place."""
        return self.to_dict() | {name: value for name, value in own.items() if value is not None}

    def floats(self, path: str) -> floats.Floats | None:
        """How a module is quantized, where its numbers are floats."""
        own = self.own(path) or {}
        said = self._said(own)
        there = said["data_type"] in floats.TYPES and self._scheme(own) is not None
        return floats.Floats.parse(said) if there else None

    def blocks(self) -> tuple[str, ...] | None:
        """The beginnings of the names of modules to quantize; None: the decoder's blocks."""
        names = self.block_name_to_quantize
        if names is None:
            return None
        if isinstance(names, str):
            return tuple(name.strip() for name in names.split(","))
        return tuple(part for name in names for part in ([name] if isinstance(name, str) else name))

    def own(self, path: str, paths: Sequence[str] = ()) -> Mapping[str, Any] | None:
        """What `extra_config` says of a module: by its name, else by the first pattern found in it; None: nothing.

        A pattern that is found in any of `paths`, the modules inside of the blocks, does not reach modules outside.
        """
        extra = self.extra_config or {}
        if path in extra:
            return extra[path]
        for pattern, own in extra.items():
            try:
                hit = re.search(pattern, path) is not None
                inside = not paths or path in paths or not any(re.search(pattern, other) for other in paths)
            except re.error:
                continue  # as the original does: a name that is no pattern
            if hit and inside and own:
                return own
        return None

    def scheme(self, path: str) -> Scheme | None:
        """How a module whose tensors are stored is quantized; None where the config leaves it dense."""
        return self._scheme(self.own(path) or {})

    def packing(self) -> str:
        """The packing of a model that is quantized on the fly: by default the one that AutoRound itself chooses."""
        if self.packing_format != DEFAULT or self.sym:
            return self.packing_format
        schemes = filter(None, map(self._scheme, (self.extra_config or {}).values()))
        one = self.bits == 4 and all(scheme.bits == 4 for scheme in schemes)
        return "auto_round:auto_awq" if one else "auto_round"


class AutoRound(Method):
    """quant_method "auto-round".

    Integers with float activations, and the floats that AutoRound's own layers load: MXFP4, MXFP8 (inputs rounded by powers
    of two at or below the maximum, or at or above it with "mx_fp_rceil"), NVFP4 and FP8 with static scales. An FP8 weight is
    rounded to the dtype of its scales, as there; others are worth their float32 product, where the original rounds to the
    model's dtype (of NVFP4 after three roundings instead of two: at most two units in the last place of float32). Groups
    of NVFP4 inputs too small for an e4m3 scale are 0 in the original. Not read: integers with powers of two (mx_int), NVFP4
    with e5m3 scales (nvfp4_v2), rotations (rotation_config). What is exported as "llm_compressor" is compressed-tensors.
    """

    name = "auto-round"
    source = "https://arxiv.org/abs/2309.05516"
    Config = AutoRoundConfig
    formats = ("gptq", "awq", "fp4", "fp8")

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        ends = (".qweight", ".weight_scale")
        return any(name.endswith(ends) or name == "qweight" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(AutoRoundConfig, config)
        if module.kind == "Embedding":
            return Skip("Embedding is not converted by the method (only Linear and Conv1D)")
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        found = self._found(config, module, modules)
        if isinstance(found, str):
            return Skip(found)
        scheme = config.floats(module.path)
        fmt = scheme.format(module.k, "f32") if scheme else self._format(found, config.packing(), module)
        stored.legal(fmt, module, self.name)
        return Quantized(fmt, note=NOTE)

    def _found(self, config: AutoRoundConfig, module: Module, modules: Mapping[str, Module]) -> Scheme | str:
        """How a module is quantized on the fly, or why it is not."""
        patterns = config.modules_to_not_convert or ()
        skip.check("modules_to_not_convert", patterns, modules, self.name, _search)
        skip.check("extra_config", config.extra_config or (), modules, self.name, _search)
        inside = _inside(config, modules)
        own = config.own(module.path, inside)
        if own is None and module.path not in inside:
            return "it is outside of the blocks that are quantized"
        scheme = config._scheme(own or {})
        if scheme is None:
            return f"extra_config gives it {(own or {})['bits']} bits"
        for pattern in patterns:
            if _search(pattern, module.path):
                return f"modules_to_not_convert has {pattern!r}"
        if module.n % 32 or module.k % 32:
            return f"[{module.n}, {module.k}] are no multiples of 32"
        return scheme

    def _format(self, scheme: Scheme, packing: str, module: Module, scale: str = "f16") -> Format:
        from qcompile.formats.awq import Awq
        from qcompile.formats.gptq import Gptq

        group = scheme.group(module.k)
        if PACKINGS[packing] == "awq":
            return Awq(scheme.bits, group, interleaved=True, scale=scale)
        return Gptq(scheme.bits, group, v1=PACKINGS[packing] == "less one", by_field=True, scale=scale)

    def _stored(self, config: AutoRoundConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        own = config.floats(module.path)
        if own is not None:
            return self._stored_floats(own, names, module, source)
        stored.need_dense(names, "qweight", module, self.name)
        stored.refuse_both(names, "qweight", module, self.name)
        if "qweight" not in names:
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, ("qweight", "qzeros", "scales"), module, self.name)
        scheme = config.scheme(module.path)
        if scheme is None:
            raise CheckpointError(
                "a module that the config leaves dense is quantized",
                where=module.path,
                found=names["qweight"],
                expected=f"a dense weight: extra_config gives it {DENSE_BITS} bits",
                remedy="the checkpoint and its quantization_config do not belong together",
            )
        scale = source.info(names["scales"]).dtype
        fmt = self._format(scheme, config.packing_format, module, scale if scale in ("bf16", "f32") else "f16")
        stored.legal(fmt, module, self.name)
        used = {s.name: names[s.name] for s in fmt.stored(module.n, module.k)}
        stored.expect_all(fmt, used, source, module)
        if "g_idx" in names:
            self._in_order(names["g_idx"], scheme.group(module.k), module, source)
        return Quantized(fmt, used, tuple(names[name] for name in ("g_idx",) if name in names))

    def _stored_floats(
        self, scheme: floats.Floats, names: Mapping[str, str], module: Module, source: TensorSource
    ) -> Skip | Quantized:
        if "weight_scale" not in names:
            stored.need_dense(names, "weight_scale", module, self.name)
            return Skip("the checkpoint stores its weight dense")
        if scheme.bits == 4:
            stored.refuse_both(names, "weight_packed", module, self.name)
        stored.require(names, (*scheme.official().values(), *scheme.static()), module, self.name)
        scale = source.info(names["weight_scale"]).dtype
        fmt = scheme.format(module.k, scale if scale in ("bf16", "f16") else "f32")
        stored.legal(fmt, module, self.name)
        dtypes = {scheme.official()[s.name]: (s.dtype,) for s in fmt.stored(module.n, module.k)}
        for name, shape in scheme.shapes(fmt, module.n, module.k).items():
            one = () if shape == (1,) and source.info(names[name]).shape == () else shape
            stored.expect(names[name], source, dtypes.get(name, ("f32", "bf16", "f16")), one, module)
        used = {own: names[name] for own, name in scheme.official().items()}
        return Quantized(fmt, used, tuple(names[name] for name in scheme.static()))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        scheme = cast(AutoRoundConfig, config).floats(module.path)
        if scheme is None:
            return stored.load(selected.format, selected.names, source, module)
        parts = {own: stored.finite(source.read(full), full, module) for own, full in selected.names.items()}
        if parts["scale"].dtype == torch.uint8:
            stored.exponents(parts["scale"], selected.names["scale"], module)
        shaped = {s.name: parts[s.name].reshape(s.shape) for s in selected.format.stored(module.n, module.k)}
        packed = stored.packed(selected.format, shaped, module)
        static = zip(scheme.static(), selected.also_claims, strict=True)
        packed.before = scheme.before({name: stored.finite(source.read(full), full, module) for name, full in static})
        packed.check(module.path)
        return packed

    def _in_order(self, name: str, group: int, module: Module, source: TensorSource) -> None:
        stored.expect(name, source, ("i32",), (module.k,), module)
        index = source.read(name)
        plain = torch.arange(module.k) // group
        if not torch.equal(index.long(), plain):
            at = int((index != plain).nonzero()[0])
            raise CheckpointError(
                "an auto-round checkpoint has inputs in another order",
                where=f"{name} (module {module.path})",
                found=f"input {at} in group {int(index[at])}",
                expected=f"group {int(plain[at])}: AutoRound keeps the order of inputs",
                remedy="the file is damaged, or its quant_method is gptq",
            )

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Round to nearest with AutoRound's scale and zero, in float32 (its `iters` 0 and `disable_opt_rtn`).

        Symmetric scales are signed: the value of greatest magnitude is the lowest code.
        """
        from qcompile.pack import pack

        config = cast(AutoRoundConfig, config)
        scheme = config.scheme(module.path)
        if scheme is None:
            raise ConfigError("the auto-round config does not quantize this module", where=module.path)
        own = config.floats(module.path)
        if own is not None:
            return own.quantize(stored.usable(weight, module), module)
        fmt = self._format(scheme, config.packing(), module)
        stored.legal(fmt, module, self.name)
        n, k, group = module.n, module.k, scheme.group(module.k)
        # Zeros appended to a last short group change nothing: its range holds 0 anyway.
        groups = torch.nn.functional.pad(stored.usable(weight, module), (0, -k % group)).reshape(n, -1, group)
        code, scale, zero = _round(groups, scheme.bits, scheme.sym)
        if PACKINGS[config.packing()] == "less one":
            zero = zero.clamp(min=1)  # what is stored is one less, and never below 0

        def whole(part: torch.Tensor) -> torch.Tensor:
            return part.expand_as(groups).reshape(n, -1)[:, :k]

        fields = {"code": whole(code).to(torch.int32), "zero": whole(zero).to(torch.int32), "scale": whole(scale)}
        return stored.packed(fmt, pack(fmt, fields, n, k), module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        """The tensors; gptqmodel's variant also has the group of each input, floats the scale of x."""
        scheme = cast(AutoRoundConfig, config).floats(module.path)
        if scheme is not None:
            shapes = scheme.shapes(packed.format, module.n, module.k)
            made = {scheme.official()[name]: tensor for name, tensor in packed.tensors.items()}
            made |= zip(scheme.static(), (t for each in packed.before for t in each.tensors.values()), strict=True)
            return {name: tensor.reshape(shapes[name]) for name, tensor in made.items()}
        if cast(AutoRoundConfig, config).packing_format != "auto_round:gptqmodel":
            return dict(packed.tensors)
        group = packed.format.group_size(packed.N, packed.K) or packed.K
        return {**packed.tensors, "g_idx": (torch.arange(packed.K) // group).to(torch.int32)}

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """The fields that are set, with the packing that the weights have, and AutoRound's names for the zero's form."""
        config = cast(AutoRoundConfig, config)
        said = {name: value for name, value in config.to_dict().items() if value is not None and name != "backend"}
        if config.data_type in floats.TYPES:
            said |= floats.Floats.parse(config.to_dict()).told()
        elif config.packing_format == DEFAULT and weights:
            formats = [packed.format.to_json() for packed in weights.values()]
            kinds = {"auto_round:auto_awq" if each["kind"] == "awq" else
                     "auto_round:auto_gptq" if each["v1"] else "auto_round" for each in formats}  # fmt: skip
            said["packing_format"] = kinds.pop()
        return said


def _round(groups: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales (f16) and zeros of f32 groups [..., group]; the scale is rounded before it is used."""
    least, top = 1e-5, 2**bits - 1
    lo, hi = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if not sym:
        scale = ((hi - lo) / top).half().clamp(min=least)
        zero = torch.round(-lo / scale)
        return (torch.round(groups / scale) + zero).clamp_(0, top), scale, zero.clamp(0, top)
    half = 2 ** (bits - 1)
    signed = torch.where(hi < -lo, -lo, -torch.maximum(hi, -lo))
    scale = (signed / half).half()
    scale = torch.where(scale < 0, scale.clamp(max=-least), scale.clamp(min=least))
    return torch.round(groups / scale).clamp_(-half, half - 1) + half, scale, torch.full_like(scale, half)


def _inside(config: AutoRoundConfig, modules: Mapping[str, Module]) -> tuple[str, ...]:
    """The modules inside of the blocks that are quantized."""
    layers = tuple(path for path, module in modules.items() if module.kind != "Embedding")
    blocks = config.blocks()
    if blocks is None:
        block = next((b for b in BLOCKS if any(path.startswith(f"{b}.") for path in layers)), None)
        return tuple(p for p in layers if not modules[p].output_embedding and (not block or p.startswith(f"{block}.")))
    skip.check("block_name_to_quantize", blocks, layers, config.method, _starts)
    return tuple(path for path in layers if path.startswith(blocks))


def _search(pattern: str, path: str) -> bool:
    return path == pattern or re.search(pattern, path) is not None


def _starts(prefix: str, path: str) -> bool:
    return path.startswith(prefix)
