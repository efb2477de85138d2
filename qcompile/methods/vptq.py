"""VPTQ: vectors of outputs as entries of learned codebooks, with residuals, outlier inputs and permuted inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import stored
from qcompile.methods.base import MethodConfig, Quantized, Skip
from qcompile.methods.calibrated import Calibrated

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.formats.codebook import Vptq as VptqFormat
    from qcompile.program import Module
    from qcompile.sources import TensorSource

FLOATS = ("f16", "bf16", "f32")
NAMES = {  # the format's tensors as checkpoints call them
    "indices": "indices",
    "centroids": "centroids.weight",
    "res_centroids": "res_centroids.weight",
    "outlier_indices": "outlier_indices",
    "outlier_centroids": "outlier_centroids.weight",
    "scale": "weight_scale",
    "bias": "weight_bias",
}


def _pair() -> list[int]:
    return [-1, -1]


@dataclass(frozen=True)
class VptqLayer:
    """The fields of transformers' VptqLayerConfig. Pairs are for the outlier part and for the main part."""

    enable_norm: bool = True
    enable_perm: bool = True
    group_num: int = 1
    group_size: int = -1
    in_features: int = -1
    indices_as_float: bool = False
    is_indice_packed: bool = True
    num_centroids: list[int] = field(default_factory=_pair)
    num_res_centroids: list[int] = field(default_factory=_pair)
    out_features: int = -1
    outlier_size: int = 0
    vector_lens: list[int] = field(default_factory=_pair)

    @property
    def has_outliers(self) -> bool:
        return self.vector_lens[0] > 1 and self.num_centroids[0] > 0

    def problem(self) -> tuple[str, str] | None:
        """The field that is out of range, and what it may be."""
        for name in ("enable_norm", "enable_perm", "indices_as_float"):
            if not isinstance(getattr(self, name), bool):
                return name, "True or False"
        for name in ("group_num", "group_size", "in_features", "out_features", "outlier_size"):
            if type(getattr(self, name)) is not int:
                return name, "an integer"
        for name in ("num_centroids", "num_res_centroids", "vector_lens"):
            value = getattr(self, name)
            pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(item) is int for item in value)
            if not pair:
                return name, "two integers"
            if name != "vector_lens" and any(count > 0 and count & (count - 1) for count in value):
                return name, "powers of two, or -1"
        if self.is_indice_packed is not True:
            return "is_indice_packed", "True"
        if self.num_res_centroids[0] > 0:
            return "num_res_centroids", "-1 for the outlier part"
        return None if self.group_num > 0 else ("group_num", "a positive integer")


LAYER_FIELDS = frozenset(f.name for f in fields(VptqLayer))
UNREAD = frozenset({"bias", "norm_dim", "enable_proxy_error"})  # the module says the first, the others change nothing


@dataclass(frozen=True)
class VptqConfig(MethodConfig):
    """The fields of transformers' VptqConfig; the values of both maps have those of `VptqLayer`."""

    method: ClassVar[str] = "vptq"

    enable_proxy_error: bool = False
    config_for_layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shared_layer_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self.require(self.enable_proxy_error is False, "enable_proxy_error", "False")
        self.require_patterns("modules_to_not_convert")
        for name in ("config_for_layers", "shared_layer_config"):
            layers = getattr(self, name)
            ok = isinstance(layers, Mapping) and all(isinstance(layer, Mapping) for layer in layers.values())
            self.require(ok, name, "a dict of layer configs")
            for path, layer in layers.items():
                self._check(f"field {name!r}, {path!r}", layer)

    def _check(self, where: str, layer: Mapping[str, Any]) -> None:
        problem = _layer(layer).problem()
        wrong = problem or (("norm_dim", "0") if layer.get("norm_dim", 0) != 0 else None)
        if wrong is not None:
            raise ConfigError(
                "the vptq config has a value out of range",
                where=f"{where}, {wrong[0]!r}",
                found=repr(layer[wrong[0]]),
                expected=wrong[1],
            )

    def layer(self, path: str) -> VptqLayer | None:
        """The config of the module `path`: its own, else what modules of its name share."""
        found = self.config_for_layers.get(path) or self.shared_layer_config.get(path.rpartition(".")[2])
        return _layer(found) if found else None


def _layer(data: Mapping[str, Any]) -> VptqLayer:
    return VptqLayer(**{name: value for name, value in data.items() if name in LAYER_FIELDS})


