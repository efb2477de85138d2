"""CompressedTensors: schemes for groups of modules, in every format that the package writes or wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import CheckpointError, ConfigError, QCompileError
from qcompile.methods import compressed_tensors_layout as layouts
from qcompile.methods import compressed_tensors_rotations as rotations
from qcompile.methods import skip, stored
from qcompile.methods.base import Cache, Method, MethodConfig, Quantized, Skip
from qcompile.methods.compressed_tensors_activations import cache_rounding, rounding, suffixes
from qcompile.methods.compressed_tensors_activations import stored as stored_rounding
from qcompile.methods.compressed_tensors_args import Args, Scheme
from qcompile.methods.compressed_tensors_config import CLASSES, SPARSE, CompressedTensorsConfig, hits
from qcompile.methods.compressed_tensors_stored import Found

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

_OBSERVERS = (None, "minmax", "static_minmax", "memoryless_minmax")


class CompressedTensors(Method):
    """quant_method "compressed-tensors".

    Weights are decoded with the roundings of the package, in the dtype of their scales (bfloat16 for 4-bit floats).
    Activations are rounded in float32, where the package computes in the model's dtype: for a bfloat16 model single
    codes differ (a layer's output by about 1e-2 of its norm). "token" means each row here; the package takes one scale
    for the whole call where the input has two dimensions only. Sparse layouts and marlin-24 are read into dense ones.

    Transforms that run with the model (`transform_config`: QuIP, SpinQuant's R3 and R4) are computed in float32, whatever
    their precision; a Hadamard matrix with signs by butterflies, any other matrix as it is stored, which is slow where its
    blocks are as wide as the model and no power of two. Transforms of queries and keys cancel: where keys are rounded, they
    are turned back after that, and queries stay as they are (the package also rounds those, where it turns them).
    transformers 5.23 ignores `transform_config`.
    """

    name = "compressed-tensors"
    source = "https://github.com/vllm-project/compressed-tensors"
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
        if config.rotations and not self.prequantized(config, source):
            raise _with_rotations(config)
        turns = [t for side in ("input", "output") for t in rotations.of_module(config, module, side, source)]
        chosen = self._chosen(config, module, source, modules)
        if not turns:
            return chosen
        if isinstance(chosen, Skip):
            chosen = Found(config, None, stored.tensors(source, module), module, source).dense()
        return replace(chosen, keeps=tuple(name for turn in turns for name in turn.names.values()))

    def _chosen(
        self, config: CompressedTensorsConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        """What happens to a module's weight, whatever turns around it."""
        ready = self.prequantized(config, source)
        if not ready:
            targets = [target for scheme in config.schemes.values() for target in scheme.targets]
            for field, patterns in (("config_groups", targets), ("ignore", config.ignore or ())):
                skip.check(field, [p for p in patterns if p not in CLASSES], modules, self.name, hits)
        ignored = config.ignored(module)
        found = Found(
            config, None if ignored else config.scheme(module), stored.tensors(source, module), module, source
        )
        scheme = found.scheme
        if "bitmask" in found.names:
            return found.select()
        if ignored or scheme is None:
            return Skip(f"ignore has {ignored!r}" if ignored else "no target of config_groups names it")
        if scheme.weights is None and scheme.input_activations is None and scheme.output_activations is None:
            return Skip("its scheme quantizes nothing")
        _require_linear(scheme, module)
        return found.select() if ready or scheme.weights is None else self._new(config, scheme, module)

    def _new(self, config: CompressedTensorsConfig, scheme: Scheme, module: Module) -> Quantized:
        """A module to be quantized from its float weight; ConfigError where that needs data."""
        args = cast(Args, scheme.weights)
        rounded = {"input_activations": scheme.input_activations, "output_activations": scheme.output_activations}
        for part, each in (rounded | {"kv_cache_scheme": config.cache}).items():
            if each is not None and each.dynamic is not True:
                raise _uncalibrated(f"{module.path}, {part!r}", each.dynamic)
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
        known = args.observer in _OBSERVERS
        return Quantized(fmt, note="" if known else f"by minimum and maximum: {args.observer!r} is another package's")

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        from qcompile.methods.compressed_tensors_read import read

        config = cast(CompressedTensorsConfig, config)
        scheme = None if config.ignored(module) else config.scheme(module)
        names = stored.tensors(source, module)
        packed = read(module, selected, scheme, names, source)
        if scheme is not None and not config.dequantize:
            packed = _around(scheme, packed, names, module, source)
        inputs, outputs = (rotations.of_module(config, module, side, source) for side in ("input", "output"))
        packed.before = (*(each for turn in inputs for each in turn.read(module.k, source)), *packed.before)
        packed.after = (*packed.after, *(each for turn in outputs for each in turn.read(module.n, source)))
        packed.check(module.path)
        return packed

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """The package's min-max quantization, bit for bit, in the weight's dtype."""
        from qcompile.formats.dense import Dense
        from qcompile.methods.compressed_tensors_quantize import quantize

        config = cast(CompressedTensorsConfig, config)
        scheme = cast(Scheme, config.scheme(module))
        dtype = module.dtype if module.dtype in layouts.FLOATS else "f32"
        if scheme.weights is None:
            packed = stored.packed(Dense(dtype), {"weight": weight.to(DTYPES[dtype])}, module)
        else:
            fmt = layouts.layout(config.stored_format(scheme), scheme.weights, dtype)
            packed = quantize(weight, scheme.weights, fmt, module)
        return packed if config.dequantize else _around(scheme, packed, {}, module, None)

    def cache(self, config: MethodConfig, path: str, heads: int, width: int, source: TensorSource) -> Cache | None:
        config = cast(CompressedTensorsConfig, config)
        turns, claims = rotations.of_attention(config, path, width, source)
        if config.cache is None or config.dequantize:
            # Queries and keys that turn in the same way have the scores that they had before.
            return Cache((), (), tuple(claims)) if claims else None
        args = config.cache
        unused = (f"{path}.q_{suffix}" for suffix in ("scale", "zero_point", "global_scale"))
        claims += [name for name in unused if name in source.names()]  # of queries, which stay as they are

        def made(side: str) -> Applied:
            def read(suffix: str) -> torch.Tensor:
                name = f"{path}.{side}_{suffix}"
                if name not in source.names():
                    raise _no_scale(name, args, path, source)
                claims.append(name)
                return stored.finite(source.read(name), name, path)

            return cache_rounding(args, heads, width, read, f"{path}, kv_cache_scheme")

        # The rounded keys are turned back, instead of the queries that meet them.
        there = tuple(each for turn in turns for each in turn.read(width, source))
        back = tuple(each for turn in reversed(turns) for each in turn.inverted().read(width, source))
        return Cache((*there, made("k"), *back), (made("v"),), tuple(claims))

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        """The package's tensors; codes that lay in words of their own are written as a stream, as since 0.18."""
        from qcompile.methods.compressed_tensors_read import written

        config = cast(CompressedTensorsConfig, config)
        scheme, out = config.scheme(module), written(packed)
        inputs = None if scheme is None else scheme.input_activations
        outputs = None if scheme is None else scheme.output_activations
        # The rounding of an input comes after what turns it, that of an output before.
        for what, args, around in (("input", inputs, packed.before[-1:]), ("output", outputs, packed.after[:1])):
            if args is not None and around and not config.dequantize:
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


def _with_rotations(config: CompressedTensorsConfig) -> ConfigError:
    return ConfigError(
        "transforms are put into a model before it is quantized",
        where="field 'transform_config'",
        found=", ".join(config.rotations),
        expected="None, or a checkpoint with quantized weights",
        remedy="apply the transforms and quantize with llm-compressor: its checkpoint is read",
    )


def _no_scale(name: str, args: Args, path: str, source: TensorSource) -> QCompileError:
    """The error about a scale of keys or values that is not in the source: of one module, or of all."""
    if not any(other.endswith((".k_scale", ".v_scale")) for other in source.names()):
        return _uncalibrated(f"{path}, 'kv_cache_scheme'", args.dynamic)
    return CheckpointError(
        "an attention module lacks a scale for its keys or values",
        where=path,
        found=", ".join(other for other in source.names().under(f"{path}.") if "_scale" in other),
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


def _around(
    scheme: Scheme, packed: Packed, names: Mapping[str, str], module: Module, source: TensorSource | None
) -> Packed:
    """The weight with the roundings of its input and output."""

    def made(what: str, args: Args | None, width: int) -> tuple[Applied, ...]:
        def read(suffix: str) -> torch.Tensor:
            if source is None:
                raise _uncalibrated(f"{module.path}, '{what}_activations'", args.dynamic if args else False)
            full = names[f"{what}_{suffix}"]
            return stored.finite(source.read(full), full, module)

        return () if args is None else (rounding(args, width, read, f"{module.path}, {what}_activations"),)

    packed.before = made("input", scheme.input_activations, module.k)
    packed.after = made("output", scheme.output_activations, module.n)
    packed.check(module.path)
    return packed
