"""Gemma's checkpoints against transformers' own layers, and a whole model of them against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import InMemory, linear
from safetensors.torch import save_file
from stored_modules import call, read, same_bits, value
from tiny_models import decoder

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.gemma import Gemma, GemmaConfig
from qcompile.methods.index import parse_config
from qcompile.program import Module

METHOD, N, K = Gemma(), 5, 31  # the last byte of a row is not full
BITS = pytest.mark.parametrize("bits", [2, 4, 8])


def filled(layer: torch.nn.Module, steps: tuple[float, float] = (0.0, 0.0)) -> torch.nn.Module:
    """A layer of transformers with random codes and scales."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in layer.named_parameters():
        if tensor.dtype in (torch.uint8, torch.int8):
            info = torch.iinfo(tensor.dtype)
            tensor.data = torch.randint(info.min, info.max + 1, tensor.shape, generator=generator, dtype=torch.int64)
            tensor.data = tensor.data.to(torch.uint8 if info.min == 0 else torch.int8)
        elif name.endswith(("weight_scale", "embedding_scale")):
            tensor.data = torch.rand(tensor.shape, generator=generator) * 0.02 + 0.01
        elif name.endswith("bias"):
            tensor.data = torch.randn(tensor.shape, generator=generator)
    for name, step in zip(("input_activation_scale", "output_activation_scale"), steps, strict=True):
        if hasattr(layer, name):
            getattr(layer, name).data = torch.tensor(step)
    return layer.eval()


def theirs(bits: int, steps: tuple[float, float] = (0.0, 0.0)) -> torch.nn.Module:
    quant = pytest.importorskip("transformers.integrations.gemma_quant")
    return filled(quant.QuantizedLinear(K, N, num_bits=bits), steps)


def stored(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"fc.{name}": tensor.detach() for name, tensor in layer.state_dict().items()}


@torch.no_grad()
@BITS
@pytest.mark.parametrize("steps", [(0.0, 0.0), (0.03, 0.0), (0.01, 0.05)])
def test_a_layer_computes_as_transformers_computes(bits: int, steps: tuple[float, float]) -> None:
    layer, module = theirs(bits, steps), linear("fc", N, K)
    tensors = stored(layer)
    packed = read(METHOD, GemmaConfig(bits), module, InMemory(tensors))
    assert [len(packed.before), len(packed.after)] == [int(step != 0) for step in steps]
    assert torch.equal(value(packed), layer._dequantize_weights())  # type: ignore[operator]
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(1))
    assert torch.equal(call(packed, x), layer(x))
    assert same_bits({f"fc.{name}": t for name, t in METHOD.write(GemmaConfig(bits), module, packed).items()}, tensors)


@torch.no_grad()
@BITS
@pytest.mark.parametrize("runs", [1, 4])
def test_an_embedding(bits: int, runs: int) -> None:
    quant = pytest.importorskip("transformers.integrations.gemma_quant")
    layer = quant.QuantizedEmbedding(9, 32, torch.float32, num_bits=bits)
    layer.embedding_scale.data = torch.ones(9, runs)
    layer = filled(layer)
    module = Module("fc", "Embedding", 9, 32, "fc.weight")
    packed = read(METHOD, GemmaConfig(bits, True), module, InMemory(stored(layer)))
    assert torch.equal(value(packed), layer.weight)
    written = METHOD.write(GemmaConfig(bits), module, packed)
    assert same_bits({f"fc.{name}": t for name, t in written.items()}, stored(layer))
    head = Module("head", "Linear", 9, 32, "fc.weight", tied=("fc",))
    assert torch.equal(value(read(METHOD, GemmaConfig(bits), head, InMemory(stored(layer)))), layer.weight)


@torch.no_grad()
def test_a_whole_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.gemma_quant import replace_with_quant_layers

    said: dict[str, Any] = {
        "quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True, "modules_to_not_convert": ["lm_head"],
        "module_quant_configs": {r"down_proj": {"num_bits": 8}, r"layers\.1.*gate_proj": {"num_bits": 2}},
    }  # fmt: skip
    model = decoder("llama")
    config = transformers.GemmaQuantizationConfig(**{k: v for k, v in said.items() if k != "quant_method"})
    model = filled(replace_with_quant_layers(model, config, ["lm_head"]))
    for path, layer in model.named_modules():
        if path.endswith("o_proj"):
            layer.input_activation_scale.data, layer.output_activation_scale.data = (
                torch.tensor(0.01),
                torch.tensor(0.02),
            )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.self_attn.k_cache_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": said}))
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids).logits
    for target in ("reference", "cpu"):
        compiled = qcompile.compile(tmp_path, target=target)
        assert {row.format for row in compiled.report.weights.values()} >= {"gemma", "int8"}
        found = compiled(input_ids=ids).logits
        assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_the_bits_of_a_module_are_those_that_transformers_takes() -> None:
    config = GemmaConfig(2, module_quant_configs={"b": {"num_bits": 8}, "a.b": {"num_bits": 4}, "z": {}})
    assert [config.bits(path) for path in ("b", "a.b", "x.a.b", "z", "y")] == [8, 4, 4, 2, 2]


