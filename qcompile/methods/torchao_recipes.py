"""TorchAO's recipes: the config that `quant_type` holds, as one dataclass for each of torchao's classes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qcompile.errors import ConfigError, near

INTS = tuple(f"int{bits}" for bits in range(1, 9))
FP8 = ("float8_e4m3fn", "float8_e5m2")
FP4 = "float4_e2m1fn_x2"
MAPPINGS = ("SYMMETRIC", "ASYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR")


@dataclass(frozen=True)
class Per:
    """A granularity: which values share a scale. `kind` is torchao's class name, `sizes` its number or numbers."""

    kind: str
    sizes: tuple[int, ...] = ()

    def block(self, n: int, k: int) -> tuple[int, int]:
        """The block [rows, columns] of a weight [n, k] that shares a scale."""
        if self.kind == "PerTensor":
            return n, k
        if self.kind in ("PerRow", "PerAxis"):  # PerRow names the dimension that is reduced, PerAxis the one that stays
            whole = self.sizes[0] % 2 == (self.kind == "PerRow")
            return (1, k) if whole else (n, 1)
        return (1, self.sizes[0]) if self.kind == "PerGroup" else (self.sizes[0], self.sizes[1])

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.sizes))})"


TENSOR, ROW, AXIS = Per("PerTensor"), Per("PerRow", (-1,)), Per("PerAxis", (0,))
BLOCKS = (Per("PerBlock", (1, 128)), Per("PerBlock", (128, 128)))
_SIZES = {"PerTensor": 0, "PerToken": 0, "PerRow": 1, "PerAxis": 1, "PerGroup": 1, "PerBlock": 2}


@dataclass(frozen=True)
class Recipe:
    """What one torchao config class says, with its fields and defaults; `idle` ones only steer torchao's kernels."""

    version: ClassVar[int] = 1
    idle: ClassVar[tuple[str, ...]] = ("set_inductor_config", "kernel_preference")

    def need(self, name: str, *allowed: Any, remedy: str = "") -> None:
        """ConfigError unless the field has one of the values `allowed`."""
        value = getattr(self, name)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise wrong(type(self).__name__, name, value, " or ".join(map(str, allowed)), remedy)

    def need_per(self, name: str, *kinds: str) -> None:
        """ConfigError unless the field is a granularity of one of the `kinds`, of the last dimension or output 0."""
        value = getattr(self, name)
        good = isinstance(value, Per) and value.kind in kinds and (value.kind != "PerAxis" or value.sizes == (0,))
        if not good or (value.kind == "PerGroup" and value.sizes[0] < 1):
            raise wrong(type(self).__name__, name, value, " or ".join(kinds))


def wrong(recipe: str, name: str, value: Any, expected: str, remedy: str = "") -> ConfigError:
    """The error for a value of a recipe's field that cannot be."""
    return ConfigError(
        "the torchao config has a value out of range",
        where=f"quant_type, {recipe}, field {name!r}",
        found=str(value),
        expected=expected,
        remedy=remedy,
    )


@dataclass(frozen=True)
class Int8WeightOnlyConfig(Recipe):
    version = 2
    group_size: int | None = None
    granularity: Per = ROW
    set_inductor_config: bool = True

    def __post_init__(self) -> None:
        self.need("group_size", None, remedy=f"write granularity=PerGroup({self.group_size})")
        self.need_per("granularity", "PerTensor", "PerRow", "PerGroup")


@dataclass(frozen=True)
class Int8DynamicActivationInt8WeightConfig(Recipe):
    version = 2
    idle = ("set_inductor_config", "weight_only_decode")
    act_mapping_type: str = "SYMMETRIC"
    weight_only_decode: bool = False
    granularity: Per | tuple[Per, ...] | None = ROW
    set_inductor_config: bool = True
    reduce_range: bool | None = False

    def __post_init__(self) -> None:
        self.need("act_mapping_type", "SYMMETRIC", "ASYMMETRIC")
        x, w = self.pair
        if x not in (TENSOR, ROW) or w.kind not in ("PerTensor", "PerRow"):
            expected = "PerRow(-1) or PerTensor() for x, PerRow or PerTensor for weights"
            raise wrong(type(self).__name__, "granularity", f"{x}, {w}", expected)

    @property
    def pair(self) -> tuple[Per, Per]:
        """The granularities of x and of the weight."""
        return _pair(self.granularity or ROW, type(self).__name__)


@dataclass(frozen=True)
class IntxWeightOnlyConfig(Recipe):
    version = 2
    weight_dtype: str = "int8"
    granularity: Per = AXIS
    mapping_type: str = "SYMMETRIC"
    scale_dtype: str | None = None
    intx_packing_format: str = "UNPACKED_TO_INT8"
    intx_choose_qparams_algorithm: str = "AFFINE"

    def __post_init__(self) -> None:
        self.need("weight_dtype", *INTS)
        self.need_per("granularity", "PerGroup", "PerAxis")
        self.need("mapping_type", *MAPPINGS)
        self.need("scale_dtype", None, "float32", "float16", "bfloat16")
        self.need("intx_packing_format", "UNPACKED_TO_INT8", remedy="the others cannot be stored in a file")
        self.need("intx_choose_qparams_algorithm", "AFFINE", "HQQ_SCALE_ONLY")


