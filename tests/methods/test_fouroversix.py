"""FourOverSix: real checkpoints bit for bit, the roundings on the fly, overrides, and what is said of wrong input."""

from __future__ import annotations

import math
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
from qcompile.methods.fouroversix import FourOverSix, FourOverSixConfig
from qcompile.methods.index import parse_config
from qcompile.transforms.four_over_six import RoundFourOverSix

METHOD, N, K = FourOverSix(), 70, 200  # both are padded
RULES = ("mse", "mae", "abs_max", "static_6", "static_4")
VARIANTS = [
    *(FourOverSixConfig(scale_rule=rule) for rule in RULES),
    *(FourOverSixConfig(scale_rule=rule, dtype="mxfp4") for rule in RULES[3:]),
    FourOverSixConfig(weight_scale_2d=True),
    FourOverSixConfig(weight_dtype="mxfp4", weight_scale_rule="static_6", weight_scale_2d=True),
]


def sample(n: int = N, k: int = K, seed: int = 0) -> torch.Tensor:
    """Numbers in bfloat16 with a block of zeros, a block that is too small to be seen, and one large number."""
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    made[0, :16], made[1, :16], made[2, 0] = 0.0, 1e-9, 9.0
    return made.bfloat16()


def written(config: FourOverSixConfig, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A module "fc" as a checkpoint holds it."""
    module = linear("fc", *weight.shape, dtype="bf16")
    made = METHOD.write(config, module, METHOD.quantize(config, module, weight))
    return {f"fc.{name}": tensor for name, tensor in made.items()}


@parametrize("fouroversix")
def test_modules_of_checkpoints(folder: Path) -> None:
    count = 0
    for each in stored_modules(folder):
        # The package goes through float16, where what is below 2**-24 vanishes.
        assert (value(each.packed) - each.weight).abs().max() <= 1e-38
        assert same_bits(each.method.write(each.config, each.module, each.packed), each.stored())
        made = each.method.quantize(each.config, each.module, each.source_weight)
        assert made.format == each.packed.format and torch.equal(value(made), each.weight)
        alike = {name: tensor for name, tensor in made.tensors.items() if name != "values"}
        assert same_bits(alike, {name: each.packed.tensors[name] for name in alike})
        assert each.probe is not None
        assert torch.equal(call(each.packed, each.probe[0]), each.probe[1])
        count += 1
    assert count == 3


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: "-".join((*c.of("weight"), str(c.weight_scale_2d))))
def test_what_is_written_is_read_again(config: FourOverSixConfig) -> None:
    weight, module = sample(), linear("fc", N, K, dtype="bf16")
    tensors = written(config, weight)
    packed = read(METHOD, config, module, InMemory(tensors))
    assert same_bits({f"fc.{name}": t for name, t in METHOD.write(config, module, packed).items()}, tensors)
    # A code is at most 1 of 4 away, under a scale for the largest of (16 or 32, or as many squared) numbers.
    assert (value(packed) - weight.float()).abs().max() <= 1.6 and value(packed)[0, :16].eq(0).all()
    assert [each.transform.kind for each in packed.after] == ["round-to"]


def test_the_adaptive_rules_lose_no_more_than_the_static_one() -> None:
    x = sample(64, 64).float()
    made = {rule: RoundFourOverSix(rule).apply(x, {}) for rule in RULES}  # type: ignore[arg-type]
    lost = {rule: (value - x).square().sum().item() for rule, value in made.items()}
    assert lost["mse"] == min(lost.values()) and lost["mse"] < 0.9 * lost["static_6"]
    blocks = {rule: (value - x).abs().reshape(64, 4, 16) for rule, value in made.items()}
    assert (blocks["abs_max"].amax(-1) <= blocks["mse"].amax(-1)).all()
    assert (blocks["mae"].sum(-1) <= blocks["mse"].sum(-1) * 1.0001).all()


def test_one_maximum_holds_for_the_whole_call() -> None:
    x = sample(4, 48).float()
    together = RoundFourOverSix().apply(x, {})
    assert not torch.equal(together[3:], RoundFourOverSix().apply(x[3:], {}))
    padded = RoundFourOverSix().apply(torch.cat([x, torch.zeros(3, 48)]), {})
    assert torch.equal(padded[:4], together) and padded[4:].eq(0).all()
    assert RoundFourOverSix().apply(torch.zeros(2, 20), {}).eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_model_with_odd_sizes_and_a_bias(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 24)).eval()
    x = torch.randn(3, K)
    config = FourOverSixConfig(module_config_overrides={"2": {"output_dtype": "float32"}})
    compiled = qcompile.compile(model, config, example_inputs=(x,), target=target)
    y = x
    for path, first in (("0", True), ("2", False)):
        layer = model.get_submodule(path)
        packed = METHOD.quantize(config, linear(path, *layer.weight.shape), layer.weight.detach())
        y = packed.before[0](y) @ value(packed).t() + layer.bias
        y = y.bfloat16().float().relu() if first else y
        assert bool(packed.after) == first
    (found,) = compiled(x) if isinstance(compiled(x), tuple) else (compiled(x),)
    torch.testing.assert_close(found, y, rtol=1e-2, atol=1e-2 * float(y.abs().max()))


def test_master_weights_are_quantized_when_they_are_read() -> None:
    config, weight = FourOverSixConfig(keep_master_weights=True), sample()
    module = linear("fc", N, K, dtype="bf16")
    packed = read(METHOD, config, module, InMemory({"fc.weight": weight}))
    assert same_bits(packed.tensors, METHOD.quantize(config, module, weight).tensors)
    assert METHOD.stored_config(config, {})["keep_master_weights"] is False
    assert METHOD.select(config, linear("lm_head", N, K), InMemory({"lm_head.weight": weight}), {}) == Skip(
        "modules_to_not_convert has 'lm_head'"
    )


def test_overrides_take_the_defaults_for_what_they_leave_out() -> None:
    config = FourOverSixConfig(scale_rule="static_4", module_config_overrides={"fc": {"weight_scale_rule": "static_6"}})
    own, other = config.layer("fc"), config.layer("other")
    assert own.of("weight") == ("nvfp4", "static_6") and own.of("activation") == ("nvfp4", "mse")
    assert other.of("weight") == other.of("activation") == ("nvfp4", "static_4")
    packed = METHOD.quantize(config, linear("fc", N, K), sample())
    assert packed.format.to_json()["limit"] == 6 * 448 and packed.before[0].transform == RoundFourOverSix("mse")
    transformers = pytest.importorskip("transformers")
    found = parse_config(transformers.FourOverSixConfig(module_config_overrides={"fc": {"dtype": "nvfp4"}}))
    assert found is not None and found[1] == FourOverSixConfig(module_config_overrides={"fc": {"dtype": "nvfp4"}})


def test_which_modules() -> None:
    modules = {path: linear(path, N, K) for path in ("a.fc", "fc", "lm_head")}
    source = InMemory({f"{path}.weight": sample() for path in modules})
    config = FourOverSixConfig(modules_to_not_convert=["fc"])
    chosen = {path: METHOD.select(config, module, source, modules) for path, module in modules.items()}
    assert chosen["fc"] == Skip("modules_to_not_convert has 'fc'")  # whole names: neither endings nor patterns
    assert isinstance(chosen["a.fc"], Quantized) and isinstance(chosen["lm_head"], Quantized)
    stored = InMemory({"a.fc.weight": sample()} | written(config, sample()))
    dense = METHOD.select(FourOverSixConfig(), modules["a.fc"], stored, {})
    assert dense == Skip("the checkpoint stores its weight dense")
    with pytest.raises(ConfigError, match="the fouroversix config has a pattern that matches no module"):
        METHOD.select(FourOverSixConfig(modules_to_not_convert=["c"]), modules["fc"], source, modules)


WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"dtype": "if4"}, "'dtype'", "'if4'", "'nvfp4' or 'mxfp4'"),
    ({"scale_rule": "max"}, "'scale_rule'", "'max'", "'mse', 'mae', 'abs_max', 'static_6', 'static_4'"),
    ({"dtype": "mxfp4"}, "'scale_rule'", "'mse'", "with mxfp4, 'static_6' or 'static_4': the adaptive rules are for nvfp4"),
    ({"output_dtype": None}, "'output_dtype'", "None", "'bfloat16', 'float16', 'float32'"),
    ({"module_config_overrides": {"fc": 1}}, "'module_config_overrides'", "{'fc': 1}", "None or {module name: {field: value}}"),
    (
        {"module_config_overrides": {"fc": {"dtype": "fp4"}}},
        "'module_config_overrides', 'fc', field 'dtype'",
        "'fp4'",
        "'nvfp4' or 'mxfp4'",
    ),
]  # fmt: skip


@pytest.mark.parametrize("fields, where, found, expected", WRONG)
def test_wrong_values_are_said_in_full(fields: dict[str, Any], where: str, found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FourOverSixConfig.from_dict(fields)
    assert str(caught.value) == (
        "the fouroversix config has a value out of range\n"
        f"  where:    field {where}\n  found:    {found}\n  expected: {expected}"
    )


NAN = torch.zeros(128 * 256 // 16).to(torch.float8_e4m3fn)
NAN[5] = math.nan
DAMAGED: list[tuple[str, torch.Tensor | None, str]] = [
    (
        "amax",
        None,
        "a module quantized with fouroversix lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    quantized_weight_metadata, quantized_weight_scale_factors, quantized_weight_values\n"
        "  expected: quantized_weight_values, quantized_weight_scale_factors, quantized_weight_amax, "
        "quantized_weight_metadata\n"
        "  try:      the checkpoint is incomplete: it must hold fc.quantized_weight_amax",
    ),
    (
        "values",
        torch.zeros(N, K // 2, dtype=torch.uint8),
        "a stored tensor has the wrong shape\n"
        "  where:    fc.quantized_weight_values (module fc, 70 outputs, 200 inputs)\n"
        "  found:    u8 [70, 100]\n"
        "  expected: u8 [128, 128]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged",
    ),
    (
        "scale_factors",
        NAN,
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.quantized_weight_scale_factors (module fc)\n"
        "  found:    nan at [5]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        "metadata",
        torch.tensor([K, N, 128, 256, 1, 1]),
        "the metadata of a quantized weight is not that of its module\n"
        "  where:    fc.quantized_weight_metadata (module fc)\n"
        "  found:    [200, 70, 128, 256, 1, 1]\n"
        "  expected: [70, 200, 128, 256, 1, 1]: outputs, inputs, both padded, codes packed, scales in tiles\n"
        "  try:      the checkpoint does not belong to this architecture, or the file is damaged",
    ),
]


@pytest.mark.parametrize("name, tensor, message", DAMAGED)
def test_a_damaged_checkpoint_is_said_in_full(name: str, tensor: torch.Tensor | None, message: str) -> None:
    config = FourOverSixConfig()
    tensors = {key: t for key, t in written(config, sample()).items() if key != f"fc.quantized_weight_{name}"}
    tensors |= {} if tensor is None else {f"fc.quantized_weight_{name}": tensor}
    with pytest.raises(CheckpointError) as caught:
        read(METHOD, config, linear("fc", N, K), InMemory(tensors))
    assert str(caught.value) == message


def test_an_unknown_field() -> None:
    with pytest.raises(ConfigError, match="unknown field in the fouroversix config"):
        FourOverSixConfig.from_dict({"scale_rul": "mse"})
    effects = dict(METHOD.effects(FourOverSixConfig(matmul_backend="cutlass", gradient_dtype="mxfp4")))
    assert effects == {
        "matmul_backend": "the target's own kernels are used", "gradient_dtype": "gradients are not computed here",
    }  # fmt: skip
