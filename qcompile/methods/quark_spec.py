"""What quark's config says about one tensor: the numbers it is rounded to, and which of them share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from qcompile.errors import ConfigError
from qcompile.format import Format
from qcompile.formats.integer import Int8
from qcompile.formats.minifloat import E2M1, Fp4, Fp6, Fp8, minifloats
from qcompile.formats.quark import QuarkInt4
from qcompile.methods import quark_narrow as narrow
from qcompile.transform import Transform
from qcompile.transforms.round_float import RoundFloat, RoundMx
from qcompile.transforms.round_int import RoundInt
from qcompile.transforms.rounding import LARGEST, to_element

RANGES = {
    "int2": (-2, 1), "uint2": (0, 3), "int3": (-4, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127),
    "uint8": (0, 255),
}  # fmt: skip
ELEMENTS = {"fp8_e4m3": "f8e4m3", "fp8_e5m2": "f8e5m2", "fp4": "e2m1", "fp6_e2m3": "e2m3", "fp6_e3m2": "e3m2"}
MX = {"fp4": (1, 2), "fp6_e2m3": (3, 2), "fp6_e3m2": (2, 4), "fp8_e4m3": (3, 8), "fp8_e5m2": (2, 15)}
"""Bits of the mantissa and the largest exponent."""
OTHERS = ("int16", "uint16", "int32", "fp8_e5m3", "mx", "mx6", "mx9", "bfp16", "bfloat16", "float16")
"""Quark's other types, which no checkpoint that transformers loads holds."""
EPS = 2.0**-23


