"""Artifacts are written whole, byte for byte the same each time, and read back equal."""

from __future__ import annotations

import errno
import os

import artifacts
import pytest
import safetensors.torch
import small_programs as small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile import codec
from qcompile.artifact import Artifact, Executable, View
from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import ArtifactError
from qcompile.runtime import folder, store
from qcompile.runtime.memory import ALIGNMENT
from qcompile.runtime.session import Session
from qcompile.runtime.tensors import write_tensors


def snapshot(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_written_is_read_back(tmp_path):
    made = artifacts.contents()
    store.write(tmp_path / "m.qc", made)
    read = store.read(tmp_path / "m.qc", trusted=True)
    assert read.artifact == made.artifact and read.kernels == made.kernels
    assert read.report == made.report and list(read.snapshots.items()) == list(made.snapshots.items())
    assert torch.equal(read.tensors["w"], made.tensors["w"])
    run = Session(read.artifact.executable, read.tensors, read.kernels)
    assert torch.equal(run({"x": torch.ones(2, 4)})["y"], 2 * (1 + made.tensors["w"]))


def test_objects_stay_unread_without_trust(tmp_path):
    store.write(tmp_path / "m.qc", artifacts.contents())
    read = store.read(tmp_path / "m.qc")
    assert read.kernels == {} and "fadd" in read.sources["add"]


def test_equal_contents_give_equal_bytes(tmp_path):
    for name in ("a.qc", "b.qc"):
        store.write(tmp_path / name, artifacts.contents())
    assert snapshot(tmp_path / "a.qc") == snapshot(tmp_path / "b.qc")
    store.write(tmp_path / "c.qc", store.read(tmp_path / "a.qc", trusted=True))
    assert snapshot(tmp_path / "a.qc") == snapshot(tmp_path / "c.qc")


def test_a_second_save_replaces_the_first(tmp_path):
    path = tmp_path / "m.qc"
    store.write(path, artifacts.contents())
    store.write(path, artifacts.contents(accuracy="int8"))
    assert store.read(path).artifact.accuracy == "int8" and os.listdir(tmp_path) == ["m.qc"]


@pytest.mark.parametrize("make", ["file", "folder", "link"])
def test_nothing_else_is_replaced(tmp_path, make):
    path = tmp_path / "m.qc"
    if make == "file":
        path.write_text("mine")
    elif make == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:
        path.symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="something else is in the way"):
        store.write(path, artifacts.contents())


@pytest.mark.parametrize("at", range(7))
def test_a_failed_save_leaves_the_old_artifact(tmp_path, monkeypatch, at):
    path = tmp_path / "m.qc"
    store.write(path, artifacts.contents())
    before, calls, write = snapshot(path), [], folder._write

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(folder, "_write", failing)
    with pytest.raises(ArtifactError, match=r"the artifact cannot be written\n.*\n.*No space left"):
        store.write(path, artifacts.contents(accuracy="int8"))
    assert snapshot(path) == before and os.listdir(tmp_path) == ["m.qc"]


def test_a_failed_rename_puts_the_old_artifact_back(tmp_path, monkeypatch):
    path = tmp_path / "m.qc"
    store.write(path, artifacts.contents())
    before, rename = snapshot(path), os.rename

    def failing(source, target):
        if str(target) == str(path) and ".old-" not in str(source):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ArtifactError, match="broken"):
        store.write(path, artifacts.contents(accuracy="int8"))
    assert snapshot(path) == before


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3), st.integers(0, 2**31)),
        max_size=6,
    )
)
def test_tensors_of_every_dtype_and_name_survive(tmp_path_factory, spec):
    tensors = {}
    for name, (dtype, shape, seed) in spec.items():
        generator = torch.Generator().manual_seed(seed)
        size = torch.empty(shape, dtype=DTYPES[dtype]).nbytes
        raw = torch.randint(0, 2 if dtype == "bool" else 256, (size,), dtype=torch.uint8, generator=generator)
        tensors[name] = raw.view(DTYPES[dtype]).view(shape) if size else torch.empty(shape, dtype=DTYPES[dtype])
    path = tmp_path_factory.mktemp("t") / "m.qc"
    buffers = {name: small.buffer(name, "weight", tuple(t.shape), NAMES[t.dtype]) for name, t in tensors.items()}
    program = Executable(buffers, (), (), ())
    store.write(path, store.Contents(Artifact("cpu:test", "module", executable=program), tensors))
    read = store.read(path).tensors
    foreign = safetensors.torch.load_file(path / "weights.safetensors")
    assert read.keys() == tensors.keys() == foreign.keys()
    for name, tensor in tensors.items():
        for other in (read[name], foreign[name]):
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert read[name].data_ptr() % ALIGNMENT == 0


def test_whole_lines_are_used_where_they_are_mapped(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.ones(32), "c": torch.ones(16)}
    with open(tmp_path / "w", "wb") as file:
        write_tensors(file, tensors)
    data = (tmp_path / "w").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    offsets = {name: entry["data_offsets"] for name, entry in codec.parse(data[8:start], "").items()}
    assert start % ALIGNMENT == 0 and offsets == {"b": [0, 128], "c": [128, 192], "a": [192, 204]}


def test_a_codec_round_trip_is_the_identity():
    program = small.arithmetic()
    text = codec.render(codec.encode(program))
    assert codec.decode(Executable, codec.parse(text, "p"), "p") == program
    assert codec.encode(View("x", (1, "b"), (1, 1))) == {"buffer": "x", "shape": [1, "b"], "strides": [1, 1]}
