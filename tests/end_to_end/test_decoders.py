"""Tiny language models, compiled: the same logits and the same text as the eager model with the same weights."""

from __future__ import annotations

import end_to_end_models as tiny
import pytest
import tiny_models
import torch

CASES = [
    *((name, config, "cpu") for name in ("llama", "qwen2", "opt") for config in tiny.CONFIGS),
    *(("gpt2", config, "cpu") for config in tiny.CONFIGS if config != "hqq"),  # which converts no Conv1D
    *((name, "float", "cpu") for name in ("llama-tied", "qwen3", "gemma2", "phi3")),
    *(("llama", config, "reference") for config in tiny.CONFIGS),
    *((name, "nf4", "reference") for name in ("qwen2", "gpt2", "opt")),
]
# GPTQ rounds (code - zero) * scale to float16 in its weights; a kernel multiplies the scale with a whole sum instead, which
# leaves that rounding (5e-4 of a weight) out. The others have no such rounding.
BOUND = {"gptq": 1e-3, "nf4": 5e-6, "hqq": 5e-6, "float": 5e-6}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """A compiled model, its eager oracle, and how far their logits may differ."""
    name, config, target = request.param
    bound = BOUND[config] if target == "cpu" else BOUND["float"]
    return tiny.compiled(name, config, target), tiny.eager(name, config, target), bound


@torch.no_grad()
def test_logits(case):
    q, model, bound = case
    ids = tiny.tokens(2, 13)
    found = q(input_ids=ids).logits
    assert found.dtype == torch.float32 and found.shape == (2, 13, 101)
    assert tiny.difference(found, model(input_ids=ids).logits) < bound


@torch.no_grad()
def test_a_prompt_in_pieces(case):
    """Several tokens, one token, several again, each behind what came before: as all at once."""
    q, model, bound = case
    ids = tiny.tokens(2, 13, seed=1)
    state, pieces = None, []
    for piece in ids.split([6, 1, 1, 4, 1], dim=1):
        out = q(input_ids=piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        pieces.append(out.logits)
    assert tiny.difference(torch.cat(pieces, 1), model(input_ids=ids).logits) < bound


def test_padding_on_the_left(case):
    q, _, bound = case
    ids = tiny.tokens(3, 9, seed=2)
    lengths = [9, 4, 1]
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in lengths])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = q(input_ids=ids * mask, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        alone = q(input_ids=ids[row : row + 1, -length:]).logits
        assert tiny.difference(together[row : row + 1, -length:], alone) < min(bound, 5e-6)


def test_generation(case):
    """Greedy, with prompts of different lengths in one batch: token for token what transformers generates."""
    q, model, _ = case
    ids = tiny.tokens(2, 7, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    found = q.generate(ids, attention_mask=mask, max_new_tokens=20)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "config"), [("llama", "nf4"), ("llama", "hqq"), ("qwen2", "gptq")])
@torch.no_grad()
def test_int8_activations(name, config):
    """Inputs of linears rounded to int8 in groups: near the exact logits, and not the same."""
    q = tiny.compiled(name, config, accuracy="int8")
    ids = tiny.tokens(2, 13)
    apart = tiny.difference(q(input_ids=ids).logits, tiny.with_weights_of(tiny_models.decoder(name), q)(ids).logits)
    assert 1e-4 < apart < 0.03
    alone = torch.cat([_stepwise(q, row[None]) for row in ids])
    assert tiny.difference(alone, q(input_ids=ids).logits) < 1e-5


def _stepwise(q, ids):
    state, logits = None, []
    for token in ids.split(1, dim=1):
        out = q(input_ids=token, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)
