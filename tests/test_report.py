"""The report: rows, reasons, JSON and text."""

from __future__ import annotations

import json

import pytest
import torch

import qcompile
from qcompile.errors import ArtifactError, ConfigError, InternalError
from qcompile.report import Fallback, KernelRow, LaunchRow, NodeRow, Refusal, Report, WeightRow


def filled() -> Report:
    report = Report("cpu", "int8", "awq")
    for i in range(3):
        report.weight(WeightRow(f"layers.{i}.q", "awq", "awq", 64, 64, "lanes", 4.5, 2304, "linear-gemv", "native"))
    report.weight(WeightRow("head", "none", "dense", 96, 64, "lanes-dense", 16.0, 12288, reason="lm_head is skipped"))
    report.refuse(Refusal("fuse-norm", "mul_3", "layers.0", "the mean is over dimensions [1], not over the last"))
    report.fallbacks.append(Fallback("conv2d", "aten.conv2d.default", "patches", "no rule"))
    report.nodes.append(NodeRow("linear", "qcompile.linear.default", "layers.0.q", ("linear-gemv-1",)))
    report.passes.append(("normalise", 3))
    report.note("awq config, version: gemm")
    return report


def test_json_and_back() -> None:
    report = filled()
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": {"q": {"path": "q", "method": "", "format": "", "n": "64", "k": 1}}}, "report.json: weights.q.n"),
        ({"passes": [["normalise"]]}, "report.json: passes.0"),
        ({"notes": "none"}, "report.json: notes"),
        ({"colour": 1}, "a field of Report is not known"),
        ([], "an object (Report)"),
    ],
)
def test_a_report_of_other_data_is_refused(change, text) -> None:
    data = filled().to_json() | change if isinstance(change, dict) else change
    with pytest.raises(ArtifactError) as caught:
        Report.from_json(data)
    assert text in str(caught.value)


def test_names_with_brackets_and_colons_are_shown_as_they_are() -> None:
    report = filled()
    report.note("x is f32[b, s] :smile:")
    report.fallbacks.append(Fallback("n", "aten.view", "m", "a size of [/b]"))
    assert "note: x is f32[b, s] :smile:" in str(report) and "aten.view: a size of [/b]" in str(report)


def test_a_module_is_reported_once() -> None:
    report = filled()
    with pytest.raises(InternalError, match="a module's weight is reported twice"):
        report.weight(report.weights["head"])


def test_reasons_add_up_and_are_found_by_module() -> None:
    report = filled()
    report.update_weight("head", reason="stored once, with embed")
    report.update_weight("head", reason="")
    assert report.why_not("head") == ["lm_head is skipped; stored once, with embed"]
    assert report.why_not("layers.0") == ["fuse-norm: the mean is over dimensions [1], not over the last"]
    assert report.why_not("patches") == ["aten.conv2d.default: no rule"] and report.why_not("layers.1.q") == []


def test_repeated_refusals_and_notes_are_kept_once() -> None:
    report = filled()
    report.refuse(report.refusals[0])
    report.note(report.notes[0])
    assert len(report.refusals) == len(report.notes) == 1


def test_text_counts_equal_layers_once() -> None:
    text = str(filled())
    assert "layers.*.q" in text and "layers.0.q" not in text
    assert "4 weights, 0.0 MB" in text and "through ATen, 1 x aten.conv2d.default: no rule" in text
    assert "note: awq config, version: gemm" in text


def test_an_accuracy_that_the_target_does_not_have_is_said():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    config, rows = {"quant_method": "gguf", "encoding": "q8_0"}, (torch.randn(2, 64),)
    made = qcompile.compile(model, config, target="reference", example_inputs=rows, accuracy="int8")
    assert "accuracy 'int8' is for CPUs: on reference linears compute exactly" in made.report.notes
    with pytest.raises(ConfigError) as error:
        qcompile.compile(model, config, target="reference", example_inputs=rows, accuracy="int8", strict=True)
    assert str(error.value) == (
        "this target computes exactly\n  where:    accuracy\n  found:    'int8'\n  expected: 'exact' for reference"
    )


def test_kernels_for_gpus_are_listed_with_their_schedule_and_machine_code() -> None:
    report = filled()
    assert "instr/weight" not in str(report)
    report.kernels.append(KernelRow("linear_1a", "sm_90", "lanes", (64, 8, 256), 2, 3, 96, 0, 33024, 2.34))
    report.launches.append(LaunchRow("model.layers.*", 30, 6, 1))
    text = str(report)
    assert "64 x 8 x 256" in text and "33024" in text and "2.34" in text
    assert "30 x model.layers.*: 6 kernels a token and 1 operators of ATen" in text
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
