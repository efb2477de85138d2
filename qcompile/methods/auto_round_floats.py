"""AutoRound's schemes of small floats: MX and NVFP4 weights with or without inputs that are rounded too, and FP8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qcompile.errors import ConfigError

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.transform import Applied

PACKINGS = ("auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8")
TYPES = ("mx_fp", "nv_fp", "fp")
_ELEMENTS: dict[int, Any] = {4: "e2m1", 8: "f8e4m3"}
_GROUPS = {"mx_fp": 32, "nv_fp": 16}
_DENSE = 16  # from here on `act_bits` says that inputs are not rounded


@dataclass(frozen=True)
class Floats:
    """How one layer is stored, and what happens to its input: the entries of AutoRound's scheme.

    Weights are e2m1 or e4m3 in groups of 32 with powers of two ("mx_fp"), e2m1 in groups of 16 with e4m3 scales under one
    float ("nv_fp"), or e4m3 with float scales ("fp": for an output, for all with `group_size` 0, or for a group).
    """

    data_type: str
    bits: int
    group_size: int
    act_bits: int
    act_type: str

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Floats:
        """The scheme; ConfigError for what AutoRound's own loader has no layer for."""
        kind, bits, size = said["data_type"], said["bits"], said["group_size"]
        act_bits, act_type = said.get("act_bits") or _DENSE, str(said.get("act_data_type") or kind)
        rounded = act_bits < _DENSE
        acts = {
            "mx_fp": act_bits in (4, 8) and act_type in ("mx_fp", "mx_fp_rceil"),
            "nv_fp": act_bits == 4 and act_type == "nv_fp4_with_static_gs",
            "fp": act_bits == 8 and act_type == "fp" and said.get("act_dynamic") is False,
        }
        for name, ok, expected in (
            ("bits", bits in ({"mx_fp": (4, 8), "nv_fp": (4,)}.get(kind, (8,))), "4 or 8 (mx_fp), 4 (nv_fp), 8 (fp)"),
            ("group_size", size == _GROUPS.get(kind, size), "32 (mx_fp), 16 (nv_fp)"),
            ("sym", said.get("sym") is not False, "True for floats"),
            ("act_bits", not rounded or acts[kind], "None, 16, or inputs as weights: mx_fp or mx_fp_rceil while running, "
             "nv_fp4_with_static_gs, or static fp"),
        ):  # fmt: skip
            if not ok:
                found = f"{said.get(name)!r}" + (f", act_data_type {act_type!r}" if name == "act_bits" else "")
                raise ConfigError(
                    "the auto-round config has a value out of range",
                    where=f"field {name!r}",
                    found=f"{found} with data_type {kind!r}",
                    expected=expected,
                    remedy="export the model in another scheme: this one is stored in a way that is not read here",
                )
        return cls(kind, bits, size, act_bits, act_type)

    def format(self, k: int, scale: str) -> Format:
        """The format of a weight of `k` inputs; `scale` is the dtype of the scales of "fp".

        AutoRound's FP8 layer dequantizes in that dtype.
        """
        from qcompile.formats.minifloat import Fp4, Fp8

        if self.data_type == "nv_fp":
            return Fp4(16, "f8e4m3", "divide")
        if self.data_type == "mx_fp":
            return Fp4(32, "u8") if self.bits == 4 else Fp8("f8e4m3", "u8", 1, 32)
        rounding = "none" if scale == "f32" else f"product-{scale}"
        rows, columns = (0, 0) if self.group_size == 0 else (1, max(self.group_size, 0))
        return Fp8("f8e4m3", scale, rows, columns, rounding)

    def official(self) -> dict[str, str]:
        """The names of the format's tensors in a checkpoint."""
        whole = {"tensor_scale": "weight_global_scale"} if self.data_type == "nv_fp" else {}
        return {"weight": "weight_packed" if self.bits == 4 else "weight", "scale": "weight_scale"} | whole

    def static(self) -> tuple[str, ...]:
        """The names of what a checkpoint holds for the rounding of x."""
        if self.act_bits >= _DENSE:
            return ()
        return {"nv_fp": ("input_global_scale",), "fp": ("input_scale",)}.get(self.data_type, ())

    def told(self) -> dict[str, Any]:
        """The entries of a checkpoint's config that follow from the others, and that AutoRound's loader wants."""
        packing = {"packing_format": "auto_round:fp8_static" if self.data_type == "fp" else "auto_round:llm_compressor"}
        size = 0 if self.data_type == "fp" else self.group_size
        return packing | ({"act_group_size": size, "act_sym": True} if self.act_bits < _DENSE else {})

    def shapes(self, fmt: Format, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a checkpoint's tensors: scales of "fp" have one dimension."""
        shapes = {self.official()[s.name]: s.shape for s in fmt.stored(n, k)}
        if self.data_type == "fp":
            rows, columns = shapes["weight_scale"]
            shapes["weight_scale"] = (rows * columns,)
        return shapes | dict.fromkeys(self.static(), (1,))

    def before(self, static: Mapping[str, torch.Tensor]) -> tuple[Applied, ...]:
        """The rounding of x, with its stored scale."""
        from qcompile.dtypes import NAMES
        from qcompile.transform import Applied
        from qcompile.transforms.round_float import RoundFloat, RoundMx, RoundNvfp4
        from qcompile.transforms.rounding import LARGEST

        if self.act_bits >= _DENSE:
            return ()
        if self.data_type == "nv_fp":
            return (Applied(RoundNvfp4(), {"tensor_scale": static["input_global_scale"].reshape(1)}),)
        if self.data_type == "fp":
            scale = static["input_scale"].reshape(1)
            dtype: Any = NAMES[scale.dtype]  # in which the original computes x / scale too
            return (Applied(RoundFloat("tensor", scale=dtype, dtype=dtype), {"scale": scale}),)
        element = _ELEMENTS[self.act_bits]
        if self.act_type == "mx_fp_rceil":
            return (Applied(RoundMx(element, rule="ceil", shift=0, divisor=LARGEST[element])),)
        return (Applied(RoundMx(element, rule="floor", shift=2 if self.act_bits == 4 else 8)),)

    def quantize(self, weight: torch.Tensor, module: Module) -> Packed:
        """Round to nearest as AutoRound does for "mx_fp" with its `iters` 0 and `disable_opt_rtn`; ConfigError for others."""
        from qcompile.methods import fp4, stored
        from qcompile.pack import pack
        from qcompile.transforms.rounding import power_of_two, to_element

        if self.data_type != "mx_fp":
            raise ConfigError(
                "AutoRound's floats with float scales come from checkpoints only",
                where=f"{module.path}, field 'data_type'",
                found=repr(self.data_type),
                expected="'mx_fp', or an integer type",
                remedy="quantize and export the model with auto-round: its checkpoint is read",
            )
        shift = 2 if self.bits == 4 else 8
        parts = weight.reshape(module.n, -1, 32)
        most = parts.abs().amax(-1, keepdim=True)
        most = torch.where(most == 0, 2.0, most)  # the exponent that the original gives to zeros
        exponent = (torch.log2(power_of_two(most, "floor")) - shift).clamp(-127, 127)
        values = to_element(parts / torch.exp2(exponent), _ELEMENTS[self.bits])
        fmt = self.format(module.k, "u8")
        code = fp4.codes(values) if self.bits == 4 else values.to(torch.float8_e4m3fn)
        fields = {"code": code, "scale": (exponent + 127).to(torch.uint8).expand_as(parts)}
        packed = pack(
            fmt, {name: each.reshape(module.n, module.k) for name, each in fields.items()}, module.n, module.k
        )
        made = stored.packed(fmt, packed, module)
        made.before = self.before({})
        return made
