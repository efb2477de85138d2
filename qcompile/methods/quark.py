"""AMD Quark: integers of 8, 4, 3 and 2 bits, FP8, and MXFP6/MXFP4, with or without rounded or rotated activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import CheckpointError, ConfigError
from qcompile.formats.quark import QuarkInt4
from qcompile.methods import quark_narrow as narrow
from qcompile.methods import quark_rotation as turning
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.quark_spec import RANGES, Spec, codes, moved, narrow_packed, spec_of, whole_layer
from qcompile.transform import Applied
from qcompile.transforms.round_int import RoundInt
from qcompile.transforms.rounding import Rounding

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

FLOATS = ("f32", "bf16", "f16")
TENSORS = ("weight", "input_tensors", "output_tensors", "bias")
CACHE = "key-value caches stay float, as when transformers loads such a checkpoint"


@dataclass(frozen=True)
class QuarkConfig(MethodConfig):
    """The dict that quark's QConfig (and so transformers' QuarkConfig) is made from, with quark's defaults.

    A layer's config has the specs of `weight`, `input_tensors`, `output_tensors` and `bias` (None: not quantized).
    """

    method: ClassVar[str] = "quark"
    steering: ClassVar[Mapping[str, str]] = {
        "kv_cache_quant_config": CACHE,
        "kv_cache_group": CACHE,
        "kv_cache_post_rope": CACHE,
        "min_kv_scale": CACHE,
        "softmax_quant_spec": "softmax stays float, as when transformers loads such a checkpoint",
        "algo_config": "it steered calibration, which is not run here",
        "quant_mode": "",
        "version": "",
    }
    foreign: ClassVar[Mapping[str, str]] = {"custom_mode": "", "legacy": ""}

    global_quant_config: dict[str, Any]
    layer_quant_config: dict[str, Any] | None = None
    layer_type_quant_config: dict[str, Any] | None = None
    exclude: list[str] | None = None
    kv_cache_quant_config: dict[str, Any] = field(default_factory=dict)
    kv_cache_group: list[str] = field(default_factory=list)
    kv_cache_post_rope: bool = False
    min_kv_scale: float = 0.0
    softmax_quant_spec: dict[str, Any] | None = None
    algo_config: list[dict[str, Any]] | None = None
    quant_mode: str = "eager_mode"
    version: str | None = None
    export: dict[str, Any] | None = None

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The dict of a transformers object, which holds quark's own objects, as a checkpoint has it."""
        inner, export = data.pop("quant_config", None), data.pop("json_export_config", None)
        if inner is None:
            return data
        export = {} if export is None else {"export": dict(vars(export))}
        return data | {name: value for name, value in inner.to_dict().items() if name != "quant_method"} | export

    def __post_init__(self) -> None:
        tables = ("global_quant_config", "layer_quant_config", "layer_type_quant_config", "export")
        for name in tables:
            value = getattr(self, name)
            empty = value is None and name != "global_quant_config"  # as quark before 1.0 wrote them
            self.require(empty or isinstance(value, Mapping), name, "a dict")
        self.require_patterns("exclude")
        _specs(self.global_quant_config, "global_quant_config")
        for name in ("layer_quant_config", "layer_type_quant_config"):
            for key, layer in (getattr(self, name) or {}).items():
                self.require(isinstance(layer, Mapping), name, "a dict of layer configs")
                _specs(layer, f"{name}, {key!r}")
        said = self.export or {}
        whole = said.get("weight_format", "real_quantized") == "real_quantized"
        self.require(whole, "export", "weight_format 'real_quantized'", "export the model with real quantized weights")
        self.require(
            said.get("pack_method", "reorder") in ("reorder", "order"), "export", "pack_method 'reorder' or 'order'"
        )
        turned = [each for each in self.algo_config or () if isinstance(each, Mapping) and each.get("r3")]
        self.require(not turned, "algo_config", "no rotation of keys and queries (r3)", "export the model without it")

    @property
    def reorder(self) -> bool:
        """How words of 4-bit integers are filled."""
        return bool((self.export or {}).get("pack_method", "reorder") == "reorder")

    @property
    def online(self) -> tuple[str, ...]:
        """The paths of modules whose inputs are rotated; "*": of all that have a matrix."""
        found = [each.get("online_config") for each in self.algo_config or () if isinstance(each, Mapping)]
        return tuple(path for each in found if each for path in each.get("online_rotation_layers") or ("*",))

    def specs(self, path: str) -> dict[str, Spec | None] | str:
        """What happens to the tensors of a linear module, or the reason why it stays dense."""
        for pattern in self.exclude or ():
            if fnmatch(path, pattern):
                return f"exclude has {pattern!r}"
        for pattern, layer in (self.layer_quant_config or {}).items():
            if fnmatch(path, pattern):
                return _specs(layer, f"layer_quant_config, {pattern!r}")
        types = self.layer_type_quant_config or {}
        for name in ("Linear", "nn.Linear"):
            if name in types:
                return _specs(types[name], f"layer_type_quant_config, {name!r}")
        return _specs(self.global_quant_config, "global_quant_config")


