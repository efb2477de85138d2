"""Encoders, a vision model, a plain MLP, and models in half precision, compiled: the same numbers as eager."""

from __future__ import annotations

import functools
from itertools import pairwise

import end_to_end_models as tiny
import pytest
import tiny_models
import torch

import qcompile

TARGETS = ("cpu", "reference")
WIDTHS = {"odd": (33, 57, 19), "mixed": (64, 130, 96, 7), "even": (96, 64, 102)}


def _inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    ids = tiny.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "config", "target"),
    [
        *(("bert", config, "cpu") for config in tiny.CONFIGS),
        *((name, "nf4", target) for name in ("bert-mlm", "vit") for target in TARGETS),
        ("vit", "hqq", "cpu"),
    ],
)
@torch.no_grad()
def test_encoders_and_vision_models(name, config, target):
    model = tiny_models.other(name)
    q = qcompile.compile(model, tiny.CONFIGS[config], target=target)
    found, expected = q(**_inputs(name)), tiny.with_weights_of(model, q)(**_inputs(name))
    assert list(found) == list(expected)
    for field in expected:
        assert tiny.difference(found[field], expected[field]) < 5e-6
    dense = {path for path, row in q.report.weights.items() if row.format == "dense"}
    assert bool(q.artifact.weights.keys() - dense) == (config != "float")
    assert target != "cpu" or not q.report.fallbacks


class Mlp(torch.nn.Module):
    def __init__(self, widths: tuple[int, ...], bias: bool):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(k, n, bias=bias) for k, n in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.nn.functional.gelu(layer(x))
        return self.layers[-1](x)


@functools.cache
def _mlp(widths: str, bias: bool) -> Mlp:
    torch.manual_seed(0)
    return Mlp(WIDTHS[widths], bias)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("widths", "bias", "config"),
    [
        *(("odd", True, config) for config in ("float", "nf4", "gptq")),
        *(("mixed", False, config) for config in ("float", "nf4", "gptq")),
        ("even", True, "hqq"),
        ("even", False, "hqq"),
    ],
)
@torch.no_grad()
def test_an_mlp(widths, bias, config, target):
    """Sizes that no tile divides; every number of rows that picks another kernel."""
    model, k = _mlp(widths, bias), WIDTHS[widths][0]
    sizes = {"x": {0: torch.export.Dim("rows", min=1, max=600)}}
    example = (torch.randn(3, k),)
    q = qcompile.compile(model, tiny.CONFIGS[config], target=target, example_inputs=example, dynamic_shapes=sizes)
    eager = tiny.with_weights_of(model, q)
    for rows in (1, 2, 7, 33, 513):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
        assert tiny.difference(q(x), eager(x)) < 5e-6, rows
        spread = torch.randn(k, rows, generator=torch.Generator().manual_seed(rows)).T  # not contiguous
        assert tiny.difference(q(spread), eager(spread)) < 5e-6, rows


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.bfloat16, "float"), (torch.bfloat16, "hqq"), (torch.float16, "nf4"), (torch.float16, "gptq")],
)
@torch.no_grad()
def test_half_precision_weights(dtype, config):
    """A CPU computes in float32 whatever the weights were stored in."""
    model = tiny_models.decoder("llama").to(dtype)
    q = qcompile.compile(model, tiny.CONFIGS[config])
    ids = tiny.tokens(2, 9)
    found = q(input_ids=ids).logits
    assert found.dtype == torch.float32
    assert tiny.difference(found, tiny.with_weights_of(model, q)(ids).logits) < 5e-6
    assert next(model.parameters()).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_inputs(dtype):
    model = _mlp("even", True)
    q = qcompile.compile(model, tiny.CONFIGS["nf4"], example_inputs=(torch.randn(3, 96),))
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(q(x), q(x.float()))
