"""MXFP4: the experts of gpt-oss as 4-bit floats, 32 inputs sharing a power of two; data-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import Packed
from qcompile.formats.dense import Dense
from qcompile.formats.minifloat import Fp4
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.program import Module
    from qcompile.sources import TensorSource

GROUP = 32
FORMAT = Fp4(group=GROUP, scale="u8")
BLOCKS, SCALES = "_blocks", "_scales"
# Halfway between neighbouring magnitudes; a tie goes to the greater one.
HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class Mxfp4Config(MethodConfig):
    """The fields of transformers' Mxfp4Config: `dequantize` unpacks every weight to float32 at compile time."""

    method: ClassVar[str] = "mxfp4"
    loading: ClassVar[tuple[str, ...]] = ("dequantize",)

    modules_to_not_convert: list[str] | None = None
    dequantize: bool = False

    def __post_init__(self) -> None:
        self.require_patterns("modules_to_not_convert")
        self.require_bools("dequantize")


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes u8 [N, K / 2], the even input in the low nibble, and exponents u8 [N, K / 32] of a float weight [N, K].

    The weight is rounded to bfloat16 first. The scale is the power of two at or above max|x| / 6, so nothing is clipped.
    Source: `downcast_to_mxfp_torch` of the kernels that transformers loads.
    """
    blocks = weight.to(torch.bfloat16).float().reshape(*weight.shape[:-1], -1, GROUP)
    most = (blocks.abs().amax(-1) / 6).contiguous()
    exponent = (most.view(torch.int32) + 0x007FFFFF) >> 23
    scale = torch.where(exponent > 0, torch.ldexp(torch.ones(()), exponent - 127), 1.0)
    magnitude = torch.bucketize((blocks / scale[..., None]).abs(), torch.tensor(HALFWAY), right=True)
    codes = (magnitude | torch.signbit(blocks) << 3).flatten(-2).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, exponent.to(torch.uint8)


class Mxfp4(Method):
    """quant_method "mxfp4".

    Only the experts of gpt-oss are converted, as in transformers; activations are not rounded. Weights are quantized along
    the inputs, which is how checkpoints hold them (transformers 5.23 quantizes a float model along the outputs, and cannot
    run the result). An exponent byte 0 is worth 2^-127 as in transformers' own decoding, not 0 as in its kernels.
    """

    name = "mxfp4"
    source = "https://arxiv.org/abs/2310.10537"
    Config = Mxfp4Config
    formats = ("fp4",)
    experts = True

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(BLOCKS) for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(Mxfp4Config, config)
        if module.kind != "Experts" or not module.transposed or module.bias is None:
            return Skip("only the experts of gpt-oss are converted by the method")
        names = {end: module.path + end for end in (BLOCKS, SCALES)}
        if self.prequantized(config, source):
            return self._stored(config, module, names, source)
        layer = module.path.rpartition(".")[0]
        patterns = config.modules_to_not_convert
        others = [path for m in modules.values() if m.experts for path in _beside(m)]
        skip.check("modules_to_not_convert", patterns or (), [*modules, *others], self.name)
        dense = skip.dense(replace(module, path=layer), modules, "modules_to_not_convert", patterns, kinds=("Experts",))
        if dense or config.dequantize:
            return Skip(dense or "dequantize is true")
        _legal(module)
        return Quantized(FORMAT)

    def _stored(
        self, config: Mxfp4Config, module: Module, names: dict[str, str], source: TensorSource
    ) -> Skip | Quantized:
        there = source.names().under(module.path)
        if names[BLOCKS] not in there and module.weight in there:
            return Skip("the checkpoint stores its weight dense")
        missing = [name for name in names.values() if name not in there]
        if missing:
            raise CheckpointError(
                "a module quantized with mxfp4 lacks a stored tensor",
                where=module.path,
                found=", ".join(sorted(there)) or "no tensor of the module",
                expected=", ".join(names.values()),
                remedy=f"the checkpoint is incomplete: it must hold {', '.join(missing)}",
            )
        _legal(module)
        shape = (module.experts, module.n, module.k // GROUP)
        stored.expect(names[BLOCKS], source, ("u8",), (*shape, GROUP // 2), module)
        stored.expect(names[SCALES], source, ("u8",), shape, module)
        used = {"weight": names[BLOCKS], "scale": names[SCALES]}
        return Quantized(Dense("f32") if config.dequantize else FORMAT, used)

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        rows = module.experts * module.n
        scale = source.read(selected.names["scale"])
        if bool((scale == 255).any()):
            raise CheckpointError(
                "a stored tensor holds a scale that is not finite",
                where=f"{selected.names['scale']} (module {module.path})",
                found=f"exponent 255 at {(scale == 255).nonzero()[0].tolist()}",
                expected="exponents from 0 to 254",
                remedy="the file is damaged, or the quantization that wrote it failed for this module",
            )
        blocks = source.read(selected.names["weight"])
        tensors = {"weight": blocks.reshape(rows, -1), "scale": scale.reshape(rows, -1)}
        if isinstance(selected.format, Dense):
            tensors = {"weight": dequantize(FORMAT, tensors, rows, module.k)}
        packed = Packed(selected.format, tensors, rows, module.k)
        packed.check(module.path)
        return packed

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        codes, scale = quantize_blocks(stored.usable(weight, module))
        return stored.packed(FORMAT, {"weight": codes, "scale": scale}, module)

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        return {name: value for name, value in config.to_dict().items() if name != "dequantize"}

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        if not isinstance(packed.format, Fp4):
            raise ConfigError(
                "weights that were unpacked are not stored as mxfp4",
                where=module.path,
                found="dequantize=True",
                remedy="compile without dequantize to write a checkpoint",
            )
        shape = (module.experts, module.n, module.k // GROUP)
        return {
            BLOCKS: packed.tensors["weight"].reshape(*shape, GROUP // 2),
            SCALES: packed.tensors["scale"].reshape(shape),
        }


def _beside(module: Module) -> tuple[str, str]:
    """The paths of the experts that a weight belongs to and of their router, which patterns may name."""
    experts = module.path.rpartition(".")[0]
    return experts, f"{experts.rpartition('.')[0]}.router"


def _legal(module: Module) -> None:
    if module.k % GROUP:
        raise ConfigError(
            "mxfp4 cannot store this module's weight",
            where=f"{module.path} [{module.experts}, {module.n}, {module.k}]",
            found=f"{module.k} inputs",
            expected=f"a multiple of {GROUP}",
            remedy="leave the experts of this layer dense with modules_to_not_convert",
        )
