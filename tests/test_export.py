"""A compiled model written as a checkpoint: read again it is the same model, for us and for the method's own package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints import ROOT, config
from safetensors import safe_open

import qcompile
from qcompile.errors import ConfigError
from qcompile.methods.index import METHODS

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 89]])


def folders() -> list[Path]:
    """Every checkpoint of a method that there is."""

    def known(path: Path) -> bool:
        data = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
        return (data.get("quantization_config") or {}).get("quant_method") in METHODS

    return sorted(path for path in ROOT.glob("*") if known(path))


def same(left: qcompile.CompiledModel, right: qcompile.CompiledModel) -> None:
    """The same layers quantized, with the same weights and logits."""
    methods = [{path: (row.method, row.format) for path, row in q.report.weights.items()} for q in (left, right)]
    assert methods[0] == methods[1]
    for path in left.artifact.weights:
        assert torch.equal(left.weight(path), right.weight(path)), path
    assert torch.equal(left(input_ids=IDS).logits, right(input_ids=IDS).logits)


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.name)
def test_a_checkpoint_survives(folder: Path, target: str, tmp_path: Path) -> None:
    compiled = qcompile.compile(folder, target="reference")
    made = compiled if target == "reference" else qcompile.compile(folder, target=target)
    try:
        made.export_checkpoint(tmp_path / "out")
    except ConfigError as error:
        assert target != "reference" and 'compile for target="reference"' in error.remedy
        pytest.skip(str(error))
    same(qcompile.compile(tmp_path / "out", target="reference"), compiled)