@dataclass(frozen=True)
class Spec:
    """The entries of a tensor's config that say what is computed; the config class has checked them."""

    dtype: str
    qscheme: str
    ch_axis: int | None
    group_size: int | None
    block_size: tuple[int, int] | None
    is_dynamic: bool
    symmetric: bool
    round_method: str
    scale_format: str
    mode: str
    observer: str
    scale_type: str

    @property
    def integer(self) -> bool:
        return self.dtype in RANGES

    @property
    def narrow(self) -> bool:
        """True for integers of 2 and 3 bits, which are stored in ways of their own."""
        return self.dtype in narrow.BITS

    @property
    def powers(self) -> bool:
        """True when scales are powers of two, stored as their exponents."""
        return self.scale_format == "e8m0"

    def blocks(self, k: int) -> tuple[int, int]:
        """The rows and columns of a weight that share a scale (0: all of them)."""
        if self.qscheme == "per_group":
            size = self.group_size or -1
            return 1, k if size < 0 else size
        if self.qscheme == "per_channel":
            return (1, 0) if self.ch_axis in (0, -2) else (0, 1)
        return self.block_size or (0, 0)

    def format(self, scale: str, k: int, *, reorder: bool) -> Format | None:
        """The format of a weight of `k` inputs with scales of the dtype `scale`; None where quark's files hold none."""
        rows, columns = self.blocks(k)
        groups = self.qscheme == "per_group"
        if self.narrow:
            return narrow.format_of(self, scale, k)
        if self.dtype in ("int4", "uint4"):
            per: Any = {"per_group": "group", "per_tensor": "tensor"}.get(self.qscheme, "channel")
            fits = self.qscheme in ("per_group", "per_tensor") or (rows, columns) == (1, 0)
            signed = self.dtype == "int4"
            return QuarkInt4(per, columns, signed, reorder, scale, not self.symmetric) if fits else None
        if self.integer and self.qscheme != "per_block":
            kind: Any = "i8" if self.dtype == "int8" else "u8"
            return Int8(kind, scale, "" if self.symmetric else kind, rows, columns)
        if self.dtype in ("fp8_e4m3", "fp8_e5m2"):
            element: Any = ELEMENTS[self.dtype]
            return Fp8(element, scale, rows, columns) if not groups else None
        if self.dtype == "fp4" and groups:
            stored: Any = scale
            return Fp4(columns, stored)
        if self.dtype in ("fp6_e2m3", "fp6_e3m2") and groups and self.powers:
            six: Any = ELEMENTS[self.dtype]
            return Fp6(six, columns)
        return None

    def rounding(self, scale: str, zero: str, dtype: str = "f32") -> Transform | None:
        """The rounding of x; stored scales (and zeros) have these dtypes. None where it is not known how.

        Quark computes 8-bit floats in the model's `dtype`, all else in float32.
        """
        position = self.qscheme == "per_channel" and self.ch_axis == 1
        groups = self.qscheme == "per_group" and self.ch_axis in (-1, 2)
        per: Any = {"per_tensor": "tensor"}.get(self.qscheme) or (position and "position") or (groups and "group")
        if not per or (self.integer and self.round_method != "half_even") or (not self.is_dynamic and per != "tensor"):
            return None
        size = self.group_size or 0 if groups else 0
        if self.integer:
            low, high = RANGES[self.dtype]
            return RoundInt(
                per, size, scale, floor=EPS, arithmetic="reciprocal", low=low, high=high,
                symmetric=self.symmetric, zero=zero, zero_first=False,
            )  # fmt: skip
        element: Any = ELEMENTS.get(self.dtype)
        if groups and self.powers and element:
            mantissa, largest = MX[self.dtype]
            rule: Any = {"floor": "floor", "ceil": "ceil"}.get(self.mode, f"even{mantissa}")
            return RoundMx(element, size, rule, largest)
        kind: Any = dtype
        return (
            RoundFloat(per, size, scale, empty=EPS, dtype=kind, element=element)
            if element and not self.powers
            else None
        )

    def quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values (integers, or numbers of the element), scale and zero point of a weight [N, K], one for each block.

        Scales are computed in the weight's dtype, values in float32 (fp8: in the weight's dtype). A scale that is a power
        of two comes as its exponent, u8.
        """
        (n, k), (rows, columns) = weight.shape, self.blocks(weight.shape[1])
        rows, columns = rows or n, columns or k
        blocks = weight.reshape(n // rows, rows, k // columns, columns)

        def wide(each: torch.Tensor) -> torch.Tensor:
            return each.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

        low = blocks.amin((1, 3)).clamp(max=0)
        high = blocks.amax((1, 3)).clamp(min=0)
        most = torch.maximum(-low, high)
        if self.powers:
            scale = self._power(most.float())
            exponent = (torch.log2(scale).round() + 127).clamp(1, 254).to(torch.uint8)
            return {"value": to_element(weight.float() / wide(scale), ELEMENTS[self.dtype]), "scale": exponent}
        if not self.integer:
            most = most.float() if self.scale_type == "float32" else most
            scale = most / LARGEST[ELEMENTS[self.dtype]]
            scale = torch.where(scale == 0, EPS, scale)
            return {"value": to_element(weight / wide(scale), ELEMENTS[self.dtype]), "scale": scale}
        least, largest = RANGES[self.dtype]
        if self.symmetric:
            scale, zero = (most / ((largest - least) / 2)).clamp(min=EPS), torch.zeros_like(most)
        else:
            scale = ((high - low) / float(largest - least)).clamp(min=EPS)
            zero = (least - torch.round(low / scale)).clamp(least, largest)
        scale = scale.float() if self.scale_type == "float32" else scale
        rounded = torch.round(weight.float() * (1.0 / wide(scale).float())) + wide(zero).float()
        return {"value": rounded.clamp(least, largest), "scale": scale, "zero": zero}

    def _power(self, most: torch.Tensor) -> torch.Tensor:
        """The power of two for each maximum: the rule of the config's scale_calculation_mode."""
        mantissa, largest = MX[self.dtype]
        if self.mode in ("floor", "ceil"):
            whole = torch.floor if self.mode == "floor" else torch.ceil
            scale = torch.exp2(whole(torch.log2(most)) - largest)
            return torch.where(scale == 0, EPS, scale)
        more = 1 << (22 - mantissa)
        bits = (most.view(torch.int32) + more) & ~((1 << 23) - 1)
        power = torch.where(most == 0, 2.0**-126, bits.view(torch.float32))
        return torch.exp2((torch.floor(torch.log2(power)) - largest).clamp(-127, 127))


