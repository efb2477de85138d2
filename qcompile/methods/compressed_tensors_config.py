"""The config of CompressedTensors: which modules have which scheme."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from qcompile.methods.base import MethodConfig
from qcompile.methods.compressed_tensors_args import FORMATS, Args, Rotation, Scheme, known, plain, wrong
from qcompile.program import Module

STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
SPARSE = ("sparse-24-bitmask", "sparse-bitmask")
CLASSES = ("Linear", "Embedding", "Module")


def hits(target: str, path: str) -> bool:
    """True when a target or an entry of `ignore` names a module: by "re:" and a pattern of its beginning, or exactly."""
    return re.match(target[3:], path) is not None if target.startswith("re:") else target == path


def is_class(target: str, module: Module) -> bool:
    """True when a target names a class of the module; classes derived from Linear and Embedding are not known here."""
    return module.kind in ("Linear", "Embedding") and target in (module.kind, "Module")


@dataclass(frozen=True)
class _Transforms:
    """The fields of the package's TransformConfig."""

    config_groups: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CompressedTensorsConfig(MethodConfig):
    """The fields of transformers' CompressedTensorsConfig and of the package's QuantizationConfig.

    `config_groups` maps a group's name to its scheme, or a preset's name to targets. `dequantize` leaves activations
    as they are (`run_compressed` is its older opposite).
    """

    method: ClassVar[str] = "compressed-tensors"
    steering: ClassVar[Mapping[str, str]] = {
        "use_optimized_inference": "kernels are generated: no other package's kernel is chosen",
        "moe_sparsity_config": "the number of experts comes from the model's own config",
    }
    foreign: ClassVar[Mapping[str, str]] = {"version": ""}
    loading: ClassVar[tuple[str, ...]] = ("dequantize", "use_optimized_inference")

    config_groups: Mapping[str, Any] | None = None
    format: str = "dense"
    quantization_status: str = "initialized"
    kv_cache_scheme: Mapping[str, Any] | None = None
    global_compression_ratio: float | None = None
    ignore: list[str] | None = None
    dequantize: bool = False
    use_optimized_inference: bool = False
    sparsity_config: Mapping[str, Any] | None = None
    transform_config: Mapping[str, Any] | None = None
    moe_sparsity_config: Mapping[str, Any] | None = None

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each group."""
        return {name: Scheme.parse(name, scheme) for name, scheme in (self.config_groups or {}).items()}

    @cached_property
    def cache(self) -> Args | None:
        """How keys and values are rounded."""
        return Args.parse(self.kv_cache_scheme, "field 'kv_cache_scheme'")

    @cached_property
    def rotations(self) -> dict[str, Rotation]:
        """The transforms of `transform_config`, by the names of their groups."""
        groups = known(_Transforms, self.transform_config or {}, "field 'transform_config'").get("config_groups") or {}
        return {name: Rotation.parse(name, each) for name, each in groups.items()}

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        data = {name: plain(value) for name, value in data.items()}
        compressed = data.pop("run_compressed", None)
        if compressed is not None:
            data["dequantize"] = data.get("dequantize", False) or not compressed
        return data

    def __post_init__(self) -> None:
        groups = self.config_groups
        self.require(groups is None or isinstance(groups, Mapping), "config_groups", "None or an object")
        if groups is not None:
            spelled = {name: scheme.to_dict() for name, scheme in self.schemes.items()}
            object.__setattr__(self, "config_groups", spelled)
        object.__setattr__(self, "kv_cache_scheme", None if self.cache is None else self.cache.to_dict())
        self.require(self.format in (*FORMATS, "fakequant"), "format", ", ".join((*FORMATS, "fakequant")))
        self.require(self.quantization_status in STATUSES, "quantization_status", ", ".join(STATUSES))
        self.require_patterns("ignore")
        self.require_bools("dequantize", "use_optimized_inference")
        places = [place for rotation in self.rotations.values() for place in rotation.apply]
        schemes = (target for scheme in self.schemes.values() for target in scheme.targets)
        turned = (target for place in places for target in (*place.targets, *place.ignore))
        for target in (*(self.ignore or ()), *schemes, *turned):
            self._require_pattern(target)
        self._require_others()

    def _require_pattern(self, target: str) -> None:
        try:
            hits(target, "")
        except re.error as error:
            raise wrong(
                "fields 'targets' and 'ignore'", target, f"a regular expression after 're:' ({error})"
            ) from None

    def _require_others(self) -> None:
        sparsity = self.sparsity_config or {}
        formats = ("dense", *SPARSE)
        if sparsity and sparsity.get("format") not in formats:
            raise wrong("field 'sparsity_config', 'format'", sparsity.get("format"), ", ".join(formats))

    def ignored(self, module: Module) -> str | None:
        """The entry of `ignore` that names the module, if one does."""
        return next((entry for entry in self.ignore or () if hits(entry, module.path) or is_class(entry, module)), None)

    def scheme(self, module: Module) -> Scheme | None:
        """The module's scheme: of the first target that names it; names come before patterns, and these before classes."""
        targets = {target: scheme for scheme in self.schemes.values() for target in scheme.targets}
        order = sorted(targets, key=lambda target: ("re:" in target, target))
        found = [target for target in order if hits(target, module.path)]
        found += [target for target in order if is_class(target, module)]
        return targets[found[0]] if found else None

    def stored_format(self, scheme: Scheme) -> str:
        """The format in which the modules of a scheme are stored."""
        named = scheme.format or self.format
        return scheme.inferred() if named in ("dense", "fakequant", "mixed-precision", *SPARSE) else named
