"""GGUF files out: read back by us, by transformers and by llama.cpp; conversions into GGUF; what the form cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers

import qcompile
from qcompile.errors import ConfigError

IDS = torch.tensor([[3, 5, 8, 13, 21]])


def logits(model: Any) -> torch.Tensor:
    return qcompile.compile(model, target="reference")(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "encoding"), [("llama", "q4_0"), ("llama-tied", "q5_1"), ("qwen3", "q4_1"), ("gpt2", "q8_0")]
)
def test_out_and_in_again(name: str, encoding: str, tmp_path: Path) -> None:
    made = qcompile.compile(
        tiny_models.decoder(name), {"quant_method": "gguf", "encoding": encoding}, target="reference"
    )
    made.export_checkpoint(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert torch.equal(logits(tmp_path / "out" / "model.gguf"), made(input_ids=IDS).logits)
    if name.startswith("llama"):  # for others transformers takes the size of the vocabulary from a tokenizer
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
        with torch.no_grad():
            expected = theirs(input_ids=IDS).logits
        assert (made(input_ids=IDS).logits - expected).norm() < 1e-5 * expected.norm()


def test_llama_cpp_reads_it(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is installed for benchmarks only")
    made = qcompile.compile(
        tiny_models.decoder("llama"), {"quant_method": "gguf", "encoding": "q8_0"}, target="reference"
    )
    made.export_checkpoint(tmp_path / "out")
    llama = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), logits_all=True, n_ctx=64, verbose=False)
    llama.eval(IDS[0].tolist())
    found, expected = torch.tensor(llama.scores[:5]), made(input_ids=IDS).logits[0]
    assert (found - expected).norm() < 0.02 * expected.norm()  # it rounds activations to 8 bits


@pytest.mark.parametrize(
    ("bits", "to", "encoding"),
    [
        (4, {"quant_method": "gguf", "encoding": "q4_0"}, "q4_0"),
        pytest.param(4, "gguf", "q4_1", marks=pytest.mark.full),
        pytest.param(8, "gguf", "q8_0", marks=pytest.mark.full),
    ],
)
def test_gptq_becomes_gguf(bits: int, to: Any, encoding: str, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True}
    qcompile.compile(tiny_models.decoder("llama"), config, target="reference").export_checkpoint(tmp_path / "gptq")
    done = qcompile.convert(tmp_path / "gptq", to, tmp_path / "out", rounded=False)
    assert {row.target for row in done.modules} == {f"gguf-{encoding}"} and len(done.modules) == 14
    found, expected = logits(tmp_path / "out" / "model.gguf"), logits(tmp_path / "gptq")
    assert (found - expected).norm() < 1e-3 * expected.norm()  # GPTQ rounds every weight to float16
    with pytest.raises(ConfigError, match="have no such weight in gguf"):
        qcompile.convert(tmp_path / "gptq", to, tmp_path / "rounded")


def test_there_and_back_bit_for_bit(tmp_path: Path) -> None:
    made = qcompile.compile(
        tiny_models.decoder("llama"), {"quant_method": "gguf", "encoding": "q4_1"}, target="reference"
    )
    made.export_checkpoint(tmp_path / "first")
    qcompile.convert(tmp_path / "first" / "model.gguf", "metal", tmp_path / "metal")
    config = {"quant_method": "gguf", "encoding": "q4_1"}
    qcompile.convert(tmp_path / "metal", config, tmp_path / "second")
    assert torch.equal(logits(tmp_path / "second" / "model.gguf"), logits(tmp_path / "first" / "model.gguf"))


def test_what_the_form_cannot_hold(tmp_path: Path) -> None:
    config = {"quant_method": "gguf", "encoding": "q8_0"}
    phi = qcompile.compile(tiny_models.decoder("opt"), config, target="reference")
    with pytest.raises(ConfigError, match="no GGUF form of this architecture is known"):
        phi.export_checkpoint(tmp_path / "opt")
    model = tiny_models.decoder("llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(ConfigError) as error:
        qcompile.compile(model, config, target="reference").export_checkpoint(tmp_path / "gelu")
    assert str(error.value) == (
        "a GGUF file of this architecture cannot say all of the model's config\n  where:    config.json\n"
        "  found:    hidden_act = 'gelu'\n  expected: hidden_act = 'silu'"
    )
    assert not (tmp_path / "gelu").exists()
