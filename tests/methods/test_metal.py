"""Metal and MLX: configs, checkpoints of every mode, both roundings, and what is said about broken files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoints import config as model_config
from checkpoints import parametrize
from in_memory import InMemory, linear
from safetensors.torch import load_file

from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import method, parse_config
from qcompile.methods.metal import Metal, MetalConfig
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder

N, K = 8, 64


def sample(n: int = N, k: int = K, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A weight with a row of zeros, a constant one, one of ties and one that is positive throughout."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[0], weight[1], weight[2] = 0.0, 0.3, torch.linspace(-6, 6, k)
    weight[3] = weight[3].abs() + 0.01
    return weight.to(dtype)


def found(config: dict[str, Any], source: Any) -> tuple[Metal, MetalConfig]:
    parsed = parse_config(None, config.get("quantization_config"), source, config)
    assert parsed is not None
    return cast(tuple[Metal, MetalConfig], parsed)


def stored(config: MetalConfig, weight: torch.Tensor, **more: Any) -> InMemory:
    """A checkpoint that holds one module "fc", as the method writes it."""
    module = linear("fc", *weight.shape, dtype="bf16")
    made = Metal().write(config, module, Metal().quantize(config, module, weight))
    return InMemory({f"fc.{name}": tensor for name, tensor in made.items()} | more)


def chosen(config: MetalConfig, source: InMemory, module: Module | None = None) -> Quantized | Skip:
    module = module or linear("fc", N, K, dtype="bf16")
    return Metal().select(config, module, source, {module.path: module})


# Configs


def test_the_fields_are_those_of_transformers() -> None:
    config = pytest.importorskip("transformers").MetalConfig
    assert MetalConfig.from_dict(config().to_dict()) == MetalConfig()
    theirs = config(bits=8, group_size=128, modules_to_not_convert=["lm_head"])
    ours = MetalConfig(8, 128, ["lm_head"])
    assert MetalConfig.from_dict(theirs.to_dict()) == ours
    assert Metal().stored_config(ours, {}) == json.loads(json.dumps(theirs.to_dict()))
    assert MetalConfig.from_dict(ours.to_dict()) == ours
    assert MetalConfig().dequantize is config().dequantize is False


def test_dequantize_is_reported() -> None:
    assert Metal().effects(MetalConfig(dequantize=True)) == [
        ("dequantize", "weights stay packed: they are decoded where they are used")
    ]


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"bits": 3}, "bits", "2, 4 or 8"),
        ({"group_size": 0}, "group_size", "a positive integer"),
        ({"mode": "int"}, "mode", "None or affine, mxfp4, mxfp8, nvfp4"),
        ({"mode": "affine", "bits": 7}, "bits", "1, 2, 3, 4, 5, 6 or 8 in mode 'affine'"),
        ({"mode": "affine", "group_size": 16}, "group_size", "32, 64 or 128 in mode 'affine'"),
        ({"mode": "nvfp4", "group_size": 16, "bits": 8}, "bits", "4 in mode 'nvfp4'"),
        ({"layers": {"fc": False}}, "layers", "nothing without `mode`: they belong to MLX's configs"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert", "None or a list of module names"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        MetalConfig(**fields)
    assert str(error.value) == (
        "the metal config has a value out of range\n"
        f"  where:    field {name!r}\n  found:    {fields[name]!r}\n  expected: {expected}"
    )


def test_an_unknown_field() -> None:
    with pytest.raises(ConfigError, match=r"unknown field in the metal config\n  found:    'bit'.*'bits'"):
        MetalConfig.from_dict({"bit": 4})


def test_mlx_checkpoints_are_recognised_without_a_method() -> None:
    source = stored(MetalConfig(mode="affine"), sample())
    old = {"quantization": {"group_size": 64, "bits": 4, "fc": {"group_size": 32, "bits": 6}, "lm_head": False}}
    _, config = found(old, source)
    assert config == MetalConfig(mode="affine", layers={"fc": {"group_size": 32, "bits": 6}, "lm_head": False})
    assert config.layer("fc") == MetalConfig(6, 32, mode="affine") and config.layer("lm_head") is None
    assert parse_config(None, None, InMemory({"fc.weight": sample()}), old) is None


# Checkpoints


@parametrize("metal")
def test_original_weights_give_the_checkpoint_and_it_is_written_back(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    metal, config = found(cast(Any, model_config(folder)), source)
    for name, weight in load_file(folder / "reference.safetensors").items():
        if not name.startswith("source."):
            continue
        path = name.removeprefix("source.").removesuffix(".weight")
        module = linear(path, *weight.shape, dtype={torch.float16: "f16", torch.bfloat16: "bf16"}[weight.dtype])
        selected = metal.select(config, module, source, {path: module})
        assert isinstance(selected, Quantized)
        read, made = metal.read(config, module, selected, source), metal.quantize(config, module, weight)
        assert made.format == read.format
        assert all(torch.equal(made.tensors[key], tensor) for key, tensor in read.tensors.items()), path
        for key, tensor in metal.write(config, module, read).items():
            original = source.read(f"{path}.{key}")
            assert tensor.dtype == original.dtype
            assert torch.equal(tensor.view(torch.uint8), original.view(torch.uint8)), key


@pytest.mark.parametrize(
    "config",
    [
        *(MetalConfig(bits, 32) for bits in (2, 4, 8)),
        *(MetalConfig(bits, 32, mode="affine") for bits in (1, 2, 3, 4, 5, 6, 8)),
        MetalConfig(4, 32, mode="mxfp4"),
        MetalConfig(8, 32, mode="mxfp8"),
        MetalConfig(4, 16, mode="nvfp4"),
    ],
    ids=lambda config: f"{config.mode}-{config.bits}",
)
def test_what_is_written_is_read_back(config: MetalConfig) -> None:
    module = linear("fc", N, K, dtype="bf16")
    made = Metal().quantize(config, module, sample())
    source = stored(config, sample())
    selected = chosen(config, source)
    assert isinstance(selected, Quantized)
    read = Metal().read(config, module, selected, source)
    assert read.format == made.format
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in made.tensors.items())
    error = (dequantize(made.format, made.tensors, N, K) - sample().float()).norm() / sample().float().norm()
    assert error < {1: 0.8, 2: 0.35, 3: 0.2}.get(config.bits, 0.15)


def test_layers_of_one_checkpoint_differ() -> None:
    config = MetalConfig(mode="affine", layers={"fc": {"bits": 8, "group_size": 32}})
    selected = chosen(config, stored(config, sample()))
    assert isinstance(selected, Quantized)
    assert selected.format.to_json() == {"kind": "mlx", "bits": 8, "group": 32, "scale": "bf16"}
    said = {"group_size": 64, "bits": 4, "mode": "affine", "fc": {"bits": 8, "group_size": 32}}
    assert Metal().stored_config(config, {}) == said
    assert Metal().model_config(config, {}) == {"quantization": said} and Metal().model_config(MetalConfig(), {}) == {}


# Which modules


def test_which_modules_are_quantized() -> None:
    embedding = Module("embed", "Embedding", 16, K, "embed.weight")
    odd, head = linear("odd", N, 40), linear("lm_head", 16, K, output_embedding=True)
    modules = {module.path: module for module in (embedding, linear("fc", N, K), odd, head)}
    source = InMemory({module.weight: torch.zeros(module.n, module.k) for module in modules.values()})

    def dense(config: MetalConfig) -> dict[str, str]:
        said = {path: Metal().select(config, module, source, modules) for path, module in modules.items()}
        return {path: value.reason for path, value in said.items() if isinstance(value, Skip)}

    assert dense(MetalConfig(mode="affine", layers={"fc": False})) == {
        "fc": "layers leaves it dense",
        "odd": "its 40 inputs are no multiple of the group, 64",
    }
    assert dense(MetalConfig(group_size=8)) == {
        "embed": "Embedding is not converted by the method (only Linear)",
        "lm_head": "it is the output embedding, and such modules stay dense by default",
    }
    with pytest.raises(ConfigError, match=r"metal cannot store this module's weight\n.*odd.*\n.*K = 40"):
        dense(MetalConfig())
    with pytest.raises(ConfigError, match="matches no module"):
        dense(MetalConfig(mode="affine", layers={"fd": False}))


# Broken checkpoints


def said(config: MetalConfig, source: InMemory) -> str:
    with pytest.raises(CheckpointError) as error:
        selected = chosen(config, source)
        assert isinstance(selected, Quantized)
        Metal().read(config, linear("fc", N, K, dtype="bf16"), selected, source)
    return str(error.value)


def test_a_missing_offset() -> None:
    source = stored(MetalConfig(), sample())
    del source.tensors["fc.qbiases"]
    assert said(MetalConfig(), source) == (
        "a module quantized with metal lacks a stored tensor\n"
        "  where:    fc\n  found:    scales, weight\n  expected: weight, scales, qbiases\n"
        "  try:      the checkpoint is incomplete: it must hold fc.qbiases"
    )


def test_words_of_another_width() -> None:
    assert said(MetalConfig(8), stored(MetalConfig(), sample())) == (
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight (module fc, 8 outputs, 64 inputs)\n"
        "  found:    uint32 [8, 8]\n  expected: uint32 [8, 16]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged"
    )


@pytest.mark.parametrize(
    ("config", "name", "byte"),
    [(MetalConfig(), "scales", None), (MetalConfig(4, 32, mode="mxfp4"), "scales", 255),
     (MetalConfig(4, 16, mode="nvfp4"), "scales", 127)],
    ids=["affine", "mxfp4", "nvfp4"],
)  # fmt: skip
def test_a_scale_that_is_not_a_number(config: MetalConfig, name: str, byte: int | None) -> None:
    source = stored(config, sample())
    source.tensors[f"fc.{name}"] = source.tensors[f"fc.{name}"].clone()
    source.tensors[f"fc.{name}"][2, 0] = float("nan") if byte is None else byte
    assert said(config, source) == (
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.scales (module fc)\n  found:    nan at [2, 0]\n  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module"
    )


def test_a_dense_layer_that_is_quantized() -> None:
    config = MetalConfig(mode="affine", layers={"fc": False})
    assert said(config, stored(replace(config, layers={}), sample())) == (
        "a module that the config leaves dense is quantized\n"
        "  where:    fc\n  found:    fc.scales\n  expected: no scales: the config says false for this module\n"
        "  try:      the checkpoint and its config.json do not belong together"
    )


def test_a_method_by_its_name() -> None:
    assert isinstance(method("metal"), Metal)
