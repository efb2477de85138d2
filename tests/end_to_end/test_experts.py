"""Mixtures of experts whose checkpoints hold each expert's layers by themselves, quantized one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import end_to_end_models as tiny
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.capture import capture
from qcompile.errors import CheckpointError
from qcompile.evaluate import dequantize
from qcompile.format import Packed
from qcompile.formats.eetq import Eetq as EetqFormat
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.eetq import Eetq, EetqConfig
from qcompile.methods.index import parse_config
from qcompile.passes.base import Context, run_pipeline
from qcompile.passes.pipelines import CHECKED, pipeline
from qcompile.program import Module
from qcompile.transform import Applied
from qcompile.transforms.linear import Scale

LAYER = re.compile(r".*experts\.\d+\.\w+(?=\.weight$)")
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


def quantized(name: str, config: dict[str, Any], folder: Path, dense: str = "nothing") -> dict[str, torch.Tensor]:
    """Writes the tiny model with its experts quantized; the value of every expert's layer, by its path."""
    tiny_models.decoder(name).save_pretrained(folder)
    found = parse_config(config)
    assert found is not None
    method, parsed = found
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        layer = LAYER.match(name)
        if layer is None or dense in name:
            continue
        path = layer.group()
        module = Module(path, "Linear", *weight.shape, name)
        packed = method.quantize(parsed, module, tensors.pop(name))
        tensors |= {f"{path}.{own}": tensor for own, tensor in method.write(parsed, module, packed).items()}
        values[path] = dequantize(packed.format, packed.tensors, packed.N, packed.K)
    save_file(tensors, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": parsed.to_dict()}))
    return values


CASES = [
    ("mixtral", tiny.CONFIGS["nf4"], "cpu", "block_sparse_moe.experts.{}.{}", ("w1", "w3"), "w2"),
    ("mixtral", tiny.CONFIGS["gptq"], "reference", "block_sparse_moe.experts.{}.{}", ("w1", "w3"), "w2"),
    ("qwen2-moe", tiny.CONFIGS["gptq"], "cpu", "mlp.experts.{}.{}", ("gate_proj", "up_proj"), "down_proj"),
]


@pytest.mark.parametrize(("name", "config", "target", "names", "up", "down"), CASES)
@torch.no_grad()
def test_experts_that_were_quantized_one_by_one(name, config, target, names, up, down, tmp_path):
    values = quantized(name, config, tmp_path)
    q = qcompile.compile(tmp_path, target=target)
    for layer, path, parts in ((0, UP, up), (1, DOWN, (down,))):
        own = [[values[f"model.layers.{layer}.{names.format(e, part)}"] for part in parts] for e in range(4)]
        assert torch.equal(q.weight(path), torch.stack([torch.cat(parts) for parts in own]))
        row = q.report.weights[path]
        assert (row.method, row.tier) == (config["quant_method"], "lanes" if target == "cpu" else "eager")
    if target == "cpu":
        assert not q.report.fallbacks
    ids, model = tiny.tokens(2, 9), tiny.with_weights_of(tiny_models.decoder(name), q)
    assert tiny.difference(q(input_ids=ids).logits, model(ids).logits) < 1e-5
    q.save(tmp_path / "saved")
    again = qcompile.load(tmp_path / "saved")
    assert torch.equal(again.weight(UP), q.weight(UP))


def test_they_are_written_as_they_were(tmp_path):
    quantized("qwen2-moe", tiny.CONFIGS["gptq"], tmp_path)
    qcompile.compile(tmp_path, target="reference").export_checkpoint(tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@torch.no_grad()
def test_a_layer_whose_experts_are_dense(tmp_path):
    quantized("qwen2-moe", tiny.CONFIGS["nf4"], tmp_path, dense="layers.1.")
    q = qcompile.compile(tmp_path, target="reference")
    assert torch.equal(q.weight(DOWN), tiny_models.decoder("qwen2-moe").get_parameter(DOWN))
    assert [q.report.weights[path].method for path in (UP, DOWN)] == ["bitsandbytes", "none"]
    assert q.report.weights[DOWN].reason == "the checkpoint stores its weight dense"


def test_an_expert_is_missing(tmp_path):
    tiny_models.decoder("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        capture(tmp_path)
    assert str(caught.value) == (
        "the checkpoint has not all the experts of a layer\n"
        f"  where:    {DOWN}, the checkpoint {tmp_path}\n"
        "  found:    3 experts, such as model.layers.1.mlp.experts.0.w2.weight\n"
        "  expected: the experts 0 to 3\n"
        "  try:      check that the checkpoint is complete and belongs to this config.json"
    )


def test_float_experts_stay_dense_when_the_method_does_not_know_them():
    q = qcompile.compile(tiny_models.decoder("mixtral"), tiny.CONFIGS["nf4"], target="reference")
    row = q.report.weights[UP]
    assert (row.method, row.reason) == ("none", "the method does not convert fused experts")
    assert q.report.weights["model.layers.0.mlp.gate"].method == "none"  # the router
    assert q.report.weights["model.layers.0.self_attn.q_proj"].method == "bitsandbytes"


class Halves(Eetq):
    """EETQ of weights that are larger by a power of two, another for each expert, and inputs smaller by it."""

    experts = True

    def prequantized(self, config: Any, source: Any) -> bool:
        return False

    def quantize(self, config: Any, module: Module, weight: torch.Tensor) -> Packed:
        by = torch.full((module.k,), 2.0 ** (int(module.path.rpartition(".")[2]) + 1))
        packed = super().quantize(config, module, weight * by)
        packed.before = (Applied(Scale(), {"scale": 1 / by}),)
        return packed

    def select(self, config: Any, module: Module, source: Any, modules: Any) -> Any:
        return Quantized(EetqFormat(scale="f32")) if module.experts else Skip("experts only")


@torch.no_grad()
def test_experts_with_inputs_of_their_own_are_layers_of_their_own():
    import transformers

    sizes = {**tiny_models.GROUPED, "intermediate_size": 64, "num_local_experts": 4}
    model = tiny_models._random(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)))
    program = capture(model)
    context = Context(program.report, method=Halves(), config=EetqConfig())
    run_pipeline(program, pipeline([name for name in CHECKED if name != "add-kv-cache"]), context)
    assert not program.graph.graph.find_nodes(op="call_function", target=torch.ops.qcompile.experts.default)
    assert program.mixtures[UP].parts == tuple(f"{UP}.{e}" for e in range(4))
    ids, positions = tiny.tokens(2, 9), torch.arange(9).expand(2, 9)
    found = program.run(input_ids=ids, position_ids=positions, keep=torch.arange(9))["logits"]
    assert tiny.difference(found, model(ids).logits) < 0.05  # int8 weights
