"""What CompressedTensors says about one tensor (QuantizationArgs), one group of modules (QuantizationScheme), one rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from qcompile.errors import ConfigError, near
from qcompile.methods.compressed_tensors_presets import PRESETS

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
FORMATS = (
    "dense", "sparse-bitmask", "sparse-24-bitmask", "int-quantized", "float-quantized", "naive-quantized",
    "pack-quantized", "marlin-24", "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp6-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
LARGEST = {8: 448.0, 6: 7.5, 4: 6.0}  # of the floats: e4m3, e2m3, e2m1
_GROUPED = ("group", "tensor_group")


def wrong(where: str, found: Any, expected: str, remedy: str = "") -> ConfigError:
    """The error about a value of the config; `where` is the way to it."""
    return ConfigError(
        "the compressed-tensors config has a value out of range",
        where=where,
        found=repr(found),
        expected=expected,
        remedy=remedy,
    )


def plain(value: Any) -> Any:
    """An enum's value, a dtype's name, an object's fields: what JSON would hold."""
    value = getattr(value, "value", value)
    if isinstance(value, torch.dtype):
        return str(value)
    return value.model_dump() if hasattr(value, "model_dump") else value


def known(cls: Any, data: Any, where: str) -> dict[str, Any]:
    """The fields of a part of the config; ConfigError unless it is an object with fields of `cls` only."""
    if not isinstance(data, Mapping):
        raise wrong(where, data, "an object")
    names = [f.name for f in fields(cls)]
    for name in data:
        if name not in names:
            raise ConfigError(
                "unknown field in the compressed-tensors config",
                where=where,
                found=f"{name!r}{near(str(name), names)}",
                expected=", ".join(names),
                remedy="correct the name, or leave the field out",
            )
    return {name: plain(value) for name, value in data.items()}