def test_what_is_not_quantized() -> None:
    modules = {"fc": linear("fc", N, K), "head": linear("head", N, K, output_embedding=True)}
    source = InMemory(stored(theirs(4)) | {"head.weight": torch.zeros(N, K)})
    assert METHOD.select(GemmaConfig(), modules["head"], source, modules) == Skip(
        "the checkpoint stores its weight dense"
    )
    floats = InMemory({f"{path}.weight": torch.zeros(N, K) for path in modules})
    assert isinstance(METHOD.select(GemmaConfig(), modules["fc"], floats, modules), Quantized)
    assert METHOD.select(GemmaConfig(), modules["head"], floats, modules) == Skip(
        "it is the output embedding, and such modules stay dense by default"
    )
    with pytest.raises(ConfigError) as caught:
        METHOD.quantize(GemmaConfig(), modules["fc"], torch.zeros(N, K))
    assert str(caught.value) == (
        "gemma has no form without calibration: its steps of inputs and outputs come from training\n"
        "  where:    fc\n"
        "  found:    a float weight\n"
        "  expected: a checkpoint that gemma's own tools have quantized\n"
        "  try:      choose bitsandbytes, hqq, quanto or torchao for a float model"
    )


def test_a_transformers_config_means_the_same() -> None:
    fields: dict[str, Any] = {"num_bits": 8, "module_quant_configs": {"q_proj": {"num_bits": 2}}}
    found = parse_config(pytest.importorskip("transformers").GemmaQuantizationConfig(**fields))
    assert found is not None and found[1] == GemmaConfig(**fields)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"num_bits": 3}, "2, 4 or 8"),
        ({"quantize_embeddings": 1}, "True or False"),
        ({"module_quant_configs": {"a": {"bits": 4}}}, "None or {regular expression: {'num_bits': 2, 4 or 8}}"),
    ],
)
def test_wrong_values_are_said_in_full(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GemmaConfig.from_dict(fields)
    ((field, found),) = fields.items()
    assert str(caught.value) == (
        f"the gemma config has a value out of range\n  where:    field {field!r}\n  found:    {found!r}\n  expected: {expected}"
    )


def test_other_wrong_configs() -> None:
    with pytest.raises(ConfigError, match="unknown field in the gemma config"):
        GemmaConfig.from_dict({"num_bit": 4})
    with pytest.raises(ConfigError, match="the gemma config has a pattern that is not a regular expression"):
        GemmaConfig.from_dict({"module_quant_configs": {"a(": {"num_bits": 4}}})


DAMAGED: list[tuple[str, torch.Tensor | None, str]] = [
    (
        "weight",
        None,
        "a module quantized with gemma lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    input_activation_scale, output_activation_scale, weight_scale\n"
        "  expected: weight, weight_scale\n"
        "  try:      the checkpoint is incomplete: it must hold fc.weight",
    ),
    (
        "weight",
        torch.zeros(N, 8, dtype=torch.uint8),
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight (module fc, 5 outputs, 31 inputs)\n"
        "  found:    u8 [5, 8]\n"
        "  expected: u8 [5, 16]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged",
    ),
    (
        "input_activation_scale",
        torch.tensor(math.nan),
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.input_activation_scale (module fc)\n"
        "  found:    nan at []\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
]


@pytest.mark.parametrize("name, tensor, message", DAMAGED)
def test_a_damaged_checkpoint_is_said_in_full(name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: t for key, t in stored(theirs(4)).items() if key != f"fc.{name}"}
    tensors |= {} if tensor is None else {f"fc.{name}": tensor}
    with pytest.raises(CheckpointError) as caught:
        read(METHOD, GemmaConfig(), linear("fc", N, K), InMemory(tensors))
    assert str(caught.value) == message