class Vptq(Calibrated):
    """quant_method "vptq".

    The weight is kept in the order of its permuted inputs, and x is permuted before it meets it. Sums and products are
    float32 here; the original's kernels round each to the model's dtype. A shared layer config is found by the last part
    of a module's path, as the original finds it (transformers looks for another part, and so never finds one).
    """

    name = "vptq"
    source = "https://arxiv.org/abs/2409.17066"
    Config = VptqConfig
    formats = ("vptq",)
    mark = "indices"
    needs = "calibration data (the Hessian of each layer's inputs) and hours of GPU time"

    def effects(self, config: MethodConfig) -> list[tuple[str, str]]:
        config = cast(VptqConfig, config)
        layers = [*config.config_for_layers.values(), *config.shared_layer_config.values()]
        unread = sorted({name for layer in layers for name in layer} - LAYER_FIELDS - UNREAD)
        floating = any(layer.get("indices_as_float") for layer in layers)
        note = [("layer field 'indices_as_float'", "it steers fine-tuning: stored indices are integers")] * floating
        return (
            super().effects(config)
            + note
            + [(f"layer field {name!r}", "not a field of vptq: ignored") for name in unread]
        )

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(VptqConfig, config)
        dense = self.dense(config, module, source, modules)
        if dense is not None:
            return dense
        names, layer = stored.tensors(source, module), config.layer(module.path)
        if layer is None:
            raise CheckpointError(
                "the vptq config has no entry for a quantized module",
                where=module.path,
                found=", ".join(config.config_for_layers) or "no entry",
                expected=f"{module.path} in config_for_layers, or {module.path.rpartition('.')[2]} in shared_layer_config",
                remedy="the checkpoint and its quantization_config do not belong together",
            )
        stored.require(names, ("indices", "centroids.weight"), module, self.name)
        stored.dtypes([names["centroids.weight"]], FLOATS, source, module)
        fmt = _format(layer, module, source.info(names["centroids.weight"]).dtype)
        stored.legal(fmt, module, self.name)
        used = {s.name: NAMES[s.name] for s in fmt.stored(module.n, module.k)}
        stored.require(names, (*used.values(), *(["perm"] if layer.enable_perm else [])), module, self.name)
        full = {name: names[official] for name, official in used.items()}
        stored.expect_all(fmt, full, source, module)
        if not layer.enable_perm:
            return Quantized(fmt, full)
        stored.expect(names["perm"], source, ("i16",), (module.k,), module)
        return Quantized(fmt, full, (names["perm"],))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        from qcompile.transform import Applied
        from qcompile.transforms.linear import Permute

        packed = stored.load(selected.format, selected.names, source, module)
        fmt = cast("VptqFormat", packed.format)
        if fmt.outliers:
            _check_indices(packed.tensors["outlier_indices"], fmt, selected.names["outlier_indices"], module)
        if selected.also_claims:
            (name,) = selected.also_claims
            order = stored.permutation(source.read(name).long() & 0xFFFF, name, module)
            packed.before = (Applied(Permute(), {"order": order}),)
            if fmt.norm:  # stored in the order of the layer's own inputs
                packed.tensors |= {name: packed.tensors[name][order] for name in ("scale", "bias")}
        return packed

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        made = {NAMES[name]: tensor for name, tensor in packed.tensors.items()}
        for applied in packed.before:
            order = applied.tensors["order"]
            made["perm"] = order.to(torch.int16)
            for name in ("weight_scale", "weight_bias"):
                if name in made:
                    made[name] = torch.empty_like(made[name]).index_put((order,), made[name])
        return made


def _format(layer: VptqLayer, module: Module, dtype: str) -> VptqFormat:
    """How a layer's weight is stored; CheckpointError when its config is for another shape."""
    from qcompile.formats.codebook import Vptq as VptqFormat

    outliers = layer.outlier_size if layer.has_outliers else 0
    shape = (layer.in_features, layer.out_features)
    said = layer.group_num * layer.group_size + outliers
    whole = layer.vector_lens[1] > 0 and layer.num_centroids[1] > 0
    if said != module.k or shape not in ((-1, -1), (module.k, module.n)) or not whole:
        raise CheckpointError(
            "the vptq config of a module is for another weight",
            where=f"{module.path} [{module.n}, {module.k}]",
            found=f"{layer.group_num} groups of {layer.group_size} inputs and {outliers} outliers, "
            f"{layer.in_features} inputs, {layer.out_features} outputs, {layer.num_centroids[1]} vectors of "
            f"{layer.vector_lens[1]}",
            expected=f"{module.k} inputs in all",
            remedy="the checkpoint and its quantization_config do not belong together",
        )
    return VptqFormat(
        vector=layer.vector_lens[1],
        centroids=layer.num_centroids[1],
        residuals=max(0, layer.num_res_centroids[1]),
        groups=layer.group_num,
        outliers=outliers,
        outlier_vector=layer.vector_lens[0] if outliers else 0,
        outlier_centroids=layer.num_centroids[0] if outliers else 0,
        norm=layer.enable_norm,
        dtype=dtype,
    )


def _check_indices(indices: torch.Tensor, fmt: VptqFormat, name: str, module: Module) -> None:
    most = int((indices.long() & 0xFFFF).max())
    if most >= fmt.outlier_centroids:
        raise CheckpointError(
            "an index is out of range",
            where=f"{name} (module {module.path})",
            found=most,
            expected=f"0 to {fmt.outlier_centroids - 1}",
            remedy="the file is damaged, or the config says another number of centroids",
        )
