"""GGUF: the blocks of a llama.cpp file, kept as they are; the file says for each tensor how it is encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import FORMATS, Format, format_class
from qcompile.formats.dense import Dense
from qcompile.methods import stored
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip

if TYPE_CHECKING:
    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource

_PREFIX = "gguf-"
ENCODINGS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # that are made of float weights


@dataclass(frozen=True)
class GgufConfig(MethodConfig):
    """The fields of transformers' GgufConfig, and `encoding`: the blocks to make of a float model.

    `dequantize` unpacks every weight to float32 at compile time.
    """

    method: ClassVar[str] = "gguf"
    steering: ClassVar[Mapping[str, str]] = {"gguf_file": "the file is the model that was given"}

    gguf_file: str | None = None
    dequantize: bool = False
    encoding: str | None = None

    def __post_init__(self) -> None:
        self.require_bools("dequantize")
        self.require(self.encoding in (None, *ENCODINGS), "encoding", f"None, {', '.join(ENCODINGS)}")


class Gguf(Method):
    """quant_method "gguf".

    A checkpoint out is one file, model.gguf, of an architecture that GGUF files are read of (Llama, Mistral, Qwen2, Qwen3,
    GPT-2). It has no tokenizer in it: its `tokenizer.ggml.model` is "no_vocab".
    """

    name = "gguf"
    source = "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"
    Config = GgufConfig
    container = "gguf"
    formats = tuple(kind for kind in FORMATS if kind.startswith(_PREFIX))

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(source.info(name).encoding for name in source.names())

    def select(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | Quantized:
        if not self.prequantized(config, source):
            return self._on_the_fly(cast(GgufConfig, config), module)
        if module.weight not in source.names():
            stored.need_dense({}, "its blocks", module, self.name)
        encoding = source.info(module.weight).encoding
        if not encoding:
            return Skip("the file stores its weight dense")
        fmt = self._blocks(encoding, module)
        stored.legal(fmt, module, self.name)
        (blocks,) = fmt.stored(module.n, module.k)
        stored.expect(module.weight, source, (blocks.dtype,), blocks.shape, module)
        unpacked = cast(GgufConfig, config).dequantize
        return Quantized(Dense("f32") if unpacked else fmt, {"weight" if unpacked else blocks.name: module.weight})

    def _blocks(self, encoding: str, module: Module) -> Format:
        kind = _PREFIX + encoding
        if kind not in FORMATS:
            raise CheckpointError(
                "a GGUF encoding is not supported",
                where=f"{module.weight} (module {module.path})",
                found=encoding,
                expected=", ".join(name.removeprefix(_PREFIX) for name in FORMATS if name.startswith(_PREFIX)),
                remedy="convert the file, for example with llama-quantize to q4_1 or q8_0",
            )
        return format_class(kind)()

    def read(self, config: MethodConfig, module: Module, selected: Quantized, source: TensorSource) -> Packed:
        data = source.read(module.weight)
        if not isinstance(selected.format, Dense):
            return stored.packed(selected.format, dict.fromkeys(selected.names, data), module)
        fmt = self._blocks(source.info(module.weight).encoding, module)
        weight = dequantize(fmt, {"data": data}, module.n, module.k)
        return stored.packed(selected.format, {"weight": weight}, module)

    def _on_the_fly(self, config: GgufConfig, module: Module) -> Skip | Quantized:
        if config.encoding is None:
            return Skip("the source stores its weight dense, and the gguf config has no encoding")
        if module.kind == "Embedding" and not module.tied:
            return Skip("Embedding is not converted by the method (only Linear, Conv1D, and what is tied to them)")
        fmt = format_class(_PREFIX + config.encoding)()
        if fmt.check(module.n, module.k):
            return Skip(f"its {module.k} inputs are no whole blocks of 32")
        return Quantized(fmt)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        from qcompile.methods.gguf_blocks import blocks

        encoding = cast(GgufConfig, config).encoding
        if encoding is None:
            raise ConfigError(
                "gguf reads files and quantizes nothing unless its config has an encoding",
                where=module.path,
                found="a float weight",
                expected=f"a .gguf file as the model, or encoding: {', '.join(ENCODINGS)}",
                remedy="set encoding, or quantize with llama.cpp first",
            )
        fmt = format_class(_PREFIX + encoding)()
        stored.legal(fmt, module, self.name)
        return stored.packed(fmt, blocks(fmt, stored.usable(weight, module)), module)

    def write(self, config: MethodConfig, module: Module, packed: Packed) -> dict[str, torch.Tensor]:
        (tensor,) = packed.tensors.values()
        return {"weight": tensor}
