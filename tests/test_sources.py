"""Tensor sources read what safetensors and gguf wrote, refuse what is damaged or hostile, and the ledger counts uses."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcompile.errors import CheckpointError
from qcompile.ledger import Ledger
from qcompile.safetensors_folder import SafetensorsFolder
from qcompile.sources import ModuleState, Renamed, TensorInfo

TENSORS = {
    "a.weight": torch.randn(3, 4),
    "a.half": torch.randn(5).half(),
    "a.brain": torch.randn(2, 2).bfloat16(),
    "a.float8": torch.randn(7).to(torch.float8_e4m3fn),
    "b.codes": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "b.bytes": torch.arange(3, dtype=torch.uint8),
    "b.words": torch.arange(3, dtype=torch.int32).view(torch.uint32),
    "b.flag": torch.tensor(True),
    "b.empty": torch.zeros(0, 4),
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def written(folder: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(folder)
    return str(caught.value).replace(str(folder), "DIR")


def test_every_dtype_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    assert set(source.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = source.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and raw(found) == raw(tensor)
    assert source.info("a.half") == TensorInfo("f16", (5,)) and source.info("b.words") == TensorInfo("uint32", (3,))
    assert source.info("a.float8").dtype == "f8e4m3"


def test_unaligned_tensors_are_read(tmp_path):
    values = torch.tensor([1.0, 2.0])
    written(
        tmp_path,
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "value": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        },
        b"\x07" + raw(values),
    )
    assert torch.equal(SafetensorsFolder(tmp_path).read("value"), values)


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path):
    save_file({"x": torch.zeros(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    SafetensorsFolder(tmp_path).read("x").fill_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def shards(folder: Path, index: object) -> None:
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
    shards(tmp_path, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    source = SafetensorsFolder(tmp_path)
    assert tuple(source.names()) == ("a", "b") and torch.equal(source.read("b"), torch.zeros(3))


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", ".safetensors", "a\\b.safetensors"],
)
def test_an_index_that_leaves_its_folder(tmp_path, file):
    shards(tmp_path, {"weight_map": {"a": file}})
    assert refused(tmp_path) == (
        "the index names a file outside its folder\n"
        "  where:    DIR/model.safetensors.index.json\n"
        f"  found:    {file!r}\n"
        "  expected: the plain name of a .safetensors file beside the index\n"
        "  try:      do not load this checkpoint unless you trust who made it"
    )


DAMAGED = "download or write the file again: it is damaged or not a safetensors file"
INDEXES = {
    "a shard is missing\n  where:    DIR/model.safetensors.index.json\n  expected: model-3.safetensors\n"
    "  try:      download the checkpoint again: a shard is missing": {"weight_map": {"c": "model-3.safetensors"}},
    "tensor 'c' is not where the index says\n  where:    DIR/model.safetensors.index.json\n  found:    nowhere\n"
    f"  expected: model-1.safetensors\n  try:      {DAMAGED}": {
        "weight_map": {"a": "model-1.safetensors", "c": "model-1.safetensors"}
    },
    "the index has no weight_map\n  where:    DIR/model.safetensors.index.json\n  found:    list\n"
    f"  expected: tensor name -> file name\n  try:      {DAMAGED}": {"weight_map": []},
    "the index is not a JSON object\n  where:    DIR/model.safetensors.index.json\n  found:    list\n"
    f"  expected: a JSON object\n  try:      {DAMAGED}": [],
}


@pytest.mark.parametrize("text", INDEXES)
def test_damaged_indexes(tmp_path, text):
    shards(tmp_path, INDEXES[text])
    assert refused(tmp_path) == text


def test_two_shards_with_one_tensor(tmp_path):
    shards(tmp_path, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    assert refused(tmp_path) == (
        "tensor 'a' lies in two files\n  where:    DIR/model.safetensors.index.json\n  found:    model-1.safetensors\n"
        f"  expected: model-2.safetensors\n  try:      {DAMAGED}"
    )


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert refused(tmp_path) == (
        "there are no weights that can be read\n  where:    DIR\n  found:    pytorch_model.bin\n"
        "  expected: model.safetensors or model.safetensors.index.json\n"
        "  try:      save the model as safetensors: pickled weights are never loaded"
    )


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = [
    (b"{", "the header is not JSON", "Expecting property name", "a JSON object"),
    (b"[]", "the header is not a JSON object", "list", "a JSON object"),
    (entry(dtype="F33"), "tensor 'x' has an unknown dtype", "F33", "F64, F32"),
    ({"x": 1}, "tensor 'x' has an unknown dtype", "1", "F64, F32"),
    (entry(shape=[-2]), "tensor 'x' has no valid shape", "[-2], [0, 8]", "a list of sizes and a pair of offsets"),
    (entry(shape=[True]), "tensor 'x' has no valid shape", "[True]", "a list of sizes"),
    (entry(shape=[1] * 17), "tensor 'x' has no valid shape", "[1, 1", "a list of sizes"),
    (entry(offsets=[0]), "tensor 'x' has no valid shape", "[2], [0]", "a list of sizes"),
    (
        entry(offsets=[0, 4]),
        "tensor 'x' does not fit its file",
        "bytes 0 to 4",
        "8 bytes for F32 [2] inside the file's 8",
    ),
    (entry(offsets=[4, 12]), "tensor 'x' does not fit its file", "bytes 4 to 12", "8 bytes for F32 [2]"),
    (entry(shape=[1 << 61, 8]), "tensor 'x' does not fit its file", "bytes 0 to 8", "73786976294838206464 bytes"),
    (entry(dtype=["F32"]), "tensor 'x' has an unknown dtype", "['F32']", "F64, F32"),
    (entry(shape=[1], offsets=[4, 8]), "tensor 'x' overlaps another, or follows a gap", "byte", "byte"),
    (entry(shape=[1], offsets=[0, 4]), "the file goes on behind its last tensor", "", ""),
    ({**entry(), "y": entry()["x"]}, "tensor 'y' overlaps another, or follows a gap", "byte", "byte"),
]


@pytest.mark.parametrize("header, summary, found, expected", HEADERS, ids=lambda x: None)
def test_damaged_headers(tmp_path, header, summary, found, expected):
    written(tmp_path, header, b"\0" * 8)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(tmp_path)
    error = caught.value
    assert error.summary == summary and error.found.startswith(found) and error.expected.startswith(expected)
    assert error.where == str(tmp_path / "model.safetensors") and error.remedy == DAMAGED


@pytest.mark.parametrize("length", [3, 2**63, 10**9])
def test_a_header_longer_than_its_file(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(b"abc" if length == 3 else struct.pack("<Q", length) + b"{}")
    assert refused(tmp_path).startswith("the header is longer than the file\n  where:    DIR/model.safetensors\n")


def test_a_missing_tensor_has_a_near_miss(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for act in (lambda s: s.read("a.wieght"), lambda s: s.info("a.wieght"), lambda s: Ledger(s).claim("a.wieght", "a")):
        with pytest.raises(CheckpointError) as caught:
            act(SafetensorsFolder(tmp_path))
        assert str(caught.value) == (
            "there is no tensor 'a.wieght', did you mean 'a.weight'?\n"
            f"  where:    the checkpoint {tmp_path}\n  found:    9 tensors\n  expected: a.wieght\n"
            "  try:      check that the checkpoint is complete and belongs to this architecture"
        )


def test_a_module_names_a_shared_tensor_once():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    source = ModuleState(model)
    assert "0.weight" in source.names() and "1.weight" not in source.names() and "2.running_mean" in source.names()
    assert source.info("1.bias") == TensorInfo("f32", (3,)) and source.describe() == "the module Sequential"
    renamed = Renamed(source, {"w": "0.weight"})
    assert tuple(renamed.names()) == ("w",) and torch.equal(renamed.read("w"), model[0].weight)
    with pytest.raises(CheckpointError, match=r"there is no tensor '0\.weight'"):
        renamed.read("0.weight")


def test_the_ledger_wants_every_tensor_used_once():
    ledger = Ledger(ModuleState(torch.nn.Linear(2, 3)))
    assert torch.equal(ledger.read("weight", "layer"), ledger.source.read("weight"))
    ledger.claim("weight", "layer")
    assert ledger.unclaimed() == ("bias",)
    ledger.ignore("bias", "no use")
    ledger.check()
    ledger.claim("weight", "another layer")
    ledger.claim("bias", "layer")
    with pytest.raises(CheckpointError) as caught:
        ledger.check()
    assert str(caught.value) == (
        "tensors that did not end in exactly one place\n"
        "  where:    the module Linear\n"
        "  found:    weight: used 2 times, by layer, another layer; bias: used 2 times, by layer, ignored (no use)\n"
        "  expected: every tensor of the source used once\n"
        "  try:      check that the quantization config and the architecture are those the checkpoint was made with"
    )
