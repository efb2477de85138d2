"""The plan of a compilation against what compiling makes, and every problem of a config named at once."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
import tiny_models
import torch
from click.testing import CliRunner

import qcompile
from qcompile import compiler
from qcompile.cli import main
from qcompile.errors import ConfigError

HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 32}
# 96 inputs of down_proj are no multiple of the group.
ILLEGAL = {"quant_method": "awq", "bits": 4, "group_size": 64}


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling ends before kernels are built: the plan is about what comes before that."""
    monkeypatch.setattr(compiler, "_build", lambda *_: ({}, None))


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("target", ["reference", "cpu", "cuda:sm_90"])
@pytest.mark.parametrize(
    "config",
    [None, HQQ, {"quant_method": "hqq", "nbits": 4, "group_size": 64, "axis": 0}, {"load_in_8bit": True}],
    ids=["float", "hqq", "hqq axis 0", "int8"],
)
def test_a_plan_is_what_comes(config: dict[str, object] | None, target: str) -> None:
    model = tiny_models.decoder("llama-tied")
    planned, made = qcompile.plan(model, config, target=target), qcompile.compile(model, config, target=target)
    rows = {row.path: row for row in planned.rows}
    assert rows.keys() == made.report.weights.keys()
    for path, row in made.report.weights.items():
        found = rows[path]
        assert (found.method, found.format, found.n, found.k) == (row.method, row.format, row.n, row.k)
        if path not in ("model.embed_tokens", "lm_head"):  # tied, so the head's layout is the embedding's too
            assert (found.layout, found.tier) == (row.layout, row.tier) and found.bytes >= row.bytes
    size = sum(tensor.nbytes for tensor in made.contents.tensors.values())
    assert size * 0.95 < planned.output < size * 1.35 and planned.peak > planned.output


def test_a_plan_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.safetensors_folder import SafetensorsFolder

    tiny_models.decoder("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(SafetensorsFolder, "read", lambda *_: pytest.fail("a tensor was read"))
    planned = qcompile.plan(tmp_path, HQQ)
    assert len(planned.rows) == 16 and not planned.problems
    assert "│ model.layers.*.mlp.down_proj │ 2 │ 64 x 96 │ hqq │ lanes │" in " ".join(str(planned).split())


@checkpoints.parametrize("quark-int8-w8a8")
def test_what_happens_to_x_is_seen_without_a_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.safetensors_folder import SafetensorsFolder

    monkeypatch.setattr(SafetensorsFolder, "read", lambda *_: pytest.fail("a tensor was read"))
    rows = qcompile.plan(folder, target="cuda:sm_90").rows
    assert {(row.layout, row.tier) for row in rows if row.method == "quark"} == {("native", "native")}


def test_every_problem_is_named_before_any_work(tmp_path: Path) -> None:
    model = tiny_models.decoder("llama")
    planned = qcompile.plan(model, ILLEGAL)
    assert [row.path for row in planned.problems] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    problem = planned.problems[0].problem
    assert problem.startswith(
        "awq cannot store this module's weight: found K = 96, expected a multiple of the group, 64; "
    )
    heard: list[str] = []
    with pytest.raises(ConfigError) as error:
        qcompile.compile(model, ILLEGAL, progress=lambda stage, on: heard.append(stage))
    assert heard == [] and str(error.value).splitlines() == [
        "awq cannot store this module's weight",
        "  where:    model.layers.0.mlp.down_proj [64, 96]",
        "  found:    K = 96",
        "  expected: a multiple of the group, 64",
        "  try:      choose another group size or method, or leave the module dense by the config's skip list",
        "  also:     model.layers.1.mlp.down_proj [64, 96]: awq cannot store this module's weight; found K = 96",
    ]


def test_the_command_line(tmp_path: Path) -> None:
    tiny_models.decoder("llama").save_pretrained(tmp_path)
    run = CliRunner().invoke
    result = run(main, ["plan", str(tmp_path), "--config", json.dumps(HQQ), "--target", "reference"])
    assert result.exit_code == 0 and result.stdout.rstrip().endswith("no problem"), result.output
    result = run(main, ["plan", str(tmp_path), "--config", json.dumps(ILLEGAL), "--json"])
    assert result.exit_code == 1
    rows = json.loads(result.stdout)["rows"]
    assert sum(bool(row["problem"]) for row in rows) == 2


def test_a_checkpoint_without_a_weight(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    folder = tmp_path / "gptq"
    qcompile.compile(tiny_models.decoder("llama"), config, target="reference").export_checkpoint(folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    gone = [f"model.layers.{i}.self_attn.q_proj.scales" for i in range(2)]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, folder / "model.safetensors")
    problems = qcompile.plan(folder).problems
    assert [row.path for row in problems] == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert "lacks a stored tensor" in problems[0].problem and torch.is_tensor(tensors[gone[0]])
