"""TorchAO: every tensor class stored and on the fly, against real checkpoints; headers; what is said about broken ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config as model_config
from checkpoints import parametrize
from in_memory import InMemory, linear
from one_module import fc, same
from safetensors.torch import load_file
from stored_modules import same_bits, value
from torchao_cases import AO, ASYMMETRIC, DTYPES, IDS, LONG, RECIPES, made_of, per, said, sample

from qcompile.errors import CheckpointError, ConfigError
from qcompile.format import Packed
from qcompile.methods import torchao_rounding as rounding
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import parse_config
from qcompile.methods.torchao_config import TorchAoConfig
from qcompile.methods.torchao_recipes import FqnToConfig, Int4WeightOnlyConfig
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder


def stored(config: TorchAoConfig, packed: Packed, dtype: str = "f32") -> InMemory:
    """The module "fc" as a checkpoint holds it, with its header."""
    written = AO.write(config, fc(packed.N, packed.K, dtype), packed)
    tensors = {f"fc.{name}": tensor for name, tensor in written.items()}
    return InMemory(tensors, notes=AO.metadata(config, {"fc": packed}, dtype))


def read(config: TorchAoConfig, source: InMemory, module: Module) -> Packed:
    selected = AO.select(config, module, source, {module.path: module})
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims} == set(source.names())
    return AO.read(config, module, selected, source)


@parametrize("torchao")
def test_a_real_checkpoint_is_read_written_and_made_again(folder: Path) -> None:
    source: Any = SafetensorsFolder(folder)
    found = parse_config(None, model_config(folder)["quantization_config"], source)  # type: ignore[arg-type]
    assert found is not None and isinstance(found[1], TorchAoConfig)
    config, dtype, seen = found[1], LONG[str(model_config(folder)["dtype"])], 0
    for name, weight in load_file(folder / "reference.safetensors").items():
        path = name.removesuffix(".weight_original")
        if path == name:
            continue
        module = linear(path, *weight.shape, dtype=dtype)
        mine = {n: source.read(n) for n in source.names() if n.startswith(f"{path}.")}
        packed = read(config, InMemory(mine, notes=source.header()), module)
        assert same(AO.quantize(config, module, weight), packed)
        assert same_bits({f"{path}.{n}": t for n, t in AO.write(config, module, packed).items()}, mine)
        header = AO.metadata(config, {path: packed}, dtype)
        assert json.loads(header[f"{path}.weight"]) == json.loads(source.header()[f"{path}.weight"])
        seen += 1
    assert seen == 4


# How far one layer may be from torchao's own: float32 sums in another order, or an output rounded to bfloat16 and, where x
# is rounded to float8, a scale of x that torchao rounds to bfloat16 too.
PROBES = {"int8da-int4w": 0.0, "int8da-int8w": 1e-6, "int8wo": 2e-6, "float8da-float8w": 2e-2}


@parametrize("torchao")
def test_a_layer_gives_what_torchao_gives(folder: Path) -> None:
    source: Any = SafetensorsFolder(folder)
    config = TorchAoConfig.from_dict(model_config(folder)["quantization_config"])  # type: ignore[arg-type]
    data = load_file(folder / "reference.safetensors")
    for name in [name for name in data if name.endswith(".probe_input")]:
        path = name.removesuffix(".probe_input")
        module = linear(path, *data[f"{path}.weight"].shape)
        selected = AO.select(config, module, source, {path: module})
        assert isinstance(selected, Quantized)
        packed, x = AO.read(config, module, selected, source), data[name].float()
        for each in packed.before:
            x = each(x)
        expected = data[f"{path}.probe_output"].float()
        error = (torch.nn.functional.linear(x, value(packed)) - expected).norm() / expected.norm()
        assert error <= PROBES.get(folder.name.removeprefix("torchao-"), 4e-3), path


@pytest.mark.parametrize("recipe, n, k, dtype, step", RECIPES, ids=IDS)
def test_what_is_made_is_what_is_announced_and_comes_back(
    recipe: dict[str, Any], n: int, k: int, dtype: str, step: float
) -> None:
    config, module, weight = made_of(recipe), fc(n, k, dtype), sample(n, k, dtype)
    selected = AO.select(config, module, InMemory({"fc.weight": weight}), {"fc": module})
    assert isinstance(selected, Quantized) and not selected.names
    packed = AO.quantize(config, module, weight)
    assert type(packed.format) is type(selected.format)
    assert (value(packed) - weight.float()).abs().max() <= step * weight.float().abs().max()
    assert same(read(config, stored(config, packed, dtype), module), packed)
    bare = replace(module, kind="Embedding")
    assert read(config, stored(config, packed, dtype), bare).before == ()
    for each in packed.before:
        rounded = each(sample(3, k))
        assert torch.isfinite(rounded).all() and (rounded - sample(3, k)).abs().max() < 1.5
        assert (each(torch.zeros(2, k)) == 0).all()


@pytest.mark.parametrize("recipe, n, k, dtype, step", RECIPES, ids=IDS)
def test_parts_equal_the_packages(recipe: dict[str, Any], n: int, k: int, dtype: str, step: float) -> None:
    pytest.importorskip("torchao")
    from torchao.core.config import config_from_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    if (
        recipe["_type"] in ("Int4WeightOnlyConfig", "NVFP4DynamicActivationNVFP4WeightConfig")
        or "Float8Dynamic" in recipe["_type"]
    ):
        pytest.skip("torchao makes these on a GPU only")
    layer = torch.nn.Linear(k, n, bias=False, dtype=DTYPES[dtype])
    layer.weight = torch.nn.Parameter(sample(n, k, dtype), requires_grad=False)
    quantize_(layer, config_from_dict(recipe))
    theirs, header = flatten_tensor_state_dict({"fc.weight": layer.weight.data})
    config = made_of(recipe)
    packed = AO.quantize(config, fc(n, k, dtype), sample(n, k, dtype))
    ours = stored(config, packed, dtype)
    assert same_bits(ours.tensors, theirs)
    assert json.loads(ours.header()["fc.weight"]) == json.loads(header["fc.weight"])
    x = sample(4, k, dtype)
    if dtype == "f32" or "Intx" in recipe["_type"]:
        y = x.float()
        for each in packed.before:
            y = each(y)
        expected, bound = layer(x).float(), 1e-6 if dtype == "f32" else 1e-2
        assert (torch.nn.functional.linear(y, value(packed)) - expected).norm() <= bound * expected.norm()


def test_hqq_moves_zeros_as_the_package_does() -> None:
    """The package's numbers for a weight in bfloat16 (torchao 0.18 on a CPU, where its own class refuses to be made)."""
    weight = ((torch.arange(128) * 37 % 101 - 50) / 64).reshape(2, 64).bfloat16()
    made = rounding.tinygemm_hqq(weight, 32)
    codes = bytes.fromhex(
        "00050b01070c03080e040a00060b02070d03090e050a01060c02080d04090f050b01070c02080e040a00060b01070d03090e040a00060c02080d03090f050b01"
        "070d03090e050a00060c02080d03090f050b01070c02080e040a0f050b01070d03090e040a00060c02080d03090f050b01060c02080e040a0f050b01070d0308"
    )
    want = {"scale": "d53dcf3dcf3dcf3d", "zero": "9f3d9a3d143c4d3a"}
    assert bytes(made["code"].flatten().tolist()) == codes
    for name, text in want.items():
        assert made[name][:, ::32].contiguous().view(torch.uint8).numpy().tobytes().hex() == text
    assert not torch.equal(rounding.tinygemm(weight, 32)["zero"], made["zero"])