@dataclass(frozen=True)
class Args:
    """How the numbers of one tensor are quantized: the fields and rules of the package's QuantizationArgs.

    `actorder` "group" (columns have the group that g_idx says) was removed from the package in 0.19, and is read here.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | str = False
    actorder: str | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: Any, where: str) -> Args | None:
        """The arguments that an object says; None for null."""
        data = plain(data)
        if data is None:
            return None
        values = known(cls, data, where)
        for name in ("type", "strategy", "dynamic", "actorder"):
            if isinstance(values.get(name), str):
                values[name] = values[name].lower()
        values["block_structure"] = _blocks(values.get("block_structure"), where)
        values["actorder"] = _order(values.get("actorder"), where)
        values["observer_kwargs"] = values.get("observer_kwargs") or {}
        if values.get("strategy") is None:
            size = values.get("group_size")
            values["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
        made = cls(**values)
        made._check(where)
        # Zero points that do not exist have no dtype: the package drops the field too.
        return replace(made, zp_dtype=None) if made.symmetric or made.zp_dtype == "None" else made

    def _check(self, where: str) -> None:
        def require(ok: bool, name: str, expected: str, remedy: str = "") -> None:
            if not ok:
                raise wrong(f"{where}, {name!r}", getattr(self, name), expected, remedy)

        size, strategy = self.group_size, self.strategy
        require(self.type in ("int", "float"), "type", "'int' or 'float'")
        bits = range(1, 33) if self.type == "int" else tuple(LARGEST)
        what = "an integer from 1 to 32" if self.type == "int" else "4, 6 or 8 for floats"
        require(type(self.num_bits) is int and self.num_bits in bits, "num_bits", what)
        require(isinstance(self.symmetric, bool), "symmetric", "True or False")
        whole = size is None or (type(size) is int and size >= -1)
        require(whole, "group_size", "None, -1 (strategy 'channel') or a positive integer (strategy 'group')")
        require(strategy in STRATEGIES, "strategy", ", ".join(STRATEGIES))
        require(self.dynamic in (True, False, "local"), "dynamic", "True, False or 'local'")
        require(strategy != "token" or bool(self.dynamic), "dynamic", "True for the strategy 'token'")
        if strategy in _GROUPED:
            require(size is not None and size > 0, "group_size", f"a positive integer for the strategy '{strategy}'")
        else:
            grouped = size is not None and size > 0
            require(not grouped, "group_size", "None or -1 unless the strategy is 'group' or 'tensor_group'")
        blocks = self.block_structure is not None
        require((strategy == "block") == blocks, "block_structure", "[rows, columns] with the strategy 'block' only")
        if self.dynamic:
            fit = ("token", "tensor", *_GROUPED)
            require(strategy in fit, "strategy", f"one of {', '.join(fit)} for dynamic quantization")
        require(self.dynamic != "local" or strategy == "tensor_group", "dynamic", "'local' for 'tensor_group' only")
        require(isinstance(self.observer_kwargs, Mapping), "observer_kwargs", "an object")
        require(self.observer is None or isinstance(self.observer, str), "observer", "None or a name")
        for name in ("scale_dtype", "zp_dtype"):
            value = getattr(self, name)
            named = isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), 0), torch.dtype)
            require(value is None or value == "None" or named, name, "None or the name of a torch dtype")
        small = self.type == "float" and self.num_bits < 8
        require(self.symmetric or not small, "symmetric", "True for floats of 4 and 6 bits")

    def to_dict(self) -> dict[str, Any]:
        """The arguments as the package writes them: optional fields only where they are set."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["block_structure"] = list(self.block_structure) if self.block_structure else None
        optional = ("block_structure", "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs")
        return {name: value for name, value in data.items() if name not in optional or value}

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest code."""
        if self.type == "float":
            return -LARGEST[self.num_bits], LARGEST[self.num_bits]
        return -(2.0 ** (self.num_bits - 1)), 2.0 ** (self.num_bits - 1) - 1

    @property
    def scales(self) -> str:
        """The dtype that scales are rounded to, without "torch."; "" where there is none."""
        return (self.scale_dtype or "").removeprefix("torch.")

    @property
    def mx(self) -> bool:
        """True where scales are powers of two, for 32 numbers each (OCP Microscaling)."""
        return self.type == "float" and self.group_size == 32 and self.scales == "uint8"

    @property
    def blocks(self) -> tuple[int, int]:
        """The rows and columns of a weight that share a scale; 0: all of them."""
        if self.block_structure is not None:
            return self.block_structure
        return {"tensor": (0, 0), "channel": (1, 0)}.get(self.strategy or "", (1, self.group_size or 0))


def _blocks(value: Any, where: str) -> tuple[int, int] | None:
    if isinstance(value, str):
        parts = value.split("x")
        value = [int(part) for part in parts] if all(part.isdigit() for part in parts) else value
    if value is None:
        return None
    sizes = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)
    if not sizes:
        raise wrong(f"{where}, 'block_structure'", value, "a list of positive integers [rows, columns]")
    return value[0], value[1]


def _order(value: Any, where: str) -> str | None:
    orders = {None: None, False: None, True: "group", "weight": "weight", "static": "weight"}
    orders |= {"group": "group", "dynamic": "group"}
    if value not in orders:
        raise wrong(f"{where}, 'actorder'", value, "None, 'weight' ('static') or 'group' ('dynamic', removed in 0.19)")
    return orders[value]


@dataclass(frozen=True)
class Scheme:
    """How the modules that `targets` names are quantized: the fields and rules of the package's QuantizationScheme."""

    targets: tuple[str, ...]
    weights: Args | None = None
    input_activations: Args | None = None
    output_activations: Args | None = None
    format: str | None = None

    @classmethod
    def parse(cls, name: str, data: Any) -> Scheme:
        """The scheme of a group: an object, or a list of targets where the group is called as a preset."""
        where, data = f"field 'config_groups', {name!r}", plain(data)
        if isinstance(data, list | tuple):
            if name.upper() not in PRESETS:
                raise wrong(where, name, f"a preset: {', '.join(PRESETS)}", "spell the scheme out as an object")
            data = {"targets": data} | PRESETS[name.upper()]
        values = known(cls, data, where)
        targets = values.get("targets")
        if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
            raise wrong(f"{where}, 'targets'", targets, "a list of module names, 're:' patterns or class names")
        values["targets"] = tuple(targets)
        for part in ("weights", "input_activations", "output_activations"):
            values[part] = Args.parse(values.get(part), f"{where}, {part!r}")
        made = cls(**values)
        made._check(where)
        return made

    def _check(self, where: str) -> None:
        formats = tuple(name for name in FORMATS if name != "mixed-precision")
        if self.format is not None and self.format not in formats:
            raise wrong(f"{where}, 'format'", self.format, f"None or one of {', '.join(formats)}")
        inputs = self.input_activations
        if inputs is not None and inputs.strategy in ("channel", "block"):
            allowed = "token, tensor, group, tensor_group or attn_head"
            raise wrong(f"{where}, 'input_activations', 'strategy'", inputs.strategy, allowed)
        for part in ("input_activations", "output_activations"):
            args = getattr(self, part)
            if args is not None and args.actorder is not None:
                raise wrong(f"{where}, {part!r}, 'actorder'", args.actorder, "None: activations have no order")

    def to_dict(self) -> dict[str, Any]:
        """The scheme as the package writes it."""
        parts = {name: getattr(self, name) for name in ("weights", "input_activations", "output_activations")}
        return {
            "targets": list(self.targets),
            **{name: None if args is None else args.to_dict() for name, args in parts.items()},
            "format": self.format,
        }

    def inferred(self) -> str:
        """The format in which the package saves such a module: the first that fits."""
        weights, inputs = self.weights, self.input_activations
        if weights is None:
            return "dense"
        if weights.type == "float":
            small = {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}
            if weights.mx or (weights.group_size == 32 and weights.num_bits < 8):
                return small[weights.num_bits]
            if weights.num_bits == 4 and weights.group_size == 16:
                return "nvfp4-pack-quantized"
            return "float-quantized" if inputs is not None else "naive-quantized"
        if inputs is not None:
            return "int-quantized"
        return "pack-quantized" if weights.num_bits <= 8 else "naive-quantized"


