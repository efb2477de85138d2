"""FineGrainedFP8 (DeepSeek's block FP8) and MXFP8: E4M3 weights with a scale for each block, x rounded to E4M3 too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import ConfigError
from qcompile.formats.blocks import grid
from qcompile.formats.minifloat import Fp4, Fp8
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.transform import Applied
from qcompile.transforms.round_float import RoundFloat, RoundMx

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

SCALE_NAMES = ("weight_scale_inv", "scale", "qscale_weight")
"""What checkpoints call the scales: most of them, DeepSeek V4, Mistral."""
STATIC_NAMES = ("activation_scale", "qscale_act")
FLOATS = ("f32", "bf16", "f16")
LARGEST = 448.0  # of E4M3


@dataclass(frozen=True)
class FineGrainedFp8Config(MethodConfig):
    """The fields of transformers' FineGrainedFP8Config."""

    method: ClassVar[str] = "fp8"
    foreign: ClassVar[Mapping[str, str]] = {"fmt": "", "ignored_layers": ""}
    loading: ClassVar[tuple[str, ...]] = ("dequantize", "modules_to_not_convert")

    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | None = (128, 128)
    dequantize: bool = False
    modules_to_not_convert: list[str] | None = None
    modules_to_convert: list[str] | None = None
    scale_fmt: str = "float"
    expert_dtype: str = "fp8"

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        """MiniMax calls the modules that stay dense `ignored_layers`."""
        if data.get("modules_to_not_convert") is None and "ignored_layers" in data:
            data["modules_to_not_convert"] = data.pop("ignored_layers")
        return data

    def __post_init__(self) -> None:
        self.require(isinstance(self.activation_scheme, str), "activation_scheme", "'dynamic' or 'static'")
        object.__setattr__(self, "activation_scheme", self.activation_scheme.lower())
        self.require(self.activation_scheme in ("dynamic", "static"), "activation_scheme", "'dynamic' or 'static'")
        block: Any = self.weight_block_size
        whole = isinstance(block, tuple | list) and all(type(size) is int and size > 0 for size in block)
        self.require(block is None or (whole and len(block) == 2), "weight_block_size", "None or two positive integers")
        object.__setattr__(self, "weight_block_size", None if block is None else tuple(block))
        self.require(self.scale_fmt in ("float", "ue8m0"), "scale_fmt", "'float' or 'ue8m0'")
        self.require(self.expert_dtype in ("fp8", "fp4"), "expert_dtype", "'fp8' or 'fp4'")
        self.require_bools("dequantize")
        self.require_patterns("modules_to_not_convert")
        self.require_patterns("modules_to_convert")


@dataclass(frozen=True)
class Mxfp8Config(FineGrainedFp8Config):
    """FineGrainedFp8Config with the blocks that the name means: a power of two for every 32 inputs of an output."""

    method: ClassVar[str] = "mxfp8"

    weight_block_size: tuple[int, int] | None = (1, 32)
    scale_fmt: str = "ue8m0"


