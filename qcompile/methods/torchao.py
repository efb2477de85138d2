"""TorchAO: integers and small floats with scales for blocks, weights alone or with activations rounded as they come."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from qcompile.dtypes import NAMES
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.torchao_config import TorchAoConfig
from qcompile.methods.torchao_recipes import FqnToConfig

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.methods.torchao_tensors import AoTensor
    from qcompile.program import Module
    from qcompile.sources import TensorSource

SKIPS = "modules_to_not_convert"
QDATA = "_weight_qdata"


class TorchAo(Method):
    """quant_method "torchao".

    A checkpoint is read by the header of its safetensors files, which names a class and its attributes for every weight;
    the config decides what is quantized on the fly, bit for bit as torchao on a CPU. Deviations: activations and the
    scales that they get stay float32, and weights are worth their unrounded float32 product, where torchao's kernels round to
    the model's dtype; zeros that float8 or NVFP4 has no scale for are 0, where torchao gives NaN.
    HQQ's steps are those on a CPU, in float32 (on a GPU they are float16). Configs that need data (AWQ, SmoothQuant,
    static scales) are read and not made. Classes older than these (AffineQuantizedTensor with TensorCoreTiledLayout) were
    saved as pickles only, which are never loaded.
    """

    name = "torchao"
    source = "https://github.com/pytorch/ao"
    Config = TorchAoConfig
    formats = ("int8", "fp8", "fp4", "torchao-int4", "torchao-int4-tiles")

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(f".{QDATA}") or name == QDATA for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(TorchAoConfig, config)
        if self.prequantized(config, source):
            return self._stored(module, source)
        dense = self._dense(config, module, modules)
        if dense:
            return Skip(dense)
        made = self._planned(config, module, module.dtype)
        if isinstance(made, str):
            return Skip(made)
        fmt = made.format({"scale": "f32", "per_tensor_scale": "f32"})
        return Quantized(fmt, note=_note(made, module))

    def _dense(self, config: TorchAoConfig, module: Module, modules: Mapping[str, Module]) -> str | None:
        """Why torchao leaves a module dense. Patterns are matched against the parameter: "q_proj" alone names nothing."""
        patterns, recipe = config.modules_to_not_convert, config.recipe
        parameters = {f"{path}.weight": each for path, each in modules.items()}
        skip.check(SKIPS, patterns or (), parameters, self.name)
        ends = config.include_input_output_embeddings and (module.kind == "Embedding" or module.output_embedding)
        # What an architecture keeps in float32 (T5's "wo") is the ending of a module, so it names no parameter either.
        named = replace(module, path=f"{module.path}.weight", keep_f32=False)
        by_name = isinstance(recipe, FqnToConfig) and recipe.rule(module.path) is not None
        embeddings = by_name or (config.include_input_output_embeddings and isinstance(recipe, FqnToConfig))
        kinds = ("Linear", "Embedding") if embeddings else ("Linear",)
        return skip.dense(named, modules, SKIPS, () if ends else patterns, kinds=kinds)

    def _planned(self, config: TorchAoConfig, module: Module, dtype: str) -> AoTensor | str:
        """The tensor class that the config makes of a module's weight, or why it stays dense."""
        from qcompile.methods.torchao_plan import plan

        recipe = config.recipe
        if isinstance(recipe, FqnToConfig):
            key = recipe.rule(module.path) or "_default"
            inner = recipe.rules.get(key)
            if inner is None:
                return (
                    f"fqn_to_config has None for {key!r}" if key in recipe.rules else "fqn_to_config does not name it"
                )
            recipe = inner
        try:
            return plan(recipe, module.n, module.k, dtype if dtype in ("f32", "f16", "bf16") else "f32")
        except ConfigError as error:
            raise ConfigError(
                error.summary,
                where=error.where or module.path,
                found=error.found,
                expected=error.expected,
                remedy=error.remedy,
            ) from None

    def _stored(self, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        if QDATA not in names:
            stored.need_dense(names, QDATA, module, self.name)
            return Skip("the checkpoint stores its weight dense")
        stored.refuse_both(names, QDATA, module, self.name)
        tensor, parts = self._parts(module, source)
        fmt = tensor.format({name: source.info(full).dtype for name, full in parts.items() if name != "zero_point"})
        return Quantized(fmt, parts)

    def _parts(self, module: Module, source: TensorSource) -> tuple[AoTensor, dict[str, str]]:
        """The class of a stored weight, and the tensor that holds each part that is there."""
        from qcompile.methods.torchao_header import tensor_of

        names, tensor = stored.tensors(source, module), tensor_of(module, source)
        needed = {name: f"_weight_{name}" for name in tensor.expected() if name not in tensor.optional}
        stored.require(names, tuple(needed.values()), module, self.name)
        parts = {}
        for name, (dtypes, shape) in tensor.expected().items():
            full = names.get(f"_weight_{name}")
            if full is None:
                continue
            parts[name] = full
            info = source.info(full)
            same = name in tensor.optional and math.prod(info.shape) == math.prod(
                shape
            )  # written as [], [1], [1, 1], ...
            stored.expect(full, source, dtypes, info.shape if same else shape, module)
        return tensor, parts

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        tensor, names = self._parts(module, source)
        return _packed(tensor, {name: _finite(source.read(full), full, module) for name, full in names.items()}, module)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """The parts that torchao makes of the weight, computed in the weight's own dtype as torchao does."""
        stored.usable(weight, module)
        made = self._planned(cast(TorchAoConfig, config), module, NAMES[weight.dtype])
        if isinstance(made, str):
            raise ConfigError("torchao does not quantize this module", where=module.path, found=made)
        return _packed(made, made.round(weight), module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        tensor = self._written(cast(TorchAoConfig, config), module.path, packed, "bf16")
        return {f"_weight_{name}": part for name, part in tensor.parts(packed).items()}

    def _written(self, config: TorchAoConfig, path: str, packed: Packed, dtype: str) -> AoTensor:
        """The class as which a packed weight is written."""
        from qcompile.program import Module

        module = Module(path, "Linear", packed.N, packed.K, f"{path}.weight")
        made = self._planned(config, module, dtype)
        if isinstance(made, str):
            raise ConfigError("torchao's config does not quantize this module", where=path, found=made)
        return made

    def metadata(self, config: MethodConfig, weights: Mapping[str, Packed], dtype: str) -> dict[str, str]:
        entries = {}
        for path, packed in weights.items():
            tensor = self._written(cast(TorchAoConfig, config), path, packed, dtype)
            parts = sorted(tensor.parts(packed), key=lambda name: name not in tensor.optional)
            said = {"_type": tensor.type, "_data": tensor.described(), "_tensor_data_names": parts}
            entries[f"{path}.weight"] = json.dumps(said)
        return {"format": "pt", "tensor_names": json.dumps(list(entries)), **entries}

    def effects(self, config: MethodConfig) -> list[tuple[str, str]]:
        return cast(TorchAoConfig, config).idle()


def _packed(tensor: AoTensor, parts: Mapping[str, torch.Tensor], module: Module) -> Packed:
    """The weight, checked; an embedding looks rows up, and rounds no input."""
    packed = tensor.packed(parts)
    if module.kind == "Embedding":
        packed.before = ()
    packed.check(module.path)
    return packed


def _finite(part: torch.Tensor, name: str, module: Module) -> torch.Tensor:
    """The part, if it has no NaN and no infinity; exponents of MX scales have a NaN too."""
    if part.dtype == torch.float8_e8m0fnu and bool((part.view(torch.uint8) == 255).any()):
        raise CheckpointError(
            "a stored tensor holds a number that is not finite",
            where=f"{name} (module {module.path})",
            found="an exponent of 255, which is NaN",
            expected="exponents up to 254",
            remedy="the file is damaged, or the quantization that wrote it failed for this module",
        )
    return part if part.dtype == torch.float8_e8m0fnu else stored.finite(part, name, module)


def _note(tensor: AoTensor, module: Module) -> str:
    """What the report says where torchao itself would refuse the weight's dtype."""
    from qcompile.methods.torchao_floats import Float8Tensor, MXTensor
    from qcompile.methods.torchao_integers import Int4TilePackedTo4dTensor

    rows = isinstance(tensor, Float8Tensor) and tensor.act is not None and tensor.act.per.kind == "PerRow"
    if module.dtype == "bf16" or not (rows or isinstance(tensor, MXTensor | Int4TilePackedTo4dTensor)):
        return ""
    return f"torchao itself takes bf16 weights only here, not {module.dtype}"
