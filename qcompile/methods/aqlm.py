"""AQLM: blocks of weights as sums of entries of learned codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from qcompile.methods import stored
from qcompile.methods.base import MethodConfig, Quantized, Skip
from qcompile.methods.calibrated import Calibrated

if TYPE_CHECKING:
    from qcompile.program import Module
    from qcompile.sources import TensorSource

STORED = ("codes", "codebooks", "scales")
FLOATS = ("f16", "bf16", "f32")


@dataclass(frozen=True)
class AqlmConfig(MethodConfig):
    """The fields of transformers' AqlmConfig."""

    method: ClassVar[str] = "aqlm"

    in_group_size: int = 8
    out_group_size: int = 1
    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    linear_weights_not_to_quantize: list[str] = field(default_factory=list)

    @classmethod
    def renamed(cls, data: dict[str, Any]) -> dict[str, Any]:
        name = "linear_weights_not_to_quantize"
        return data | {name: []} if data.get(name, 0) is None else data

    def __post_init__(self) -> None:
        for name in ("in_group_size", "out_group_size", "num_codebooks"):
            value = getattr(self, name)
            self.require(type(value) is int and value > 0, name, "a positive integer")
        bits = self.nbits_per_codebook
        self.require(type(bits) is int and 1 <= bits <= 24, "nbits_per_codebook", "an integer from 1 to 24")
        self.require_patterns("linear_weights_not_to_quantize")


class Aqlm(Calibrated):
    """quant_method "aqlm".

    The sum of entries and its product with the scale are float32 here, as the original computes on a CPU; on a GPU it
    rounds each to float16. `linear_weights_not_to_quantize` names parameters ("lm_head.weight") in the files of the
    original, and modules where transformers reads it: both are understood.
    """

    name = "aqlm"
    source = "https://arxiv.org/abs/2401.06118"
    Config = AqlmConfig
    formats = ("aqlm",)
    mark = "codes"
    needs = "calibration data and about a day of GPU time for 7 billion weights"
    field = "linear_weights_not_to_quantize"

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        from qcompile.formats.codebook import Aqlm as AqlmFormat

        config = cast(AqlmConfig, config)
        dense = self.dense(config, module, source, modules)
        if dense is not None:
            return dense
        names = stored.tensors(source, module)
        stored.require(names, STORED, module, self.name)
        stored.dtypes([names[name] for name in ("codebooks", "scales")], FLOATS, source, module)
        fmt = AqlmFormat(
            config.num_codebooks,
            config.nbits_per_codebook,
            config.out_group_size,
            config.in_group_size,
            source.info(names["codebooks"]).dtype,
            source.info(names["scales"]).dtype,
        )
        stored.legal(fmt, module, self.name)
        used = {name: names[name] for name in STORED}
        stored.expect_all(fmt, used, source, module)
        return Quantized(fmt, used)
