"""Whole models on CUDA: compiled, run in Triton's interpreter or on a GPU, and compared with the same graph run by torch."""

from __future__ import annotations

import functools
from typing import Any

import end_to_end_models as tiny
import pytest
import tiny_models
import torch
from fake_device import FakeDevice
from gpu.device import interpreted

import qcompile
from qcompile.errors import ArtifactError
from qcompile.runtime.cuda import Device
from qcompile.runtime.cuda_session import CudaSession
from qcompile.runtime.model import CompiledModel
from qcompile.runtime.store import read

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ["cuda:interpret", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
# Inputs of tensor-core dots and the cache are rounded to 16 bits.
TOLERANCE = 1e-2


@functools.cache
def compiled(name: str, config: str, where: str) -> CompiledModel:
    source = tiny_models.decoder(name) if name in tiny_models.DECODERS else tiny_models.other(name)
    return qcompile.compile(source, tiny.CONFIGS[config], target=where)


def on(model: CompiledModel) -> tuple[CompiledModel, Device]:
    """The model anew, and the device that it runs on."""
    made = CompiledModel(model.contents, on=model.target, bounds=model.bounds)
    if model.target.name == "cuda:interpret":
        return interpreted(made)
    session = made.session
    assert isinstance(session, CudaSession)
    return made, session.gpu


def by_torch(model: CompiledModel) -> CompiledModel:
    return CompiledModel(model.contents, on="reference")


def logits_by_steps(model: CompiledModel, ids: torch.Tensor, first: int, **inputs: Any) -> torch.Tensor:
    """The logits of a prompt of `first` tokens, then one token at a time."""
    out = model(input_ids=ids[:, :first], use_cache=True, **inputs)
    logits = [out.logits]
    for token in ids[:, first:].split(1, dim=1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1).cpu()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("name", "config"), [("llama", "hqq"), ("gpt2", "float")])
def test_a_language_model(name, config, where):
    model, _ = on(compiled(name, config, where))
    ids = tiny.tokens(2, 6, seed=1)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0
    expected = logits_by_steps(by_torch(model), ids, 5, attention_mask=mask)
    found = logits_by_steps(model, ids, 5, attention_mask=mask)
    assert tiny.difference(found[0, 2:], expected[0, 2:]) < TOLERANCE
    assert tiny.difference(found[1], expected[1]) < TOLERANCE


def test_text_from_recorded_steps_is_that_of_torch():
    model, device = on(compiled("llama", "hqq", "cuda:interpret"))
    ids = tiny.tokens(1, 1)
    text = model.generate(ids, max_new_tokens=3, eos_token_id=[])
    assert isinstance(device, FakeDevice) and device.replays == 1
    assert torch.equal(text, by_torch(model).generate(ids, max_new_tokens=3, eos_token_id=[]))


def test_an_artifact_is_read_as_it_was_written(tmp_path):
    made = compiled("llama", "hqq", "cuda:interpret")
    made.save(tmp_path / "m.qc")
    again = read(tmp_path / "m.qc", trusted=True)
    assert again.artifact.executable == made.artifact.executable and again.kernels == made.contents.kernels


@pytest.mark.parametrize("where", WHERE)
def test_an_encoder(where):
    model, _ = on(compiled("bert", "float", where))
    given = tiny_models.inputs(["input_ids", "attention_mask"], 2, 7)
    found, expected = model(**given), by_torch(model)(**given)
    real = given["attention_mask"] != 0
    assert tiny.difference(found.last_hidden_state.cpu()[real], expected.last_hidden_state[real]) < TOLERANCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_what_runs_there():
    model = CompiledModel(compiled("llama", "hqq", "cuda:interpret").contents, on="cuda:sm_90")
    with pytest.raises(ArtifactError) as error:
        model(tiny.tokens(1, 3))
    assert str(error.value) == (
        "the artifact is for another machine\n  found:    a machine without an NVIDIA GPU with a driver\n"
        '  expected: cuda:sm_90\n  try:      target="reference" runs anywhere'
    )
    assert by_torch(model)(tiny.tokens(1, 3)).logits.shape == (1, 3, 101)