@dataclass(frozen=True)
class Int8DynamicActivationIntxWeightConfig(Recipe):
    version = 2
    weight_dtype: str = "int8"
    weight_granularity: Per = Per("PerGroup", (32,))
    weight_mapping_type: str = "SYMMETRIC"
    weight_scale_dtype: str | None = None
    act_mapping_type: str = "ASYMMETRIC"
    intx_packing_format: str = "UNPACKED_TO_INT8"
    intx_choose_qparams_algorithm: str = "AFFINE"

    def __post_init__(self) -> None:
        self.need("weight_dtype", *INTS)
        self.need_per("weight_granularity", "PerGroup", "PerAxis")
        self.need("weight_mapping_type", *MAPPINGS)
        self.need("weight_scale_dtype", None, "float32", "float16", "bfloat16")
        self.need("act_mapping_type", "ASYMMETRIC")
        self.need("intx_packing_format", "UNPACKED_TO_INT8", remedy="the others cannot be stored in a file")
        self.need("intx_choose_qparams_algorithm", "AFFINE", "HQQ_SCALE_ONLY")


@dataclass(frozen=True)
class Int4WeightOnlyConfig(Recipe):
    version = 2
    group_size: int = 128
    set_inductor_config: bool = True
    int4_packing_format: str = "PLAIN"
    int4_choose_qparams_algorithm: str = "TINYGEMM"
    int4_tile_packed_ntile: int = 8

    def __post_init__(self) -> None:
        self.need("group_size", 256, 128, 64, 32)
        self.need(
            "int4_packing_format", "PLAIN", "TILE_PACKED_TO_4D", remedy="the others are for one device's own operator"
        )
        self.need("int4_choose_qparams_algorithm", "TINYGEMM", "HQQ")
        if self.int4_choose_qparams_algorithm == "HQQ":
            self.need("int4_packing_format", "TILE_PACKED_TO_4D", remedy="HQQ is for this packing only")
        self.need("int4_tile_packed_ntile", 8, remedy="16 is the layout of ROCm")


@dataclass(frozen=True)
class Float8WeightOnlyConfig(Recipe):
    version = 2
    weight_dtype: str = "float8_e4m3fn"
    set_inductor_config: bool = True
    granularity: Per | None = None

    def __post_init__(self) -> None:
        self.need("weight_dtype", *FP8)
        if self.granularity is not None:
            self.need_per("granularity", "PerTensor", "PerRow", "PerGroup")


@dataclass(frozen=True)
class Float8DynamicActivationFloat8WeightConfig(Recipe):
    version = 2
    idle = ("set_inductor_config", "kernel_preference", "alg_id")
    activation_dtype: str = "float8_e4m3fn"
    weight_dtype: str = "float8_e4m3fn"
    granularity: Per | tuple[Per, ...] | None = None
    packing_format: str | None = "PLAIN"
    mm_config: Mapping[str, Any] | None = None
    activation_value_lb: float | None = None
    activation_value_ub: float | None = None
    kernel_preference: str = "AUTO"
    set_inductor_config: bool = True
    alg_id: int = 0

    def __post_init__(self) -> None:
        self.need("activation_dtype", *FP8)
        self.need("weight_dtype", *FP8)
        self.need("packing_format", "PLAIN", remedy="sparse weights have no such checkpoint")
        pair = self.pair
        if pair != BLOCKS and pair != (TENSOR, TENSOR) and {per.kind for per in pair} != {"PerRow"}:
            expected = "PerTensor, PerRow, or PerBlock(1, 128) for x with PerBlock(128, 128) for weights"
            raise wrong(type(self).__name__, "granularity", ", ".join(map(str, pair)), expected)

    @property
    def pair(self) -> tuple[Per, Per]:
        """The granularities of x and of the weight."""
        return _pair(self.granularity or TENSOR, type(self).__name__)


@dataclass(frozen=True)
class MXDynamicActivationMXWeightConfig(Recipe):
    block_size: int = 32
    activation_dtype: str = "float8_e4m3fn"
    weight_dtype: str = "float8_e4m3fn"
    kernel_preference: str = "AUTO"
    scaling_mode: str = "RCEIL"

    def __post_init__(self) -> None:
        self.need("block_size", 32)
        self.need("weight_dtype", *FP8, FP4)
        self.need("activation_dtype", self.weight_dtype, remedy="both sides have one type")
        self.need("scaling_mode", "RCEIL", "FLOOR", "CEIL", "EVEN")


@dataclass(frozen=True)
class NVFP4WeightOnlyConfig(Recipe):
    use_dynamic_per_tensor_scale: bool = True


@dataclass(frozen=True)
class NVFP4DynamicActivationNVFP4WeightConfig(Recipe):
    idle = ("use_triton_kernel",)
    use_triton_kernel: bool = True
    use_dynamic_per_tensor_scale: bool = True
    step: str | None = None


