"""What a compiled model says of itself: report, graphs after passes, kernels' texts, weights."""

from __future__ import annotations

import json

import end_to_end_models as tiny
import pytest
import tiny_models
import torch

import qcompile
from qcompile.errors import ConfigError
from qcompile.report import Report

CASES = [
    ("llama", "nf4"), ("llama", "float"), ("qwen2", "gptq"), ("gpt2", "nf4"), ("opt", "hqq"),
    ("llama-tied", "float"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_weight_has_its_place(name, config):
    q = tiny.compiled(name, config)
    report = q.report
    assert report.target == q.target.name and report.accuracy == "exact"
    assert set(report.weights) == set(q.artifact.weights)
    assert {path for path, module in tiny_models.decoder(name).named_modules() if hasattr(module, "weight")} >= set(
        report.weights
    )
    for path, row in report.weights.items():
        assert row.format and row.layout and row.tier in ("lanes", "generic"), row
        assert row.kernel in q.kernels(), row
        once = "stored once, with" in row.reason
        assert row.bytes == (0 if once else round(row.bits * row.n * row.k / 8)), row
        assert (row.format != "dense") or row.reason, row
        assert tuple(q.weight(path).shape) == (row.n, row.k)
    assert report.fallbacks == []
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_reference_says_that_there_are_no_kernels():
    q = tiny.compiled("llama", "nf4", "reference")
    assert q.kernels() == {}
    for row in q.report.weights.values():
        assert row.format == row.layout and (row.kernel, row.tier) == ("", "eager")


def test_graphs_after_passes():
    q = tiny.compiled("llama", "nf4")
    before, after, last = q.graph(after="quantize"), q.graph(after="fuse-dequantize"), q.graph()
    assert before.count("qcompile.dequantize(") == 15 and before.count("qcompile.linear(") == 0  # the head is dense
    assert after.count("qcompile.dequantize(") == 0 and after.count("qcompile.linear(") == 15
    assert "model.layers.1.mlp.down_proj" in after
    assert last.count("qcompile.linear(") < 15  # siblings are merged
    with pytest.raises(ConfigError) as caught:
        q.graph(after="fuse-dequantise")
    assert str(caught.value).startswith("no graph was kept after 'fuse-dequantise', did you mean 'fuse-dequantize'?\n")


def test_kernels_explain_themselves():
    kernels = tiny.compiled("llama", "nf4").kernels()
    for kernel in kernels.values():
        assert kernel.source.startswith("//") and "func.func" in kernel.source
    assert any(kernel.spec.template == "linear-gemv" for kernel in kernels.values())


def test_report_and_graphs_are_saved(tmp_path):
    q = tiny.compiled("llama", "nf4")
    q.save(tmp_path / "m.qc")
    loaded = qcompile.load(tmp_path / "m.qc")
    assert loaded.report == q.report
    assert loaded.graph(after="fuse-dequantize") == q.graph(after="fuse-dequantize")
    assert {name: k.source for name, k in loaded.kernels().items()} == {n: k.source for n, k in q.kernels().items()}
    for path in q.artifact.weights:
        assert torch.equal(loaded.weight(path), q.weight(path))


def test_the_report_as_text():
    text = str(tiny.compiled("llama", "nf4").report)
    assert "model.layers.*.mlp.down_proj" in text and "16 weights" in text
