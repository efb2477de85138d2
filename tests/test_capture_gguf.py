"""GGUF files: the reader against the gguf package, captured graphs against transformers, damaged files refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_capture import check_decoder
from tiny_models import decoder

from qcompile.capture import capture
from qcompile.capture.gguf import FAMILIES
from qcompile.errors import CaptureError, CheckpointError
from qcompile.gguf_file import BLOCKS, GgufFile
from qcompile.sources import TensorInfo

SHORT = {"llama-tied": "llama"}


def by_gguf_name(name: str, model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model as llama.cpp's converter names and arranges them."""
    family, out = FAMILIES[name], {}
    back = {to: old for old, to in family.names.items()}
    for key, value in model.state_dict().items():
        stem, _, end = key.rpartition(".")
        layer = next((part for part in stem.split(".") if part.isdigit()), None)
        pattern = ".".join("#" if part.isdigit() else part for part in stem.split("."))
        if pattern == "lm_head" and model.config.tie_word_embeddings:
            continue
        old = back[pattern].replace("#", str(layer)) + "." + end
        if family.transposed and layer and end == "weight" and "ln" not in stem:
            value = value.t()
        if family.paired_rows and stem.endswith(("q_proj", "k_proj")):
            heads = model.config.num_attention_heads if stem.endswith("q_proj") else model.config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        out[old] = value
    return out


def write(
    path: Path,
    name: str,
    model: Any,
    kind: Any = None,
    more: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """A GGUF file of `model`, its matrices in blocks of `kind`, with `more` metadata and `tensors`."""
    config, family = model.config, FAMILIES[name]
    writer = gguf.GGUFWriter(path, name)
    for key, field in family.keys.items():
        value = getattr(config, field, None)
        value = config.rope_parameters["rope_theta"] if field == "rope_theta" else value
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{name}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(config.vocab_size)])
    for key, value in (more or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for key, value in (by_gguf_name(name, model) | (tensors or {})).items():
        data = value.detach().float().contiguous().numpy()
        if kind is not None and data.ndim == 2 and ("blk" in key or "token" in key):
            writer.add_tensor(key, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "gpt2"])
def test_a_float_file_is_the_model(name, tmp_path):
    model = decoder(name)
    if name == "qwen2":  # the file says nothing of windows on some of the layers
        model.config.layer_types = ["full_attention"] * 2
    write(tmp_path / "m.gguf", SHORT.get(name, name), model)
    program = capture(tmp_path / "m.gguf")
    assert program.quantization_config is None and program.model_config["model_type"] == SHORT.get(name, name)
    reference = type(model)(model.config).eval()
    reference.load_state_dict(model.state_dict())
    check_decoder(program, reference)
    for tensor in program.tensors:
        program.load(tensor, tensor)
    program.ledger.check()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_blocks_stay_blocks(name, kind, tmp_path):
    model = decoder(name)
    write(tmp_path / "m.gguf", name, model, kind)
    program = capture(tmp_path / "m.gguf")
    assert program.quantization_config == {"quant_method": "gguf"}
    for module in program.modules.values():
        info = program.source.info(module.weight)
        blocked = module.weight not in ("lm_head.weight", "transformer.wpe.weight")
        assert info.encoding == (kind.name.lower() if blocked else "")
        assert module.dtype == "f32"  # what the blocks are worth, for a method that quantizes them again
        if blocked:
            expected = gguf.quantize(np.zeros((module.n, module.k), np.float32), kind).shape
            assert info.shape == program.source.read(module.weight).shape == expected
    old = by_gguf_name(name, model)
    state = {}
    for key, new in program.source.to.items():
        data = old[new].detach().numpy()
        data = gguf.dequantize(gguf.quantize(data, kind), kind) if program.source.info(key).encoding else data
        old[new] = torch.from_numpy(data.copy())
    for key, new in program.source.to.items():
        value = old[new]
        if key in program.source.heads:
            value = value.unflatten(0, (program.source.heads[key], -1, 2)).transpose(1, 2).flatten(0, 2)
        state[key] = value.t() if key in program.source.transposed else value
    model.load_state_dict(state, strict=name != "gpt2")  # there the output embedding is tied
    check_decoder(program, model)


def test_llama_3_frequencies(tmp_path):
    model, factors = decoder("llama"), torch.linspace(1, 8, 8)
    write(tmp_path / "m.gguf", "llama", model, tensors={"rope_freqs.weight": factors})
    model.model.rotary_emb.inv_freq /= factors
    program = capture(tmp_path / "m.gguf")
    check_decoder(program, model)
    assert "rope_freqs.weight" not in program.ledger.unclaimed()


