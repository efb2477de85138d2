"""AWQ's scaled activations: models whose MLP has no gate, where the tensor before a layer belongs to the activation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import InMemory, linear
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.errors import CheckpointError
from qcompile.methods.awq import Awq, AwqConfig
from qcompile.methods.base import Quantized

SIZES = {
    "hidden_size": 64, "vocab_size": 96, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 128
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Starcoder2": ({"num_key_value_heads": 1}, "model.layers.0.mlp"),
    "GPTNeoX": ({}, "gpt_neox.layers.0.mlp"),
}
IDS = torch.tensor([[3, 5, 8, 13, 21, 34]])


class Divided(torch.nn.Module):
    """An activation over its scales, as AWQ puts it into a model."""

    def __init__(self, act: torch.nn.Module, scales: torch.Tensor):
        super().__init__()
        self.act, self.scales = act, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.act(x) / self.scales
        return made


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_divides_by_the_scales_of_the_activation_before_it(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fields, mlp = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | fields, tie_word_embeddings=False)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    quantized = qcompile.compile(model, config=AwqConfig(group_size=32), target="reference")
    quantized.export_checkpoint(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for path in quantized.artifact.weights:
        if quantized.report.weights[path].method == "awq":
            model.get_submodule(path).weight.data = quantized.weight(path)
    block, scales = model.get_submodule(mlp), torch.rand(128).add(0.5).half()
    tensors[f"{mlp}.act.scales"] = scales
    block.act = Divided(block.act, scales.float())
    folder = tmp_path / "scaled"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors")
    compiled = qcompile.compile(folder, target="reference")
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    compiled.export_checkpoint(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items() if key.endswith(".scales"))


def stored(path: str) -> dict[str, torch.Tensor]:
    module, config = linear(path, 16, 64), AwqConfig(group_size=32)
    tensors = Awq().write(config, module, Awq().quantize(config, module, torch.randn(16, 64)))
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def test_blooms_activation_has_a_name_of_its_own() -> None:
    module, config = linear("h.0.mlp.dense_4h_to_h", 16, 64), AwqConfig(group_size=32)
    scales = torch.rand(64).add(0.5).half()
    source = InMemory(stored(module.path) | {"h.0.mlp.gelu_impl.scales": scales})
    selected = Awq().select(config, module, source, {module.path: module})
    assert isinstance(selected, Quantized) and selected.also_claims == ("h.0.mlp.gelu_impl.scales",)
    packed = Awq().read(config, module, selected, source)
    (scale,) = packed.before
    assert torch.equal(scale(torch.ones(64)), 1 / scales.float())
    assert torch.equal(Awq().write(config, module, packed)["/h.0.mlp.gelu_impl.scales"], scales)


def test_scales_of_an_activation_that_are_wrong() -> None:
    module, config, held = linear("mlp.c_proj", 16, 64), AwqConfig(group_size=32), stored("mlp.c_proj")
    for scales, message in (
        (torch.ones(32, dtype=torch.float16), "found:    f16 [32]\n  expected: f16 or bf16 or f32 [64]"),
        (torch.full((64,), torch.nan, dtype=torch.float16), "found:    nan at [0]"),
    ):
        source = InMemory(held | {"mlp.act.scales": scales})
        with pytest.raises(CheckpointError, match=r"where:    mlp\.act\.scales") as error:
            selected = Awq().select(config, module, source, {module.path: module})
            assert isinstance(selected, Quantized)
            Awq().read(config, module, selected, source)
        assert message in str(error.value)