def _specs(layer: Mapping[str, Any], where: str) -> dict[str, Spec | None]:
    return {name: spec_of(layer.get(name), f"field {where}, {name!r}") for name in TENSORS}


class Quark(Method):
    """quant_method "quark".

    As transformers loads it: key-value caches stay float whatever the config says. Deviations: the original computes with
    activations and dequantized weights in the model's dtype; here both are float32. Quark quantizes with calibration;
    on the fly it is its min-max observers on the weight alone, so static activation scales need a checkpoint. No module is
    dense by default: name the output embedding in `exclude`. Integers of 2 and 3 bits become a bit stream. Quark 0.13
    exports int3, and does not load it again: it is read as quark's own packing has it. Rotated inputs (online R1, R4) go
    through the stored matrix in float32; a matrix of trained rotations is rounded to float32.
    """

    name = "quark"
    source = "https://quark.docs.amd.com"
    Config = QuarkConfig
    formats = ("quark-int4", "bitstream", "int8", "fp8", "fp4", "fp6")

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(".weight_scale") or name == "weight_scale" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(QuarkConfig, config)
        there = self.prequantized(config, source)
        if not there:
            for name in ("exclude", "layer_quant_config"):
                skip.check(name, getattr(config, name) or (), modules, self.name, _named)
        if module.kind != "Linear":
            return Skip(f"{module.kind} is not converted by the method (only Linear)")
        specs = config.specs(module.path)
        if isinstance(specs, str):
            return Skip(specs)
        weight = specs["weight"]
        if weight is None:
            return Skip("the config quantizes no weight of it")
        _supported(specs, module)
        if there:
            return self._stored(config, specs, module, source)
        for name in ("input_tensors", "output_tensors"):
            spec = specs[name]
            if spec is not None and not spec.is_dynamic:
                raise _calibrated(module, f"static scales for {name}", "is_dynamic true, or a checkpoint with scales")
        if config.online:
            raise _calibrated(module, "an online rotation in algo_config", "no rotation")
        fmt = _made(config, weight, module)
        _legal(fmt, weight, module)
        return Quantized(fmt)

    def _stored(
        self, config: QuarkConfig, specs: Mapping[str, Spec | None], module: Module, source: TensorSource
    ) -> Quantized:
        spec, names = specs["weight"], stored.tensors(source, module)
        assert spec is not None  # the caller has looked
        wanted = ["weight", "weight_scale"] + (["weight_zero_point"] if spec.integer else [])
        static: list[str] = []
        for part, prefix in (("input_tensors", "input"), ("output_tensors", "output")):
            each = specs[part]
            if each is not None and not each.is_dynamic:
                static += [f"{prefix}_scale"] + ([f"{prefix}_zero_point"] if each.integer else [])
        stored.require(names, wanted + static, module, self.name)
        fmt = _format(config, spec, module, source.info(names["weight_scale"]).dtype)
        _legal(fmt, spec, module)
        turns = turning.names(config.online, names, module, source)
        for name, (dtypes, shape) in _official(spec, fmt, module).items():
            one = (1,) if shape == () and source.info(names[name]).shape == (1,) else shape
            stored.expect(names[name], source, dtypes, one, module)
        for name in static:
            dtypes = FLOATS if name.endswith("scale") else ("i8", "u8", "i32")
            one = (1,) if source.info(names[name]).shape == (1,) else ()
            stored.expect(names[name], source, dtypes, one, module)
        # The scales of key-value caches: transformers does not use them.
        caches = [name for name in ("output_scale", "output_zero_point") if name in names and name not in static]
        note = "the scale of a key-value cache is not used" if caches else ""
        claims = (*(names[n] for n in static + caches), *turns.values())
        return Quantized(fmt, {n: names[n] for n in wanted}, claims, note)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        config = cast(QuarkConfig, config)
        fmt, specs = selected.format, config.specs(module.path)
        assert not isinstance(specs, str) and specs["weight"] is not None  # `select` has looked
        spec = specs["weight"]
        data = {n: stored.finite(source.read(full), full, module) for n, full in selected.names.items()}
        if spec.integer and spec.symmetric and bool(data["weight_zero_point"].any()):
            raise CheckpointError(
                "a symmetric weight has zero points",
                where=f"{selected.names['weight_zero_point']} (module {module.path})",
                found=f"{int(data['weight_zero_point'].count_nonzero())} that are not 0",
                expected="nothing but 0",
                remedy="correct 'symmetric' in the quantization_config, or export the model again",
            )
        made = narrow_packed(spec, fmt, narrow.read(spec, data), module.n, module.k) if spec.narrow else {}
        for each in fmt.stored(module.n, module.k) if not spec.narrow else ():
            tensor = data["weight" if each.name == "weight" else f"weight_{_OFFICIAL[each.name]}"]
            turned = tensor.t().contiguous() if _transposed(spec) else tensor
            made[each.name] = turned.reshape(each.shape)
        packed = stored.packed(fmt, made, module)
        names = stored.tensors(source, module)
        static = {n: stored.finite(source.read(f), f, module) for n, f in names.items() if f in selected.also_claims}
        dtype = NAMES[packed.tensors["scale"].dtype]  # the model's, but for powers of two, which need none
        turns = turning.read(turning.names(config.online, names, module, source), module, source)
        packed.before = (*turns, *_rounding(specs["input_tensors"], "input", static, dtype))
        packed.after = _rounding(specs["output_tensors"], "output", static, dtype)
        return packed

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Quark's min-max (for powers of two, PerBlockMX) observers on the weight, and its rounding half to even."""
        from qcompile.pack import pack

        config = cast(QuarkConfig, config)
        specs = config.specs(module.path)
        spec = None if isinstance(specs, str) else specs["weight"]
        if isinstance(specs, str) or spec is None:
            raise ConfigError(
                "quark does not quantize this module",
                where=module.path,
                found=specs if isinstance(specs, str) else "no spec of its weight",
                expected="a spec of its weight",
            )
        fmt = _made(config, spec, module)
        stored.legal(fmt, module, self.name)
        stored.finite(weight, module.weight, module)
        made = spec.quantized(weight)
        if spec.narrow:
            packed = stored.packed(fmt, narrow_packed(spec, fmt, made, module.n, module.k), module)
            return _around(packed, specs, module)
        rows, columns = (size or whole for size, whole in zip(spec.blocks(module.k), weight.shape, strict=True))
        fields = {
            name: value.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            for name, value in made.items()
            if name != "value" and name in (each.name for each in fmt.stored(module.n, module.k))
        }
        fields["code"] = codes(fmt, made["value"])
        if "zero" in fields:
            fields["zero"] = fields["zero"].to(torch.int32) + moved(fmt)
        return _around(stored.packed(fmt, pack(fmt, fields, module.n, module.k), module), specs, module)

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """The config with every key that quark reads, where the caller's had fewer."""
        said = config.to_dict()
        said["global_quant_config"] = whole_layer(said["global_quant_config"])
        for name in ("layer_quant_config", "layer_type_quant_config"):
            said[name] = {key: whole_layer(layer) for key, layer in (said[name] or {}).items()}
        export = {"pack_method": "reorder", "weight_format": "real_quantized"} | (said["export"] or {})
        return said | {"exclude": said["exclude"] or [], "export": export}

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        specs = cast(QuarkConfig, config).specs(module.path)
        assert not isinstance(specs, str) and specs["weight"] is not None  # it was quantized
        spec, made = specs["weight"], turning.written(packed, module)
        if spec.narrow:
            made |= _narrow_written(spec, packed)
        for name, (dtypes, shape) in _official(spec, packed.format, module).items() if not spec.narrow else ():
            inner = {"weight": "weight", "weight_scale": "scale", "weight_zero_point": "zero"}[name]
            tensor = packed.tensors.get(inner)
            if tensor is None:  # a symmetric weight's zero points
                tensor = torch.zeros(shape, dtype=DTYPES[dtypes[0]])
            elif _transposed(spec):
                tensor = tensor.t().contiguous()
            made[name] = tensor.reshape(shape)
        for prefix, around in (("input", packed.before), ("output", packed.after)):
            for each in (each for each in around if isinstance(each.transform, Rounding)):
                for name, value in each.tensors.items():
                    made[f"{prefix}_{_OFFICIAL[name]}"] = value.reshape(())
                if isinstance(each.transform, RoundInt) and each.tensors:
                    kind = torch.uint8 if each.transform.low == 0 else torch.int8
                    made.setdefault(f"{prefix}_zero_point", torch.zeros((), dtype=kind))
        return made


