"""FP8 in whole models: a mixture of experts with biases and short blocks, from per-expert files and on the fly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from end_to_end_models import difference, tokens
from in_memory import InMemory, linear
from safetensors.torch import load_file, save_file
from stored_modules import read, same_bits, value

import qcompile
from qcompile.errors import CheckpointError
from qcompile.methods.base import MethodConfig, Skip
from qcompile.methods.fp8 import FineGrainedFp8, FineGrainedFp8Config
from qcompile.methods.index import method
from qcompile.program import Module

NAME = "qwen2-moe"


def written(folder: Path, config: MethodConfig, *, dequantized: bool = False) -> Path:
    """The tiny model as transformers writes it, every projection quantized (or the value of that, in float32)."""
    tiny_models.decoder(NAME).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        found, module = method(config.method), linear(path, *tensor.shape)
        packed = found.quantize(config, module, tensor)
        if dequantized:
            tensors[name] = value(packed)
        else:
            tensors |= {f"{path}.{inner}": t for inner, t in found.write(config, module, packed).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if not dequantized:
        said: dict[str, Any] = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | {"quantization_config": config.to_dict()}))
    return folder


def logits(model: Any, config: Any = None, target: str = "reference") -> torch.Tensor:
    found: torch.Tensor = qcompile.compile(model, config, target=target)(input_ids=tokens(2, 9)).logits
    return found


SHORT = FineGrainedFp8Config(weight_block_size=(32, 32))  # experts of 48 rows have a short block
WHOLE = FineGrainedFp8Config(
    weight_block_size=(16, 16), modules_to_not_convert=["lm_head", "gate", "shared_expert_gate"]
)


@torch.no_grad()
def test_experts_stored_one_by_one(tmp_path: Path) -> None:
    folder = written(tmp_path / "fp8", SHORT)
    found = logits(folder, replace(SHORT, dequantize=True), "cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(written(tmp_path / "float", SHORT, dequantized=True))
    assert difference(found, plain(input_ids=tokens(2, 9)).logits) < 1e-5
    assert 1e-4 < difference(logits(folder, None, "cpu"), found) < 0.2


def test_experts_are_quantized_on_the_fly_as_they_are_stored(tmp_path: Path) -> None:
    stored = logits(written(tmp_path / "fp8", WHOLE))
    assert torch.equal(logits(tiny_models.decoder(NAME), WHOLE), stored)


def test_experts_stored_together() -> None:
    experts = Module("moe.experts.up", "Experts", 48, 96, "moe.experts.up", experts=3)
    codes, scale = torch.randn(3, 48, 96).to(torch.float8_e4m3fn), torch.rand(3, 3, 6) + 0.5
    source = InMemory({"moe.experts.up": codes, "moe.experts.up_scale_inv": scale})
    packed = read(FineGrainedFp8(), WHOLE, experts, source)
    wide = scale.repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.equal(value(packed), (codes.float() * wide).reshape(144, 96))
    made = FineGrainedFp8().write(WHOLE, experts, packed)
    assert same_bits({f"moe.experts.up{name}": t for name, t in made.items()}, source.tensors)
    dense = InMemory({"moe.experts.up": torch.zeros(3, 48, 96), "fc.weight": codes[0]})
    assert FineGrainedFp8().select(WHOLE, experts, dense, {}) == Skip("the checkpoint stores its weight dense")
    with pytest.raises(CheckpointError, match="a stored tensor has the wrong shape"):  # 48 rows are not whole blocks
        read(FineGrainedFp8(), SHORT, experts, InMemory(source.tensors))


def test_experts_that_transformers_does_not_convert() -> None:
    turned = Module("moe.experts.up", "Experts", 64, 96, "moe.experts.up", experts=3, transposed=True)
    config = replace(WHOLE, modules_to_not_convert=["moe.gate"])
    floats = InMemory({"moe.experts.up": torch.zeros(3, 96, 64)})
    assert FineGrainedFp8().select(config, turned, floats, {turned.path: turned}) == Skip(
        "experts with biases, or stored as [K, N], are not converted by the method"
    )
