"""HIGGS: rotated weights rounded to the points of a grid that is optimal for normally distributed numbers, data-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from qcompile.dtypes import DTYPES
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.formats.higgs import Higgs as HiggsFormat
    from qcompile.program import Module
    from qcompile.sources import TensorSource

STORED = ("weight", "scales", "tables", "tables2")
SHORT = ("f16", "bf16")


@dataclass(frozen=True)
class HiggsConfig(MethodConfig):
    """The fields of transformers' HiggsConfig. `tune_metadata` says for each module which of FLUTE's layouts it has."""

    method: ClassVar[str] = "higgs"

    bits: int = 4
    p: int = 2
    modules_to_not_convert: list[str] | None = None
    hadamard_size: int = 512
    group_size: int = 256
    tune_metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        return data | {"tune_metadata": {}} if data.get("tune_metadata", 0) is None else data

    def __post_init__(self) -> None:
        self.require(self.bits in (2, 3, 4), "bits", "2, 3 or 4")
        self.require(self.p in (1, 2), "p", "1 or 2")
        self.require_patterns("modules_to_not_convert")
        self.require(self.group_size in (64, 128, 256), "group_size", "64, 128 or 256")
        size = self.hadamard_size
        power = type(size) is int and 0 < size <= 32768 and size & (size - 1) == 0
        self.require(power and size % self.group_size == 0, "hadamard_size", "a power of two, at least the group_size")
        self.require(isinstance(self.tune_metadata, Mapping), "tune_metadata", "a dict by module names")


class Higgs(Method):
    """quant_method "higgs".

    The stored weight acts on x rotated in blocks of `hadamard_size` (a Hadamard matrix over the root of its size);
    `q.weight` is rotated back. x, the rotation and the product are float32 here; the original rotates in 16 bits and rounds
    each point times its scale to 16 bits (a relative 2^-11 in float16, 2^-8 in bfloat16). Two of its bugs are not
    followed: it never adds a layer's bias, which is added here, and transformers converts the bits that `tables2` of a
    bfloat16 model holds under the name of float16, which are read as they are here.
    """

    name = "higgs"
    source = "https://arxiv.org/abs/2411.17525"
    Config = HiggsConfig
    formats = ("higgs",)

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith("tables2") for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        config = cast(HiggsConfig, config)
        if self.prequantized(config, source):
            return self._stored(config, module, source)
        patterns = config.modules_to_not_convert
        skip.check("modules_to_not_convert", patterns or (), modules, self.name)
        dense = skip.dense(module, modules, "modules_to_not_convert", patterns)
        if dense:
            return Skip(dense)
        note = (
            ""
            if module.dtype in SHORT
            else f"higgs itself refuses {module.dtype} weights: its numbers are stored as f16"
        )
        return Quantized(self._format(config, module, module.dtype, 32), note=note)

    def _format(self, config: HiggsConfig, module: Module, dtype: str, tile: int) -> HiggsFormat:
        from qcompile.formats.higgs import Higgs as HiggsFormat

        fmt = HiggsFormat(config.bits, config.group_size, tile, "bf16" if dtype == "bf16" else "f16")
        if module.k % config.hadamard_size:
            raise ConfigError(
                "higgs cannot store this module's weight",
                where=f"{module.path} [{module.n}, {module.k}]",
                found=f"K = {module.k}",
                expected=f"a multiple of hadamard_size, {config.hadamard_size}",
                remedy="choose a smaller hadamard_size, or name the module in modules_to_not_convert",
            )
        stored.legal(fmt, module, self.name)
        return fmt

    def _stored(self, config: HiggsConfig, module: Module, source: TensorSource) -> Skip | Quantized:
        names = stored.tensors(source, module)
        if "tables2" not in names:
            stored.require(names, ("weight",), module, self.name)
            return Skip("the checkpoint stores its weight dense")
        stored.require(names, STORED, module, self.name)
        fmt = self._format(config, module, source.info(names["scales"]).dtype, tile(config, module.path))
        weight, scales, _ = fmt.stored(module.n, module.k)
        stored.expect(names["weight"], source, (weight.dtype,), weight.shape, module)
        stored.expect(names["scales"], source, SHORT, scales.shape, module)
        levels = 2**config.bits
        stored.expect(names["tables"], source, (fmt.dtype,), (levels,), module)
        stored.expect(names["tables2"], source, tuple(dict.fromkeys(("f16", fmt.dtype))), (levels, levels, 2), module)
        used = {name: names[name] for name in ("weight", "scales", "tables2")}
        return Quantized(fmt, used, (names["tables"],))

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        config, names = cast(HiggsConfig, config), selected.names
        points = source.read(names["tables2"]).view(DTYPES[cast("HiggsFormat", selected.format).dtype])
        tensors = {
            "weight": source.read(names["weight"]),
            "scales": stored.finite(source.read(names["scales"]), names["scales"], module),
            "tables2": stored.finite(points, names["tables2"], module).reshape(-1, 2),
        }
        return self._rotated(config, stored.packed(selected.format, tensors, module))

    def _rotated(self, config: HiggsConfig, packed: Packed) -> Packed:
        from qcompile.transform import Applied
        from qcompile.transforms.linear import Hadamard

        packed.before = (Applied(Hadamard(config.hadamard_size)),)
        return packed

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """Each block over its norm, rotated, and rounded to the nearest point; one scale for a block's groups."""
        from qcompile.formats.higgs_grids import points
        from qcompile.pack import pack

        config = cast(HiggsConfig, config)
        fmt = self._format(config, module, module.dtype, 32)
        codes, norm = nearest(stored.usable(weight, module), config)
        pair = codes if config.p == 2 else codes[:, ::2] << config.bits | codes[:, 1::2]
        dtype, size = DTYPES[fmt.dtype], config.hadamard_size
        scales = (norm / size**0.5).to(dtype).repeat_interleave(size, 1)
        grid = points(config.p, config.bits).to(dtype)
        if config.p == 1:  # the pairs of its levels
            grid = torch.cartesian_prod(grid[:, 0], grid[:, 0])
        pair = pair.to(torch.int32).repeat_interleave(2, 1)
        point = grid[pair, torch.arange(module.k) % 2]
        tensors = pack(fmt, {"pair": pair, "point": point, "scale": scales}, module.n, module.k)
        return self._rotated(config, stored.packed(fmt, tensors | {"tables2": grid}, module))

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        config, grid = cast(HiggsConfig, config), packed.tensors["tables2"]
        levels = 2**config.bits
        return {
            "weight": packed.tensors["weight"],
            "scales": packed.tensors["scales"],
            "tables": grid[::levels, 0].clone() if config.p == 1 else torch.arange(levels).to(grid.dtype),
            "tables2": grid.reshape(levels, levels, 2).view(torch.float16),
        }

    def stored_config(self, config: MethodConfig, weights: Mapping[str, Packed]) -> dict[str, Any]:
        config = cast(HiggsConfig, config)
        tuned = {path: config.tune_metadata.get(path) or metadata(packed) for path, packed in weights.items()}
        return config.to_dict() | {"tune_metadata": tuned}