def spec_of(data: Any, where: str) -> Spec | None:
    """The spec of a tensor's config, by quark's own rules; None for a tensor that stays as it is."""
    if data is None:
        return None
    if isinstance(data, list | tuple):
        if len(data) != 1:
            _refuse(where, f"{len(data)} stages", "one stage", "export the model with one stage for each tensor")
        data = data[0]
    if not isinstance(data, Mapping):
        _refuse(where, type(data).__name__, "None or the config of a tensor")
    get = data.get
    dtype, scheme = get("dtype"), get("qscheme")
    known = (*RANGES, *ELEMENTS)
    if dtype not in known:
        remedy = "export the model with one of these types" if dtype in OTHERS else ""
        _refuse(f"{where}, 'dtype'", repr(dtype), ", ".join(known), remedy)
    dynamic, axis = get("is_dynamic", get("dynamic")), get("ch_axis", get("axis"))
    needed: dict[str, Any] = {"qscheme": scheme}
    if dtype in RANGES or dtype in ("fp8_e4m3", "fp8_e5m2"):
        needed["is_dynamic"] = dynamic
    if dtype in RANGES:
        needed |= {name: get(name) for name in ("symmetric", "round_method", "scale_type")}
    for name, value in needed.items():
        if value is None:
            _refuse(f"{where}, {name!r}", "None", f"a value, which {dtype} needs")
    schemes = ("per_tensor", "per_channel", "per_group", "per_block")
    if scheme not in schemes:
        _refuse(f"{where}, 'qscheme'", repr(scheme), ", ".join(schemes))
    if scheme in ("per_channel", "per_group") and type(axis) is not int:
        _refuse(f"{where}, 'ch_axis'", repr(axis), f"an integer, for {scheme}")
    group, block = get("group_size"), get("block_size")
    if scheme == "per_group" and (type(group) is not int or not (group > 0 or group == -1)):
        _refuse(f"{where}, 'group_size'", repr(group), "a positive integer or -1 (the whole row)")
    pair = isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if scheme == "per_block" and not pair:
        _refuse(f"{where}, 'block_size'", repr(block), "two positive integers")
    if get("zero_point_type", "int32") not in (None, "int32"):
        _refuse(f"{where}, 'zero_point_type'", repr(get("zero_point_type")), "'int32'", "export integer zero points")
    if get("scale_format") not in (None, "float32", "e8m0"):
        _refuse(f"{where}, 'scale_format'", repr(get("scale_format")), "None, 'float32' or 'e8m0'")
    return Spec(
        dtype, scheme, axis, group, tuple(block) if block and pair and scheme == "per_block" else None, bool(dynamic),
        bool(get("symmetric")), get("round_method") or "half_even", get("scale_format") or "",
        get("scale_calculation_mode") or "even", get("observer_cls") or "", get("scale_type") or "float",
    )  # fmt: skip


def moved(fmt: Format) -> int:
    """What the format adds to signed codes and zero points."""
    return 8 if isinstance(fmt, QuarkInt4) and fmt.signed else 0


def narrow_packed(spec: Spec, fmt: Format, made: Mapping[str, torch.Tensor], n: int, k: int) -> dict[str, torch.Tensor]:
    """The format's tensors of integers of 2 or 3 bits [N, K] with scales and zero points [N, groups]."""
    from qcompile.pack import pack

    middle, least = 1 << (narrow.BITS[spec.dtype] - 1), RANGES[spec.dtype][0]
    fields = {
        "code": made["value"].to(torch.int32) - least,
        "scale": made["scale"].repeat_interleave(k // made["scale"].shape[1], 1),
        "zero": (made["zero"].to(torch.int32) - least - middle).repeat_interleave(k // made["zero"].shape[1], 1),
    }
    stored = {each.name for each in fmt.stored(n, k)}
    return pack(fmt, {name: each for name, each in fields.items() if name in stored or name == "code"}, n, k)


def codes(fmt: Format, value: torch.Tensor) -> torch.Tensor:
    """The codes of values: integers, 8-bit floats as they are, the places of smaller floats in their tables."""
    if fmt.kind == "fp8":
        return value
    if fmt.kind not in ("fp4", "fp6"):
        return value.to(torch.int32) + moved(fmt)
    entries = (
        E2M1
        if fmt.kind == "fp4"
        else minifloats(2, 3, 1)
        if fmt.to_json()["element"] == "e2m3"
        else minifloats(3, 2, 3)
    )
    half = len(entries) // 2
    place = torch.searchsorted(torch.tensor(entries[:half]), value.abs().float().contiguous())
    return (place + half * (value < 0)).to(torch.int32)  # quark has no -0


def whole_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's config with every key that quark reads."""
    parts = ("input_tensors", "output_tensors", "weight", "bias")
    return {"target_device": None} | dict(layer) | {name: _whole_spec(layer.get(name)) for name in parts}


def _whole_spec(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    names = (
        "ch_axis", "group_size", "block_size", "symmetric", "round_method", "scale_type", "scale_format",
        "scale_calculation_mode", "mx_element_dtype",
    )  # fmt: skip
    if data.get("scale_format") == "e8m0":
        observer = "PerBlockMXObserver"
    else:
        kinds = {"per_channel": "PerChannel", "per_group": "PerGroup", "per_block": "PerBlock2D"}
        observer = f"{kinds.get(data['qscheme'], 'PerTensor')}MinMaxObserver"
    default = dict.fromkeys(names) | {"is_dynamic": False, "zero_point_type": "int32", "observer_cls": observer}
    return default | dict(data)


def _refuse(where: str, found: str, expected: str, remedy: str = "") -> NoReturn:
    raise ConfigError(
        "the quark config has a value out of range", where=where, found=found, expected=expected, remedy=remedy
    )
