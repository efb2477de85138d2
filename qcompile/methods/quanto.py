"""Quanto: int8, int4, int2 and float8 weights; checkpoints of optimum, with static rounding of what goes in and out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import CheckpointError
from qcompile.formats.quanto import QuantoBits, group_of
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Output, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource
    from qcompile.transform import Applied

MAP = "quanto_qmap.json"
TYPES = {"qint8": "int8", "qint4": "int4", "qint2": "int2", "qfloat8_e4m3fn": "float8", "qfloat8_e5m2": "float8_e5m2"}
"""The types of the map, and what the config calls them."""
MAPPED = {short: long for long, short in TYPES.items()}
BYTES = {"int8": "i8", "float8": "f8e4m3", "float8_e5m2": "f8e5m2"}
FLOATS = ("f32", "f16", "bf16")
SCALES = ("input_scale", "output_scale")


@dataclass(frozen=True)
class QuantoConfig(MethodConfig):
    """The fields of transformers' QuantoConfig; "float8_e5m2" is found in checkpoints only.

    A checkpoint has no such config but a map of its modules: the fields then say what most of them have.
    """

    method: ClassVar[str] = "quanto"

    weights: str = "int8"
    activations: str | None = None
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self.require(self.weights in (*TYPES.values(), "none"), "weights", "float8, int8, int4 or int2")
        known = self.activations in (None, "int8", "float8", "float8_e5m2")
        self.require(known, "activations", "None, int8 or float8")
        self.require_patterns("modules_to_not_convert")


class Quanto(Method):
    """quant_method "quanto"; optimum's checkpoints are known by their quanto_qmap.json.

    Weights are worth what the package dequantizes, every rounding of their dtype included. Deviations: the package's
    bfloat16 kernels on a CPU (int8, and int4 in groups of 128) round otherwise; a float8 output of zeros is 0, where the
    package gives NaN. With rounded activations, every quantized module rounds its output, and its input where that is not
    rounded yet, as in a model that optimum loads (a model that was only calibrated rounds less). What is written again
    leaves out the entries of norms.
    """

    name = "quanto"
    source = "https://github.com/huggingface/optimum-quanto"
    Config = QuantoConfig
    formats = ("int8", "fp8", "quanto")

    def recognise(self, model_config: Mapping[str, Any], source: TensorSource) -> dict[str, Any] | None:
        entries = source.sidecar(MAP)
        if entries is None:
            return None
        said = {
            side: Counter(TYPES.get(str(entry.get(side))) for entry in entries.values() if isinstance(entry, dict))
            for side in ("weights", "activations")
        }
        most = {side: next((name for name, _ in count.most_common() if name), None) for side, count in said.items()}
        return {"quant_method": self.name, "weights": most["weights"] or "none", "activations": most["activations"]}

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(("weight._data", "weight._data._data")) for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(QuantoConfig, config)
        if self.prequantized(config, source):
            return self._stored(module, source)
        patterns = config.modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns)
        return Skip(dense) if dense else Quantized(_format(self._asked(config), module.k, module.dtype))

    def _asked(self, config: QuantoConfig) -> str:
        """The type of weights that a caller asks for; ConfigError where the method cannot make it from weights alone."""
        config.require(config.weights in ("int8", "int4", "int2", "float8"), "weights", "float8, int8, int4 or int2")
        remedy = "calibrate the model with optimum-quanto and save it: its checkpoint is read"
        config.require(config.activations is None, "activations", "None: their scales need data", remedy)
        return config.weights

    def _stored(self, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        entry = _entry(module, source, names)
        if entry["weights"] is None:
            stored.require(names, ("weight",), module, self.name)
            return Skip("the checkpoint stores its weight dense")
        data = "weight._data" if entry["weights"] in BYTES else "weight._data._data"
        stored.refuse_both(names, data, module, self.name)
        official = {"weight": data, "data": data, "scale": "weight._scale", "shift": "weight._shift"}
        wanted = (data, "weight._scale", *(("weight._shift",) if data.endswith("._data._data") else ()), *SCALES)
        stored.require(names, wanted, module, self.name)
        scale = source.info(names["weight._scale"])
        stored.expect(names["weight._scale"], source, FLOATS, scale.shape, module)
        zero = entry["weights"] not in BYTES and source.info(names["weight._shift"]).dtype == "u8"
        fmt = _format(entry["weights"], module.k, scale.dtype, zero)
        used = {s.name: names[official[s.name]] for s in fmt.stored(module.n, module.k)}
        for s in fmt.stored(module.n, module.k):
            single = s.name == "scale" and not scale.shape and s.shape == (1, 1)  # an only output has a bare number
            stored.expect(used[s.name], source, (s.dtype,), () if single else s.shape, module)
        for name in SCALES:
            stored.expect(names[name], source, FLOATS, (), module)
        return Quantized(fmt, used, tuple(names[name] for name in SCALES))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        tensors = {name: stored.finite(source.read(full), full, module) for name, full in selected.names.items()}
        if not tensors["scale"].dim():
            tensors["scale"] = tensors["scale"].reshape(1, 1)
        packed = stored.packed(selected.format, tensors, module)
        names = stored.tensors(source, module)
        kind = _entry(module, source, names)["activations"]
        if kind is not None:
            before, after = (_static(kind, source.read(names[name]), names[name], module.path) for name in SCALES)
            packed.before, packed.after = (before,), (after,)
        return packed

    def outputs(self, config: MethodConfig, source: TensorSource) -> Mapping[str, Output]:
        """The static rounding of what norms give; their input scales are there and say nothing."""
        found, names = {}, set(source.names())
        for path, entry in (source.sidecar(MAP) or {}).items():
            kind = TYPES.get(str(entry.get("activations"))) if isinstance(entry, dict) else None
            claims = tuple(f"{path}.{name}" for name in SCALES)
            if kind is None or entry.get("weights") != "none" or not names.issuperset(claims):
                continue
            found[path] = Output(_static(kind, source.read(claims[1]), claims[1], path), claims)
        return found

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Codes and scales as quanto's AbsmaxOptimizer (8 bits) and MaxOptimizer give them, in the weight's own dtype."""
        kind = self._asked(cast(QuantoConfig, config))
        stored.usable(weight, module)
        fmt = _format(kind, module.k, NAMES[weight.dtype])
        made = _bytes(weight, DTYPES[BYTES[kind]]) if kind in BYTES else _groups(weight, cast(QuantoBits, fmt))
        return stored.packed(fmt, made, module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        t, one = packed.tensors, torch.ones((), dtype=packed.tensors["scale"].dtype)
        scale = t["scale"].reshape(()) if "data" not in t and packed.N == 1 else t["scale"]
        weight = (
            {"weight._data._data": t["data"], "weight._shift": t["shift"]}
            if "data" in t
            else {"weight._data": t["weight"]}
        )
        sides = {"input_scale": packed.before, "output_scale": packed.after}
        around = {name: side[0].tensors["scale"].reshape(()) if side else one for name, side in sides.items()}
        return {**weight, "weight._scale": scale, **around}

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """Nothing: what optimum saves has its map alone."""
        return {}

    def sidecars(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        return {MAP: {path: _said(packed) for path, packed in weights.items()}}


def _entry(module: Module, source: TensorSource, names: Mapping[str, str]) -> dict[str, str | None]:
    """What the map says of a module, in the config's words: None for "none", and for a module that it does not name."""
    entries = source.sidecar(MAP) or {}
    said = entries.get(module.path)
    if said is None and any(name.startswith("weight._data") for name in names):
        near_by = [path for path in entries if module.path.endswith(f".{path}") or path.endswith(f".{module.path}")]
        said = entries.get(near_by[0] if len(near_by) == 1 else "")
        if said is None:
            raise _wrong(module, "no entry", "an entry for each module that is stored quantized")
    if said is None:
        return {"weights": None, "activations": None}
    sides = {side: said.get(side) if isinstance(said, dict) else said for side in ("weights", "activations")}
    if any(value not in ("none", *TYPES) for value in sides.values()) or sides["activations"] in ("qint4", "qint2"):
        raise _wrong(module, str(said), f"weights and activations: none, {', '.join(TYPES)} (activations of 8 bits)")
    return {side: TYPES.get(str(value)) for side, value in sides.items()}


def _wrong(module: Module, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{MAP} says of a module what is not supported",
        where=f"{MAP}, {module.path!r}",
        found=found,
        expected=expected,
    )


def _format(kind: str, k: int, scale: str, zero: bool = False) -> Format:
    """The format of weights of a type, with k inputs, whose scales are of dtype `scale`."""
    from qcompile.formats.integer import Int8
    from qcompile.formats.minifloat import Fp8

    scale = scale if scale in FLOATS else "f32"
    rounding = "none" if scale == "f32" else f"product-{scale}"
    if kind == "int8":
        return Int8(scale=scale, rounding=rounding)
    if kind in BYTES:
        return Fp8("f8e5m2" if kind == "float8_e5m2" else "f8e4m3", scale, rounding=rounding)
    return QuantoBits(4 if kind == "int4" else 2, group_of(k), scale, zero)


def _static(kind: str, scale: torch.Tensor, name: str, path: str) -> Applied:
    """The rounding of an input or an output by one stored scale."""
    from qcompile.transform import Applied
    from qcompile.transforms.round_float import RoundFloat
    from qcompile.transforms.round_int import RoundInt

    if not 0 < float(scale) < math.inf:
        raise CheckpointError(
            "a scale of activations is not a positive number",
            where=f"{name} (module {path})",
            found=float(scale),
            expected="a positive, finite number",
            remedy="calibrate the model again",
        )
    dtype = NAMES[scale.dtype]
    if kind == "int8":
        return Applied(RoundInt(per="tensor", scale=dtype, once=True), {"scale": scale.reshape(1)})
    element = RoundFloat(per="tensor", scale=dtype, once=True, element="f8e5m2" if kind == "float8_e5m2" else "f8e4m3")
    return Applied(element, {"scale": scale.reshape(1)})


def _bytes(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Codes of 8 bits: scale = max|w| / the largest code for each output, w / scale. An output of zeros has codes 0."""
    info: Any = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    scale = weight.abs().amax(1, keepdim=True) / info.max
    ratio = torch.nan_to_num(weight / scale, nan=0.0, posinf=math.inf, neginf=-math.inf)
    ratio = ratio if dtype.is_floating_point else torch.round(ratio)
    return {"weight": ratio.clamp(info.min, info.max).to(dtype), "scale": scale}


def _groups(weight: torch.Tensor, fmt: QuantoBits) -> dict[str, torch.Tensor]:
    """Codes of 4 or 2 bits: scale = (max - min) / the largest code for each group, shift = -min, (w + shift) / scale."""
    rows = weight.reshape(-1, fmt.group or weight.shape[1])
    least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    top = 2**fmt.bits - 1
    scale, shift = (most - least) / top, -least
    code = torch.nan_to_num(torch.round((rows + shift) / scale), nan=0.0).clamp(0, top).to(torch.uint8)
    per = 8 // fmt.bits
    planes = torch.nn.functional.pad(code, (0, 0, 0, -len(rows) % per)).reshape(per, -1, rows.shape[1])
    data = torch.zeros_like(planes[0])
    for plane, each in enumerate(planes):
        data |= each << (plane * fmt.bits)
    return {"data": data, "scale": scale, "shift": shift}


def _said(packed: Packed) -> dict[str, str]:
    """A module's entry of the map."""
    from qcompile.formats.minifloat import Fp8
    from qcompile.transforms.round_float import RoundFloat

    fmt = packed.format
    if isinstance(fmt, QuantoBits):
        weights = f"qint{fmt.bits}"
    elif isinstance(fmt, Fp8):
        weights = "qfloat8_e5m2" if fmt.dtype == "f8e5m2" else "qfloat8_e4m3fn"
    else:
        weights = "qint8"
    activations = "none"
    for each in packed.before:
        small = each.transform.element if isinstance(each.transform, RoundFloat) else ""
        activations = {"f8e4m3": "qfloat8_e4m3fn", "f8e5m2": "qfloat8_e5m2"}.get(small, "qint8")
    return {"weights": weights, "activations": activations}
