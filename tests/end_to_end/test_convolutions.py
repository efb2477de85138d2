"""Convolutions as compiled models have them: no operator through ATen, the numbers of eager, and a way back."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import end_to_end_models as tiny
import pytest
import torch
from gpu.device import interpreted
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim

import qcompile
from qcompile.errors import ArtifactError
from qcompile.runtime.check import check_artifact
from qcompile.runtime.model import CompiledModel


class Speech(nn.Module):
    """As an encoder of speech begins: two convolutions along time, and a third of patches of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(5, 12, 3, padding=1), nn.Conv1d(12, 8, 3, stride=2, padding=1)
        self.patches = nn.Conv2d(1, 6, (2, 4), stride=(2, 4), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.second(nn.functional.gelu(self.first(x))))
        return self.patches(x.unsqueeze(1)).flatten(2).transpose(1, 2)


@functools.cache
def made(target: str) -> tuple[Speech, CompiledModel]:
    torch.manual_seed(0)
    model = Speech().half().float().eval()
    shapes = {"x": {0: Dim("b", min=1, max=64), 2: Dim("s", min=16, max=512)}}
    given = (torch.randn(2, 5, 24),)
    return model, qcompile.compile(model, None, target=target, example_inputs=given, dynamic_shapes=shapes)


@pytest.mark.parametrize(("target", "bound"), [("cpu", 2e-6), ("cuda:interpret", 1e-2)])
@torch.no_grad()
def test_numbers_of_eager_for_any_batch_and_length(target: str, bound: float) -> None:
    model, compiled = made(target)
    assert not compiled.report.fallbacks
    q = interpreted(compiled)[0] if target == "cuda:interpret" else compiled
    for b, s in ((2, 24), (1, 17), (3, 40)):
        x = torch.randn(b, 5, s, generator=torch.Generator().manual_seed(s))
        assert tiny.difference(q(x), model(x)) < bound, (b, s)


def test_the_way_back(tmp_path: Path) -> None:
    model, q = made("cpu")
    q.export_checkpoint(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor)
        if name.endswith("weight"):
            row = q.report.weights[name.removesuffix(".weight")]
            assert torch.equal(q.weight(row.path), tensor)
            assert (row.method, row.tier, row.reason) == (
                "none",
                "lanes",
                "a convolution, which methods leave as it is",
            )


def test_a_window_that_does_not_fit_is_refused() -> None:
    _, q = made("cpu")
    record = q.artifact.weights["first"]
    assert record.origin is not None
    wrong = replace(record, origin=replace(record.origin, module=replace(record.origin.module, window=(4,))))
    artifact = replace(q.artifact, weights=q.artifact.weights | {"first": wrong})
    with pytest.raises(ArtifactError) as caught:
        check_artifact(artifact, q.contents.tensors)
    assert str(caught.value) == "a convolution's window does not fit its weight\n  where:    first\n  found:    (4,)"
