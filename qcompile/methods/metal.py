"""Metal: affine codes with a float offset, as transformers' metal method and MLX store them, and MLX's float modes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import CheckpointError
from qcompile.methods import metal_rounding as rounding
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Format, Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

# MLX's modes: the bits and groups that each allows.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
OFFSETS = ("qbiases", "biases")  # transformers' name and MLX's


@dataclass(frozen=True)
class MetalConfig(MethodConfig):
    """The fields of transformers' MetalConfig, and the two that make it MLX's own.

    `bits` 2, 4 or 8, over `group_size` inputs. With `mode` it is a config of MLX ("affine", "mxfp4", "mxfp8" or
    "nvfp4"): embeddings are quantized too, affine codes have 1 to 6 or 8 bits and MLX's rounding, and `layers` maps module
    paths to what differs there ({"bits": 6}), or to False, which leaves a module dense.
    """

    method: ClassVar[str] = "metal"
    steering: ClassVar[Mapping[str, str]] = {
        "dequantize": "weights stay packed: they are decoded where they are used",
    }

    bits: int = 4
    group_size: int = 64
    modules_to_not_convert: list[str] | None = None
    dequantize: bool = False
    mode: str | None = None
    layers: Mapping[str, Mapping[str, Any] | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.require_bools("dequantize")
        self.require_patterns("modules_to_not_convert")
        self.require(self.mode is None or self.mode in MODES, "mode", f"None or {', '.join(MODES)}")
        if self.mode is None:
            self.require(type(self.bits) is int and self.bits in (2, 4, 8), "bits", "2, 4 or 8")
            self.require(type(self.group_size) is int and self.group_size > 0, "group_size", "a positive integer")
            self.require(not self.layers, "layers", "nothing without `mode`: they belong to MLX's configs")
            return
        bits, groups = MODES[self.mode]
        self.require(type(self.bits) is int and self.bits in bits, "bits", _choice(bits) + f" in mode {self.mode!r}")
        self.require(self.group_size in groups, "group_size", _choice(groups) + f" in mode {self.mode!r}")
        self.require(
            all(isinstance(value, (bool, Mapping)) for value in self.layers.values()), "layers", "dicts, or False"
        )
        for path in self.layers:
            self.layer(path)

    def layer(self, path: str) -> MetalConfig | None:
        """The config of one module; None where `layers` leaves it dense."""
        own = self.layers.get(path, True)
        if isinstance(own, bool):
            return self if own else None
        return MetalConfig(
            own.get("bits", self.bits), own.get("group_size", self.group_size), mode=own.get("mode", self.mode)
        )


class Metal(Method):
    """quant_method "metal", and MLX's checkpoints, which name no method.

    Weights are decoded in float32, as the kernel does; transformers' own fallback rounds them to the scales' dtype.
    """

    name = "metal"
    source = "https://github.com/ml-explore/mlx"
    Config = MetalConfig
    formats = ("mlx", "fp4", "fp8")

    def recognise(self, model_config: Mapping[str, Any], source: TensorSource) -> dict[str, Any] | None:
        said = model_config.get("quantization") or model_config.get("quantization_config")
        if not isinstance(said, Mapping) or "quant_method" in said or not {"bits", "group_size"} <= said.keys():
            return None
        if not _marked(source):
            return None
        layers = {name: value for name, value in said.items() if isinstance(value, (Mapping, bool))}
        rest = {name: value for name, value in said.items() if name not in layers}
        return {"quant_method": self.name, "mode": "affine"} | rest | {"layers": layers}

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return _marked(source)

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(MetalConfig, config)
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        dense = self._dense(config, module, modules)
        if dense:
            return Skip(dense)
        fmt = self._format(config.layer(module.path) or config, module.dtype)
        stored.legal(fmt, module, self.name)
        return Quantized(fmt)

    def _dense(self, config: MetalConfig, module: Module, modules: Mapping[str, Module]) -> str | None:
        if config.mode is None:
            patterns = config.modules_to_not_convert
            skip.check("modules_to_not_convert", patterns or (), modules, self.name)
            return skip.dense(module, modules, "modules_to_not_convert", patterns)
        skip.check("layers", config.layers, modules, self.name, str.__eq__)
        layer = config.layer(module.path)
        if layer is None:
            return "layers leaves it dense"
        if module.kind == "Conv1D":
            return "Conv1D is not converted by the method (only Linear and Embedding)"
        if module.k % layer.group_size:
            return f"its {module.k} inputs are no multiple of the group, {layer.group_size}"
        return None

    def _format(self, config: MetalConfig, scale: str) -> Format:
        from qcompile.formats.minifloat import Fp4, Fp8
        from qcompile.formats.mlx import Mlx

        if config.mode == "mxfp8":
            return Fp8(scale="u8", columns=32)
        if config.mode == "mxfp4":
            return Fp4(32, "u8")
        if config.mode == "nvfp4":
            return Fp4(16, "f8e4m3")
        return Mlx(config.bits, config.group_size, "f16" if scale == "f16" else "bf16" if scale == "bf16" else "f32")

    def _stored(self, config: MetalConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        stored.require(names, ("weight",), module, self.name)
        if "scales" not in names:
            return Skip("the checkpoint stores its weight dense")
        layer = config.layer(module.path)
        if layer is None:
            raise CheckpointError(
                "a module that the config leaves dense is quantized",
                where=module.path,
                found=names["scales"],
                expected="no scales: the config says false for this module",
                remedy="the checkpoint and its config.json do not belong together",
            )
        affine = layer.mode in (None, "affine")
        offset = OFFSETS[config.mode is not None]
        if affine:
            stored.require(names, ("weight", "scales", offset), module, self.name)
        fmt = self._format(layer, source.info(names["scales"]).dtype)
        stored.legal(fmt, module, self.name)
        used = {s.name: names[{"scale": "scales", "biases": offset}.get(s.name, s.name)]
                for s in fmt.stored(module.n, module.k)}  # fmt: skip
        words = (module.n, module.k * layer.bits // 32)
        stored.expect(names["weight"], source, ("uint32",), words, module)
        for s in fmt.stored(module.n, module.k)[1:]:
            stored.expect(used[s.name], source, (s.dtype if affine else "u8",), s.shape, module)
        return Quantized(fmt, used)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        """Words of u32 are read as the bytes that the format wants, and so are nvfp4's scales."""
        tensors = {}
        for s in selected.format.stored(module.n, module.k):
            name = selected.names[s.name]
            tensor = source.read(name).contiguous()
            if tensor.dtype in (torch.uint32, torch.uint8):
                tensor = tensor.view(DTYPES[s.dtype])
            if tensor.dtype == torch.uint8 and s.name == "scale" and bool((tensor == 255).any()):
                stored.finite(tensor.view(torch.float8_e8m0fnu), name, module)
            tensors[s.name] = stored.finite(tensor, name, module)
        return stored.packed(selected.format, tensors, module)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Rounding in float32; affine scales and offsets are cast to the weight's dtype after the codes were made."""
        from qcompile.pack import pack

        config = cast(MetalConfig, config)
        config = config.layer(module.path) or config
        n, k = module.n, module.k
        fmt = self._format(config, module.dtype)
        stored.legal(fmt, module, self.name)
        groups = stored.usable(weight, module).reshape(n, -1, config.group_size)

        def whole(part: torch.Tensor) -> torch.Tensor:
            return part.expand_as(groups).reshape(n, k)

        if config.mode == "mxfp8":
            scaled, exponent = rounding.power_of_two(groups, 448)
            codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).reshape(n, k)
            return stored.packed(fmt, {"weight": codes, "scale": exponent.squeeze(-1)}, module)
        if config.mode in ("mxfp4", "nvfp4"):
            mx = config.mode == "mxfp4"
            scaled, scale = rounding.power_of_two(groups, 6) if mx else rounding.e4m3_scale(groups)
            fields = {"code": rounding.nearest_e2m1(scaled).reshape(n, k), "scale": whole(scale)}
        else:
            round_ = rounding.min_max if config.mode is None else rounding.edge_first
            code, scale, offset = round_(groups, config.bits)
            dtype = DTYPES[fmt.stored(n, k)[1].dtype]
            fields = {
                "code": whole(code).to(torch.int32),
                "scale": whole(scale.to(dtype)),
                "offset": whole(offset.to(dtype)),
            }
        return stored.packed(fmt, pack(fmt, fields, n, k), module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        offset = OFFSETS[cast(MetalConfig, config).mode is not None]
        out = {}
        for name, tensor in packed.tensors.items():
            whole = tensor.contiguous()
            if name == "weight":
                out[name] = whole.view(torch.uint32)
            elif name == "biases":
                out[offset] = whole
            else:
                out["scales"] = whole.view(torch.uint8) if whole.dtype == torch.float8_e4m3fn else whole
        return out

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """transformers' fields; for MLX, as MLX writes them: without a method, and with its layers among them."""
        config = cast(MetalConfig, config)
        if config.mode is not None:
            return {"group_size": config.group_size, "bits": config.bits, "mode": config.mode, **config.layers}
        said = config.to_dict()
        return {name: said[name] for name in ("quant_method", "bits", "group_size", "modules_to_not_convert")}

    def model_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        """MLX reads `quantization`, and writes the same again as `quantization_config`."""
        return (
            {"quantization": self.stored_config(config, weights)} if cast(MetalConfig, config).mode is not None else {}
        )


def _marked(source: TensorSource) -> bool:
    """True when some module of the source has scales beside words of codes."""
    names = frozenset(source.names())
    marks = (name.removesuffix("scales") + "weight" for name in names if name == "scales" or name.endswith(".scales"))
    return any(name in names and source.info(name).dtype == "uint32" for name in marks)


def _choice(values: tuple[int, ...]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))