@dataclass(frozen=True)
class FqnToConfig(Recipe):
    """A recipe, or None for dense, by the name of a parameter or module, by "re:" and a pattern, or "_default"."""

    fqn_to_config: Mapping[str, Recipe | None] = field(default_factory=dict)
    module_fqn_to_config: Mapping[str, Recipe | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fqn_to_config and self.module_fqn_to_config and self.fqn_to_config != self.module_fqn_to_config:
            raise wrong("FqnToConfig", "module_fqn_to_config", "another than fqn_to_config", "one of the two")
        for pattern in self.rules:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except re.error as error:
                raise wrong("FqnToConfig", "fqn_to_config", f"{pattern!r} ({error})", "a regular expression") from None

    @property
    def rules(self) -> Mapping[str, Recipe | None]:
        return self.fqn_to_config or self.module_fqn_to_config

    def rule(self, path: str) -> str | None:
        """The key that decides about the module `path`: the parameter's name, the module's, the first pattern."""
        parameter = f"{path}.weight"
        patterns = (
            p for p in self.rules if p.startswith("re:") and any(re.fullmatch(p[3:], n) for n in (parameter, path))
        )
        return next((name for name in (parameter, path) if name in self.rules), None) or next(patterns, None)


@dataclass(frozen=True)
class Calibrated(Recipe):
    """A class of torchao whose weights are read, and made by torchao alone: they need data, or a GPU's own arithmetic."""

    name: str
    data: Mapping[str, Any]


CALIBRATED = (
    "AWQConfig",
    "SmoothQuantConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Float8DynamicActivationInt4WeightConfig",
)
RECIPES: Mapping[str, type[Recipe]] = {
    cls.__name__: cls
    for cls in (
        Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig, Int4WeightOnlyConfig, Float8WeightOnlyConfig,
        Float8DynamicActivationFloat8WeightConfig, MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig,
        NVFP4DynamicActivationNVFP4WeightConfig, FqnToConfig,
    )
} | {"ModuleFqnToConfig": FqnToConfig}  # fmt: skip


def _pair(said: Per | tuple[Per, ...], recipe: str) -> tuple[Per, Per]:
    pair = (said, said) if isinstance(said, Per) else said
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(per, Per) for per in pair):
        raise wrong(recipe, "granularity", said, "a granularity, or a list of two: for x and for the weight")
    return pair[0], pair[1]


def recipe(data: Any) -> Recipe:
    """The recipe of a torchao config's JSON; ConfigError for a class or field that is not known, or a wrong value."""
    if (
        not isinstance(data, Mapping)
        or not isinstance(data.get("_type"), str)
        or not isinstance(data.get("_data"), Mapping)
    ):
        raise _not_a_config(data)
    name = data["_type"]
    if name in CALIBRATED:
        return Calibrated(name, data["_data"])
    if name not in RECIPES:
        raise ConfigError(
            "a torchao config class that is not supported",
            where="quant_type",
            found=f"{name!r}{near(name, RECIPES)}",
            expected=", ".join((*RECIPES, *CALIBRATED)),
        )
    cls = RECIPES[name]
    version = data.get("_version", 1)
    if version != cls.version:
        raise ConfigError(
            "a torchao config has a version that is not supported",
            where=f"quant_type, {name}",
            found=f"version {version}",
            expected=f"version {cls.version}",
            remedy="quantize the model with a present torchao, which has removed the older versions",
        )
    known = {f.name for f in dataclasses.fields(cls)}
    for key in data["_data"]:
        if key not in known:
            raise ConfigError(
                f"unknown field in torchao's {name}", where="quant_type", found=f"{key!r}{near(key, known)}",
                expected=", ".join(sorted(known)) or "no field",
            )  # fmt: skip
    return cls(**{key: plain(value) for key, value in data["_data"].items()})


def plain(value: Any) -> Any:
    """torchao's JSON without its types: dtypes and enums as names, granularities as `Per`, nested configs as recipes."""
    if isinstance(value, Mapping) and "_type" in value and "_data" in value:
        kind, inner = value["_type"], value["_data"]
        if kind in RECIPES:
            return recipe(value)
        if kind in _SIZES and isinstance(inner, Mapping):
            sizes = [size for each in inner.values() for size in (each if isinstance(each, list | tuple) else [each])]
            if not all(type(size) is int for size in sizes) or len(sizes) != _SIZES[kind]:
                raise wrong(kind, ", ".join(inner), list(inner.values()), f"{_SIZES[kind]} integers")
            return Per(kind, tuple(sizes))
        return plain(inner)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return tuple(plain(each) for each in value) if isinstance(value, list | tuple) else value


def _not_a_config(found: Any) -> ConfigError:
    return ConfigError(
        "quant_type is not a torchao config",
        where="field 'quant_type'",
        found=repr(found)[:200],
        expected='{"default": {"_type": a class, "_version": a number, "_data": {field: value}}}, or torchao\'s own object',
    )
