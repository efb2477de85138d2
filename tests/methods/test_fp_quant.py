"""FP-Quant: real checkpoints, rotations and roundings on the fly, both layouts, and what is said of wrong input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import parametrize
from in_memory import InMemory, linear
from stored_modules import call, read, same_bits, stored_modules, value
from torch import nn

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.fp_quant import FpQuant, FpQuantConfig, rotation
from qcompile.methods.index import parse_config
from qcompile.transform import effective_weight

METHOD, N, K = FpQuant(), 70, 96  # outputs and scales are padded
VARIANTS = [
    FpQuantConfig(),
    FpQuantConfig("mxfp4"),
    FpQuantConfig("mxfp4", "quest"),
    FpQuantConfig(hadamard_group_size=32, transform_init="gsr"),
    FpQuantConfig("mxfp4", transform_init="identity"),
]
ALL = pytest.mark.parametrize(
    "config", [*VARIANTS, *(replace(each, pseudoquantization=True) for each in VARIANTS)],
    ids=lambda c: f"{c.forward_dtype}-{c.forward_method}-{c.transform_init}-{'pseudo' if c.pseudoquantization else 'real'}",
)  # fmt: skip


def sample(n: int = N, k: int = K, seed: int = 0) -> torch.Tensor:
    """Numbers in bfloat16 with a row of zeros."""
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    made[0] = 0.0
    return made.bfloat16()


def written(config: FpQuantConfig, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A module "fc" as a checkpoint holds it."""
    module = linear("fc", *weight.shape, dtype="bf16")
    made = METHOD.write(config, module, METHOD.quantize(config, module, weight))
    return {f"fc.{name}": tensor for name, tensor in made.items()}


@parametrize("fp_quant")
def test_modules_of_checkpoints(folder: Path) -> None:
    count = 0
    for each in stored_modules(folder):
        assert torch.equal(value(each.packed), each.weight)
        assert same_bits(each.method.write(each.config, each.module, each.packed), each.stored())
        made = each.method.quantize(each.config, each.module, each.source_weight)
        assert made.format == each.packed.format and torch.equal(value(made), each.weight)
        for a, b in zip(made.before, each.packed.before, strict=True):
            assert a.transform == b.transform and same_bits(a.tensors, b.tensors)
        assert each.probe is not None
        x, y = each.probe
        # The factor behind the original's matmul is in front of it here: y may fall to the other side of a bf16 step.
        difference = (call(each.packed, x) - y).abs()
        assert difference.count_nonzero() <= 0.011 * y.numel() and difference.norm() <= 3e-4 * y.norm()
        count += 1
    assert count == 3


@ALL
def test_what_is_written_is_read_again(config: FpQuantConfig) -> None:
    weight, module = sample(), linear("fc", N, K, dtype="bf16")
    tensors = written(config, weight)
    packed = read(METHOD, config, module, InMemory(tensors))
    assert same_bits({f"fc.{name}": t for name, t in METHOD.write(config, module, packed).items()}, tensors)
    near = effective_weight(value(packed), packed.before, None)
    assert (near - weight.float()).norm() <= 0.2 * weight.float().norm() and near[0].eq(0).all()
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.float().t()
    assert (call(packed, x) - exact).norm() <= 0.25 * exact.norm()


def test_rotations() -> None:
    for size in (16, 32, 64, 128):
        for init in ("hadamard", "gsr", "identity"):
            matrix = rotation(init, size).float()
            assert torch.allclose(matrix @ matrix.t(), torch.eye(size), atol=2e-3)
    changes = (rotation("gsr", 16)[1:] != rotation("gsr", 16)[:-1]).sum(0)
    assert changes.tolist() == list(range(16))


def test_the_stored_matrix_is_the_one_that_rotates() -> None:
    config, module = FpQuantConfig(), linear("fc", N, K, dtype="bf16")
    tensors = written(config, sample()) | {"fc.forward_hadamard_matrix": torch.eye(16).bfloat16()}
    packed = read(METHOD, config, module, InMemory(tensors))
    assert torch.equal(packed.before[0](torch.ones(1, K)), torch.ones(1, K))


