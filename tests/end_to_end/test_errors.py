"""What compile() says of wrong input, in full: place, found, expected, what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from checkpoints import ROOT
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.errors import CaptureError, CheckpointError, ConfigError
from qcompile.methods.index import METHODS

GPTQ_FIELDS = (
    "bits, tokenizer, dataset, group_size, damp_percent, desc_act, act_group_aware, sym, true_sequential, format, meta, "
    "backend, model_seqlen, block_name_to_quantize, module_name_preceding_first_block, batch_size, pad_token_id, "
    "max_input_length, cache_block_outputs, modules_in_block_to_quantize, dynamic, lm_head, pack_dtype"
)
SKIP = "choose another group size or method, or leave the module dense by the config's skip list"
CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "gtpq", "bits": 4},
        "unknown quantization method\n"
        "  where:    field 'quant_method'\n"
        "  found:    'gtpq', did you mean 'gptq'?\n"
        f"  expected: {', '.join(METHODS)}",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_sise": 64},
        "unknown field in the gptq config\n"
        "  found:    'group_sise', did you mean 'group_size'?\n"
        f"  expected: {GPTQ_FIELDS}\n"
        "  try:      correct the name, or leave the field out",
    ),
    (
        {"quant_method": "gptq", "bits": 9},
        "the gptq config has a value out of range\n"
        "  where:    field 'bits'\n"
        "  found:    9\n"
        "  expected: an integer from 2 to 8",
    ),
    (
        {"quant_method": "awq", "bits": 4, "group_size": 48},
        "awq cannot store this module's weight\n"
        "  where:    model.layers.0.self_attn.q_proj [64, 64]\n"
        "  found:    K = 64\n"
        "  expected: a multiple of the group, 48\n"
        f"  try:      {SKIP}\n"
        "  also:     model.layers.0.self_attn.k_proj [32, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     model.layers.0.self_attn.v_proj [32, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     model.layers.0.self_attn.o_proj [64, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     model.layers.0.mlp.gate_proj [96, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     model.layers.0.mlp.up_proj [96, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     model.layers.1.self_attn.q_proj [64, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     model.layers.1.self_attn.k_proj [32, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     model.layers.1.self_attn.v_proj [32, 64]: awq cannot store this module's weight; found K = 64\n"
        "  also:     3 more",
    ),
    (
        {"quant_method": "hqq", "nbits": 4, "group_size": 40},
        "hqq cannot store this module's weight\n"
        "  where:    model.layers.0.self_attn.q_proj [64, 64]\n"
        "  found:    N * K = 4096\n"
        "  expected: a multiple of the group, 40\n"
        f"  try:      {SKIP}\n"
        "  also:     model.layers.0.self_attn.k_proj [32, 64]: hqq cannot store this module's weight; found N * K = 2048\n"
        "  also:     model.layers.0.self_attn.v_proj [32, 64]: hqq cannot store this module's weight; found N * K = 2048\n"
        "  also:     model.layers.0.self_attn.o_proj [64, 64]: hqq cannot store this module's weight; found N * K = 4096\n"
        "  also:     model.layers.0.mlp.gate_proj [96, 64]: hqq cannot store this module's weight; found N * K = 6144\n"
        "  also:     model.layers.0.mlp.up_proj [96, 64]: hqq cannot store this module's weight; found N * K = 6144\n"
        "  also:     model.layers.0.mlp.down_proj [64, 96]: hqq cannot store this module's weight; found N * K = 6144\n"
        "  also:     model.layers.1.self_attn.q_proj [64, 64]: hqq cannot store this module's weight; found N * K = 4096\n"
        "  also:     model.layers.1.self_attn.k_proj [32, 64]: hqq cannot store this module's weight; found N * K = 2048\n"
        "  also:     5 more",
    ),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["q_porj"]},
        "the bitsandbytes config has a pattern that matches no module\n"
        "  where:    field 'llm_int8_skip_modules'\n"
        "  found:    'q_porj'\n"
        "  expected: one of 16 modules with a weight, such as q_proj, v_proj, o_proj\n"
        "  try:      correct the pattern, or take it out",
    ),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=lambda item: "" if isinstance(item, str) else None)
def test_configs(config, message):
    with pytest.raises(ConfigError) as caught:
        qcompile.compile(tiny_models.decoder("llama"), config)
    assert str(caught.value) == message


class Branch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


def test_a_model_that_cannot_be_exported():
    with pytest.raises(CaptureError) as caught:
        qcompile.compile(Branch(), example_inputs=(torch.randn(2, 8),))
    lines = str(caught.value).splitlines()
    source = Path(__file__).read_text().splitlines()
    line = next(at for at, text in enumerate(source, 1) if "y.sum() > 0" in text)
    assert lines[0] == "Branch cannot be exported to a graph"
    assert lines[1] == f"  where:    {__file__}:{line} in forward"
    assert "Could not guard on data-dependent expression" in lines[2]
    assert lines[3:] == [
        "  expected: a forward whose control flow depends on shapes and settings only, not on the values of tensors",
        "  try:      rewrite that line with tensor operators, or make the dimension it names fixed in dynamic_shapes",
    ]


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    (
        {},
        "example_inputs are needed to export a module\n"
        "  where:    Branch\n"
        "  try:      pass example_inputs=(tensor, ...) and dynamic_shapes, as for torch.export",
    ),
    (
        {"target": "gpu"},
        "no target is called 'gpu', did you mean 'cpu'?\n"
        "  found:    'gpu'\n"
        "  expected: cpu, cpu:native, cpu:x86-64-v4-vnni, cpu:x86-64-v3, cpu:aarch64, cuda, cuda:sm_80, cuda:sm_86, cuda:sm_89, "
        "cuda:sm_90, cuda:sm_100, cuda:sm_120, rocm, rocm:gfx942, reference",
    ),
    (
        {"accuracy": "int4"},
        "no such accuracy\n  where:    accuracy\n  found:    'int4'\n  expected: 'exact' or 'int8'",
    ),
    (
        {"model": 5},
        "this is not a model\n"
        "  found:    int\n"
        "  expected: an nn.Module, a folder, a .gguf file, or the id of a model on the Hub",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=["no-examples", "target", "accuracy", "model"])
def test_arguments(arguments, message):
    with pytest.raises(ConfigError) as caught:
        qcompile.compile(**{"model": Branch(), **arguments})
    assert str(caught.value) == message


DOWN = "model.layers.0.mlp.down_proj"
TOGETHER = "the checkpoint and its quantization_config do not belong together, or a file is damaged"
BELONG = "check that the quantization config and the architecture are those the checkpoint was made with"
Tensors = dict[str, torch.Tensor]
DAMAGES: list[tuple[str, str, Callable[[Tensors, dict[str, Any]], Any], str]] = [
    (
        "gptq-lacks-scales",
        "gptq",
        lambda tensors, _: tensors.pop(f"{DOWN}.scales"),
        "a module quantized with gptq lacks a stored tensor\n"
        f"  where:    {DOWN}\n"
        "  found:    g_idx, qweight, qzeros\n"
        "  expected: qweight, qzeros, scales\n"
        f"  try:      the checkpoint is incomplete: it must hold {DOWN}.scales",
    ),
    (
        "bitsandbytes-lacks-absmax",
        "bitsandbytes-nf4",
        lambda tensors, _: tensors.pop(f"{DOWN}.weight.absmax"),
        "a module quantized with bitsandbytes lacks a stored tensor\n"
        f"  where:    {DOWN}\n"
        "  found:    weight, weight.quant_map, weight.quant_state.bitsandbytes__nf4\n"
        "  expected: weight.quant_map, weight, weight.absmax\n"
        f"  try:      the checkpoint is incomplete: it must hold {DOWN}.weight.absmax",
    ),
    (
        "lacks-a-norm",
        "gptq",
        lambda tensors, _: tensors.pop("model.norm.weight"),
        "1 tensors of the architecture are not in the checkpoint\n"
        "  where:    the checkpoint FOLDER\n"
        "  found:    32 tensors\n"
        "  expected: model.norm.weight\n"
        "  try:      check that the checkpoint is complete and belongs to this config.json",
    ),
    (
        "extra-module",
        "gptq",
        lambda tensors, _: tensors.update({"model.layers.9.mlp.gate.weight": torch.zeros(3)}),
        "tensors that did not end in exactly one place\n"
        "  where:    the checkpoint FOLDER\n"
        "  found:    model.layers.9.mlp.gate.weight: not used\n"
        "  expected: every tensor of the source used once\n"
        f"  try:      {BELONG}",
    ),
    (
        "extra-tensor",
        "gptq",
        lambda tensors, _: tensors.update({f"{DOWN}.qscale": torch.zeros(3)}),
        "tensors that did not end in exactly one place\n"
        "  where:    the checkpoint FOLDER\n"
        f"  found:    {DOWN}.qscale: not used\n"
        "  expected: every tensor of the source used once\n"
        f"  try:      {BELONG}",
    ),
    (
        "packed-shape",
        "gptq",
        lambda tensors, _: tensors.update({f"{DOWN}.qweight": tensors[f"{DOWN}.qweight"][:-4].contiguous()}),
        "a stored tensor has the wrong shape\n"
        f"  where:    {DOWN}.qweight (module {DOWN}, 128 outputs, 384 inputs)\n"
        "  found:    i32 [44, 128]\n"
        "  expected: i32 [48, 128]\n"
        f"  try:      {TOGETHER}",
    ),
    (
        "packed-dtype",
        "gptq",
        lambda tensors, _: tensors.update({f"{DOWN}.qzeros": tensors[f"{DOWN}.qzeros"].long()}),
        "a stored tensor has the wrong dtype\n"
        f"  where:    {DOWN}.qzeros (module {DOWN}, 128 outputs, 384 inputs)\n"
        "  found:    i64 [12, 16]\n"
        "  expected: i32 [12, 16]\n"
        f"  try:      {TOGETHER}",
    ),
    (
        "not-finite",
        "gptq",
        lambda tensors, _: tensors[f"{DOWN}.scales"].fill_(float("nan")),
        "a stored tensor holds a number that is not finite\n"
        f"  where:    {DOWN}.scales (module {DOWN})\n"
        "  found:    nan at [0, 0]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        "float-shape",
        "gptq",
        lambda tensors, _: tensors.update({"model.norm.weight": torch.ones(124)}),
        "tensor 'model.norm.weight' has another shape than the architecture\n"
        "  where:    the checkpoint FOLDER\n"
        "  found:    [124]\n"
        "  expected: [128]\n"
        "  try:      check that the checkpoint belongs to this config.json",
    ),
    (
        "architecture",
        "gptq",
        lambda _, config: config.update(architectures=["LlamaForCausalML"]),
        "the architecture is not known\n"
        "  where:    FOLDER/config.json\n"
        "  found:    LlamaForCausalML\n"
        "  expected: LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification, "
        "LlamaForQuestionAnswering, LlamaModel\n"
        "  try:      update transformers; models that bring their own code are not supported",
    ),
]


@pytest.mark.skipif(not ROOT.is_dir(), reason="the real checkpoints are not on this machine")
@pytest.mark.parametrize(("name", "checkpoint", "damage", "message"), DAMAGES, ids=[item[0] for item in DAMAGES])
def test_damaged_checkpoints(name, checkpoint, damage, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(ROOT / checkpoint / file, folder / file)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, CaptureError)) as caught:
        qcompile.compile(folder, target="reference")
    assert str(caught.value).replace(str(folder), "FOLDER") == message