def test_every_plain_and_block_type_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "any")
    plain = {"f32": np.float32, "f16": np.float16, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64}
    for name, dtype in plain.items():
        writer.add_tensor(name, np.arange(6).reshape(2, 3).astype(dtype))
    data = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q5_1, gguf.GGMLQuantizationType.Q8_0):
        writer.add_tensor(kind.name, gguf.quantize(data, kind), raw_dtype=kind)
    for add, value in ((writer.add_uint64, 1 << 60), (writer.add_bool, True), (writer.add_float64, 0.1)):
        add(f"k.{value}", value)
    writer.add_array("k.words", ["a", "ü"])
    writer.add_array("k.numbers", [1, 2, -3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reader = GgufFile(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert tuple(file.names()) == tuple(t.name for t in reader.tensors)
    for tensor in reader.tensors:
        found = file.read(tensor.name).numpy()
        assert found.dtype == tensor.data.dtype and np.array_equal(found, tensor.data)
    assert file.info("i32") == TensorInfo("i32", (2, 3)) and file.info("Q8_0") == TensorInfo("u8", (4, 272), "q8_0")
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == expected


def test_block_sizes_are_those_of_ggml():
    for kind, (name, weights, size) in BLOCKS.items():
        assert gguf.GGMLQuantizationType(kind).name.lower() == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (weights, size)


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word)) + word.encode()


def header(tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


DAMAGED = {
    "the file is too short for GGUF": b"GGUF",
    "the file does not start with GGUF": b"GGML" + bytes(40),
    "the GGUF version is not known": header(version=1),
    "the file claims too many tensors": header(tensors=1 << 40),
    "the file claims too many metadata keys": header(keys=1 << 40),
    "the file ends too early": header(keys=1, body=text("k")),
    "the file claims too many bytes in a string": header(keys=1, body=struct.pack("<Q", 1 << 60)),
    "a metadata value has an unknown type": header(keys=1, body=text("k") + struct.pack("<I", 99)),
    "the file claims too many values in an array": header(keys=1, body=text("k") + struct.pack("<IIQ", 9, 4, 1 << 60)),
    "the file claims too many strings in an array": header(keys=1, body=text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)),
    "an array holds values of an unknown type": header(keys=1, body=text("k") + struct.pack("<IIQ", 9, 9, 1)),
    "general.alignment is not an alignment": header(keys=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
    "tensor 'x' has too many dimensions": header(tensors=1, body=text("x") + struct.pack("<I", 1 << 30)),
    "tensor 'x' has an unknown type": header(tensors=1, body=tensor("x", (4,), 4)),
    "the rows of tensor 'x' are no whole blocks": header(tensors=1, body=tensor("x", (33,), 3)),
    "the file claims too many elements along a dimension": header(tensors=1, body=tensor("x", (1 << 60,), 0)),
    "tensor 'x' does not fit its file": header(tensors=1, body=tensor("x", (1 << 40, 1 << 40), 0)),
    "the file holds tensor 'x' twice": header(tensors=2, body=tensor("x", (1,), 24) * 2 + bytes(64)),
}


@pytest.mark.parametrize("summary", DAMAGED)
def test_damaged_files(tmp_path, summary):
    (tmp_path / "m.gguf").write_bytes(DAMAGED[summary])
    with pytest.raises(CheckpointError) as caught:
        capture(tmp_path / "m.gguf")
    assert caught.value.summary == summary and caught.value.where.startswith(str(tmp_path / "m.gguf"))


def test_the_text_of_an_error(tmp_path):
    (tmp_path / "m.gguf").write_bytes(header(tensors=1, body=tensor("x", (64, 2), 3, 1 << 20)))
    with pytest.raises(CheckpointError) as caught:
        GgufFile(tmp_path / "m.gguf")
    assert str(caught.value) == (
        "tensor 'x' does not fit its file\n"
        f"  where:    {tmp_path}/m.gguf, byte 65\n"
        "  found:    bytes 1048672 to 1048752\n"
        "  expected: at most 65\n"
        "  try:      download or convert the file again: it is damaged or not a GGUF file"
    )


def test_an_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CaptureError) as caught:
        capture(tmp_path / "m.gguf")
    assert str(caught.value) == (
        "the architecture of the GGUF file is not known\n"
        f"  where:    {tmp_path}/m.gguf\n"
        "  found:    mamba\n"
        "  expected: llama, mistral, qwen2, qwen3, gpt2\n"
        "  try:      use the model's safetensors checkpoint instead"
    )


def test_metadata_that_would_be_lost(tmp_path):
    write(tmp_path / "m.gguf", "llama", decoder("llama"), more={"llama.expert_count": 8})
    with pytest.raises(CaptureError) as caught:
        capture(tmp_path / "m.gguf")
    assert caught.value.found == "llama.expert_count = 8"
    write(tmp_path / "m.gguf", "llama", decoder("llama"), more={"llama.rope.scaling.type": "none"})
    capture(tmp_path / "m.gguf")


HOSTILE = {
    "general.architecture": ["llama"],
    "llama.block_count": "two",
    "llama.embedding_length": [64],
    "llama.attention.head_count": 0,
    "llama.attention.head_count_kv": [2, 2],
    "llama.attention.layer_norm_rms_epsilon": float("nan"),
    "llama.rope.freq_base": -1.0,
    "llama.feed_forward_length": 1 << 40,
    "llama.rope.dimension_count": "x",
    "tokenizer.ggml.bos_token_id": "x",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    write(path, "llama", decoder("llama"))
    return path


@pytest.mark.parametrize("key", HOSTILE)
def test_metadata_of_another_kind(whole, key, monkeypatch):
    read = GgufFile.__init__

    def changed(self, path):
        read(self, path)
        self.metadata[key] = HOSTILE[key]

    monkeypatch.setattr(GgufFile, "__init__", changed)
    with pytest.raises((CaptureError, CheckpointError)) as caught:
        capture(whole)
    assert str(whole) in caught.value.where


def test_more_layers_than_tensors(whole, monkeypatch):
    monkeypatch.setitem(HOSTILE, "llama.block_count", 1 << 31)
    test_metadata_of_another_kind(whole, "llama.block_count", monkeypatch)


def test_a_missing_tensor(tmp_path):
    model = decoder("llama")
    del model.model.layers[1].mlp.up_proj
    write(tmp_path / "m.gguf", "llama", model)
    with pytest.raises(CheckpointError) as caught:
        capture(tmp_path / "m.gguf")
    assert caught.value.summary == "1 tensors of the architecture are not in the checkpoint"
    assert caught.value.expected == "model.layers.1.mlp.up_proj.weight"
