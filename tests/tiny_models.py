"""Tiny transformers models with random weights, by name, for tests of capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

SMALL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}
GROUPED = {**SMALL, "num_key_value_heads": 2}
BERT = {**SMALL, "max_position_embeddings": 64}
VIT = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 7}
del VIT["vocab_size"]


def _random(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def _qwen2() -> Any:
    config = T.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    return T.Qwen2ForCausalLM(config)


def _gemma2() -> Any:
    # Only eager attention knows the soft cap.
    config = T.Gemma2Config(**GROUPED, head_dim=16, sliding_window=4, attn_implementation="eager")
    return T.Gemma2ForCausalLM(config)


def _opt() -> Any:
    config = {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64, **TOKENS}
    return T.OPTForCausalLM(T.OPTConfig(**config))


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)),
    "llama-tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "qwen2": _qwen2,
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": _gemma2,
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED, **TOKENS)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "opt": _opt,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertModel(T.BertConfig(**BERT)),
    "bert-mlm": lambda: T.BertForMaskedLM(T.BertConfig(**BERT)),
    "distilbert": lambda: T.DistilBertModel(
        T.DistilBertConfig(vocab_size=101, dim=64, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=64)
    ),
    "llama-base": lambda: T.LlamaModel(T.LlamaConfig(**GROUPED)),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VIT)),
}


def decoder(name: str) -> Any:
    """A causal language model in float32 and evaluation mode; the same weights every time."""
    return _random(DECODERS[name]())


def other(name: str) -> Any:
    """An encoder, a bare decoder or a vision model."""
    return _random(OTHERS[name]())
