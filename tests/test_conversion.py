"""Checkpoints converted from one method to another: the proof, the model that comes out, and the reasons against it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import test_capture_gguf
import tiny_models
import torch
from click.testing import CliRunner

import qcompile
from qcompile.cli import main
from qcompile.errors import ConfigError

IDS = torch.tensor([[3, 5, 8, 13, 21]])


def quantized(model: str, config: dict[str, object], folder: Path) -> Path:
    """A checkpoint of a tiny model that was quantized here."""
    qcompile.compile(tiny_models.decoder(model), config, target="reference").export_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    return quantized("llama", config, tmp_path_factory.mktemp("source") / "gptq")


def logits(folder: Path) -> torch.Tensor:
    return qcompile.compile(folder, target="reference")(input_ids=IDS).logits


@pytest.mark.parametrize("to", ["awq", "auto-round", "compressed-tensors"])
def test_there_and_back_again(to: str, source: Path, tmp_path: Path) -> None:
    there = qcompile.convert(source, to, tmp_path / "there")
    assert (there.source, there.target, len(there.modules)) == ("gptq", to, 14)
    assert sum(row.weights for row in there.modules) == sum(row.weights for row in there.modules if not row.note) > 0
    assert json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]["quant_method"] == to
    back = qcompile.convert(tmp_path / "there", "gptq", tmp_path / "back")
    assert [row.path for row in back.modules] == [row.path for row in there.modules]
    assert torch.equal(logits(tmp_path / ("back" if to == "awq" else "there")), logits(source))


def test_only_the_rounding_differs(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        qcompile.convert(source, "metal", tmp_path / "out")
    assert str(error.value).startswith("14 of 14 modules have no such weight in metal\n")
    assert "would change, by at most" in error.value.found and "(13 more like it)" in error.value.found
    assert "allow that with rounded=False (--unrounded)" in error.value.remedy
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())
    done = qcompile.convert(source, "metal", tmp_path / "out", rounded=False)
    assert "equal bit for bit before the rounding of each method" in str(done)
    found, expected = logits(tmp_path / "out"), logits(source)
    assert 0 < (found - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("Q4_0", {"quant_method": "metal", "bits": 4, "group_size": 32}),
        ("Q4_1", "metal"),
        ("Q8_0", {"quant_method": "metal", "bits": 8, "group_size": 32}),
    ],
    ids=["Q4_0", "Q4_1", "Q8_0"],
)
def test_a_gguf_file(kind: str, to: str | dict[str, object], tmp_path: Path) -> None:
    blocks = getattr(gguf.GGMLQuantizationType, kind)
    test_capture_gguf.write(tmp_path / "m.gguf", "llama", tiny_models.decoder("llama"), blocks)
    done = qcompile.convert(tmp_path / "m.gguf", to, tmp_path / "out")
    rows = {row.path: row for row in done.modules}
    assert rows["model.layers.0.mlp.up_proj"].target == "mlx"
    embedding = rows["model.embed_tokens"]  # blocks too, which Metal does not quantize
    assert embedding.target == "dense" and embedding.note.startswith("metal leaves it dense: Embedding")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("model", "config", "to", "text"),
    [
        ("llama", {"quant_method": "hqq", "group_size": 32}, "gptq", "the zeros are no whole numbers"),
        (
            "llama",
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
            "metal",
            "the offset would be rounded",
        ),
        (
            "llama",
            {"quant_method": "gptq", "bits": 8, "group_size": 32},
            {"quant_method": "awq", "bits": 4, "group_size": 32},
            "the codes do not fit",
        ),
        (
            "llama",
            {"load_in_4bit": True, "quant_method": "bitsandbytes"},
            "eetq",
            "no config of eetq is found by itself",
        ),
        ("llama", None, "gptq", "the model is not quantized"),
    ],
    ids=["float zeros", "rounded offsets", "bits", "no config", "float model"],
)
def test_why_not(model: str, config: dict[str, object], to: object, text: str, tmp_path: Path) -> None:
    folder = quantized(model, config, tmp_path / "source")
    with pytest.raises(ConfigError) as error:
        qcompile.convert(folder, to, tmp_path / "out")
    assert text in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command_line(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    result = run(main, ["convert", str(source), "--to", "awq", "-o", str(tmp_path / "awq"), "--json"])
    assert result.exit_code == 0, result.output
    proof = json.loads(result.stdout)
    assert proof["target"] == "awq" and {row["target"] for row in proof["modules"]} == {"awq"}
    config = json.dumps({"bits": 4, "group_size": 32, "sym": False})
    result = run(
        main, ["convert", str(tmp_path / "awq"), "--to", "gptq", "--config", config, "-o", str(tmp_path / "gptq")]
    )
    assert result.exit_code == 0 and result.stdout.endswith("decoded from both checkpoints: equal bit for bit\n")
    assert run(main, ["convert", str(source), "-o", str(tmp_path / "x")]).exit_code == 2
    artifact = tmp_path / "m.qc"
    qcompile.compile(tmp_path / "gptq", target="reference").save(artifact)
    result = run(main, ["export", str(artifact), "-o", str(tmp_path / "again")])
    assert result.exit_code == 0 and result.stdout == ""
    assert torch.equal(logits(tmp_path / "again"), logits(source))
