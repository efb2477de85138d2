"""What every method has: a typed config, a decision for each module, a reader and a quantizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch

from qcompile.errors import ConfigError, near
from qcompile.methods import stored

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied


MISSPELT = 0.85  # an unknown field of a checkpoint that is as like a known one is an error, not another writer's field


@dataclass(frozen=True)
class MethodConfig:
    """A quantization config with the field names, defaults and rules of the transformers class of the same method.

    `method` is the `quant_method`. `steering` maps fields that steer another library only to what is true here instead.
    `foreign` maps fields that other writers put in the same dict, and that mean nothing here, to a note ("" for fields
    that only say who wrote a checkpoint and how: they are not reported). `loading` names fields that say how to load, so
    that a config given beside a checkpoint's own replaces them.
    `unused` holds the fields of the source dict that are not fields of this class; they are reported, not obeyed.
    """

    method: ClassVar[str]
    steering: ClassVar[Mapping[str, str]] = {}
    foreign: ClassVar[Mapping[str, str]] = {}
    loading: ClassVar[tuple[str, ...]] = ()

    unused: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the config's own fields, in order."""
        return tuple(f.name for f in fields(cls) if f.name != "unused")

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`data` with other spellings of fields (older names, doubled names) brought to the field's own name."""
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, lenient: bool = False) -> Self:
        """The config that a `quantization_config` dict says; ConfigError for unknown fields and values out of range.

        With `lenient`, for configs that came with a checkpoint, an unknown field that is not a near miss of a known one
        is kept in `unused` and reported, as transformers ignores it.
        """
        data = cls.renamed({name: value for name, value in data.items() if name != "quant_method"})
        known, own, unused = cls.names(), {}, {}
        for name, value in data.items():
            if name in known:
                own[name] = value
            elif name in cls.foreign or (lenient and not near(name, known, MISSPELT)):
                unused[name] = value
            else:
                raise ConfigError(
                    f"unknown field in the {cls.method} config",
                    found=f"{name!r}{near(name, known)}",
                    expected=", ".join(known),
                    remedy="correct the name, or leave the field out",
                )
        for f in fields(cls):
            if f.name not in own and f.default is MISSING and f.default_factory is MISSING:
                raise ConfigError(
                    f"the {cls.method} config needs the field {f.name!r}", found=", ".join(data) or "no field"
                )
        return cls(**own, unused=unused)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON data, with `quant_method` and every field."""
        return {"quant_method": self.method} | {name: getattr(self, name) for name in self.names()}

    def require(self, ok: bool, name: str, expected: str, remedy: str = "") -> None:
        """Raise ConfigError about field `name` unless `ok`."""
        if not ok:
            raise ConfigError(
                f"the {self.method} config has a value out of range",
                where=f"field {name!r}",
                found=repr(getattr(self, name)),
                expected=expected,
                remedy=remedy,
            )

    def require_bools(self, *names: str) -> None:
        """Raise ConfigError unless each field is True or False."""
        for name in names:
            self.require(isinstance(getattr(self, name), bool), name, "True or False")

    def require_patterns(self, name: str) -> None:
        """Raise ConfigError unless the field is None or a list of strings."""
        value = getattr(self, name)
        ok = value is None or (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value))
        self.require(ok, name, "None or a list of module names")

    def is_default(self, name: str) -> bool:
        """True when the field has its default value."""
        f = next(f for f in fields(self) if f.name == name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        return bool(getattr(self, name) == default)


@dataclass(frozen=True)
class Skip:
    """The method leaves a module dense, for `reason`."""

    reason: str


@dataclass(frozen=True)
class Quantized:
    """The method quantizes a module.

    `format` is how its weight is stored (numbers that depend on the weight, such as an offset, may differ in what
    `quantize` makes). `names` maps each stored tensor of the format to the source tensor that holds it; it is empty
    when the weight is quantized on the fly. `also_claims` are further source tensors that belong to the weight: they
    describe it, or what happens around the matmul. `note` is a line for the report. `keeps` are source tensors that
    modules may share: a checkpoint out holds them as they are, without `write`.
    """

    format: Format
    names: dict[str, str] = field(default_factory=dict)
    also_claims: tuple[str, ...] = ()
    note: str = ""
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cache:
    """What a method does to the keys and the values [B, heads, S, width] of an attention module; `claims` are its tensors."""

    k: tuple[Applied, ...]
    v: tuple[Applied, ...]
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """What a method does to the output of a module that is no linear layer; `claims` are its tensors."""

    applied: Applied
    claims: tuple[str, ...] = ()


class Method(ABC):
    """One `quant_method`. Methods hold no state; `modules` are the model's modules with a weight, by path, in order.

    `formats` are the kinds of the formats that it reads or makes; weights that it leaves dense do not count. `experts` is
    true for methods that convert the fused weights of a mixture of experts: `select` then sees modules of the kind
    "Experts", `read` gives their weight [E * N, K], and `quantize` is asked for each expert as for a linear layer.
    `container` is the file that holds a checkpoint's tensors.
    `indexed` is true where the package reads checkpoints by their index alone, even if all is in one file. `source` is
    the address of a paper or project that describes the method.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    formats: ClassVar[tuple[str, ...]]
    indexed: ClassVar[bool] = False
    container: ClassVar[Literal["safetensors", "gguf"]] = "safetensors"
    experts: ClassVar[bool] = False

    def recognise(self, model_config: Mapping[str, Any], source: TensorSource) -> dict[str, Any] | None:
        """The quantization config of a checkpoint whose config.json names no `quant_method`, if it is this method's."""
        return None

    @abstractmethod
    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        """True when the source already holds weights that this method quantized."""

    @abstractmethod
    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        """What happens to a module's weight, from headers and the small tensors that describe it.

        Raises ConfigError (a pattern that matches nothing, a group that does not divide K) and CheckpointError (a
        tensor that is missing or has the wrong shape or dtype).
        """

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        """The stored tensors of a module that `select` chose; CheckpointError when a value is not finite."""
        return stored.load(selected.format, selected.names, source, module)

    @abstractmethod
    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Quantize a float weight [N, K], from the weight alone."""

    def cache(self, config: MethodConfig, path: str, heads: int, width: int, source: TensorSource) -> Cache | None:
        """What happens to the keys (after rotary embedding) and values of the attention module `path`; None: nothing."""
        return None

    def outputs(self, config: MethodConfig, source: TensorSource) -> Mapping[str, Output]:
        """What happens to the outputs of modules that are no linear layers, by module path."""
        return {}

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        """The tensors of a quantized module as the method's checkpoints hold them, by their names within the module.

        The bias is not among them unless the method changes it. A name that starts with "/" is a whole one, of a tensor
        outside of the module. ConfigError where the method defines no checkpoint.
        """
        return dict(packed.tensors)

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint that holds `weights` (module path -> what `write` was given); {}: none."""
        return config.to_dict()

    def model_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """What else a checkpoint's config.json says about it, beside its `quantization_config`."""
        return {}

    def sidecars(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """Further JSON files of a checkpoint: file name -> content."""
        return {}

    def metadata(self, config: MethodConfig, weights: Mapping[str, Packed], dtype: str) -> dict[str, str]:
        """What the header of the safetensors file says beside the tensors; `dtype` is that of the model's other floats."""
        return {"format": "pt"}

    def effects(self, config: MethodConfig) -> list[tuple[str, str]]:
        """Each field of the config that has no effect here, with what holds instead."""
        return without_effect(config)


def without_effect(config: MethodConfig) -> list[tuple[str, str]]:
    """The fields of `config` that are set and have no effect here, with the note of each."""
    steering = [(name, note) for name, note in config.steering.items() if not config.is_default(name)]
    unknown = f"not a field of {config.method}: ignored"
    others = [(name, config.foreign.get(name, unknown)) for name in config.unused]
    return [(name, note) for name, note in steering + others if note]
