"""TorchAO's integer tensors: Int8Tensor, IntxUnpackedToInt8Tensor, Int4Tensor and Int4TilePackedTo4dTensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from qcompile.dtypes import NAMES
from qcompile.format import Format, Packed
from qcompile.formats.integer import Int8
from qcompile.formats.torchao import Int4Rows, Int4Tiles
from qcompile.methods import torchao_rounding as rounding
from qcompile.methods.torchao_recipes import ROW, Per
from qcompile.methods.torchao_tensors import (
    FLOATS,
    LONG,
    AoTensor,
    Expected,
    Parts,
    dtype,
    granularity,
    kept,
    prescaled,
    rows_columns,
    scales,
    tagged,
    zeros_like,
)
from qcompile.pack import pack
from qcompile.transform import Applied
from qcompile.transforms.round_float import RoundFloat
from qcompile.transforms.round_int import RoundInt

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).smallest_normal


@dataclass(frozen=True)
class Bytes(AoTensor):
    """Integers of a byte each with scales and zero points for blocks: W = (qdata - zero_point) * scale."""

    block: tuple[int, int] = (1, 0)

    def expected(self) -> Expected:
        blocks = scales(self.block, self.n, self.k)
        return {
            "qdata": (("i8",), (self.n, self.k)),
            "scale": (FLOATS, blocks),
            "zero_point": (("i8", *FLOATS), blocks),
        }

    def format(self, dtypes: Mapping[str, str]) -> Format:
        rows, columns = rows_columns(self.block, self.n, self.k)
        return Int8("i8", dtypes["scale"], dtypes.get("zero_point", ""), rows, columns)

    def stored(self, parts: Parts) -> dict[str, Tensor]:
        names = {"weight": "qdata", "scale": "scale", "zero": "zero_point"}
        return {name: parts[part] for name, part in names.items() if part in parts}

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        t = packed.tensors
        zero = t["zero"] if "zero" in t else zeros_like(t["scale"])
        return {"qdata": t["weight"], "scale": t["scale"], "zero_point": zero}


@dataclass(frozen=True)
class Int8Tensor(Bytes):
    """int8 with float32 scales; x stays float, or is rounded for each row or whole, by static numbers or its own."""

    type = "Int8Tensor"
    optional = ("zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
    act: tuple[Per, str, bool] | None = None
    reduced: bool = False

    def expected(self) -> Expected:
        single: Expected = {
            "act_quant_scale": (FLOATS, ()),
            "act_quant_zero_point": (("i8", "i32", *FLOATS), ()),
            "act_pre_scale": (FLOATS, (self.k,)),
        }
        return super().expected() | single

    def before(self, parts: Parts) -> tuple[Applied, ...]:
        if self.act is None:
            return prescaled(parts)
        per, mapping, reduced = self.act
        low, high = (-64, 63) if reduced else (-128, 127)
        static = {
            name: parts[part].reshape(1)
            for name, part in (("scale", "act_quant_scale"), ("zero", "act_quant_zero_point"))
            if part in parts and (name == "scale" or mapping == "ASYMMETRIC")
        }
        how = RoundInt(
            per="token" if per == ROW else "tensor",
            low=low,
            high=high,
            symmetric=mapping == "SYMMETRIC",
            zero_first=False,
            arithmetic="reciprocal",
            floor=EPS,
            scale=NAMES[static["scale"].dtype] if "scale" in static else "",
            zero=NAMES[static["zero"].dtype] if "zero" in static else "",
        )
        return (*prescaled(parts), Applied(how, static))

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        static = next((each.tensors for each in packed.before if isinstance(each.transform, RoundInt)), {})
        names = {"scale": "act_quant_scale", "zero": "act_quant_zero_point"}
        return super().parts(packed) | kept(packed) | {names[name]: t.reshape(1, 1) for name, t in static.items()}

    def round(self, weight: Tensor) -> dict[str, Tensor]:
        low, high = (-64, 63) if self.reduced else (-128, 127)
        scale, zero = rounding.affine(weight, self.block, low, high, "SYMMETRIC", EPS)
        code = rounding.codes(weight, self.block, scale.float(), zero, low, high)
        return {"qdata": code, "scale": scale.float(), "zero_point": zero}

    def described(self) -> dict[str, Any]:
        act = None
        if self.act is not None:
            per, mapping, reduced = self.act
            fields = {"granularity": granularity(per), "mapping_type": tagged("MappingType", mapping)}
            act = tagged("QuantizeTensorToInt8Kwargs", {**fields, "reduce_range": reduced})
        return {
            "act_quant_kwargs": act,
            "reduce_range": self.reduced,
            "block_size": list(self.block),
            "dtype": dtype(self.dtype),
        }


@dataclass(frozen=True)
class IntxUnpackedToInt8Tensor(Bytes):
    """Integers of 1 to 8 bits in a byte each; x stays float or is rounded for each row, with a zero point."""

    type = "IntxUnpackedToInt8Tensor"
    bits: int = 8
    act: bool = False
    mapping: str = "SYMMETRIC"
    scale_dtype: str = ""
    hqq: bool = False

    def before(self, parts: Parts) -> tuple[Applied, ...]:
        if not self.act:
            return ()
        return (Applied(RoundInt(symmetric=False, zero_first=False, arithmetic="reciprocal", floor=TINY)),)

    def round(self, weight: Tensor) -> dict[str, Tensor]:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if self.hqq:
            code, scale = rounding.hqq_scales(weight, self.block, low, high)
            zero = zeros_like(scale)
        else:
            floor = torch.finfo(weight.dtype).smallest_normal
            scale, zero = rounding.affine(weight, self.block, low, high, self.mapping, floor)
            code = rounding.codes(weight, self.block, scale, zero, low, high)
        if self.scale_dtype and self.scale_dtype != NAMES[weight.dtype]:
            scale = scale.to(getattr(torch, LONG[self.scale_dtype]))
            code = rounding.codes(weight, self.block, scale, zero, low, high)
        return {"qdata": code, "scale": scale, "zero_point": zero}

    def described(self) -> dict[str, Any]:
        return {
            "target_dtype": dtype(f"int{self.bits}"),
            "block_size": list(self.block),
            "dtype": dtype(self.dtype),
            "activation_quantization": "int8_asym_per_token" if self.act else None,
        }


@dataclass(frozen=True)
class Int4Tensor(AoTensor):
    """Nibbles in rows with transposed scales and float zero points; x may be rounded to e4m3 for each row."""

    type = "Int4Tensor"
    optional = ("act_pre_scale",)
    group: int = 128
    act: bool = False

    def expected(self) -> Expected:
        groups = (self.k // self.group, self.n)
        parts: Expected = {"qdata": (("i8",), (self.n, self.k // 2)), "scale": (FLOATS, groups)}
        return parts | {"zero_point": (FLOATS, groups), "act_pre_scale": (FLOATS, (self.k,))}

    def format(self, dtypes: Mapping[str, str]) -> Format:
        return Int4Rows(self.group, dtypes["scale"])

    def counts(self, zero: Tensor) -> bool:
        return True

    def stored(self, parts: Parts) -> dict[str, Tensor]:
        return {name: parts[name] for name in ("qdata", "scale", "zero_point")}

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        return packed.tensors | kept(packed)

    def before(self, parts: Parts) -> tuple[Applied, ...]:
        return (*prescaled(parts), *([Applied(RoundFloat())] if self.act else []))

    def round(self, weight: Tensor) -> dict[str, Tensor]:
        return rounding.int4_rows(weight, self.group)

    def described(self) -> dict[str, Any]:
        act = dtype("f8e4m3" if self.act else "bf16")
        return {"activation_dtype": act, "block_size": [1, self.group], "shape": [self.n, self.k]}


@dataclass(frozen=True)
class Int4TilePackedTo4dTensor(AoTensor):
    """Nibbles in the tiles of tensor cores, filled up to whole tiles."""

    type = "Int4TilePackedTo4dTensor"
    optional = ("act_pre_scale",)
    group: int = 128
    hqq: bool = False

    def expected(self) -> Expected:
        shapes = {s.name: ((s.dtype,), s.shape) for s in Int4Tiles(self.group).stored(self.n, self.k)}
        return {**shapes, "act_pre_scale": (FLOATS, (self.k,))}

    def format(self, dtypes: Mapping[str, str]) -> Format:
        return Int4Tiles(self.group)

    def stored(self, parts: Parts) -> dict[str, Tensor]:
        return {name: parts[name] for name in ("qdata", "scale_and_zero")}

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        return packed.tensors | kept(packed)

    def round(self, weight: Tensor) -> dict[str, Tensor]:
        fmt = cast(Int4Tiles, self.format({}))
        n, k = fmt.padded(*weight.shape)
        whole = torch.nn.functional.pad(weight, (0, k - weight.shape[1], 0, n - weight.shape[0]))
        fields = rounding.tinygemm_hqq if self.hqq else rounding.tinygemm
        return pack(fmt, fields(whole, self.group), n, k)

    def described(self) -> dict[str, Any]:
        return {"block_size": [1, self.group], "shape": [self.n, self.k]}
