"""Capture of GGUF files: the architecture from the file's metadata, tensors under transformers' names, blocks kept."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.capture.huggingface import architecture, check_layers, instantiate, program_of, transformers_config
from qcompile.errors import CaptureError, CheckpointError
from qcompile.gguf_file import GgufFile
from qcompile.program import Program
from qcompile.sources import Renamed, TensorInfo

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.#.attn_norm": "model.layers.#.input_layernorm",
    "blk.#.attn_q": "model.layers.#.self_attn.q_proj",
    "blk.#.attn_k": "model.layers.#.self_attn.k_proj",
    "blk.#.attn_v": "model.layers.#.self_attn.v_proj",
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
    "blk.#.attn_q_norm": "model.layers.#.self_attn.q_norm",
    "blk.#.attn_k_norm": "model.layers.#.self_attn.k_norm",
    "blk.#.ffn_norm": "model.layers.#.post_attention_layernorm",
    "blk.#.ffn_gate": "model.layers.#.mlp.gate_proj",
    "blk.#.ffn_up": "model.layers.#.mlp.up_proj",
    "blk.#.ffn_down": "model.layers.#.mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.#.attn_norm": "transformer.h.#.ln_1",
    "blk.#.attn_qkv": "transformer.h.#.attn.c_attn",
    "blk.#.attn_output": "transformer.h.#.attn.c_proj",
    "blk.#.ffn_norm": "transformer.h.#.ln_2",
    "blk.#.ffn_up": "transformer.h.#.mlp.c_fc",
    "blk.#.ffn_down": "transformer.h.#.mlp.c_proj",
}
_LLAMA_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Said again by another key or by the tensors' own shapes.
_REDUNDANT = {"vocab_size", "attention.value_length", "rope.dimension_count", "tokenizer_length"}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """How an architecture is written in GGUF: names of tensors and metadata keys; `#` stands for a layer's number.

    `paired_rows`: llama.cpp stores the rows of q and k with the two halves of a head interleaved. `transposed`: the
    weights of the layers are [K, N] in transformers.
    """

    model_type: str
    names: Mapping[str, str]
    keys: Mapping[str, str]
    paired_rows: bool = False
    transposed: bool = False


FAMILIES = {
    "llama": Family("llama", _LLAMA_NAMES, _LLAMA_KEYS, paired_rows=True),
    "mistral": Family("mistral", _LLAMA_NAMES, _LLAMA_KEYS, paired_rows=True),
    "qwen2": Family("qwen2", _LLAMA_NAMES, _LLAMA_KEYS),
    "qwen3": Family("qwen3", _LLAMA_NAMES, _LLAMA_KEYS),
    "gpt2": Family("gpt2", _GPT2_NAMES, _GPT2_KEYS, transposed=True),
}


@dataclass(frozen=True)
class Arranged(Renamed):
    """A GGUF file under transformers' names. `heads` says how many heads' rows to put in order, by tensor name.

    A tensor in blocks is always u8 [N, bytes of a row]; rows change places whole.
    """

    heads: dict[str, int]
    transposed: frozenset[str]

    def info(self, name: str) -> TensorInfo:
        info = super().info(name)
        flip = name in self.transposed and not info.encoding
        return TensorInfo(info.dtype, info.shape[::-1], info.encoding) if flip else info

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        if name in self.heads:
            tensor = tensor.reshape(self.heads[name], -1, 2, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)
        return tensor.t() if name in self.transposed and not self.info(name).encoding else tensor


def _family(file: GgufFile) -> Family:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CaptureError(
            "the architecture of the GGUF file is not known",
            where=str(file.path),
            found=name,
            expected=", ".join(FAMILIES),
            remedy="use the model's safetensors checkpoint instead",
        )
    return FAMILIES[name]


def _number(file: GgufFile, key: str, least: float = 5e-324) -> int | float:
    """The metadata value `key`, which must be a number from `least` (by default: any above 0) to 2**31."""
    value = file.metadata[key]
    if type(value) not in (int, float) or not least <= value <= 2**31:
        raise CheckpointError(
            "a metadata value is out of range", where=str(file.path), found=f"{key} = {reprlib.repr(value)}",
            expected="a number of at least 0" if least == 0 else "a number above 0",
            remedy="use the model's safetensors checkpoint instead",
        )  # fmt: skip
    number: int | float = value
    return number


def config_of(file: GgufFile, family: Family) -> dict[str, Any]:
    """The fields of a config.json that the metadata says; CaptureError for metadata whose meaning would be lost."""
    prefix, config = f"{file.metadata['general.architecture']}.", dict[str, Any](model_type=family.model_type)
    for key, value in file.metadata.items():
        if not key.startswith(prefix):
            continue
        short = key.removeprefix(prefix)
        if short in family.keys:
            config[family.keys[short]] = _number(file, key)
        elif short not in _REDUNDANT and value not in (0, "", "none", False):
            raise CaptureError(
                "the GGUF file asks for something that its architecture here does not have",
                where=str(file.path),
                found=f"{key} = {value}",
                expected=", ".join(prefix + known for known in family.keys),
                remedy="use the model's safetensors checkpoint instead",
            )
    absent = [
        key for key in ("block_count", "embedding_length", "attention.head_count") if family.keys[key] not in config
    ]
    if absent:
        raise CheckpointError(
            "metadata is missing", where=str(file.path), expected=", ".join(prefix + key for key in absent)
        )
    names = set(file.names())
    config |= {
        "architectures": None,
        "vocab_size": file.info("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in names,
    }
    for key, field in TOKENS.items():
        if f"tokenizer.ggml.{key}" in file.metadata:
            config[field] = _number(file, f"tokenizer.ggml.{key}", least=0)
    if not family.transposed:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        turned = file.metadata.get(f"{prefix}rope.dimension_count", config["head_dim"])
        if turned != config["head_dim"]:
            raise CaptureError(
                "the GGUF file turns only a part of each head",
                where=str(file.path),
                found=f"{prefix}rope.dimension_count = {turned}",
                expected=config["head_dim"],
                remedy="use the model's safetensors checkpoint instead",
            )
    if family.model_type == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}
    return config


def arrange(file: GgufFile, family: Family, config: Mapping[str, Any]) -> Arranged:
    """`file` under the names of `family`; a tensor that has no place there keeps its own name."""
    to: dict[str, str] = {}
    heads: dict[str, int] = {}
    transposed = set()
    for old in file.names():
        stem, _, end = old.rpartition(".")
        layer = re.match(r"blk\.(\d+)\.", stem)
        pattern = re.sub(r"^blk\.\d+\.", "blk.#.", stem)
        known = family.names.get(pattern)
        new = f"{known.replace('#', layer[1]) if layer else known}.{end}" if known is not None else old
        to[new] = old
        if family.paired_rows and pattern in ("blk.#.attn_q", "blk.#.attn_k"):
            heads[new] = config["num_attention_heads" if pattern.endswith("q") else "num_key_value_heads"]
        if family.transposed and layer and end == "weight" and "norm" not in pattern:
            transposed.add(new)
    return Arranged(file, to, heads, frozenset(transposed))


def capture_gguf(path: Path) -> Program:
    """The Program of a GGUF file; tensors stay in their blocks until a pass reads them."""
    file = GgufFile(path)
    family = _family(file)
    config = config_of(file, family)
    source = arrange(file, family, config)
    check_layers(config, source)
    settings = transformers_config({k: v for k, v in config.items() if k != "architectures"}, str(path))
    shell = instantiate(architecture(settings, {}, str(path)), settings)
    if ROPE_FACTORS in source.names():
        # Llama 3.1 and later: the file holds what each frequency is divided by, instead of a rule.
        shell.get_buffer("model.rotary_emb.inv_freq").div_(source.read(ROPE_FACTORS).float())
    encoded = any(source.info(name).encoding for name in source.names())
    if encoded:
        config["quantization_config"] = {"quant_method": "gguf"}
    program = program_of(shell, source, config, config.get("quantization_config"))
    if ROPE_FACTORS in source.names():
        program.ledger.claim(ROPE_FACTORS, "the rotary frequencies")
    return program
