"""Saved models: the same bytes every time, at home on any path without the compiler, and for other machines."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import end_to_end_models as tiny
import exports
import pytest
import tiny_models
import torch

import qcompile
from qcompile.errors import ArtifactError

# One worker: what is built for a target serves several tests.
pytestmark = pytest.mark.xdist_group("artifacts")
LEAN = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch_mlir", "triton", "transformers"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import json
import torch
import qcompile

q = qcompile.load(sys.argv[1], native="trusted")
ids = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps([q(input_ids=ids).logits.tolist(), q.generate(ids, max_new_tokens=5).tolist()]))
"""


@functools.cache
def _compiled(target: str) -> qcompile.runtime.model.CompiledModel:
    return _compile(target)


def _compile(target: str) -> qcompile.runtime.model.CompiledModel:
    return qcompile.compile(tiny_models.decoder("llama"), tiny.CONFIGS["nf4"], target=target)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "m.qc"
    tiny.compiled("llama", "nf4").save(path)
    return path


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return tiny.compiled("llama", "nf4")(input_ids=tiny.tokens(2, 6)).logits


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_the_same_model_gives_the_same_bytes(target, tmp_path, monkeypatch):
    """In two compilations, of which the second traces and builds everything anew."""
    _compile(target).save(tmp_path / "one")
    exports.forget()
    if target == "cpu":
        monkeypatch.setenv("QCOMPILE_HOME", str(tmp_path / "empty"))
    _compile(target).save(tmp_path / "two")
    one, two = _files(tmp_path / "one"), _files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_it_runs_elsewhere_without_the_compiler(saved, expected, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(saved, moved)
    ids = tiny.tokens(2, 6)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LEAN, str(moved), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logits, text = json.loads(done.stdout)
    assert torch.equal(torch.tensor(logits), expected)
    assert text == tiny.compiled("llama", "nf4").generate(ids, max_new_tokens=5).tolist()


def test_native_code_is_made_again_or_trusted(saved, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_HOME", str(tmp_path / "empty"))
    for native in ("rebuild", "trusted"):
        q = qcompile.load(saved, native=native)
        assert torch.equal(q(input_ids=tiny.tokens(2, 6)).logits, expected)
        built = {path.suffix for path in (tmp_path / "empty").rglob("*.kernel")}
        assert built == {".kernel"}  # made by the first load; the second finds them made or needs none
    on_reference = qcompile.load(saved, target="reference")(input_ids=tiny.tokens(2, 6)).logits
    assert tiny.difference(on_reference, expected) < 5e-6


def test_a_loaded_model_is_saved_unchanged(saved, tmp_path):
    qcompile.load(saved, native="trusted").save(tmp_path / "again")
    assert _files(tmp_path / "again") == _files(saved)


def test_another_cpu_of_this_architecture(expected, tmp_path):
    """Less capable instructions: objects of their own, and equal results up to the order of sums."""
    q = _compiled("cpu:x86-64-v3")
    if q.target.missing():
        pytest.skip(f"this machine lacks {', '.join(q.target.missing())}")
    q.save(tmp_path / "v3")
    for native in ("rebuild", "trusted"):
        loaded = qcompile.load(tmp_path / "v3", native=native)
        assert loaded.target.name == "cpu:x86-64-v3"
        assert tiny.difference(loaded(input_ids=tiny.tokens(2, 6)).logits, expected) < 5e-6


def test_kernels_for_another_cpu_are_built_from_the_same_data(saved):
    """How x is packed is in the data, so that all kernels that a level builds agree on it."""
    q, ids = tiny.compiled("llama", "nf4"), tiny.tokens(2, 13)
    if q.target.name != "cpu:x86-64-v4-vnni":
        pytest.skip("this machine has no better level than the other")
    loaded = qcompile.load(saved, target="cpu:x86-64-v3")
    assert tiny.difference(loaded(input_ids=ids).logits, q(input_ids=ids).logits) < 5e-6


@pytest.mark.parametrize(("target", "machine"), [("cpu:aarch64", 183), ("cpu:x86-64-v3", 62)])
def test_objects_are_for_the_machine_asked_for(target, machine, tmp_path):
    """ELF files whose header names the machine: 183 is AArch64, 62 is x86-64."""
    q = _compiled(target)
    q.save(tmp_path / "m.qc")
    objects = list((tmp_path / "m.qc").glob("*.o"))
    assert len(objects) == len(q.kernels()) > 5
    for path in objects:
        head = path.read_bytes()[:20]
        assert head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") == machine


def test_another_architecture_is_refused_here(expected, tmp_path):
    q = _compiled("cpu:aarch64")
    if not q.target.missing():
        pytest.skip("this machine is an aarch64")
    q.save(tmp_path / "m.qc")
    with pytest.raises(ArtifactError) as caught:
        qcompile.load(tmp_path / "m.qc", native="trusted")
    assert str(caught.value) == (
        "the artifact is for another machine\n"
        f"  where:    {tmp_path / 'm.qc'}\n"
        "  found:    no aarch64\n"
        "  expected: cpu:aarch64\n"
        '  try:      target="reference" runs anywhere'
    )
    on_reference = qcompile.load(tmp_path / "m.qc", target="reference")
    assert tiny.difference(on_reference(input_ids=tiny.tokens(2, 6)).logits, expected) < 5e-6