_OFFICIAL = {"scale": "scale", "zero": "zero_point"}
"""What quark calls the stored tensors of formats and transforms."""


def _named(pattern: str, path: str) -> bool:
    return fnmatch(path, pattern)


def _transposed(spec: Spec) -> bool:
    """True for tensors that quark stores the other way round than the format."""
    return spec.dtype in ("int8", "uint8") and spec.qscheme == "per_group"


def _official(spec: Spec, fmt: Format, module: Module) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The dtypes and shapes of a weight's tensors in quark's files."""
    if spec.narrow:
        kinds = {"weight_scale": FLOATS}
        shapes = narrow.shapes(spec, module.n, module.k)
        return {name: (kinds.get(name, (narrow.STORED[spec.dtype],)), shape) for name, shape in shapes.items()}
    tensors = {each.name: each for each in fmt.stored(module.n, module.k)}
    weight, scale = tensors["weight"], tensors["scale"]
    turned = -1 if _transposed(spec) else 1
    shape = scale.shape[::turned]
    if spec.qscheme == "per_tensor":
        shape = ()
    elif spec.qscheme == "per_channel":
        shape = (max(scale.shape),)
    out: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight": ((weight.dtype,), weight.shape[::turned]),
        "weight_scale": (("u8",) if spec.powers else FLOATS, shape),
    }
    if isinstance(fmt, QuarkInt4) and spec.qscheme != "per_tensor":
        shape = (*shape[:-1], -(-shape[-1] // 8))
    return out | ({"weight_zero_point": ((weight.dtype,), shape)} if spec.integer else {})


def _format(config: QuarkConfig, spec: Spec, module: Module, scale: str) -> Format:
    """The format of a module's weight; `_supported` has seen that there is one."""
    scale = scale if scale in FLOATS or spec.powers else "f32"
    fmt = spec.format("u8" if spec.powers else scale, module.k, reorder=config.reorder)
    assert fmt is not None
    return fmt


