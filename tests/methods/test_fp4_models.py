"""Whole models with FP4 activations: compiled, they are the float32 model of transformers with such layers."""

from __future__ import annotations

import pytest
import torch
from checkpoints import ROOT
from in_memory import linear
from safetensors.torch import load_file
from stored_modules import call, read

import qcompile
from qcompile.methods.index import parse_config
from qcompile.safetensors_folder import SafetensorsFolder


@torch.no_grad()
@pytest.mark.parametrize("name", ["fouroversix", "fouroversix-mxfp4", "fp_quant-nvfp4", "fp_quant-mxfp4-pseudo"])
def test_a_whole_model(name: str) -> None:
    transformers, folder = pytest.importorskip("transformers"), ROOT / name
    if not folder.is_dir():
        pytest.skip(f"no checkpoint {name} at {ROOT.name}")
    config = transformers.AutoConfig.from_pretrained(folder)
    said = config.quantization_config
    del config.quantization_config
    model, source = transformers.LlamaForCausalLM(config).float().eval(), SafetensorsFolder(folder)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    found = parse_config(None, said, source)
    assert found is not None
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            packed = read(*found, linear(path, *layer.weight.shape, dtype="bf16"), source)
            layer.forward = lambda x, packed=packed: call(packed, x)
    ids = torch.arange(20).reshape(2, 10)
    expected = model(ids).logits
    compiled = qcompile.compile(folder, target="reference")
    assert (compiled(input_ids=ids).logits - expected).norm() <= 1e-4 * expected.norm()
