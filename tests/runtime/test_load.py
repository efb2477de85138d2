"""Loading: kernels made anew from data or trusted, the cache of built kernels, and what a model shows."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import stat
import threading

import artifacts
import pytest
import small_programs as small
import torch

from qcompile.artifact import Artifact, Buffer, Extent, GraphNode, WeightRecord
from qcompile.errors import ArtifactError, ConfigError, ToolchainError
from qcompile.runtime.cache import build_kernels, cache_folder
from qcompile.runtime.load import load
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.output import Output, structured
from qcompile.runtime.store import Contents
from qcompile.target import native

X = torch.linspace(-1, 1, 8).view(2, 4)
W = torch.arange(8.0).view(2, 4)
Y = (X + W) * X + (X + W)


class Builder:
    """Builds the small kernels and counts how often."""

    def __init__(self, fail=None):
        self.built, self.fail = [], fail

    def key(self, spec, target):
        return f"{spec.template}{len(target)}"

    def build(self, kernels):
        if self.fail:
            raise self.fail
        self.built += list(kernels)
        return {name: small.built(spec.template) for name, (spec, _) in kernels.items()}

    def extents(self, spec):
        return lambda dims, threads: [Extent("f32", dims[0]), Extent("f32", dims[0]), Extent("f32", dims[0], True)]


@pytest.fixture
def path(tmp_path):
    CompiledModel(artifacts.contents(target=native().name)).save(tmp_path / "m.qc")
    return tmp_path / "m.qc"


def test_kernels_are_made_anew_once(path, tmp_path):
    builder, cache = Builder(), tmp_path / "cache"
    for _ in range(2):
        model = load(path, builder_for=lambda _: builder, cache=cache, threads=1)
        assert torch.equal(model(x=X)["y"], Y) and torch.equal(model(X).y, Y)
    assert builder.built == ["add"]
    assert stat.S_IMODE((cache / "kernels").stat().st_mode) == 0o700


def test_objects_run_when_trusted(path):
    assert torch.equal(load(path, native="trusted")(X)["y"], Y)


def test_the_reference_runs_the_graph(path):
    model = load(path, "reference")
    assert torch.equal(model(X)["y"], Y) and model.target.name == "reference"


def test_without_a_compiler_the_error_says_what_to_do(path, tmp_path):
    remedy = 'pip install torch-mlir, or load(..., native="trusted") if you trust who made the artifact'
    with pytest.raises(ToolchainError, match=re.escape(remedy)):
        load(path)
    failing = Builder(ToolchainError("compiling for a CPU needs torch-mlir", found="no module"))
    with pytest.raises(ToolchainError, match=r"compiling for a CPU needs torch-mlir[\s\S]*" + re.escape(remedy)):
        load(path, builder_for=lambda _: failing, cache=tmp_path)


def test_targets_that_do_not_fit(path, tmp_path):
    other = next(n for n in ("cpu:aarch64", "cpu:x86-64-v3") if n.split(":")[1].split("-")[0] not in native().triple)
    with pytest.raises(ArtifactError, match="the artifact is for another machine"):
        load(path, other)
    with pytest.raises(ConfigError, match="no target is called 'cpu:z80'"):
        load(path, "cpu:z80")
    with pytest.raises(ConfigError, match="native is not known\n  found:    'yes'"):
        load(path, native="yes")
    CompiledModel(artifacts.contents(target=other)).save(tmp_path / "other.qc")
    model = CompiledModel(artifacts.contents(target=other))
    with pytest.raises(ArtifactError, match="the artifact is for another machine"):
        model(X)
    CompiledModel(artifacts.contents(target="reference", executable=None), on="reference")
    with pytest.raises(ArtifactError, match="the artifact has no kernels for this target"):
        CompiledModel(artifacts.contents(target="reference", executable=None), on=native())(X)
    with pytest.raises(ArtifactError, match="the artifact has no graph"):
        CompiledModel(artifacts.contents(target="cpu", graph=None), on="reference")(X)


def test_an_artifact_without_objects_is_not_trusted_silently(tmp_path):
    made = artifacts.contents(target=native().name)
    CompiledModel(Contents(made.artifact, made.tensors)).save(tmp_path / "m.qc")
    with pytest.raises(ArtifactError, match=r"the artifact holds no object for a kernel[\s\S]*add"):
        load(tmp_path / "m.qc", native="trusted")
    assert torch.equal(load(tmp_path / "m.qc", builder_for=lambda _: Builder(), cache=tmp_path)(X)["y"], Y)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "json"])
def test_a_damaged_cache_entry_is_made_anew(path, tmp_path, damage, caplog):
    load(path, builder_for=lambda _: Builder(), cache=tmp_path)
    (entry,) = (tmp_path / "kernels").glob("*.kernel")
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes({"flip": bytes(data), "cut": bytes(data[:90]), "empty": b"", "json": b"0" * 64 + b"\n[]"}[damage])
    builder = Builder()
    with caplog.at_level(logging.WARNING, "qcompile"):
        assert torch.equal(load(path, builder_for=lambda _: builder, cache=tmp_path)(X)["y"], Y)
    assert builder.built == ["add"] and "damaged" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_cache_that_others_may_write_is_not_used(path, tmp_path, caplog):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with caplog.at_level(logging.WARNING, "qcompile"):
        load(path, builder_for=lambda _: Builder(), cache=tmp_path)
    assert "others may write" in caplog.text and not list((tmp_path / "kernels").iterdir())


def test_many_writers_of_one_cache(tmp_path):
    results = []
    wanted = {name: (spec, "cpu") for name, spec in small.SPECS.items()}

    def work():
        for _ in range(5):
            results.append(build_kernels(wanted, Builder(), tmp_path) == small.kernels())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20 and all(results)
    assert sorted(file.suffix for file in (tmp_path / "kernels").iterdir()) == [".kernel"] * 3


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("QCOMPILE_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("QCOMPILE_HOME")
    assert cache_folder() == tmp_path / "b" / "qcompile"


def test_what_a_model_shows(path):
    model = load(path, "reference")
    assert torch.equal(model.weight("lin"), W)
    with pytest.raises(ConfigError, match="no module of that name has a weight, did you mean 'lin'"):
        model.weight("lim")
    assert model.graph() == "graph two\n" and model.graph(after="quantize") == "graph one\n"
    with pytest.raises(ConfigError, match="did you mean 'quantize'"):
        model.graph(after="quantise")
    assert "fadd" in model.kernels()["add"].source and model.kernels()["add"].spec.template == "add"
    assert repr(model) == "CompiledModel(module, 1 weights, 0.0 MiB, target='reference', accuracy='exact')"
    with pytest.raises(ConfigError, match="this model does not generate text"):
        model.generate(torch.ones(1, 1, dtype=torch.int64))


def test_a_weight_may_be_rows_of_a_permuted_one():
    order = torch.tensor([2, 0, 3, 1])
    record = WeightRecord({"kind": "dense", "dtype": "f32"}, {"weight": "w"}, 2, 4, 1, 1, "order")
    artifact = Artifact("reference", "module", graph=artifacts.arithmetic_graph(), weights={"lin": record})
    model = CompiledModel(Contents(artifact, {"w": W, "order": order}))
    assert torch.equal(model.weight("lin")[:, order], W[1:])


@pytest.mark.parametrize(
    ("args", "inputs", "text"),
    [
        ((X, X), {}, "too many positional inputs\n  found:    2\n  expected: x"),
        ((X,), {"x": X}, "an input is given twice\n  found:    x"),
        ((), {}, "an input is missing"),
    ],
)
def test_calls_that_do_not_fit(path, args, inputs, text):
    with pytest.raises(ConfigError, match=text):
        load(path, "reference")(*args, **inputs)


def test_an_input_with_a_default_may_be_left_out():
    graph = artifacts.arithmetic_graph()
    inputs = (*graph.inputs, Buffer("bias", "f32", ("b", 4), "input"))
    last = GraphNode("t4", "aten.add.Tensor", ({"node": "t3"}, {"node": "bias"}))
    graph = dataclasses.replace(graph, inputs=inputs, nodes=(*graph.nodes, last), outputs={"output": {"node": "t4"}})
    artifact = Artifact("reference", "module", graph=graph, defaults={"bias": 2})
    model = CompiledModel(Contents(artifact, {"w": W}))
    assert torch.equal(model(X), Y + 2) and torch.equal(model(X, torch.ones(2, 4)), Y + 1)
    with pytest.raises(ConfigError, match="an input is missing"):
        model(bias=X)


def test_structures():
    a, b = torch.ones(1), torch.zeros(1)
    assert structured({"output": a}, None) is a
    assert structured({"output_0": a, "output_1": b}, None) == (a, b)
    named = structured({"last_hidden_state": a, "pooler_output": b}, None)
    assert isinstance(named, Output) and named.pooler_output is b and named[0] is a and named["last_hidden_state"] is a
    with pytest.raises(AttributeError, match="there are last_hidden_state, pooler_output"):
        named.logits  # noqa: B018
    structure = {
        "dict": {"x": {"output": "a"}, "y": {"list": [{"output": "b"}, {"tuple": [{"output": "a"}]}, {"none": None}]}}
    }
    assert structured({"a": a, "b": b}, structure) == {"x": a, "y": [b, (a,), None]}
