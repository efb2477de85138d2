"""qcompile inside of transformers: `from_pretrained` with our config, and our export format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.errors import ConfigError

transformers = pytest.importorskip("transformers")
CONFIGS = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "llm.int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2: its linears have biases."""
    path = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).eval().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_from_pretrained_gives_what_compile_gives(folder: Path, name: str) -> None:
    from qcompile.huggingface import QCompileConfig, QuantizedLinear

    ids = torch.arange(14).reshape(2, 7)
    config = QCompileConfig(CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        logits = model(ids).logits
    expected = qcompile.compile(folder, CONFIGS[name], target="reference")(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_config_without_a_method_is_refused() -> None:
    from qcompile.huggingface import QCompileConfig

    with pytest.raises(ConfigError, match="there is no quantization config"):
        QCompileConfig()
    with pytest.raises(ConfigError, match="unknown field in the qcompile config"):
        QCompileConfig(CONFIGS["nf4"], bits=4)


def test_the_exporter_of_transformers(folder: Path, tmp_path: Path) -> None:
    auto = pytest.importorskip("transformers.exporters.auto")
    import qcompile.huggingface_export

    ids = torch.arange(14).reshape(2, 7)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    config = {"export_format": "qcompile", "config": CONFIGS["nf4"], "target": "reference"}
    exported = auto.AutoHfExporter.from_config(config).export(model, {"input_ids": ids}, config)
    expected = qcompile.compile(folder, CONFIGS["nf4"], target="reference")(ids).logits
    torch.testing.assert_close(exported(input_ids=ids).logits, expected, rtol=0, atol=0)
    exported.save_pretrained(tmp_path)
    assert torch.equal(qcompile.load(tmp_path / "model.qc")(ids).logits, expected)
