"""CompressedTensors: schemes for groups of modules, in every format that the package writes or wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from qcompile.errors import CheckpointError, ConfigError, QCompileError
from qcompile.methods import compressed_tensors_layout as layouts
from qcompile.methods import skip, stored
from qcompile.methods.base import Cache, Method, MethodConfig, Quantized, Skip
from qcompile.methods.compressed_tensors_activations import cache_rounding, rounding, suffixes
from qcompile.methods.compressed_tensors_activations import stored as stored_rounding
from qcompile.methods.compressed_tensors_args import Args, Scheme
from qcompile.methods.compressed_tensors_config import SPARSE, CompressedTensorsConfig, hits

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.formats.bitstream import Bitstream
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

_OBSERVERS = (None, "minmax", "static_minmax", "memoryless_minmax")
_LEFT_OVER = (
    "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point",
    "input_global_scale", "output_scale", "output_zero_point", "output_global_scale", "shape", "bitmask", "row_offsets",
    "meta",
)  # fmt: skip


class CompressedTensors(Method):
    """quant_method "compressed-tensors".

    Weights are decoded with the roundings of the package, in the dtype of their scales (bfloat16 for 4-bit floats).
    Activations are rounded in float32, where the package computes in the model's dtype: for a bfloat16 model single
    codes differ. Sparse layouts and marlin-24 are read into their dense ones.
    """

    name = "compressed-tensors"
    Config = CompressedTensorsConfig
    formats = ("bitstream", "int8", "fp8", "fp4", "fp6")

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        schemes = cast(CompressedTensorsConfig, config).schemes.values()
        ends = (".weight_packed", ".weight_scale", ".scale_packed", ".bitmask")
        return all(s.weights is None for s in schemes) or any(name.endswith(ends) for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(CompressedTensorsConfig, config)
        ready = self.prequantized(config, source)
        if not ready:
            targets = [
                t for s in config.schemes.values() for t in s.targets if t not in ("Linear", "Embedding", "Module")
            ]
            skip.check("config_groups", targets, modules, self.name, hits)
            named = [t for t in config.ignore or () if t not in ("Linear", "Embedding", "Module")]
            skip.check("ignore", named, modules, self.name, hits)
        names = stored.tensors(source, module)
        ignored, scheme = config.ignored(module), config.scheme(module)
        if "bitmask" in names:
            return self._sparse(config, None if ignored else scheme, names, module, source)
        if ignored or scheme is None:
            return Skip(f"ignore has {ignored!r}" if ignored else "no target of config_groups names it")
        if scheme.weights is None and scheme.input_activations is None and scheme.output_activations is None:
            return Skip("its scheme quantizes nothing")
        _require_linear(scheme, module)
        if scheme.weights is None or not ready:
            return self._dense(names, module, source) if scheme.weights is None else self._new(config, scheme, module)
        return self._stored(config, scheme, scheme.weights, names, module, source)

    def _new(self, config: CompressedTensorsConfig, scheme: Scheme, module: Module) -> Quantized:
        """A module to be quantized from its float weight; ConfigError where that needs data."""
        args = cast(Args, scheme.weights)
        static = [
            (part, args_.dynamic)
            for part in ("input_activations", "output_activations")
            if (args_ := getattr(scheme, part)) is not None and args_.dynamic is not True
        ]
        if config.cache is not None and config.cache.dynamic is not True:
            static.append(("kv_cache_scheme", config.cache.dynamic))
        for part, dynamic in static:
            raise _uncalibrated(f"{module.path}, {part!r}", dynamic)
        if args.actorder == "group":
            raise ConfigError(
                "an order of the columns by their activations needs calibration data",
                where=f"{module.path}, 'weights', 'actorder'",
                found="'group'",
                expected="None or 'weight'",
            )
        kind = config.stored_format(scheme)
        if kind in ("marlin-24", *SPARSE) or (config.sparsity_config or {}).get("format", "dense") != "dense":
            raise ConfigError(
                "sparse weights come from checkpoints only",
                where=module.path,
                found=kind if kind == "marlin-24" else "sparsity_config",
                expected="a format without sparsity",
            )
        if args.strategy in ("group", "tensor_group") and module.k % (args.group_size or 1):
            raise ConfigError(
                "the group size does not divide the inputs of a module",
                where=f"{module.path} [{module.n}, {module.k}]",
                found=f"group_size: {args.group_size}",
                expected=f"a divisor of {module.k}",
                remedy="choose another group_size, or leave the module out by 'ignore'",
            )
        fmt = layouts.layout(kind, args, module.dtype if module.dtype in layouts.FLOATS else "f32")
        stored.legal(fmt, module, self.name)
        notes = (
            [f"{observer} was another package's search: minimum and maximum are used"]
            if (observer := args.observer) not in _OBSERVERS
            else []
        )
        return Quantized(fmt, note="; ".join(notes))

    def _dense(self, names: Mapping[str, str], module: Module, source: TensorSource) -> Quantized:
        """A module whose activations alone are rounded."""
        from qcompile.formats.dense import Dense

        stored.require(names, ("weight",), module, self.name)
        fmt, used = Dense(source.info(names["weight"]).dtype), {"weight": names["weight"]}
        stored.expect(names["weight"], source, layouts.FLOATS, (module.n, module.k), module)
        return Quantized(fmt, used, _others(names, used))

    def _stored(
        self,
        config: CompressedTensorsConfig,
        scheme: Scheme,
        args: Args,
        names: Mapping[str, str],
        module: Module,
        source: TensorSource,
    ) -> Skip | Quantized:
        kind = config.stored_format(scheme)
        if kind == "marlin-24":
            return self._marlin(args, names, module, source)
        scale = source.info(names["weight_scale"]).dtype if "weight_scale" in names else ""
        fmt = layouts.layout(kind, args, scale if scale in layouts.FLOATS else "bf16")
        official = layouts.official(fmt)
        plain = source.info(names["weight"]).dtype in layouts.FLOATS if "weight" in names else False
        if plain and "weight_packed" not in names:
            return self._calibrated(fmt, args, names, module, source)
        stored.refuse_both(names, "weight_packed", module, self.name)
        stored.require(names, tuple(official.values()), module, self.name)
        if fmt.kind == "bitstream":
            fmt = self._bitstream(cast("Bitstream", fmt), config, names, module, source)
        used = {name: names[layouts.official(fmt)[name]] for name in layouts.official(fmt)}
        layouts.check(fmt, used, source, module)
        self._require_rounding(scheme, names, module)
        return Quantized(fmt, used, _others(names, used))

    def _bitstream(
        self, fmt: Bitstream, config: CompressedTensorsConfig, names: Mapping[str, str], module: Module, source: Any
    ) -> Bitstream:
        stored.require(names, ("weight_shape",), module, self.name)
        shape = source.read(names["weight_shape"]).flatten().tolist()
        if shape != [module.n, module.k]:
            raise CheckpointError(
                "a packed weight has another shape than its module",
                where=f"{names['weight_shape']} (module {module.path})",
                found=shape,
                expected=[module.n, module.k],
                remedy="check that the checkpoint belongs to this config.json",
            )
        used = {name: names[official] for name, official in layouts.official(fmt).items()}
        padded = layouts.packing(fmt, used, source, module, str(config.unused.get("version", "")))
        indirect = fmt.columns > 0 and "weight_g_idx" in names
        if indirect:
            groups = -(-module.k // fmt.columns)
            indirect = not layouts.ordered(names["weight_g_idx"], groups, fmt.columns, source, module)
        return replace(fmt, padded=padded, indirect=indirect)

    def _calibrated(
        self, fmt: Format, args: Args, names: Mapping[str, str], module: Module, source: TensorSource
    ) -> Skip | Quantized:
        """A float weight: dense, or with the scales that a run which is not compressed yet rounds it by."""
        if "weight_scale" not in names:
            return Skip("the checkpoint stores its weight dense")
        stored.expect(names["weight"], source, layouts.FLOATS, (module.n, module.k), module)
        used = {"weight": names["weight"]}
        return Quantized(fmt, used, _others(names, used, "weight_scale"), "rounded by the scales beside it")

    def _marlin(self, args: Args, names: Mapping[str, str], module: Module, source: TensorSource) -> Quantized:
        stored.require(names, ("weight_packed", "scale_packed", "meta"), module, self.name)
        fmt, n, k = layouts.layout("marlin-24", args, "f16"), module.n, module.k
        ok = args.num_bits in (4, 8) and args.symmetric and n % 64 == 0 and k % 32 == 0
        if not ok or args.strategy not in ("group", "channel"):
            raise ConfigError(
                "marlin-24 cannot store this module's weight",
                where=f"{module.path} [{n}, {k}]",
                found=f"{args.num_bits} bits, symmetric: {args.symmetric}, strategy {args.strategy!r}",
                expected="4 or 8 symmetric bits, groups or channels, outputs in multiples of 64 and inputs of 32",
            )
        groups = -(-k // (args.blocks[1] or k))
        stored.expect(names["weight_packed"], source, ("i32",), (k // 32, n * args.num_bits // 2), module)
        stored.expect(names["scale_packed"], source, ("f16",), (groups, n), module)
        stored.expect(names["meta"], source, ("i16",), (k // 32, 2 * n), module)
        used = {"packed": names["weight_packed"], "scale": names["scale_packed"]}
        return Quantized(fmt, used, _others(names, used), "2:4 sparse in the checkpoint, stored with its zeros")

    def _sparse(
        self,
        config: CompressedTensorsConfig,
        scheme: Scheme | None,
        names: Mapping[str, str],
        module: Module,
        source: TensorSource,
    ) -> Quantized:
        from qcompile.formats.dense import Dense

        stored.require(names, ("compressed", "bitmask", "shape"), module, self.name)
        stored.expect(names["bitmask"], source, ("u8",), (module.n, -(-module.k // 8)), module)
        args, dtype = None if scheme is None else scheme.weights, source.info(names["compressed"]).dtype
        used = {"weight": names["compressed"]}
        if args is None or scheme is None:
            fmt: Format = Dense(dtype)
        else:
            stored.require(names, ("weight_scale",), module, self.name)
            fmt = layouts.layout(config.stored_format(scheme), args, source.info(names["weight_scale"]).dtype)
            rest = {name: other for name, other in layouts.official(fmt).items() if name != "weight"}
            stored.require(names, tuple(rest.values()), module, self.name)
            used |= {name: names[other] for name, other in rest.items()}
        return Quantized(fmt, used, _others(names, used), "sparse in the checkpoint, stored with its zeros")

    def _require_rounding(self, scheme: Scheme, names: Mapping[str, str], module: Module) -> None:
        for what, args in (("input", scheme.input_activations), ("output", scheme.output_activations)):
            if args is not None:
                stored.require(names, tuple(f"{what}_{suffix}" for suffix in suffixes(args)), module, self.name)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        from qcompile.methods.compressed_tensors_read import read

        config = cast(CompressedTensorsConfig, config)
        scheme = None if config.ignored(module) else config.scheme(module)
        names = stored.tensors(source, module)
        packed = read(module, selected, scheme, names, source)
        return packed if scheme is None or config.dequantize else _around(scheme, packed, names, module, source)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """The package's min-max quantization, bit for bit, in the weight's dtype."""
        from qcompile.methods.compressed_tensors_quantize import quantize

        config = cast(CompressedTensorsConfig, config)
        scheme = cast(Scheme, config.scheme(module))
        args = cast(Args, scheme.weights)
        fmt = layouts.layout(
            config.stored_format(scheme), args, module.dtype if module.dtype in layouts.FLOATS else "f32"
        )
        packed = quantize(weight, args, fmt, module)
        return packed if config.dequantize else _around(scheme, packed, {}, module, None)

    def cache(self, config: MethodConfig, path: str, heads: int, width: int, source: TensorSource) -> Cache | None:
        config = cast(CompressedTensorsConfig, config)
        if config.cache is None or config.dequantize:
            return None
        args, claims = config.cache, list[str]()

        def made(side: str) -> Applied:
            def read(suffix: str) -> torch.Tensor:
                name = f"{path}.{side}_{suffix}"
                if name not in source.names():
                    raise _no_scale(name, args, path, source)
                claims.append(name)
                return stored.finite(source.read(name), name, path)

            return cache_rounding(args, heads, width, read, f"{path}, kv_cache_scheme")

        return Cache(made("k"), made("v"), tuple(claims))

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        """The package's tensors; codes that lay in words of their own are written as a stream, as since 0.18."""
        from qcompile.methods.compressed_tensors_read import written

        scheme, out = cast(CompressedTensorsConfig, config).scheme(module), written(packed)
        inputs = None if scheme is None else scheme.input_activations
        outputs = None if scheme is None else scheme.output_activations
        for what, args, around in (("input", inputs, packed.before), ("output", outputs, packed.after)):
            if args is not None and around:
                every = stored_rounding(around[0], what)
                out |= {f"{what}_{suffix}": every[f"{what}_{suffix}"] for suffix in suffixes(args)}
        return out

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        config = cast(CompressedTensorsConfig, config)
        groups = {name: _current(config, scheme) for name, scheme in config.schemes.items()}
        formats = {scheme.format for scheme in groups.values() if scheme.weights is not None}
        written = {name: scheme.to_dict() for name, scheme in groups.items()}
        kind = formats.pop() if len(formats) == 1 else "mixed-precision" if formats else config.format
        changed = {"config_groups": written, "format": kind, "quantization_status": "compressed"}
        return config.to_dict() | changed | {"sparsity_config": {}, "ignore": config.ignore or []}