def nearest(weight: torch.Tensor, config: HiggsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes i64 [N, K / p] of a float32 weight [N, K], and the norm of each of its blocks.

    A block of zeros gets code 0 everywhere (0 / 0 is what is compared, as in the original) and the norm 0.
    """
    from qcompile.formats.higgs_grids import points
    from qcompile.transforms.linear import Hadamard

    grid, size = points(config.p, config.bits), config.hadamard_size
    squares = torch.linalg.norm(grid, axis=-1) ** 2
    blocks = weight.reshape(len(weight), -1, size)
    norm = torch.linalg.norm(blocks, axis=-1)
    codes = []
    for at in range(0, len(weight), 16):
        turned = Hadamard(size).apply(blocks[at : at + 16], {}) * size**0.5 / norm[at : at + 16, :, None]
        vectors = turned.reshape(len(turned), -1, config.p)
        codes.append((2 * vectors @ grid.T - squares).argmax(-1))
    return torch.cat(codes), norm


def tile(config: HiggsConfig, path: str) -> int:
    """The outputs of a tile in a checkpoint's layout; CheckpointError when the config does not say for this module."""
    entry = config.tune_metadata.get(path)
    identity = entry.get("template_id") if isinstance(entry, Mapping) else None
    if type(identity) is not int or identity < 0:
        raise CheckpointError(
            "the higgs config does not say in which layout a module's weight is stored",
            where=f"field 'tune_metadata', {path!r}",
            found=repr(entry),
            expected="an entry with a template_id",
            remedy="restore tune_metadata in quantization_config: FLUTE writes an entry for each module",
        )
    return 64 if identity // (16 if config.bits == 4 else 4) % 3 == 0 else 32


def metadata(packed: Packed) -> dict[str, Any]:
    """What FLUTE wants to know about a weight: the layout by one of its templates; it tunes and repacks for its device."""
    fmt = cast("HiggsFormat", packed.format)
    return {
        "M": 1,
        "N": packed.N,
        "K": packed.K,
        "num_bits": fmt.bits,
        "group_size": fmt.group,
        "num_sms": 1,
        "dtype": str(DTYPES[fmt.dtype]),
        "device": "cuda:0",
        "template_id": 0 if fmt.tile == 64 else 16 if fmt.bits == 4 else 4,
    }