class FineGrainedFp8(Method):
    """quant_method "fp8".

    x is rounded as the original's Triton kernel rounds it, for each row and the columns of a block of the weight:
    s = max|x| / 448, codes E4M3(x / max(s, 1e-12)) saturating. One stored scale instead where the scheme is static; one
    for the row where a single block covers the weight (a static scale is not used then); the next power of two where
    blocks are [1, 32] with power-of-two scales. Deviations: the original rounds x and y to bfloat16; without a GPU it
    does not round x at all, and takes short blocks for equal ones; on Hopper and Blackwell DeepGEMM multiplies by 1 / s
    with max|x| at least 1e-4, which moves single codes.
    """

    name = "fp8"
    source = "https://arxiv.org/abs/2412.19437"
    Config = FineGrainedFp8Config
    formats = ("fp8", "fp4")
    experts = True

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        scales = ("weight_scale_inv", "qscale_weight")
        return any(name.endswith(scales) or source.info(name).dtype == "f8e4m3" for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(FineGrainedFp8Config, config)
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        patterns, layer = config.modules_to_not_convert, module
        others = [path for m in modules.values() if m.experts for path in _beside(m)]
        skip.check("modules_to_not_convert", patterns or (), [*modules, *others], self.name)
        if module.kind == "Experts":  # patterns name the layer that has both weights
            layer = replace(module, path=_beside(module)[0])
        dense = skip.dense(layer, modules, "modules_to_not_convert", patterns, kinds=("Linear", "Experts"))
        if dense or config.dequantize:
            return Skip(dense or "dequantize is true: no weight is quantized")
        if module.transposed or (module.kind == "Experts" and module.bias is not None):
            return Skip("experts with biases, or stored as [K, N], are not converted by the method")
        rows, columns = config.weight_block_size or (module.n, module.k)
        if module.n % rows or module.k % columns:
            return Skip(f"[{module.n}, {module.k}] is not made of whole blocks [{rows}, {columns}]: it stays dense")
        self._require_dynamic(config, module)
        return Quantized(_format(config, module, "f8e4m3", "f8e8m0" if config.scale_fmt == "ue8m0" else "f32"))

    def _require_dynamic(self, config: FineGrainedFp8Config, module: Module) -> None:
        if config.activation_scheme != "dynamic":
            raise ConfigError(
                f"{self.name} cannot quantize on the fly with static activation scales",
                where=module.path,
                found="activation_scheme 'static' and a float weight",
                expected="scales from a calibration, as a checkpoint holds them",
                remedy="use activation_scheme 'dynamic'",
            )

    def _stored(self, config: FineGrainedFp8Config, module: Module, source: TensorSource) -> Skip | Quantized:
        names = _names(module, source)
        stored.require(names, ("weight",), module, self.name)
        dtype = source.info(names["weight"]).dtype
        scales = ("weight_scale",) if module.kind == "Embedding" else SCALE_NAMES
        scale = next((name for name in scales if name in names), scales[0])
        if scale not in names and dtype not in ("f8e4m3", "i8"):
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, ("weight", scale), module, self.name)
        numbers = source.info(names[scale])
        fmt = _format(config, module, dtype, numbers.dtype)
        weight, blocks = (_whole(module, each.shape) for each in fmt.stored(module.n, module.k))
        stored.expect(names["weight"], source, ("i8" if dtype == "i8" else "f8e4m3",), weight, module)
        alone = blocks == (1, 1) and numbers.shape in ((), (1,))  # one scale is stored as a plain number
        stored.expect(names[scale], source, (*FLOATS, "f8e8m0", "u8"), numbers.shape if alone else blocks, module)
        static = [name for name in STATIC_NAMES if name in names]
        if not static and _is_static(_rounding(config, module, fmt)):
            stored.require(names, ("weight", scale, STATIC_NAMES[0]), module, self.name)
        for name in static:
            one = (1,) if source.info(names[name]).shape == (1,) else ()
            stored.expect(names[name], source, FLOATS, one, module)
        used = {"weight": names["weight"], "scale": names[scale]}
        return Quantized(fmt, used, tuple(names[name] for name in static))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        fmt, data = selected.format, {name: source.read(full) for name, full in selected.names.items()}
        if data["weight"].dtype == torch.int8:
            data["weight"] = data["weight"].view(torch.uint8)
        if data["scale"].dtype == torch.uint8:
            data["scale"] = data["scale"].view(torch.float8_e8m0fnu)
        for name, full in selected.names.items():
            stored.finite(data[name], full, module)
        whole = replace(module, n=module.n * max(module.experts, 1))  # the experts of a mixture, one below the other
        tensors = {each.name: data[each.name].reshape(each.shape) for each in fmt.stored(whole.n, whole.k)}
        packed = stored.packed(fmt, tensors, whole)
        static = [stored.finite(source.read(name), name, module) for name in selected.also_claims]
        return _rounded(cast(FineGrainedFp8Config, config), module, packed, static)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """s = 448 / max|w| of a block (1 where that is 0), codes E4M3(w * s) saturating, stored 1 / s.

        "ue8m0": 1 / s is rounded up to a power of two first. Short blocks are those of the weight padded with zeros.
        """
        config = cast(FineGrainedFp8Config, config)
        self._require_dynamic(config, module)
        weight = stored.usable(weight, module)
        fmt = _format(config, module, "f8e4m3", "f8e8m0" if config.scale_fmt == "ue8m0" else "f32")
        n, k = module.n, module.k
        rows, columns = config.weight_block_size or (n, k)
        down, across = grid(n, k, rows, columns)
        padded = torch.nn.functional.pad(weight, (0, across * columns - k, 0, down * rows - n))
        blocks = padded.reshape(down, rows, across, columns)
        most = blocks.abs().amax((1, 3))
        scale = torch.where(most > 0, LARGEST / torch.where(most > 0, most, 1.0), 1.0)
        inverse = 1.0 / scale
        if config.scale_fmt == "ue8m0":
            inverse = torch.exp2(torch.ceil(torch.log2(inverse.clamp(min=2.0**-126)))).to(torch.float8_e8m0fnu)
            scale = 1.0 / inverse.float()
        codes = (blocks * scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        codes = codes.reshape(down * rows, across * columns)[:n, :k].contiguous()
        return _rounded(config, module, stored.packed(fmt, {"weight": codes, "scale": inverse}, module), [])

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        config = cast(FineGrainedFp8Config, config)
        weight, scale = packed.tensors["weight"], packed.tensors["scale"]
        if module.kind == "Embedding":
            return {"weight": weight, "weight_scale": scale.reshape(1)}
        weight = weight.view(torch.int8) if packed.format.kind == "fp4" else weight
        if module.kind == "Experts":
            one, blocks = (_whole(module, each.shape) for each in packed.format.stored(module.n, module.k))
            return {"": weight.reshape(one), "_scale_inv": scale.reshape(blocks)}
        whole = config.weight_block_size is None and packed.format.kind == "fp8"
        made = {"weight": weight, "weight_scale_inv": scale.reshape(()) if whole else scale}
        if config.activation_scheme == "static":  # the original's layers have one even where they do not use it
            used = [each.tensors["scale"].reshape(()) for each in packed.before if each.tensors]
            made["activation_scale"] = used[0] if used else torch.ones(())
        return made


class Mxfp8(FineGrainedFp8):
    """quant_method "mxfp8": FineGrainedFP8 in blocks [1, 32] with power-of-two scales."""

    name = "mxfp8"
    source = "https://arxiv.org/abs/2310.10537"
    Config = Mxfp8Config


def _format(config: FineGrainedFp8Config, module: Module, weight: str, scale: str) -> Fp8 | Fp4:
    """The format of a module whose source tensors have these dtypes; bytes as scales are the exponents of f8e8m0."""
    scale = scale if scale in (*FLOATS, "f8e8m0") else "f8e8m0"
    if weight == "i8":  # experts as pairs of E2M1, whatever the config says about blocks
        return Fp4(32, cast(Any, scale))
    rows, columns = (0, 0) if module.kind == "Embedding" else config.weight_block_size or (0, 0)
    if module.kind == "Experts" and (rows == 0 or rows >= module.n):
        rows = module.n
    return Fp8(scale=scale, rows=rows, columns=columns)


def _names(module: Module, source: TensorSource) -> dict[str, str]:
    """The source tensors of a module by the names that a layer has for them."""
    if module.kind != "Experts":
        return stored.tensors(source, module)
    ends = {"weight": "", "weight_scale_inv": "_scale_inv", "activation_scale": "_activation_scale"}
    return {name: module.weight + end for name, end in ends.items() if module.weight + end in source.names()}


def _beside(module: Module) -> tuple[str, ...]:
    """The paths of the experts that a weight belongs to and of their router, which patterns may name."""
    experts = module.path.rpartition(".")[0]
    return experts, *(f"{experts.rpartition('.')[0]}.{name}" for name in ("router", "gate"))


def _whole(module: Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor of one expert, or of all of them where the module is a mixture."""
    return (module.experts, *shape) if module.kind == "Experts" else shape


def _rounding(config: FineGrainedFp8Config, module: Module, fmt: Fp8 | Fp4) -> RoundFloat | RoundMx | None:
    """How x is rounded before a weight of the module."""
    block = config.weight_block_size
    if config.dequantize or module.kind == "Embedding":
        return None
    if isinstance(fmt, Fp4) or (block == (1, 32) and fmt.scale == "f8e8m0"):
        return RoundMx("f8e4m3", 32, "ceil", shift=0, divisor=LARGEST)
    if block is None or block == (module.n, module.k):
        return RoundFloat("token", floor=1e-12)
    if config.activation_scheme == "static":
        return RoundFloat("tensor", scale="f32")
    return RoundFloat("group", block[1], floor=1e-12) if block[1] < module.k else RoundFloat("token", floor=1e-12)


def _is_static(rounding: RoundFloat | RoundMx | None) -> bool:
    return isinstance(rounding, RoundFloat) and bool(rounding.scale)


def _rounded(config: FineGrainedFp8Config, module: Module, packed: Packed, static: list[torch.Tensor]) -> Packed:
    """The weight with the rounding of x before it."""
    rounding = _rounding(config, module, cast("Fp8 | Fp4", packed.format))
    if rounding is not None:
        tensors = {"scale": static[0].reshape(1).float()} if _is_static(rounding) else {}
        packed.before = (Applied(rounding, tensors),)
    return packed
