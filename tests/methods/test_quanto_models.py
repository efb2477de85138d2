"""Quanto with rounded activations in a whole model: which inputs and outputs are rounded, against hooks that do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_module import fc
from safetensors.torch import save_file

import qcompile
from qcompile.methods.quanto import MAP, Quanto, QuantoConfig

Q = Quanto()
IDS = torch.tensor([[3, 50, 8, 13, 21], [11, 7, 7, 60, 2]])


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.round(x / scale).clamp(-128, 127) * scale


def opt() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, max_position_embeddings=32,
        word_embed_proj_dim=32, tie_word_embeddings=False, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model: Any, folder: Path) -> None:
    """The model as optimum saves it with calibrated int8 activations; the model itself then does what that means."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    entries = {}
    for at, (path, module) in enumerate(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear) and path != "lm_head"
        if not linear and not isinstance(module, torch.nn.LayerNorm):
            continue
        inputs, outputs = torch.tensor(0.02 + 0.001 * at), torch.tensor(0.03 + 0.001 * at)
        entries[path] = {"weights": "qint8" if linear else "none", "activations": "qint8"}
        if linear:
            packed = Q.quantize(QuantoConfig(), fc(*module.weight.shape, dtype="f32"), module.weight.detach())
            written = Q.write(QuantoConfig(), fc(*module.weight.shape), packed)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{name}": tensor for name, tensor in written.items()}
            module.weight.data = written["weight._data"] * written["weight._scale"]
        tensors |= {f"{path}.input_scale": inputs, f"{path}.output_scale": outputs}
        module.register_forward_hook(lambda _, __, y, scale=outputs: rounded(y, scale))
        if path.endswith("out_proj"):  # what the others read is rounded already: by a norm, or by fc1 before its relu
            module.register_forward_pre_hook(lambda _, x, scale=inputs: (rounded(x[0], scale),))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / MAP).write_text(json.dumps(entries))
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": ["OPTForCausalLM"]}))


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_every_module_rounds_its_output_and_no_input_twice(tmp_path: Path, target: str) -> None:
    model = opt()
    save(model, tmp_path / "model")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    compiled = qcompile.compile(tmp_path / "model", target=target)
    error = (compiled(input_ids=IDS).logits - expected).norm() / expected.norm()
    # Sums in another order may move a value over the middle between two codes.
    assert error < (1e-6 if target == "reference" else 1e-2)
    notes = [note for note in compiled.report.notes if "its output is rounded" in note]
    assert len(notes) == 3 and "model.decoder.final_layer_norm: its output is rounded, int8 static" in notes