def test_static_scales_and_scales_of_inputs_are_read_and_written() -> None:
    config = made_of(said("Int8DynamicActivationInt8Weight", granularity=per("PerTensor")))
    packed = AO.quantize(config, fc(5, 8), sample(5, 8))
    source = stored(config, packed)
    source.tensors |= {
        "fc._weight_act_quant_scale": torch.tensor([[0.5]]),
        "fc._weight_act_pre_scale": torch.arange(1.0, 9.0),
    }
    found = read(config, source, fc(5, 8))
    scaled, rounded = found.before
    assert torch.equal(scaled(torch.ones(1, 8)), torch.arange(1.0, 9.0)[None])
    assert torch.equal(rounded(torch.tensor([[0.7, 900.0]])), torch.tensor([[0.5, 63.5]]))
    written = AO.write(config, fc(5, 8), found)
    assert same_bits({f"fc.{name}": tensor for name, tensor in written.items()}, source.tensors)


def test_zero_points_count_where_they_are_not_zero() -> None:
    config = made_of(said("IntxWeightOnly", mapping_type=ASYMMETRIC))
    packed = AO.quantize(config, fc(5, 8), sample(5, 8))
    assert packed.format.to_json()["zero"] == "i8"
    assert AO.quantize(config, fc(5, 8), torch.zeros(5, 8)).tensors["weight"].eq(-128).all()
    assert AO.quantize(made_of(said("IntxWeightOnly")), fc(5, 8), sample(5, 8)).format.to_json()["zero"] == ""