def _legal(fmt: Format, spec: Spec, module: Module) -> None:
    """ConfigError unless quark's files can hold the module's weight."""
    stored.legal(fmt, module, Quark.name)
    problem = narrow.problem(spec, module.n, module.k) if spec.narrow else ""
    if problem:
        raise ConfigError(
            "quark cannot store this module's weight",
            where=f"{module.path} [{module.n}, {module.k}]",
            found=f"{spec.dtype}, {problem}",
            expected="whole groups, and whole bytes",
            remedy="choose another group size, or leave the module dense by 'exclude'",
        )


def _supported(specs: Mapping[str, Spec | None], module: Module) -> None:
    """ConfigError when quark's files hold no such weight, or it is not known how x or y is rounded."""
    weight = specs["weight"]
    for name, spec in specs.items():
        if spec is None:
            continue
        if name == "weight":
            good = (
                weight is not None
                and weight.format("u8" if weight.powers else "f32", module.k, reorder=True) is not None
            )
        else:
            good = name != "bias" and spec.rounding("" if spec.is_dynamic else "f32", "") is not None
        if not good:
            how = "dynamic" if spec.is_dynamic else "static"
            raise ConfigError(
                f"quark's {name} of this kind is not supported",
                where=module.path,
                found=f"{spec.dtype}, {spec.qscheme}, ch_axis {spec.ch_axis}, {how}",
                expected="no quantized bias"
                if name == "bias"
                else "a combination that quark's files hold and can be computed",
                remedy="export the model without it, or leave the module dense by 'exclude'",
            )


