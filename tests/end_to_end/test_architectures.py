"""Every architecture of docs/architectures.md, built small from its config: compiled, and equal to the eager model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import end_to_end_models as tiny
import pytest
import tiny_models
import torch

import qcompile
from qcompile.errors import CaptureError
from qcompile.transform import transform_from_json

PAGE = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
# Rounding to int8 is not continuous: kernels that sum in another order move an activation by a whole step now and then.
# On the reference target nothing is summed in another order.
METHODS = {"nf4": (tiny.CONFIGS["nf4"], "cpu", 1e-5), "int8": (INT8, "reference", 1e-5)}
# Variants of others; test_decoders.py and test_other_models.py compile those of ELSEWHERE with nf4 for a CPU.
VARIANTS = {"llama-tied", "llama-base", "bert-mlm", "distilbert"}
ELSEWHERE = {"llama", "qwen2", "gpt2", "opt", "bert", "vit"}
NAMES = [name for name in (*tiny_models.DECODERS, *tiny_models.OTHERS) if name not in VARIANTS]
CASES = [(name, method) for name in NAMES for method in METHODS if method != "nf4" or name not in ELSEWHERE]


def model_of(name: str) -> Any:
    return tiny_models.decoder(name) if name in tiny_models.DECODERS else tiny_models.other(name)


def rounding(model: Any, q: Any) -> Any:
    """`model` with the weights of `q`, and its inputs rounded as the method does."""
    model = tiny.with_weights_of(model, q)
    for path, record in q.artifact.weights.items():
        for each in record.before:
            transform = transform_from_json(each.transform)
            assert not each.tensors
            model.get_submodule(path).register_forward_pre_hook(lambda _, args, by=transform: (by.apply(args[0], {}),))
    return model


@pytest.mark.parametrize(("name", "method"), CASES)
@torch.no_grad()
def test_an_architecture(name: str, method: str) -> None:
    model = model_of(name)
    config, target, bound = METHODS[method]
    q = qcompile.compile(model, config, target=target)
    decoder = q.artifact.kind == "causal-lm"
    names = [buffer.name for buffer in q.artifact.graph.inputs]
    given = {"input_ids": tiny.tokens(2, 9)} if decoder else tiny_models.inputs(names, 2, 9)
    found, expected = q(**given), rounding(model, q)(**given)
    for field in ("logits",) if decoder else found:
        assert tiny.difference(found[field], expected[field]) < bound, field
    assert target != "cpu" or not q.report.fallbacks  # kernels for every operator
    quantized = [row for row in q.report.weights.values() if row.method == "bitsandbytes"]
    assert quantized and all(bool(row.around) == (method == "int8") for row in quantized)


@pytest.mark.parametrize("name", tiny_models.REFUSED)
def test_what_is_refused_is_on_the_page(name: str) -> None:
    with pytest.raises(CaptureError) as caught:
        qcompile.compile(tiny_models.REFUSED[name](), target="reference")
    rows = [line for line in PAGE.read_text().splitlines() if f"`{type(tiny_models.REFUSED[name]()).__name__}`" in line]
    assert len(rows) == 1 and caught.value.summary.replace(type(tiny_models.REFUSED[name]()).__name__, "it") in rows[0]


def test_every_architecture_is_on_the_page() -> None:
    page = PAGE.read_text()
    assert [name for name in NAMES if f"`{type(model_of(name)).__name__}`" not in page] == []
