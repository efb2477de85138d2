"""Every real checkpoint, whole: compiled for each target, weights bit for bit, logits against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import parametrize, reference

import qcompile

# AWQ's gemv_fast stores scale * zero rounded to float16, and its reference was made from the unrounded twin.
WEIGHT_BOUND = {"awq-gemv_fast": 3e-4}
LOGIT_BOUND = {"awq-gemv_fast": 2e-3}


@pytest.mark.parametrize("target", ["reference", "cpu"])
@parametrize("gptq", "awq", "bitsandbytes", "hqq", "eetq")
def test_weights_and_logits_of_a_real_checkpoint(folder: Path, target: str) -> None:
    compiled = qcompile.compile(folder, target=target)
    expected = reference(folder)
    for path, weight in expected.weights.items():
        found = compiled.weight(path)
        bound = WEIGHT_BOUND.get(folder.name)
        assert torch.equal(found, weight) if bound is None else (found - weight).abs().max() < bound, path
    logits = compiled(input_ids=expected.input_ids).logits
    error = (logits - expected.logits).abs().max() / expected.logits.abs().max()
    assert error < LOGIT_BOUND.get(folder.name, 1e-3)