LOCATIONS = ("input", "output", "q_attn", "k_cache", "weight_input", "weight_output")
ONLINE = LOCATIONS[:4]  # the others were multiplied into the weights when these were made
ROTATIONS = ("hadamard", "random-hadamard", "random-matrix")


@dataclass(frozen=True)
class Place:
    """Where a rotation, or its inverse, acts: the fields of the package's TransformArgs."""

    targets: tuple[str, ...]
    location: str
    inverse: bool = False
    ignore: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: Any, where: str) -> Place:
        values = {"ignore": ()} | known(cls, plain(data), where)
        for name in ("targets", "ignore"):
            value = values.get(name)
            values[name] = (value,) if isinstance(value, str) else tuple(value or ())
        if not values["targets"]:
            raise wrong(f"{where}, 'targets'", list(values["targets"]), "a list of module names or 're:' patterns")
        if values.get("location") not in LOCATIONS:
            raise wrong(f"{where}, 'location'", values.get("location"), ", ".join(LOCATIONS))
        return cls(**values)


@dataclass(frozen=True)
class Rotation:
    """A transform and where it acts: the fields and defaults of the package's TransformScheme.

    `head_dim` is the size of its blocks; None: as wide as what it acts on. `randomize` permutes a Hadamard matrix.
    """

    type: str
    apply: tuple[Place, ...] = ()
    randomize: bool = False
    requires_grad: bool = False
    head_dim: int | None = None
    precision: str = "torch.float32"

    @classmethod
    def parse(cls, name: str, data: Any) -> Rotation:
        """The transform of a group in `transform_config`."""
        where = f"field 'transform_config', 'config_groups', {name!r}"
        values = known(cls, plain(data), where)
        if values.get("type") not in ROTATIONS:
            raise wrong(f"{where}, 'type'", values.get("type"), ", ".join(ROTATIONS))
        size = values.get("head_dim")
        if size is not None and (type(size) is not int or size < 1):
            raise wrong(f"{where}, 'head_dim'", size, "None or a positive integer")
        places = enumerate(values.get("apply") or ())
        values["apply"] = tuple(Place.parse(each, f"{where}, 'apply', {at}") for at, each in places)
        return cls(**values)
