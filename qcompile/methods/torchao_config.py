"""TorchAoConfig, in the form of this day and that of transformers 4.48."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.errors import ConfigError, near
from qcompile.methods.base import MethodConfig, without_effect
from qcompile.methods.torchao_recipes import Recipe, recipe


def _json(value: Any) -> Any:
    """torchao's own objects as the JSON that it writes of them; JSON as it is."""
    if isinstance(value, enum.Enum):
        return {"_type": type(value).__name__, "_data": value.name}
    if isinstance(value, torch.dtype):
        return {"_type": "torch.dtype", "_data": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_asdict"):
        return [_json(each) for each in value]
    if dataclasses.is_dataclass(value) or hasattr(value, "_asdict"):
        data = value._asdict() if hasattr(value, "_asdict") else dict(vars(value))
        data = {key: _json(each) for key, each in data.items() if key != "version" and not key.startswith("_")}
        return {"_type": type(value).__name__, "_version": getattr(value, "version", 1), "_data": data}
    return value


def _int4(group_size: int = 128, use_hqq: bool = False) -> dict[str, Any]:
    algorithm = {"_type": "Int4ChooseQParamsAlgorithm", "_data": "HQQ" if use_hqq else "TINYGEMM"}
    packing = {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"}
    data = {"group_size": group_size, "int4_packing_format": packing, "int4_choose_qparams_algorithm": algorithm}
    return {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": data}


def _int8(group_size: int | None = None) -> dict[str, Any]:
    per = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if group_size is not None:
        per = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group_size}}
    return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": per}}


def _int8_dynamic(weight_only_decode: bool = False, act_mapping_type: Any = "SYMMETRIC") -> dict[str, Any]:
    name = getattr(act_mapping_type, "name", str(act_mapping_type).rpartition(".")[2])
    data = {"act_mapping_type": {"_type": "MappingType", "_data": name}, "weight_only_decode": weight_only_decode}
    return {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": data}


def _float8() -> dict[str, Any]:
    return {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}


def _float8_dynamic() -> dict[str, Any]:
    return {"_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2, "_data": {}}


OLD: Mapping[str, Callable[..., dict[str, Any]]] = {
    "int4_weight_only": _int4,
    "int8_weight_only": _int8,
    "int8_dynamic_activation_int8_weight": _int8_dynamic,
    "float8_weight_only": _float8,
    "float8_dynamic_activation_float8_weight": _float8_dynamic,
}
"""The names of transformers 4.48 and its time, with what stands for each of them now."""


def _from_old(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if name not in OLD:
        raise ConfigError(
            f"an unknown torchao quantization{near(name, OLD)}",
            where="field 'quant_type'",
            found=repr(name),
            expected=f"a torchao config object, its JSON, or one of {', '.join(OLD)}",
        )
    try:
        return OLD[name](**options)
    except TypeError:
        allowed = inspect.signature(OLD[name]).parameters
        raise ConfigError(
            f"an option that torchao's {name} has not, or that has no meaning here",
            where="field 'quant_type_kwargs'",
            found=", ".join(options),
            expected=", ".join(allowed) or "no option",
        ) from None


@dataclass(frozen=True)
class TorchAoConfig(MethodConfig):
    """The fields of transformers' TorchAoConfig. `quant_type` is kept as the JSON of its torchao config.

    It may be given as torchao's object, as its JSON with or without "default" around it, or by a name of transformers
    4.48, whose options stand beside it or in `quant_type_kwargs`.
    """

    method: ClassVar[str] = "torchao"

    quant_type: Any
    modules_to_not_convert: list[str] | None = None
    include_input_output_embeddings: bool = False
    untie_embedding_weights: bool = False

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        said = data.get("quant_type")
        if isinstance(said, str):
            options = data.pop("quant_type_kwargs", None) or {}
            beside = {name: data.pop(name) for name in list(data) if name not in cls.names()}
            data["quant_type"] = {"default": _from_old(said, {**options, **beside})}
        return data

    def __post_init__(self) -> None:
        said = _from_old(self.quant_type, {}) if isinstance(self.quant_type, str) else _json(self.quant_type)
        whole = said if isinstance(said, dict) and set(said) == {"default"} else {"default": said}
        object.__setattr__(self, "quant_type", whole)
        self.require_patterns("modules_to_not_convert")
        self.require_bools("include_input_output_embeddings", "untie_embedding_weights")
        assert self.recipe  # a wrong quant_type is an error from the start

    @property
    def recipe(self) -> Recipe:
        """What `quant_type` says."""
        return recipe(self.quant_type["default"])

    def idle(self) -> list[tuple[str, str]]:
        """The fields of the recipe that are set and only steer torchao's kernels."""
        said = self.recipe
        set_ = [f for f in dataclasses.fields(said) if f.name in said.idle and getattr(said, f.name) != f.default]
        note = "kernels are generated: no other package's kernel is chosen"
        return [*without_effect(self), *((f"quant_type, {f.name}", note) for f in set_)]
