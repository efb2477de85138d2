"""Every method on a model of another shape than the checkpoints': biases, grouped heads, sizes that are no powers of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import compiler
from qcompile.errors import ConfigError
from qcompile.methods.index import METHODS

IDS = torch.tensor([[3, 50, 8, 13, 21, 34, 55, 89, 2], [11, 7, 7, 64, 98, 0, 41, 5, 17]])
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
QUARK = {
    "dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False, "symmetric": True,
    "observer_cls": "PerChannelMinMaxObserver", "round_method": "half_even", "scale_type": "float",
}  # fmt: skip
# What quantizes a float model; several where a method has several kinds.
ON_THE_FLY: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 3, "group_size": 32},
    "awq": {"bits": 4, "group_size": 64},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bitsandbytes/int8": {"load_in_8bit": True},
    "hqq": {"nbits": 4, "group_size": 64},
    "eetq": {},
    "compressed-tensors": {"config_groups": {"g": {"targets": ["Linear"], "weights": INT8}}, "ignore": ["lm_head"]},
    "compressed-tensors/fp8": {
        "config_groups": {
            "g": {
                "targets": ["Linear"], "weights": INT8 | {"type": "float"}, "input_activations": FP8_TOKENS,
            }
        },
        "ignore": ["lm_head"],
    },
    "quanto": {"weights": "int4"},
    "quanto/float8": {"weights": "float8"},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}},
    "torchao/dynamic": {
        "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}}
    },
    "fouroversix": {},
    "fp_quant": {},
    "nvfp4": {},
    "bitnet": {},
    "higgs": {
        "bits": 4, "p": 2, "hadamard_size": 64, "group_size": 64,
        "modules_to_not_convert": ["model.layers.0.self_attn", "down_proj", "lm_head"],  # it stores multiples of 128 outputs
    },
    "fbgemm_fp8": {},
    "fp8": {"weight_block_size": [64, 64]},
    "mxfp8": {},
    "quark": {"global_quant_config": {"weight": QUARK}, "exclude": ["lm_head"]},
    "metal": {"bits": 4, "group_size": 64},
    "auto-round": {"bits": 4, "group_size": 64},
    "sinq": {"nbits": 4, "group_size": 64, "modules_to_not_convert": ["lm_head"]},  # an odd number of rows
}  # fmt: skip
# What needs a calibrated checkpoint, a model of one kind or a file, and says so.
NOT_ON_THE_FLY: dict[str, dict[str, Any]] = {
    "aqlm": {},
    "vptq": {},
    "spqr": {},
    "mxfp4": {},
    "gguf": {},
    "gemma": {},
}
FEWER = {"higgs": 2, "nvfp4": 4}  # nvfp4 leaves layers with a bias dense
NO_CHECKPOINT = ("nvfp4",)
SKIPS = ("ignore", "exclude", "modules_to_not_convert")  # fields that name layers of the language model
# One of each way through the CPU kernels; test_conformance.py runs every method there.
ON_CPU = (
    "compressed-tensors/fp8",
    "quanto",
    "torchao/dynamic",
    "fouroversix",
    "fp_quant",
    "bitnet",
    "higgs",
    "fp8",
    "sinq",
)
LINEAR = ("higgs", "sinq")  # what happens to x is a rotation or a scale: nothing is rounded
INTEGERS = ("torchao/dynamic", "bitnet")  # x is rounded to int8, which a CPU multiplies as integers
# Activations of few bits: cpu and reference add in another order, and a single flipped code moves the logits.
ROUGH = {"fouroversix": 0.1, "fp_quant": 0.1}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Qwen2Config(
        hidden_size=192, intermediate_size=384, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=99, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    made: torch.nn.Module = transformers.Qwen2ForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def config_of(name: str) -> dict[str, Any]:
    return {"quant_method": name.split("/")[0]} | ON_THE_FLY[name]


def test_every_method_is_here() -> None:
    assert {name.split("/")[0] for name in ON_THE_FLY} | NOT_ON_THE_FLY.keys() == set(METHODS)


def float_logits(model: torch.nn.Module, q: qcompile.CompiledModel) -> torch.Tensor:
    """The float model's logits with the weights that `q` holds in place of its own."""
    kept = {path: model.get_submodule(path).weight.detach().clone() for path in q.artifact.weights}
    try:
        with torch.no_grad():
            for path in kept:
                model.get_submodule(path).weight.copy_(q.weight(path))
            logits: torch.Tensor = model(IDS).logits
    finally:
        with torch.no_grad():
            for path, weight in kept.items():
                model.get_submodule(path).weight.copy_(weight)
    return logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ON_THE_FLY)
def test_on_the_fly(model: torch.nn.Module, name: str, tmp_path: Path) -> None:
    """What runs agrees with the float model that holds the weights, on a CPU too; so does a checkpoint of it."""
    q = qcompile.compile(model, config_of(name), target="reference")
    rows = [row for row in q.report.weights.values() if row.method != "none"]
    assert len(rows) >= FEWER.get(name, 7), q.report
    logits = q(input_ids=IDS).logits
    exact = float_logits(model, q)
    around = name not in LINEAR and any(row.around for row in rows)
    assert distance(logits, exact) < (0.5 if around else 1e-5)
    if name in ON_CPU:
        on_cpu = qcompile.compile(model, config_of(name), target="cpu")
        for row in rows:
            torch.testing.assert_close(on_cpu.weight(row.path), q.weight(row.path), rtol=2e-7, atol=0)
        assert not on_cpu.report.fallbacks
        tiers = {on_cpu.report.weights[row.path].tier for row in rows}
        assert tiers == {"native"} if name in INTEGERS else "native" not in tiers
        rough = ROUGH.get(name, 1e-2 if around else 1e-5)
        assert distance(on_cpu(input_ids=IDS).logits, logits) < rough
    if name in NO_CHECKPOINT:
        with pytest.raises(ConfigError, match="defines no checkpoint"):
            q.export_checkpoint(tmp_path / "out")
        return
    q.export_checkpoint(tmp_path / "out")
    again = qcompile.compile(tmp_path / "out", target="reference")
    for row in rows:
        assert torch.equal(again.weight(row.path), q.weight(row.path)), row.path
    assert distance(again(input_ids=IDS).logits, logits) < 1e-6


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(256, 384, bias=False), torch.nn.Linear(384, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
@pytest.mark.parametrize("name", ON_THE_FLY)
def test_the_plan_is_what_comes(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Format, layout and tier of each weight, without kernels built."""
    monkeypatch.setattr(compiler, "_build", lambda *_: ({}, None))
    torch.manual_seed(0)
    model, config = Layers(), {key: value for key, value in config_of(name).items() if key not in SKIPS}
    planned = qcompile.plan(model, config, target=target, example_inputs=(torch.zeros(3, 256),))
    made = qcompile.compile(model, config, target=target, example_inputs=(torch.zeros(3, 256),))
    rows = {row.path: (row.method, row.format, row.layout, row.tier) for row in made.report.weights.values()}
    assert {row.path: (row.method, row.format, row.layout, row.tier) for row in planned.rows} == rows


@pytest.mark.parametrize("name", NOT_ON_THE_FLY)
def test_what_cannot_be_quantized_here_says_so(model: torch.nn.Module, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        qcompile.compile(model, {"quant_method": name} | NOT_ON_THE_FLY[name], target="reference")
    assert error.value.remedy and error.value.found
