"""FP-Quant: MXFP4 or NVFP4 weights and activations, both rotated by a small stored matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.fp4 import codes

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.formats.fp_quant import FpQuant as Real
    from qcompile.program import Module
    from qcompile.sources import TensorSource

_SIZES = {"nvfp4": (16, 32, 64, 128), "mxfp4": (32, 64, 128)}
_SCALES = ("weight_global_scale", "act_global_scale")
_FORWARD, _BACKWARD = "forward_hadamard_matrix", "backward_hadamard_matrix"
_LAYOUTS = ("qweight", "scales", "dqweight", "weight")  # a layout has one or two of these


@dataclass(frozen=True)
class FpQuantConfig(MethodConfig):
    """The fields of transformers' FPQuantConfig; None as `hadamard_group_size` or `modules_to_not_convert` is resolved."""

    method: ClassVar[str] = "fp_quant"
    steering: ClassVar[Mapping[str, str]] = {"backward_dtype": "gradients are not computed here"}

    forward_dtype: str = "nvfp4"
    forward_method: str = "abs_max"
    backward_dtype: str = "bf16"
    store_master_weights: bool = False
    hadamard_group_size: int | None = None
    pseudoquantization: bool = False
    transform_init: str = "hadamard"
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self.require(self.forward_dtype in _SIZES, "forward_dtype", "'nvfp4' or 'mxfp4'")
        if self.hadamard_group_size is None:
            object.__setattr__(self, "hadamard_group_size", 16 if self.forward_dtype == "nvfp4" else 32)
        if self.modules_to_not_convert is None:
            object.__setattr__(self, "modules_to_not_convert", ["lm_head"])
        methods = {"nvfp4": ("abs_max",), "mxfp4": ("abs_max", "quest")}[self.forward_dtype]
        expected = " or ".join(map(repr, methods)) + f" with {self.forward_dtype}"
        self.require(self.forward_method in methods, "forward_method", expected)
        sizes = _SIZES[self.forward_dtype]
        expected = f"{', '.join(map(str, sizes))} with {self.forward_dtype}, or None"
        self.require(self.hadamard_group_size in sizes, "hadamard_group_size", expected)
        self.require(self.backward_dtype in ("bf16", "mxfp8", "mxfp4"), "backward_dtype", "'bf16', 'mxfp8' or 'mxfp4'")
        ok = self.backward_dtype == "bf16" or self.forward_dtype == "mxfp4"
        self.require(ok, "backward_dtype", "'bf16' with nvfp4")
        inits = ("hadamard", "identity", "gsr")
        self.require(self.transform_init in inits, "transform_init", "'hadamard', 'identity' or 'gsr'")
        self.require_bools("store_master_weights", "pseudoquantization")
        self.require_patterns("modules_to_not_convert")

    @property
    def size(self) -> int:
        """The inputs that are rotated together."""
        return cast(int, self.hadamard_group_size)


