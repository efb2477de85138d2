"""A compiled model written as a checkpoint: read again it is the same model, for us and for the method's own package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from test_every_method import NOT_ON_THE_FLY

import qcompile
from qcompile.errors import ConfigError
from qcompile.export import export_checkpoint
from qcompile.methods.index import METHODS

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 89]])
ON_CPU = ("gptq-actorder", "bitsandbytes-nf4-dq", "hqq-axis0", "eetq")


def folders() -> list[Path]:
    """A checkpoint, the last by name, of every method that quantizes no float model.

    `test_every_method.py` has the other methods, and `tests/methods` write and read every checkpoint's tensors.
    """
    found: dict[str, Path] = {}
    for path in sorted(ROOT.glob("*")):
        data = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
        method = (data.get("quantization_config") or {}).get("quant_method")
        if method in METHODS and method in NOT_ON_THE_FLY:
            found[method] = path
    return list(found.values())


CASES = [(folder, "reference") for folder in folders()] + [(ROOT / name, "cpu") for name in ON_CPU]
CASES = [case for case in CASES if case[0].is_dir()]


def same(left: qcompile.CompiledModel, right: qcompile.CompiledModel) -> None:
    """The same layers quantized in the same formats, with the same weights and logits."""
    rows = [{path: (row.method, row.format) for path, row in q.report.weights.items()} for q in (left, right)]
    assert rows[0] == rows[1]
    for path in left.artifact.weights:
        assert torch.equal(left.weight(path), right.weight(path)), path
    ids = IDS % left.artifact.model_config["vocab_size"]
    assert torch.equal(left(input_ids=ids).logits, right(input_ids=ids).logits)


@pytest.mark.parametrize(("folder", "target"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_checkpoint_survives(folder: Path, target: str, tmp_path: Path) -> None:
    compiled = qcompile.compile(folder, target="reference")
    made = compiled if target == "reference" else qcompile.compile(folder, target=target)
    made.export_checkpoint(tmp_path / "out")
    same(qcompile.compile(tmp_path / "out", target="reference"), compiled)


@pytest.mark.skipif(not CASES, reason=f"no checkpoints at {ROOT.name}")
@pytest.mark.parametrize("name", ["gptq", "awq", "bitsandbytes-nf4-dq", "bitsandbytes-int8", "hqq-dynamic"])
def test_the_files_are_those_of_the_package(name: str, tmp_path: Path) -> None:
    qcompile.compile(ROOT / name, target="reference").export_checkpoint(tmp_path / "out")
    theirs, ours = load_file(ROOT / name / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        if "quant_state" in key:  # it names the float weight's dtype, which nothing else in a checkpoint does
            states = [json.loads(bytes(part.tolist())) for part in (tensor, ours[key])]
            assert states[0] == states[1] | {"dtype": states[0]["dtype"]}
            continue
        assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "config",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    ],
    ids=["nf4", "int8", "storage"],
)
def test_bitsandbytes_loads_what_was_quantized_here(config: dict[str, object], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = tiny_models.GROUPED | {"intermediate_size": 128}  # its CPU kernels want whole blocks in a row
    float_model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    compiled = qcompile.compile(float_model, {"quant_method": "bitsandbytes", **config}, target="reference")
    del float_model
    compiled.export_checkpoint(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    if "load_in_4bit" in config:
        weight = theirs.model.layers[0].mlp.up_proj.weight
        decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(decoded.float(), compiled.weight("model.layers.0.mlp.up_proj"))
    with torch.no_grad():
        expected, found = theirs(IDS).logits, compiled(input_ids=IDS).logits
    # x is rounded to int8 in both, so that single codes flip; the 4-bit CPU kernel computes in bfloat16.
    assert (found - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_hqq_loads_what_was_quantized_here(nbits: int, tmp_path: Path) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = {"quant_method": "hqq", "nbits": nbits, "group_size": 32, "axis": 0}
    compiled = qcompile.compile(tiny_models.decoder("llama"), config, target="reference")
    compiled.export_checkpoint(tmp_path / "out")
    start = "model.layers.0.mlp.up_proj."
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = hqq.HQQLinear(None, quant_config=None, compute_dtype=torch.float32, device="cpu", initialize=False)
    layer.load_state_dict({name.removeprefix(start): value for name, value in stored.items() if name.startswith(start)})
    assert torch.equal(layer.dequantize(), compiled.weight(start[:-1]))


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("llama-tied", {"quant_method": "gptq", "bits": 3, "group_size": 32}),
        ("gpt2", {"quant_method": "gptq", "bits": 4, "group_size": 32}),  # Conv1D, biases, tied head
        ("qwen2", {"quant_method": "awq", "group_size": 32}),
        ("opt", {"quant_method": "hqq", "nbits": 4, "group_size": 32}),
        ("gemma2", {"quant_method": "awq", "group_size": 16, "bits": 8}),
        ("phi3", None),
    ],
    ids=lambda value: value if isinstance(value, str) else (value or {}).get("quant_method", "none"),
)
def test_a_model_that_was_quantized_here_survives(model: str, config: dict[str, object] | None, tmp_path: Path) -> None:
    compiled = qcompile.compile(tiny_models.decoder(model), config, target="reference")
    compiled.save(tmp_path / "m.qc")
    qcompile.load(tmp_path / "m.qc").export_checkpoint(tmp_path / "out")
    again = qcompile.compile(tmp_path / "out", target="reference")
    for path in compiled.artifact.weights:
        assert torch.equal(compiled.weight(path), again.weight(path)), path
    assert torch.equal(compiled(input_ids=IDS).logits, again(input_ids=IDS).logits)


def test_a_merged_and_folded_cpu_model_survives(tmp_path: Path) -> None:
    float_model = tiny_models.decoder("qwen2")  # q, k and v have biases and become one linear
    config = {"quant_method": "hqq", "nbits": 4, "group_size": 32}
    compiled = qcompile.compile(float_model, config, target="cpu")
    compiled.export_checkpoint(tmp_path / "out")
    expected = qcompile.compile(float_model, config, target="reference")
    same(qcompile.compile(tmp_path / "out", target="reference"), expected)


def test_a_large_checkpoint_is_written_in_shards(tmp_path: Path) -> None:
    compiled = qcompile.compile(tiny_models.decoder("llama"), None, target="reference")
    compiled.artifact.checkpoint.generation_config["temperature"] = 0.5
    export_checkpoint(compiled.artifact, compiled.contents.tensors, tmp_path / "out", shard_bytes=100_000)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    count = len(names) - 3
    assert count > 2 and names[:3] == [
        "config.json",
        "generation_config.json",
        f"model-00001-of-{count:05}.safetensors",
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny_models.decoder("llama").parameters())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5
    same(qcompile.compile(tmp_path / "out", target="reference"), compiled)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    compiled = qcompile.compile(tiny_models.decoder("llama"), None, target="reference")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="something else is in the way"):
        compiled.export_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
