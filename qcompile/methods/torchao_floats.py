"""TorchAO's tensors of small floats: Float8Tensor, MXTensor and NVFP4Tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from qcompile.dtypes import DTYPES
from qcompile.format import Format, Packed
from qcompile.formats.minifloat import Fp4, Fp8
from qcompile.methods import torchao_rounding as rounding
from qcompile.methods.torchao_recipes import Per
from qcompile.methods.torchao_tensors import (
    AoTensor,
    Expected,
    Parts,
    dtype,
    granularity,
    rows_columns,
    scales,
    tagged,
)
from qcompile.transform import Applied
from qcompile.transforms.round_float import RoundFloat, RoundMx, RoundNvfp4
from qcompile.transforms.rounding import LARGEST

Small = Literal["f8e4m3", "f8e5m2"]


@dataclass(frozen=True)
class Float8Act:
    """How x is rounded to float8: one scale for each row, for 128 of its values or for all, max|x| within bounds."""

    per: Per
    element: Small = "f8e4m3"
    least: float | None = None
    most: float | None = None

    def transform(self) -> RoundFloat:
        which = {"PerRow": "token", "PerTensor": "tensor", "PerBlock": "group"}[self.per.kind]
        size = self.per.sizes[1] if self.per.kind == "PerBlock" else 0
        return RoundFloat(cast(Any, which), size, "", self.least or 0.0, self.most or 0.0, element=self.element)


@dataclass(frozen=True)
class Float8Tensor(AoTensor):
    """float8 with float32 scales for blocks of the weight."""

    type = "Float8Tensor"
    block: tuple[int, int] = (1, 0)
    element: Small = "f8e4m3"
    act: Float8Act | None = None

    def expected(self) -> Expected:
        data = ((self.element,), (self.n, self.k))
        return {"qdata": data, "scale": (("f32",), scales(self.block, self.n, self.k))}

    def format(self, dtypes: Mapping[str, str]) -> Format:
        rows, columns = rows_columns(self.block, self.n, self.k)
        return Fp8(self.element, "f32", rows, columns)

    def stored(self, parts: Parts) -> dict[str, Tensor]:
        return {"weight": parts["qdata"], "scale": parts["scale"]}

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        return {"qdata": packed.tensors["weight"], "scale": packed.tensors["scale"]}

    def before(self, parts: Parts) -> tuple[Applied, ...]:
        return () if self.act is None else (Applied(self.act.transform()),)

    def round(self, weight: Tensor) -> dict[str, Tensor]:
        return rounding.float8(weight, self.block, self.element, DTYPES[self.element])

    def described(self) -> dict[str, Any]:
        act, mm, preference = None, None, tagged("KernelPreference", "AUTO")
        if self.act is not None:
            fast = self.act.per.kind != "PerBlock"
            mm = tagged("Float8MMConfig", {"emulate": False, "use_fast_accum": fast, "pad_inner_dim": False})
            said = {
                "float8_dtype": dtype(self.act.element),
                "granularity": granularity(self.act.per),
                "mm_config": None,
                "hp_value_lb": self.act.least,
                "hp_value_ub": self.act.most,
                "kernel_preference": preference,
            }
            act = tagged("QuantizeTensorToFloat8Kwargs", said)
        return {
            "block_size": list(self.block),
            "mm_config": mm,
            "act_quant_kwargs": act,
            "kernel_preference": preference,
            "dtype": dtype(self.dtype),
        }


@dataclass(frozen=True)
class MXTensor(AoTensor):
    """float8 or e2m1 with a power of two for every 32 inputs; x is rounded in the same way."""

    type = "MXTensor"
    element: Small | Literal["e2m1"] = "f8e4m3"
    swizzled: bool = True
    mode: str = "RCEIL"
    act: bool = True

    def expected(self) -> Expected:
        small = self.element == "e2m1"
        data = (("u8",), (self.n, self.k // 2)) if small else ((self.element,), (self.n, self.k))
        return {"qdata": data, "scale": (("f8e8m0", "u8"), scale_shape(self.n, self.k // 32, self.swizzled))}

    def format(self, dtypes: Mapping[str, str]) -> Format:
        return Fp4(32, "u8") if self.element == "e2m1" else Fp8(self.element, "u8", 1, 32)

    def stored(self, parts: Parts) -> dict[str, Tensor]:
        scale = parts["scale"]
        scale = rounding.plain_scales(scale, self.n, self.k // 32) if self.swizzled else scale
        return {"weight": parts["qdata"], "scale": scale.view(torch.uint8)}

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        scale = packed.tensors["scale"].view(torch.float8_e8m0fnu)
        return {"qdata": packed.tensors["weight"], "scale": rounding.swizzled(scale) if self.swizzled else scale}

    def before(self, parts: Parts) -> tuple[Applied, ...]:
        if not self.act:
            return ()
        rule, shift = rounding.mx_rule(self.element, self.mode)
        divisor = LARGEST[self.element] if self.mode == "RCEIL" else 1.0
        return (Applied(RoundMx(self.element, 32, cast(Any, rule), shift, divisor)),)

    def round(self, weight: Tensor) -> dict[str, Tensor]:
        exponent, ratio = rounding.mx(weight, self.element, self.mode)
        scale = exponent.view(torch.float8_e8m0fnu)
        largest = LARGEST[self.element]
        small = self.element == "e2m1"
        code = rounding.e2m1(ratio) if small else ratio.clamp(-largest, largest).to(DTYPES[self.element])
        return {"qdata": code, "scale": rounding.swizzled(scale) if self.swizzled else scale}

    def described(self) -> dict[str, Any]:
        said = {"elem_dtype": dtype(self.element), "block_size": 32}
        preference = tagged("KernelPreference", "AUTO")
        mode = tagged("ScaleCalculationMode", self.mode)
        act = {**said, "scaling_mode": mode, "kernel_preference": preference, "is_swizzled_scales": True}
        return {
            **said,
            "orig_dtype": dtype(self.dtype),
            "kernel_preference": preference,
            "act_quant_kwargs": tagged("QuantizeTensorToMXKwargs", act) if self.act else None,
            "is_swizzled_scales": self.swizzled,
        }


@dataclass(frozen=True)
class NVFP4Tensor(AoTensor):
    """e2m1 with an e4m3 scale for every 16 inputs and one float32 scale for all; x may be rounded in the same way.

    `act`: None, or whether x's own maximum gives the scale for all of it, where the file has no number for that.
    """

    type = "NVFP4Tensor"
    optional = ("per_tensor_scale", "act_per_tensor_scale")
    swizzled: bool = True
    whole: bool = True
    act: bool | None = None

    def expected(self) -> Expected:
        scale = scale_shape(self.n, self.k // 16, self.swizzled)
        parts: Expected = {"qdata": (("u8",), (self.n, self.k // 2)), "scale": (("f8e4m3",), scale)}
        return parts | {"per_tensor_scale": (("f32",), ()), "act_per_tensor_scale": (("f32",), ())}

    def format(self, dtypes: Mapping[str, str]) -> Format:
        return Fp4(16, "f8e4m3", "multiply" if "per_tensor_scale" in dtypes else "")

    def stored(self, parts: Parts) -> dict[str, Tensor]:
        scale = parts["scale"]
        scale = rounding.plain_scales(scale, self.n, self.k // 16) if self.swizzled else scale
        whole = {"tensor_scale": parts["per_tensor_scale"].reshape(1)} if "per_tensor_scale" in parts else {}
        return {"weight": parts["qdata"], "scale": scale, **whole}

    def parts(self, packed: Packed) -> dict[str, Tensor]:
        t = packed.tensors
        scale = rounding.swizzled(t["scale"]) if self.swizzled else t["scale"]
        whole = {"per_tensor_scale": t["tensor_scale"].reshape(())} if "tensor_scale" in t else {}
        return {"qdata": t["weight"], "scale": scale, **whole}

    def before(self, parts: Parts) -> tuple[Applied, ...]:
        if self.act is None:
            return ()
        if self.act and "act_per_tensor_scale" not in parts:
            return (Applied(RoundNvfp4(tensor="multiply", stored_scale="", floor=2.0**-6)),)
        one = parts.get("act_per_tensor_scale", torch.ones(()))
        return (Applied(RoundNvfp4(tensor="multiply", floor=2.0**-6), {"tensor_scale": one.reshape(1)}),)

    def round(self, weight: Tensor) -> dict[str, Tensor]:
        whole = weight.abs().amax().float() / (448.0 * 6.0) if self.whole else None
        made = rounding.nvfp4(weight, whole)
        made["scale"] = rounding.swizzled(made["scale"]) if self.swizzled else made["scale"]
        return made if whole is None else made | {"per_tensor_scale": whole}

    def described(self) -> dict[str, Any]:
        act = None
        if self.act is not None:
            said = {"block_size": 16, "is_swizzled_scales": True, "use_triton_kernel": False}
            act = tagged("QuantizeTensorToNVFP4Kwargs", {**said, "use_dynamic_per_tensor_scale": self.act})
        return {
            "is_swizzled_scales": self.swizzled,
            "use_triton_kernel": False,
            "act_quant_kwargs": act,
            "block_size": 16,
            "orig_dtype": dtype(self.dtype),
        }


def scale_shape(rows: int, columns: int, swizzled: bool) -> tuple[int, int]:
    """The shape of stored block scales."""
    return (32 * -(-rows // 128), 16 * -(-columns // 4)) if swizzled else (rows, columns)