def test_what_lies_beyond_the_weight_does_not_matter() -> None:
    config, module = FpQuantConfig("mxfp4"), linear("fc", N, K, dtype="bf16")
    tensors = written(config, sample())
    expected = value(read(METHOD, config, module, InMemory(tensors)))
    tensors["fc.scales"] = tensors["fc.scales"].clone()
    tensors["fc.scales"][N:], tensors["fc.scales"][:, K // 32 :] = 255, 255
    assert torch.equal(value(read(METHOD, config, module, InMemory(tensors))), expected)


def test_master_weights_are_quantized_when_they_are_read() -> None:
    config, weight, module = FpQuantConfig(store_master_weights=True), sample(), linear("fc", N, K, dtype="bf16")
    tensors = {name: t for name, t in written(config, weight).items() if name not in ("fc.qweight", "fc.scales")}
    tensors |= {"fc.weight": weight, "fc.qweight": torch.zeros(0)}  # transformers keeps empty tensors
    source = InMemory(tensors)
    selected = METHOD.select(config, module, source, {"fc": module})
    assert isinstance(selected, Quantized) and set(selected.also_claims) == set(tensors)
    packed = METHOD.read(config, module, selected, source)
    assert same_bits(packed.tensors, METHOD.quantize(config, module, weight).tensors)
    assert METHOD.stored_config(config, {})["store_master_weights"] is False


@torch.no_grad()
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_model_with_odd_sizes_and_a_bias(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 48), nn.ReLU(), nn.Linear(48, 7)).eval()
    x, y = torch.randn(3, K), torch.zeros(0)
    compiled = qcompile.compile(model, FpQuantConfig(), example_inputs=(x,), target=target)
    y = x
    for path in ("0", "2"):
        layer = model.get_submodule(path)
        packed = METHOD.quantize(FpQuantConfig(), linear(path, *layer.weight.shape), layer.weight)
        turned = packed.before[1](packed.before[0](y)) @ value(packed).t()
        y = (turned + layer.bias).bfloat16().float()
        y = y.relu() if path == "0" else y
    found = compiled(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, y, rtol=1e-2, atol=2e-2)


def test_which_modules() -> None:
    modules = {path: linear(path, N, K) for path in ("a.fc", "b.fc2", "lm_head")}
    source = InMemory({f"{path}.weight": sample() for path in modules})
    left = {
        p: METHOD.select(FpQuantConfig(modules_to_not_convert=["fc"]), m, source, modules) for p, m in modules.items()
    }
    assert left["a.fc"] == Skip("modules_to_not_convert has 'fc'")  # endings: no patterns
    assert isinstance(left["b.fc2"], Quantized) and isinstance(left["lm_head"], Quantized)
    assert isinstance(METHOD.select(FpQuantConfig(), modules["lm_head"], source, modules), Skip)
    with pytest.raises(ConfigError) as caught:
        METHOD.select(FpQuantConfig(hadamard_group_size=64), modules["a.fc"], source, modules)
    assert str(caught.value) == (
        "fp_quant cannot rotate the inputs of this module\n"
        "  where:    a.fc [70, 96]\n"
        "  found:    K = 96\n"
        "  expected: a multiple of hadamard_group_size, 64\n"
        "  try:      choose a smaller hadamard_group_size, or name the module in modules_to_not_convert"
    )