def _uncalibrated(where: str, dynamic: bool | str) -> ConfigError:
    return ConfigError(
        "scales that are fixed before the model runs need calibration data",
        where=where,
        found=f"dynamic: {dynamic!r}",
        expected="dynamic: True",
        remedy="choose a scheme with dynamic activations, or start from a checkpoint that was calibrated",
    )


def _no_scale(name: str, args: Args, path: str, source: TensorSource) -> QCompileError:
    """The error about a scale of keys or values that is not in the source: of one module, or of all."""
    if not any(other.endswith((".k_scale", ".v_scale")) for other in source.names()):
        return _uncalibrated(f"{path}, 'kv_cache_scheme'", args.dynamic)
    return CheckpointError(
        "an attention module lacks a scale for its keys or values",
        where=path,
        found=", ".join(other for other in source.names() if other.startswith(f"{path}.") and "_scale" in other),
        expected=name,
        remedy="the checkpoint is incomplete",
    )


def _current(config: CompressedTensorsConfig, scheme: Scheme) -> Scheme:
    """The scheme with the format in which its weights are written today."""
    kind = config.stored_format(scheme)
    return replace(scheme, format="pack-quantized" if kind == "marlin-24" else kind)


def _require_linear(scheme: Scheme, module: Module) -> None:
    if module.kind == "Embedding" and (scheme.input_activations or scheme.output_activations):
        raise ConfigError(
            "the activations of an embedding are not quantized",
            where=module.path,
            found="input_activations or output_activations in its scheme",
            expected="a scheme for weights alone",
            remedy="give embeddings a group of their own, or leave them out by 'ignore'",
        )


def _others(names: Mapping[str, str], used: Mapping[str, str], *more: str) -> tuple[str, ...]:
    """The module's further tensors that the package writes."""
    taken = set(used.values())
    return tuple(full for name, full in names.items() if name in (*_LEFT_OVER, *more) and full not in taken)


def _around(
    scheme: Scheme, packed: Packed, names: Mapping[str, str], module: Module, source: TensorSource | None
) -> Packed:
    """The weight with the roundings of its input and output."""

    def made(what: str, args: Args | None, width: int) -> tuple[Applied, ...]:
        def read(suffix: str) -> torch.Tensor:
            full = names[f"{what}_{suffix}"]
            assert source is not None  # a rounding that stores something comes from a checkpoint
            return stored.finite(source.read(full), full, module)

        return () if args is None else (rounding(args, width, read, f"{module.path}, {what}_activations"),)

    packed.before = made("input", scheme.input_activations, module.k)
    packed.after = made("output", scheme.output_activations, module.n)
    packed.check(module.path)
    return packed