def test_a_block_of_zeros_is_zero() -> None:
    for recipe, n, k, dtype, _ in RECIPES:
        made = AO.quantize(made_of(recipe), fc(n, k, dtype), torch.zeros(n, k, dtype=DTYPES[dtype]))
        assert value(made).abs().max() < 1e-6, recipe


# Which modules


def llama() -> dict[str, Module]:
    names = ("layers.0.q_proj", "layers.0.mlp.down_proj", "layers.1.q_proj")
    head = linear("lm_head", 96, 128, output_embedding=True, last_parameter=True)
    embedding = Module("embed_tokens", "Embedding", 96, 128, "embed_tokens.weight")
    return {each.path: each for each in (embedding, *(linear(name, 64, 128) for name in names), head)}


def dense(config: TorchAoConfig) -> dict[str, str]:
    modules = llama()
    source = InMemory({each.weight: torch.zeros(each.n, each.k) for each in modules.values()})
    decided = {path: AO.select(config, each, source, modules) for path, each in modules.items()}
    return {path: result.reason for path, result in decided.items() if isinstance(result, Skip)}


def test_patterns_are_matched_against_parameters() -> None:
    recipe = said("Int8WeightOnly")
    kind, head = (
        "Embedding is not converted by the method (only Linear)",
        "it is the output embedding, and such modules stay dense by default",
    )
    assert dense(made_of(recipe)) == {"embed_tokens": kind, "lm_head": head}
    assert dense(made_of(recipe, include_input_output_embeddings=True)) == {"embed_tokens": kind}
    by_name = dense(made_of(recipe, modules_to_not_convert=["layers.0", "q_proj.weight"]))
    assert by_name == {
        "embed_tokens": kind,
        "layers.0.q_proj": "modules_to_not_convert has 'layers.0'",
        "layers.0.mlp.down_proj": "modules_to_not_convert has 'layers.0'",
        "layers.1.q_proj": "modules_to_not_convert has 'q_proj.weight'",
    }
    kept = linear("layers.0.wo", 64, 128, keep_f32=True)  # T5's list has "wo", which is the ending of no parameter
    source = InMemory({"layers.0.wo.weight": torch.zeros(64, 128)})
    assert isinstance(AO.select(made_of(recipe), kept, source, {kept.path: kept}), Quantized)
    with pytest.raises(ConfigError, match="a pattern that matches no module"):
        dense(made_of(recipe, modules_to_not_convert=["q_proj"]))


def test_recipes_by_name() -> None:
    inner = {
        "re:.*down_proj": said("Int4WeightOnly", group_size=32),
        "layers.1.q_proj": None,
        "_default": said("Int8WeightOnly"),
    }
    recipe = said("FqnTo", 1, fqn_to_config=inner)
    assert dense(made_of(recipe)).items() >= {"layers.1.q_proj": "fqn_to_config has None for 'layers.1.q_proj'"}.items()
    rules = {"a.weight": None, "a": Int4WeightOnlyConfig(), "re:a|b": None, "re:b.*": Int4WeightOnlyConfig()}
    found = FqnToConfig(rules)
    assert [found.rule(path) for path in ("a", "b", "bc", "c")] == ["a.weight", "re:a|b", "re:b.*", None]
    only = made_of(
        said("FqnTo", 1, fqn_to_config={"embed_tokens": said("Int8WeightOnly")}), include_input_output_embeddings=True
    )
    left = dense(only)
    assert "embed_tokens" not in left and left["layers.0.q_proj"] == "fqn_to_config does not name it"
    module = llama()["layers.0.mlp.down_proj"]
    assert AO.quantize(made_of(recipe), module, sample(64, 128)).format.kind == "torchao-int4"


def test_shapes_that_torchao_leaves_dense() -> None:
    for recipe, reason in (
        (said("Int4WeightOnly", group_size=256), "its 128 inputs are not a multiple of the group, 256"),
        (said("Float8DynamicActivationFloat8Weight"), "its shape [60, 128] is not a multiple of 16"),
    ):
        module = fc(60, 128)
        found = AO.select(made_of(recipe), module, InMemory({"fc.weight": sample(60, 128)}), {"fc": module})
        assert found == Skip(f"torchao leaves it dense: {reason}")
        with pytest.raises(ConfigError, match="torchao does not quantize this module"):
            AO.quantize(made_of(recipe), module, sample(60, 128))


def test_a_dtype_that_torchao_refuses_is_noted() -> None:
    module = fc(16, 128)
    found = AO.select(
        made_of(said("MXDynamicActivationMXWeight", 1)), module, InMemory({"fc.weight": sample(16, 128)}), {}
    )
    assert isinstance(found, Quantized) and found.note == "torchao itself takes bf16 weights only here, not f16"