def _made(config: QuarkConfig, spec: Spec, module: Module) -> Format:
    """The format in which a weight is quantized on the fly; ConfigError where that needs data or another rounding."""
    plain = spec.observer in ("", "PlaceholderObserver", "PerBlockMXObserver") or spec.observer.endswith(
        "MinMaxObserver"
    )
    if not plain or "PowOf2" in spec.observer:
        raise _calibrated(module, spec.observer, "a min-max observer")
    if spec.round_method != "half_even" or spec.scale_type not in ("float", "float32"):
        raise _calibrated(
            module, f"{spec.round_method}, {spec.scale_type}", "half_even and scale_type float or float32"
        )
    return _format(config, spec, module, "f32" if spec.scale_type == "float32" else module.dtype)


def _around(packed: Packed, specs: Mapping[str, Spec | None], module: Module) -> Packed:
    """The weight with the roundings that find their scales while running."""
    packed.before = _rounding(specs["input_tensors"], "input", {}, module.dtype)
    packed.after = _rounding(specs["output_tensors"], "output", {}, module.dtype)
    return packed


def _narrow_written(spec: Spec, packed: Packed) -> dict[str, torch.Tensor]:
    from qcompile.pack import unpack

    fields = unpack(packed.format, packed.tensors, packed.N, packed.K)
    least, _ = RANGES[spec.dtype]
    scale = packed.tensors["scale"]
    zero = packed.tensors.get("zero", torch.zeros(scale.shape)).to(torch.int32)
    # The format's zeros are less the middle of its codes, which is -least of signed ones.
    zero = zero + least + (1 << (narrow.BITS[spec.dtype] - 1))
    return narrow.written(spec, fields["code"].to(torch.int32) + least, scale, zero)


def _calibrated(module: Module, found: str, expected: str) -> ConfigError:
    return ConfigError(
        "quark cannot quantize this module on the fly",
        where=module.path,
        found=found,
        expected=expected,
        remedy="quantize and export the model with quark, and compile that checkpoint",
    )


def _rounding(spec: Spec | None, prefix: str, static: Mapping[str, torch.Tensor], dtype: str) -> tuple[Applied, ...]:
    """The rounding of x ("input") or y ("output") in a model of `dtype`, with its stored scale and zero point."""
    if spec is None:
        return ()
    tensors = {}
    if not spec.is_dynamic:
        tensors["scale"] = static[f"{prefix}_scale"].reshape(1)
        if spec.integer:
            tensors["zero"] = static[f"{prefix}_zero_point"].reshape(1)
    if "zero" in tensors and not bool(tensors["zero"].any()):
        del tensors["zero"]
    names = {name: NAMES[tensor.dtype] for name, tensor in tensors.items()}
    transform = spec.rounding(names.get("scale", ""), names.get("zero", ""), dtype if dtype in FLOATS else "f32")
    assert transform is not None  # `_supported` has looked
    return (Applied(transform, tensors),)
