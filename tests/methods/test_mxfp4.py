"""MXFP4: gpt-oss's experts, stored and on the fly, against a real checkpoint; and what is said about broken ones."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import end_to_end_models as tiny
import pytest
import tiny_models
import torch
from checkpoints import parametrize, reference
from in_memory import InMemory, linear
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.mxfp4 import FORMAT, Mxfp4, Mxfp4Config, quantize_blocks
from qcompile.program import Module

MX, CONFIG, E, N, K = Mxfp4(), Mxfp4Config(), 3, 6, 64
PATH = "model.layers.0.mlp.experts.gate_up_proj"


def experts(**changes: Any) -> Module:
    """The weight of gpt-oss's experts, as capture describes it."""
    made = Module(PATH, "Experts", N, K, PATH, f"{PATH}_bias", "bf16", experts=E, transposed=True)
    return replace(made, **changes)


def stored() -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint for `experts()`."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 130, (E, N, K // 32), generator=generator, dtype=torch.uint8)
    return {f"{PATH}_blocks": blocks, f"{PATH}_scales": scales, f"{PATH}_bias": torch.zeros(E, N).bfloat16()}


@functools.cache
def compiled(folder: Path, target: str) -> Any:
    return qcompile.compile(folder, target=target)


@pytest.mark.parametrize("target", ["reference", "cpu"])
@parametrize("mxfp4")
@torch.no_grad()
def test_a_real_checkpoint(folder: Path, target: str) -> None:
    q, expected = compiled(folder, target), reference(folder)
    for path, weight in expected.weights.items():
        assert torch.equal(q.weight(path), weight)
    logits = q(input_ids=expected.input_ids).logits
    assert float((logits - expected.logits).norm() / expected.logits.norm()) < 1e-5
    # Token by token: sinks, the sliding window and the cache.
    state, pieces = None, []
    for piece in expected.input_ids.split([7, 1, 4], dim=1):
        out = q(input_ids=piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        pieces.append(out.logits)
    assert tiny.difference(torch.cat(pieces, 1), expected.logits) < 1e-5
    row = q.report.weights["model.layers.1.mlp.experts.down_proj"]
    # Lanes hold the scales as float32.
    assert (row.method, row.format, row.bits) == ("mxfp4", "fp4", 4.25 if target == "reference" else 5.0)
    assert row.tier == ("eager" if target == "reference" else "lanes")
    assert q.report.weights["model.layers.0.mlp.router"].method == "none"


@parametrize("mxfp4")
@torch.no_grad()
def test_a_real_layer(folder: Path) -> None:
    """The whole layer as the real package ran it, from our weights."""
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    from transformers import AutoConfig

    data, model = load_file(folder / "reference.safetensors"), load_file(folder / "model.safetensors")
    layer, path = modeling.GptOssMLP(AutoConfig.from_pretrained(folder)), "model.layers.0.mlp"
    for name, parameter in layer.named_parameters():
        weight = f"experts.{name.removeprefix('experts.')}" if name.endswith("_proj") else ""
        own = (
            compiled(folder, "reference").weight(f"{path}.{weight}").transpose(1, 2)
            if weight
            else model[f"{path}.{name}"]
        )
        parameter.data = own.float()
    found = layer(data[f"probe.{path}.input"])[0]
    assert tiny.difference(found, data[f"probe.{path}.output"]) < 1e-5


@parametrize("mxfp4")
def test_the_original_weights_give_the_stored_bytes(folder: Path) -> None:
    data, files = load_file(folder / "reference.safetensors"), load_file(folder / "model.safetensors")
    seen = 0
    for name, weight in data.items():
        if name.startswith("source."):
            path = name.removeprefix("source.").removesuffix(".weight")
            bytes_, scales = quantize_blocks(weight.reshape(-1, weight.shape[-1]))
            assert torch.equal(bytes_, files[f"{path}_blocks"].reshape(bytes_.shape))
            assert torch.equal(scales, files[f"{path}_scales"].reshape(scales.shape))
            seen += 1
    assert seen == 2


@parametrize("mxfp4")
def test_the_checkpoint_is_written_as_it_was(folder: Path, tmp_path: Path) -> None:
    compiled(folder, "reference").export_checkpoint(tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4" and "dequantize" not in config


@parametrize("mxfp4")
def test_dequantize_unpacks_at_compile_time(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    q = qcompile.compile(folder, said | {"dequantize": True}, target="reference")
    path = "model.layers.0.mlp.experts.down_proj"
    assert q.report.weights[path].format == "dense"
    assert torch.equal(q.weight(path), compiled(folder, "reference").weight(path))


@pytest.mark.parametrize("target", ["reference", "cpu"])
@torch.no_grad()
def test_on_the_fly(target: str) -> None:
    """Only the experts are converted, each by itself, along its inputs."""
    model = tiny_models.decoder("gpt-oss")
    q = qcompile.compile(model, {"quant_method": "mxfp4"}, target=target)
    quantized = {path for path, row in q.report.weights.items() if row.method == "mxfp4"}
    names = ("gate_up_proj", "down_proj")
    assert quantized == {f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in names}
    for path in quantized:
        parameter = model.get_parameter(path)
        rows = parameter.detach().transpose(1, 2).reshape(-1, parameter.shape[1])
        bytes_, scales = quantize_blocks(rows)
        expected = dequantize(FORMAT, {"weight": bytes_, "scale": scales}, *rows.shape)
        assert torch.equal(q.weight(path).flatten(0, 1), expected)
        parameter.data = q.weight(path).transpose(1, 2).contiguous()
    ids = tiny.tokens(2, 9)
    assert tiny.difference(q(input_ids=ids).logits, model(ids).logits) < 5e-6


def test_what_is_written_is_read_again() -> None:
    tensors = stored()
    selected = MX.select(CONFIG, experts(), InMemory(tensors), {PATH: experts()})
    assert isinstance(selected, Quantized) and set(selected.names.values()) == {f"{PATH}_blocks", f"{PATH}_scales"}
    packed = MX.read(CONFIG, experts(), selected, InMemory(tensors))
    assert (packed.N, packed.K) == (E * N, K)
    written = {PATH + name: tensor for name, tensor in MX.write(CONFIG, experts(), packed).items()}
    assert written.keys() | {f"{PATH}_bias"} == tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in written.items())


def test_values_of_codes_and_scales() -> None:
    weight = torch.zeros(4, 32)
    weight[0, :4] = torch.tensor([6.0, 2.5, -0.25, -0.2])
    weight[1, 0] = 1e-38
    weight[2, 0] = 6.5  # rounds the scale up to 2
    weight[3, 0] = -0.0
    bytes_, scales = quantize_blocks(weight)
    assert scales.flatten().tolist() == [127, 1, 128, 0]
    value = dequantize(FORMAT, {"weight": bytes_, "scale": scales}, 4, 32)
    assert value[0, :4].tolist() == [6.0, 3.0, -0.5, -0.0] and value[2, 0] == 6.0
    assert torch.signbit(value[0, 3]) and torch.signbit(value[3, 0])
    least = dequantize(FORMAT, {"weight": torch.full((1, 16), 2, dtype=torch.uint8), "scale": scales[3:]}, 1, 32)
    assert least[0, 0] == 2.0**-127


def floats() -> InMemory:
    return InMemory({PATH: torch.zeros(E, K, N)})


@pytest.mark.parametrize(
    "config, module, reason",
    [
        (CONFIG, linear("lm_head", N, K), "only the experts of gpt-oss are converted by the method"),
        (CONFIG, experts(transposed=False), "only the experts of gpt-oss are converted by the method"),
        (replace(CONFIG, modules_to_not_convert=["model.layers.0"]), experts(), "modules_to_not_convert has 'model.layers.0'"),
        (replace(CONFIG, modules_to_not_convert=["mlp.experts"]), experts(), "modules_to_not_convert has 'mlp.experts'"),
        (replace(CONFIG, dequantize=True), experts(), "dequantize is true"),
    ],
    ids=["linear", "others", "layer", "experts", "dequantize"],
)  # fmt: skip
def test_what_stays_dense(config: Mxfp4Config, module: Module, reason: str) -> None:
    assert MX.select(config, module, floats(), {PATH: experts()}) == Skip(reason)


def test_routers_may_be_named() -> None:
    config = replace(CONFIG, modules_to_not_convert=["model.layers.*.mlp.router"])
    assert isinstance(MX.select(config, experts(), floats(), {PATH: experts()}), Quantized)


def test_inputs_that_fill_no_block() -> None:
    with pytest.raises(ConfigError) as caught:
        MX.select(CONFIG, experts(k=80), floats(), {PATH: experts()})
    assert str(caught.value) == (
        "mxfp4 cannot store this module's weight\n"
        f"  where:    {PATH} [3, 6, 80]\n"
        "  found:    80 inputs\n"
        "  expected: a multiple of 32\n"
        "  try:      leave the experts of this layer dense with modules_to_not_convert"
    )


def _without_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{PATH}_scales"]


def _short(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PATH}_blocks"] = tensors[f"{PATH}_blocks"][:, :5]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PATH}_scales"][1, 2, 1] = 255


BROKEN = {
    "missing": (
        _without_scales,
        "a module quantized with mxfp4 lacks a stored tensor\n"
        f"  where:    {PATH}\n"
        f"  found:    {PATH}_bias, {PATH}_blocks\n"
        f"  expected: {PATH}_blocks, {PATH}_scales\n"
        f"  try:      the checkpoint is incomplete: it must hold {PATH}_scales",
    ),
    "short": (
        _short,
        "a stored tensor has the wrong shape\n"
        f"  where:    {PATH}_blocks (module {PATH}, 6 outputs, 64 inputs)\n"
        "  found:    u8 [3, 5, 2, 16]\n"
        "  expected: u8 [3, 6, 2, 16]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged",
    ),
    "nan": (
        _nan,
        "a stored tensor holds a scale that is not finite\n"
        f"  where:    {PATH}_scales (module {PATH})\n"
        "  found:    exponent 255 at [1, 2, 1]\n"
        "  expected: exponents from 0 to 254\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint(case: str) -> None:
    break_, message = BROKEN[case]
    tensors = stored()
    break_(tensors)
    with pytest.raises(CheckpointError) as caught:
        selected = MX.select(CONFIG, experts(), InMemory(tensors), {})
        assert isinstance(selected, Quantized)
        MX.read(CONFIG, experts(), selected, InMemory(tensors))
    assert str(caught.value) == message


@parametrize("mxfp4")
def test_a_broken_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a module quantized with mxfp4 lacks a stored tensor"):
        qcompile.compile(tmp_path, target="reference")


def test_an_unknown_field() -> None:
    with pytest.raises(ConfigError) as caught:
        Mxfp4Config.from_dict({"dequantise": True})
    assert str(caught.value) == (
        "unknown field in the mxfp4 config\n"
        "  found:    'dequantise', did you mean 'dequantize'?\n"
        "  expected: modules_to_not_convert, dequantize\n"
        "  try:      correct the name, or leave the field out"
    )
