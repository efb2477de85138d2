"""Whole models on the machine code's own text: PTX through the real session and driver class, evaluated on the CPU.

Nothing of what runs here is replaced but the driver library and torch's streams and graphs: kernels start with the grids,
threads, shared memory and arguments that a GPU would be given.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator

import end_to_end_models as tiny
import pytest
import tiny_models
import torch
import transformers as T
from gpu.device import interpreted
from gpu.evaluated import evaluated
from gpu.libcuda import Libcuda

import qcompile
from qcompile import target
from qcompile.errors import InternalError
from qcompile.lowering.builders import builder_for
from qcompile.lowering.triton import toolchain
from qcompile.runtime.codes import build_codes
from qcompile.runtime.load import load
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.store import Contents, write

TOLERANCE = 1e-2  # as in test_models.py
H100 = target.target("cuda:sm_90")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Libcuda]:
    """The driver library of a GPU that no machine code here is for."""
    made, real = Libcuda(), ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *rest: made if name == "libcuda.so.1" else real(name, *rest))
    target.gpu_capability.cache_clear()
    yield made
    target.gpu_capability.cache_clear()


def for_few_rows(contents: Contents) -> Contents:
    """A model's program with the kernels that serve 4 rows alone, in PTX."""
    program, steps = contents.artifact.executable, []
    for step in program.steps:
        variant = next(each for each in step.variants if each.when is None or each.when[1] >= 4)
        steps.append(dataclasses.replace(step, variants=(dataclasses.replace(variant, when=None),)))
    called = {call.kernel for step in steps for variant in step.variants for call in variant.calls}
    kernels = {name: spec for name, spec in program.kernels.items() if name in called}
    made = dataclasses.replace(program, steps=tuple(steps), kernels=kernels)
    return dataclasses.replace(
        contents, artifact=dataclasses.replace(contents.artifact, target=target.PTX.name, executable=made),
        kernels=build_codes(kernels, (target.PTX,), builder_for(target.PTX)),
    )  # fmt: skip


def logits(model: CompiledModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the last two tokens of a prompt, and of one token more."""
    first = model(ids[:, :-1], attention_mask=mask, use_cache=True)
    last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits[:, -2:], last.logits], 1)


def test_a_saved_model_runs_on_its_ptx(library, tmp_path, monkeypatch):
    config = T.LlamaConfig(**tiny_models.GROUPED | {"num_hidden_layers": 1})
    source = tiny_models._random(T.LlamaForCausalLM(config))
    made = qcompile.compile(source, tiny.CONFIGS["gptq"], target="cuda:interpret")
    write(tmp_path / "m.qc", for_few_rows(made.contents))
    model, device = evaluated(load(tmp_path / "m.qc", native="trusted"))
    reference = load(tmp_path / "m.qc", target="reference")
    ids = tiny.tokens(2, 3, seed=1)
    mask = torch.tensor([[0, 1], [1, 1]])
    found, expected = (logits(each, ids, mask) for each in (model, reference))
    assert tiny.difference(found[0, 1:], expected[0, 1:]) < TOLERANCE
    assert tiny.difference(found[1], expected[1]) < TOLERANCE
    options = {"max_new_tokens": 3, "do_sample": True, "seed": 7, "top_k": 20, "top_p": 0.9, "eos_token_id": []}
    made = model.generate(ids[:1], **options)
    assert torch.equal(made, reference.generate(ids[:1], **options))
    assert device.replays == 1 and not model.session.uncaptured
    monkeypatch.setattr("gpu.evaluated.ranges", lambda pointers, extents: [])
    with pytest.raises(InternalError, match="a kernel ran outside its memory\n  where:    embedding") as error:
        model(ids)
    assert "there is no memory" in error.value.found


# Model, config, and prompts [b, s] with as many rows as kernels have buckets for. Where x is rounded to few bits, what was
# rounded to 16 before decides here and there between two neighbours: such models are compared with Triton's interpreter.
WHOLE = [
    ("llama", tiny.CONFIGS["gptq"], ((1, 1), (2, 9), (2, 40), (3, 150)), False),
    ("gpt-oss", None, ((1, 3), (2, 9)), False),
    ("llama", {"quant_method": "fp8", "weight_block_size": [32, 32]}, ((1, 3), (2, 9)), True),
    ("llama", {"quant_method": "nvfp4"}, ((1, 3), (2, 9)), True),
]


@pytest.mark.full
@pytest.mark.parametrize(("name", "config", "prompts", "rounds"), WHOLE, ids=["gptq", "gpt-oss", "fp8", "nvfp4"])
def test_a_model_runs_as_it_would_on_a_gpu_of_9_0(name, config, prompts, rounds, library):
    library.attributes[97] = toolchain.SHARED[90]
    made = qcompile.compile(tiny_models.decoder(name), config, target="cuda:interpret")
    other = CompiledModel(made.contents, on=made.target if rounds else "reference", bounds=made.bounds)
    other = interpreted(other)[0] if rounds else other
    model, _ = evaluated(made, H100)
    for b, s in prompts:
        ids = tiny.tokens(b, s + 1, seed=1)
        found, expected = (logits(each, ids, torch.ones(b, s, dtype=torch.int64)) for each in (model, other))
        assert tiny.difference(found, expected) < (1e-3 if rounds else TOLERANCE), (b, s)
