"""A model as a GGUF file: what `capture_gguf` reads, written; names, order of rows and metadata are its families'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.capture.gguf import FAMILIES, TOKENS, Family, arrange, config_of
from qcompile.errors import ConfigError
from qcompile.gguf_file import GgufFile

FILE = "model.gguf"
# Fields of a config.json that change nothing of what a trained model computes.
_SILENT = re.compile(
    r"_name_or_path|architectures|(torch_)?dtype|transformers_version|use_cache|pretraining_tp|model_type|id2label"
    r"|label2id|initializer_range|scale_attn_by_inverse_layer_idx|task_specific_params|quantization_config"
    r"|\w*(dropout|pdrop)|summary_\w+|\w+_token_id"
)


def write_gguf(
    path: Path, config: Mapping[str, Any], encodings: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write `tensors` (transformers' names) to the new file `path`; those in `encodings` are rows of such blocks.

    `config` is the model's config.json. The file holds no tokenizer: its `tokenizer.ggml.model` is "no_vocab".
    ConfigError for an architecture that has no GGUF form here, and for a config or a tensor that the form cannot hold.
    """
    import gguf

    name = config.get("model_type")
    if name not in FAMILIES:
        raise ConfigError("no GGUF form of this architecture is known", found=name, expected=", ".join(FAMILIES))
    family = FAMILIES[name]
    # llama.cpp knows Mistral's models by Llama's name.
    writer = gguf.GGUFWriter(path, "llama" if name == "mistral" else name, use_temp_file=True)
    _metadata(writer, family, config)
    written = {"lm_head.weight"} if config.get("tie_word_embeddings") else set[str]()
    for title, tensor in tensors:
        if title in written:  # a weight that modules share is one tensor
            continue
        written.add(title)
        _add(writer, family, config, title, tensor, encodings.get(title, ""))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _nothing_lost(path, family, config)


def source_of(path: Path) -> Any:
    """The tensors of a file that `write_gguf` wrote, under the names that it was given."""
    file = GgufFile(path)
    family = FAMILIES[file.metadata["general.architecture"]]
    return arrange(file, family, config_of(file, family))


def _metadata(writer: Any, family: Family, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    for key, field in family.keys.items():
        value = config.get(field, rope.get(field))
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{writer.arch}.{key}", value)
    width = config.get("head_dim")
    if width is not None and not family.transposed:
        writer.add_uint32(f"{writer.arch}.attention.value_length", width)
        writer.add_uint32(f"{writer.arch}.rope.dimension_count", width)
    writer.add_uint32(f"{writer.arch}.vocab_size", config["vocab_size"])
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, field in TOKENS.items():
        if isinstance(config.get(field), int):
            writer.add_uint32(f"tokenizer.ggml.{key}", config[field])


def _add(writer: Any, family: Family, config: Mapping[str, Any], title: str, tensor: Tensor, encoding: str) -> None:
    import gguf

    stem, _, end = title.rpartition(".")
    layer = next((part for part in stem.split(".") if part.isdigit()), None)
    pattern = re.sub(r"\.\d+\.", ".#.", stem)
    back = {new: old for old, new in family.names.items()}
    if pattern not in back:
        raise ConfigError(
            "a GGUF file of this architecture has no place for a tensor",
            where=title,
            found=family.model_type,
            expected=", ".join(back),
        )
    old = back[pattern]
    if family.paired_rows and old in ("blk.#.attn_q", "blk.#.attn_k"):
        heads = config["num_attention_heads"]
        heads = heads if old.endswith("q") else config.get("num_key_value_heads") or heads
        tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 2)
    if family.transposed and layer and end == "weight" and "norm" not in old and not encoding:
        tensor = tensor.t()
    place = f"{old.replace('#', str(layer))}.{end}"
    if tensor.dim() == 1:  # llama.cpp adds and multiplies in float32
        tensor = tensor.float()
    tensor = tensor.detach().cpu().contiguous()
    if encoding:
        writer.add_tensor(place, tensor.numpy(), raw_dtype=gguf.GGMLQuantizationType[encoding.upper()])
    elif tensor.dtype == torch.bfloat16:
        writer.add_tensor(place, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(place, tensor.numpy())


def _nothing_lost(path: Path, family: Family, config: Mapping[str, Any]) -> None:
    """ConfigError unless the file's metadata say all that `config` says of what the model computes."""
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    file = GgufFile(path)
    found, wanted = (
        AutoConfig.for_model(**{"model_type": family.model_type, **given, "architectures": None}).to_dict()
        for given in (config_of(file, family), plain)
    )
    differ = [key for key in sorted(wanted) if not _SILENT.fullmatch(key) and not _same(wanted[key], found.get(key))]
    if differ:
        raise ConfigError(
            "a GGUF file of this architecture cannot say all of the model's config",
            where="config.json",
            found=", ".join(f"{key} = {wanted[key]!r}" for key in differ),
            expected=", ".join(f"{key} = {found.get(key)!r}" for key in differ),
        )


def _same(wanted: Any, found: Any) -> bool:
    """Equal, where a float may have been rounded to float32."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(_same(value, found.get(key)) for key, value in wanted.items())
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return bool(torch.tensor(wanted) == torch.tensor(float(found)))
    return bool(wanted == found)