@pytest.mark.parametrize(
    "fields", [{}, {"forward_dtype": "mxfp4", "backward_dtype": "mxfp8"}, {"transform_init": "gsr"}]
)
def test_a_transformers_config_means_the_same(fields: dict[str, Any]) -> None:
    theirs = pytest.importorskip("transformers").FPQuantConfig(**fields)
    found = parse_config(theirs)
    assert found is not None and found[1].to_dict() == theirs.to_dict() == FpQuantConfig.from_dict(fields).to_dict()


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"forward_dtype": "mxfp8"}, "'mxfp8'", "'nvfp4' or 'mxfp4'"),
    ({"forward_method": "quest"}, "'quest'", "'abs_max' with nvfp4"),
    ({"hadamard_group_size": 8}, "8", "16, 32, 64, 128 with nvfp4, or None"),
    ({"hadamard_group_size": 16, "forward_dtype": "mxfp4"}, "16", "32, 64, 128 with mxfp4, or None"),
    ({"backward_dtype": "mxfp4"}, "'mxfp4'", "'bf16' with nvfp4"),
    ({"backward_dtype": "f32"}, "'f32'", "'bf16', 'mxfp8' or 'mxfp4'"),
    ({"transform_init": "random"}, "'random'", "'hadamard', 'identity' or 'gsr'"),
]


@pytest.mark.parametrize("fields, found, expected", WRONG)
def test_wrong_values_are_said_in_full(fields: dict[str, Any], found: str, expected: str) -> None:
    with pytest.raises(ValueError):
        pytest.importorskip("transformers").FPQuantConfig(**fields)
    with pytest.raises(ConfigError) as caught:
        FpQuantConfig.from_dict(fields)
    assert str(caught.value) == (
        "the fp_quant config has a value out of range\n"
        f"  where:    field {next(iter(fields))!r}\n  found:    {found}\n  expected: {expected}"
    )


FAULT = "the file is damaged, or the quantization that wrote it failed for this module"
DAMAGED: list[tuple[str, torch.Tensor | None, str]] = [
    (
        "act_global_scale",
        None,
        "a module quantized with fp_quant lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    backward_hadamard_matrix, forward_hadamard_matrix, qweight, scales, weight_global_scale\n"
        "  expected: qweight, scales, weight_global_scale, act_global_scale, "
        "forward_hadamard_matrix, backward_hadamard_matrix\n"
        "  try:      the checkpoint is incomplete: it must hold fc.act_global_scale",
    ),
    (
        "scales",
        torch.zeros(N, 6, dtype=torch.uint8),
        "a stored tensor has the wrong shape\n"
        "  where:    fc.scales (module fc, 70 outputs, 96 inputs)\n"
        "  found:    u8 [70, 6]\n"
        "  expected: u8 [128, 8]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged",
    ),
    (
        "scales",
        torch.full((128, 8), 0x7F, dtype=torch.uint8),
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.scales (module fc)\n"
        f"  found:    nan at [0, 0]\n  expected: finite numbers\n  try:      {FAULT}",
    ),
    (
        "act_global_scale",
        torch.tensor([torch.inf]).bfloat16(),
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.act_global_scale (module fc)\n"
        f"  found:    inf at [0]\n  expected: finite numbers\n  try:      {FAULT}",
    ),
    (
        "weight",
        sample(),
        "a module quantized with fp_quant also has a dense weight\n"
        "  where:    fc\n"
        "  found:    fc.weight and fc.qweight\n"
        "  expected: one of them\n"
        "  try:      the checkpoint says the weight twice: remove the one that is not meant",
    ),
]


@pytest.mark.parametrize("name, tensor, message", DAMAGED)
def test_a_damaged_checkpoint_is_said_in_full(name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: t for key, t in written(FpQuantConfig(), sample()).items() if key != f"fc.{name}"}
    tensors |= {} if tensor is None else {f"fc.{name}": tensor}
    with pytest.raises(CheckpointError) as caught:
        read(METHOD, FpQuantConfig(), linear("fc", N, K), InMemory(tensors))
    assert str(caught.value) == message


def test_an_unknown_field() -> None:
    with pytest.raises(ConfigError, match="unknown field in the fp_quant config"):
        FpQuantConfig.from_dict({"forward_dtpye": "nvfp4"})