# Broken checkpoints

WRONG = "the checkpoint and its quantization_config do not belong together, or a file is damaged"
BROKEN: list[tuple[str, Any, str]] = [  # a tensor to replace, or None to remove it; or the header's text
    (
        "fc._weight_scale",
        None,
        "a module quantized with torchao lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    _weight_qdata, _weight_zero_point\n"
        "  expected: _weight_qdata, _weight_scale\n"
        "  try:      the checkpoint is incomplete: it must hold fc._weight_scale",
    ),
    (
        "fc._weight_qdata",
        torch.zeros(5, 9, dtype=torch.int8),
        "a stored tensor has the wrong shape\n"
        "  where:    fc._weight_qdata (module fc, 5 outputs, 8 inputs)\n"
        "  found:    i8 [5, 9]\n"
        "  expected: i8 [5, 8]\n"
        f"  try:      {WRONG}",
    ),
    (
        "fc._weight_scale",
        torch.full((5, 1), math.nan),
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc._weight_scale (module fc)\n"
        "  found:    nan at [0, 0]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        "fc.weight",
        torch.zeros(5, 8),
        "a module quantized with torchao also has a dense weight\n"
        "  where:    fc\n"
        "  found:    fc.weight and fc._weight_qdata\n"
        "  expected: one of them\n"
        "  try:      the checkpoint says the weight twice: remove the one that is not meant",
    ),
    (
        "header",
        None,
        "the header does not say how a torchao weight is stored\n"
        "  where:    fc, tensors in memory\n"
        "  found:    no entry 'fc.weight'\n"
        '  expected: \'fc.weight\': {"_type": a torchao class, "_data": ...} in the metadata of the safetensors file\n'
        "  try:      save the model with safetensors metadata, as transformers' save_pretrained does",
    ),
    (
        "header",
        '{"_type": "Int3Tensor", "_data": {}}',
        "the header describes a weight in a way that is not supported\n"
        "  where:    fc.weight (module fc, 5 outputs, 8 inputs)\n"
        "  found:    'Int3Tensor', did you mean 'Int8Tensor'?\n"
        "  expected: Int8Tensor, IntxUnpackedToInt8Tensor, Int4Tensor, Int4TilePackedTo4dTensor, Float8Tensor, "
        "MXTensor, NVFP4Tensor",
    ),
    (
        "header",
        '{"_type": "Int8Tensor", "_data": {"block_size": [1, 3]}}',
        "the header describes a weight in a way that is not supported\n"
        "  where:    fc.weight (module fc, 5 outputs, 8 inputs)\n"
        "  found:    block_size: [1, 3]\n"
        "  expected: block_size: two numbers that divide the weight's shape",
    ),
    (
        "header",
        '{"_type": "Int8Tensor"',
        "the header describes a weight in a way that is not supported\n"
        "  where:    fc.weight (module fc, 5 outputs, 8 inputs)\n"
        '  found:    {"_type": "Int8Tensor" (JSONDecodeError: Expecting \',\' delimiter: line 1 column 23 (char 22))\n'
        "  expected: a torchao class with its attributes",
    ),
]


@pytest.mark.parametrize("name, new, message", BROKEN)
def test_a_broken_checkpoint_is_said_in_full(name: str, new: Any, message: str) -> None:
    config = made_of(said("Int8WeightOnly"))
    source = stored(config, AO.quantize(config, fc(5, 8), sample(5, 8)))
    target: dict[str, Any] = source.notes if name == "header" else source.tensors
    target.pop("fc.weight" if name == "header" else name, None)
    if new is not None:
        target["fc.weight" if name == "header" else name] = new
    with pytest.raises(CheckpointError) as caught:
        read(config, source, fc(5, 8))
    assert str(caught.value) == message


def test_an_exponent_that_is_nan_is_an_error() -> None:
    config = made_of(said("MXDynamicActivationMXWeight", 1))
    source = stored(config, AO.quantize(config, fc(16, 32, "bf16"), sample(16, 32, "bf16")), "bf16")
    source.tensors["fc._weight_scale"].view(torch.uint8)[0, 0] = 255
    with pytest.raises(CheckpointError, match="an exponent of 255, which is NaN"):
        read(config, source, fc(16, 32))


def test_a_header_of_another_prefix_is_found() -> None:
    config = made_of(said("Int8WeightOnly"))
    packed = AO.quantize(config, fc(5, 8), sample(5, 8))
    source = stored(config, packed)
    source.notes = {f"model.{name}" if name == "fc.weight" else name: text for name, text in source.notes.items()}
    assert same(read(config, source, fc(5, 8)), packed)
