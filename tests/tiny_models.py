"""Tiny transformers models with random weights, by name, for tests of capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
QWEN_MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
T5 = {"vocab_size": 101, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": 101, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16,
    "max_source_positions": 30, "max_target_positions": 64, "decoder_start_token_id": 1, **TOKENS,
}  # fmt: skip


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


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"]
    config = T.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4, layer_types=layers)
    return T.Gemma3ForCausalLM(config)


def _gpt_oss() -> Any:
    # YaRN rope, attention sinks, and a sliding window in the first layer.
    return T.GptOssForCausalLM(
        T.GptOssConfig(**GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
    )


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)),
    "llama-tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "qwen2": _qwen2,
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": _gemma2,
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED, **TOKENS)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "opt": _opt,
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=4)),
    "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**GROUPED, head_dim=16)),
    "gemma3": _gemma3,
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**SMALL, **TOKENS)),
    "gpt-neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SMALL, max_position_embeddings=64)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen2-moe": lambda: T.Qwen2MoeForCausalLM(T.Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=48)),
    "qwen3-moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**QWEN_MOE, head_dim=16)),
    "gpt-oss": _gpt_oss,
}
# What cannot be compiled, and docs/architectures.md says why.
REFUSED: dict[str, Callable[[], Any]] = {
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=101, hidden_size=64, n_layer=1, n_head=4, **TOKENS)),
    "mpt": lambda: T.MptForCausalLM(T.MptConfig(vocab_size=101, d_model=64, n_layers=1, n_heads=4, max_seq_len=64)),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(vocab_size=101, hidden_size=64, num_hidden_layers=1)),
    "falcon": lambda: T.FalconForCausalLM(
        T.FalconConfig(vocab_size=101, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, **TOKENS)
    ),
    "gpt-j": lambda: T.GPTJForCausalLM(T.GPTJConfig(**GPT2 | {"n_layer": 1}, rotary_dim=8)),
    "llama-4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(**GROUPED, head_dim=16, intermediate_size_mlp=96, num_local_experts=4, **TOKENS)
    ),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertModel(T.BertConfig(**BERT)),
    "bert-mlm": lambda: T.BertForMaskedLM(T.BertConfig(**BERT)),
    "distilbert": lambda: T.DistilBertModel(
        T.DistilBertConfig(vocab_size=101, dim=64, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=64)
    ),
    "llama-base": lambda: T.LlamaModel(T.LlamaConfig(**GROUPED)),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VIT)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "whisper": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)),
}


def decoder(name: str) -> Any:
    """A causal language model in float32 and evaluation mode; the same weights every time."""
    return _random(DECODERS[name]())


def other(name: str) -> Any:
    """An encoder, a bare decoder or a vision model."""
    return _random(OTHERS[name]())


def inputs(names: Iterable[str], b: int, s: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of an encoder, a vision model or a model of both parts, by name, for b rows of s tokens."""
    generator = torch.Generator().manual_seed(seed + 100 * b + s)
    ids = torch.randint(3, 101, (b, s), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, s // 2 + 1 :] = 0
    known = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": ids % 2,
        "decoder_input_ids": ids.flip(1)[:, : s // 2 + 1],
        "pixel_values": torch.randn(b, 3, 32, 32, generator=generator),
        "input_features": torch.randn(b, 16, 60, generator=generator),
    }
    return {name: known[name] for name in names}