class FpQuant(Method):
    """quant_method "fp_quant": W4A4 on rotated inputs.

    Rotation, rounding and the matmul are computed in float32, and the result is rounded to bf16 after the bias, where the
    package rounds before it and again after: at most one more unit in the last place. The bias is added once; fp-quant
    0.3.2 adds it twice with pseudoquantization. GPUs divide approximately: single codes at the edge of two may differ
    from theirs. Master weights are quantized once, and written out quantized. The backward matrix is not read; the
    forward one is written in its place.
    """

    name = "fp_quant"
    source = "https://github.com/IST-DASLab/FP-Quant"
    Config = FpQuantConfig
    formats = ("fp-quant",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(_FORWARD) for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(FpQuantConfig, config)
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        endings = config.modules_to_not_convert or []
        if endings != ["lm_head"]:  # the default, which not every model has
            skip.check("modules_to_not_convert", endings, modules, self.name, skip.ends)
        if module.kind != "Linear":
            return Skip(f"{module.kind} is not converted by the method (only Linear)")
        for ending in endings:
            if skip.ends(ending, module.path):
                return Skip(f"modules_to_not_convert has {ending!r}")
        self._rotates(config, module)
        return Quantized(self._format(config, module))

    def _rotates(self, config: FpQuantConfig, module: Module) -> None:
        if module.k % config.size:
            raise ConfigError(
                "fp_quant cannot rotate the inputs of this module",
                where=f"{module.path} [{module.n}, {module.k}]",
                found=f"K = {module.k}",
                expected=f"a multiple of hadamard_group_size, {config.size}",
                remedy="choose a smaller hadamard_group_size, or name the module in modules_to_not_convert",
            )

    def _format(self, config: FpQuantConfig, module: Module) -> Format:
        from qcompile.formats.dense import Dense
        from qcompile.formats.fp_quant import FpQuant as Real

        return Dense("bf16") if config.pseudoquantization else Real(cast(Any, config.forward_dtype))

    def _stored(self, config: FpQuantConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        everything = stored.tensors(source, module)
        # transformers writes what a layout has no use for as empty tensors.
        empty = [name for name in _LAYOUTS if name in everything and 0 in source.info(everything[name]).shape]
        names = {name: full for name, full in everything.items() if name not in empty}
        if _FORWARD not in names:
            stored.require(names, ("weight",), module, self.name)
            return Skip("the checkpoint stores its weight dense")
        self._rotates(config, module)
        fmt, matrix = self._format(config, module), (config.size, config.size)
        if config.store_master_weights:
            own = {}
            stored.require(names, ("weight", *_SCALES, _FORWARD, _BACKWARD), module, self.name)
        else:
            own = {s.name: "dqweight" if s.name == "weight" else s.name for s in fmt.stored(module.n, module.k)}
            stored.require(
                names, tuple(dict.fromkeys((*own.values(), *_SCALES, _FORWARD, _BACKWARD))), module, self.name
            )
            stored.refuse_both(names, next(iter(own.values())), module, self.name)
        used = {name: names[official] for name, official in own.items()}
        stored.expect_all(fmt, used, source, module) if used else None
        for name in _SCALES:
            stored.expect(names[name], source, ("bf16",), (1,), module)
        for name in (_FORWARD, _BACKWARD):
            stored.expect(names[name], source, ("bf16",), matrix, module)
        rest = [*_SCALES, _FORWARD, _BACKWARD, *(["weight"] if config.store_master_weights else [])]
        beside = tuple(names[name] for name in rest if names[name] not in used.values())
        note = "from its master weight" if config.store_master_weights else ""
        return Quantized(fmt, used, (*beside, *(everything[name] for name in empty)), note)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        config, names = cast(FpQuantConfig, config), stored.tensors(source, module)
        around = {
            name: stored.finite(source.read(names[name]), names[name], module) for name in (*_SCALES, _FORWARD)
        }  # fmt: skip
        if not selected.names:
            return self._encode(config, module, source.read(module.weight), around)
        packed = super().read(config, module, selected, source)
        if "scales" in packed.tensors:
            _finite_scales(packed, selected.names["scales"], module)
        return self._around(config, packed, around)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        config = cast(FpQuantConfig, config)
        whole = torch.tensor([1.0 if config.forward_method == "quest" else 3.0], dtype=torch.bfloat16)
        matrix = rotation(config.transform_init, config.size)
        return self._encode(config, module, weight, {**dict.fromkeys(_SCALES, whole), _FORWARD: matrix})

    def _encode(
        self, config: FpQuantConfig, module: Module, weight: torch.Tensor, around: dict[str, torch.Tensor]
    ) -> Packed:
        """The packed weight, rounded to bf16 first, as the package holds it."""
        from qcompile.pack import pack
        from qcompile.transforms.fp_quant import GROUP, encode

        weight = stored.usable(weight, module).bfloat16().float()
        turned = (weight.reshape(module.n, -1, config.size) @ around[_FORWARD].float()).flatten(1)
        group, whole = GROUP[config.forward_dtype], around["weight_global_scale"]
        values, scale, step = encode(
            turned.reshape(module.n, -1, group),
            whole.float(),
            config.forward_dtype,
            config.forward_method,
            config.pseudoquantization,
        )
        fmt = self._format(config, module)
        if config.pseudoquantization:
            tensors = {"weight": (values * step).flatten(1).bfloat16()}
        else:
            small = scale.to(torch.float8_e4m3fn if config.forward_dtype == "nvfp4" else torch.float8_e8m0fnu)
            fields = {
                "code": codes(values).flatten(1),
                "scale": small.view(torch.uint8).to(torch.int32).squeeze(-1).repeat_interleave(group, 1),
                "whole": whole.reshape(1, 1),
            }
            tensors = pack(fmt, fields, module.n, module.k)
        return self._around(config, stored.packed(fmt, tensors, module), around)

    def _around(self, config: FpQuantConfig, packed: Packed, around: dict[str, torch.Tensor]) -> Packed:
        from qcompile.transform import Applied
        from qcompile.transforms.cast import RoundTo
        from qcompile.transforms.fp_quant import RoundFpQuant
        from qcompile.transforms.linear import Rotate

        emulated = config.pseudoquantization
        rounding = RoundFpQuant(cast(Any, config.forward_dtype), cast(Any, config.forward_method), emulated)
        before = [
            Applied(Rotate(config.size), {"matrix": around[_FORWARD].t().contiguous()}),
            Applied(rounding, {name: around[name] for name in _SCALES}),
            *([Applied(RoundTo())] if emulated else []),
        ]
        return replace(packed, before=tuple(before), after=(Applied(RoundTo()),))

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        rotate, rounding = packed.before[:2]
        matrix = rotate.tensors["matrix"].t().contiguous()
        weight = {"dqweight" if name == "weight" else name: tensor for name, tensor in packed.tensors.items()}
        return weight | rounding.tensors | {_FORWARD: matrix, _BACKWARD: matrix.clone()}

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        return config.to_dict() | {"store_master_weights": False}


def _finite_scales(packed: Packed, name: str, module: Module) -> None:
    """CheckpointError for the bytes of a NaN among the scales in use; what lies beyond them is never written."""
    fmt, scales = cast("Real", packed.format), packed.tensors["scales"]
    scales = scales[: packed.N, : packed.K // fmt.group].contiguous()
    stored.finite(scales.view(torch.float8_e4m3fn if fmt.dtype == "nvfp4" else torch.float8_e8m0fnu), name, module)


def rotation(init: str, size: int) -> torch.Tensor:
    """The matrix that fp-quant begins with, bf16 [size, size].

    "hadamard": Sylvester's, over sqrt(size); "gsr": its columns in the order of their sign changes; "identity".
    """
    if init == "identity":
        return torch.eye(size, dtype=torch.bfloat16)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if init == "gsr":
        changes = (matrix[1:] != matrix[:-1]).sum(0)
        matrix = matrix[:, torch.argsort(changes)]
    return (matrix * float(size**-0.5)).bfloat16()
