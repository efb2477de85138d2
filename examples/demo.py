"""Compiles SmolLM2 with two 4-bit configs, measures both against the float model, generates text, saves and reloads.

python examples/demo.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qcompile

sys.path.insert(0, str(Path(__file__).parent))
import smollm2

CONFIGS = {
    "nf4 (bitsandbytes)": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int4 (hqq, groups of 64)": {"quant_method": "hqq", "nbits": 4, "group_size": 64},
}
PROMPT = "Explain in two sentences why the sky is blue."


def summary(report: Any) -> str:
    """A line for each kind of weight, and one for what no kernel covers; `print(report)` shows every layer."""
    kinds: dict[tuple[str, str, str], list[Any]] = {}
    for row in report.weights.values():
        kinds.setdefault((row.format, row.layout, f"{row.bits:.2f}"), []).append(row)
    lines = [
        f"{len(rows):4} weights  {format:9} as {layout}  {bits} bits  {sum(row.bytes for row in rows) / 1e6:6.1f} MB"
        for (format, layout, bits), rows in kinds.items()
    ]
    return "\n".join([*lines, f"{len(report.fallbacks):4} operators run through ATen"])


def float_perplexity(windows: list[torch.Tensor]) -> float:
    model = smollm2.float_model()
    with torch.inference_mode():
        return smollm2.perplexity(lambda ids: model(ids).logits, windows)


def main() -> None:
    words = smollm2.tokenizer()
    windows = list(smollm2.text_windows(words, count=4))
    print(f"float32: perplexity {float_perplexity(windows):.2f}\n")
    chat = words.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False)
    prompt = words(chat, return_tensors="pt").input_ids
    for name, config in CONFIGS.items():
        start = time.perf_counter()
        compiled = qcompile.compile(smollm2.gguf(), config, target="cpu")
        print(f"== {name}: compiled in {time.perf_counter() - start:.1f} s")
        print(summary(compiled.report))
        print(f"perplexity {smollm2.perplexity(lambda ids, q=compiled: q(input_ids=ids).logits, windows):.2f}")
        with tempfile.TemporaryDirectory() as folder:
            compiled.save(Path(folder) / "smollm2.qc")
            del compiled
            start = time.perf_counter()
            loaded = qcompile.load(Path(folder) / "smollm2.qc")
            print(f"saved, and loaded again in {time.perf_counter() - start:.2f} s")
            start = time.perf_counter()
            out = loaded.generate(prompt, max_new_tokens=64)
            seconds = time.perf_counter() - start
        made = out[0, prompt.shape[1] :]
        print(
            f"{len(made) / seconds:.1f} tokens/s, reading the prompt included:\n{words.decode(made, skip_special_tokens=True)}\n"
        )


if __name__ == "__main__":
    main()
