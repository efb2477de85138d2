"""FP8 in whole models: a mixture of experts with biases and short blocks, from per-expert files and on the fly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from end_to_end_models import difference, tokens
from in_memory import linear
from safetensors.torch import load_file, save_file
from stored_modules import value

import qcompile
from qcompile.methods.base import MethodConfig
from qcompile.methods.fp8 import FineGrainedFp8Config
from qcompile.methods.index import method

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
