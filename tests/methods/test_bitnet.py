"""BitNet: both linear classes, stored and on the fly, against real checkpoints; and what is said about broken ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config as model_config
from checkpoints import parametrize
from in_memory import InMemory, linear
from one_module import same, written_again
from safetensors.torch import load_file

from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import Packed
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.bitnet import BitNet, BitNetConfig, pack_rows, unpack_rows
from qcompile.methods.index import parse_config
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder

BIT, N, K = BitNet(), 8, 24
AUTO = BitNetConfig(linear_class="autobitlinear")
ONLINE = replace(AUTO, quantization_mode="online")
CLASSES = pytest.mark.parametrize("config", [BitNetConfig(), AUTO, ONLINE], ids=["bit", "auto", "online"])


def sample(n: int = N, k: int = K, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)


def module(n: int = N, k: int = K, **more: Any) -> Module:
    return linear("fc", n, k, dtype="bf16", **more)


def read(config: BitNetConfig, tensors: dict[str, torch.Tensor], into: Module | None = None) -> Packed:
    into, source = into or module(), InMemory(tensors)
    selected = BIT.select(config, into, source, {"fc": into})
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims} == set(tensors) - (
        {"fc.bias"} if config.inverse else set()
    )
    return BIT.read(config, into, selected, source)


def value(packed: Packed) -> torch.Tensor:
    return dequantize(packed.format, packed.tensors, packed.N, packed.K)


def stored(config: BitNetConfig, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A module "fc" as a checkpoint holds it."""
    if config.online:
        return {"fc.weight": weight}
    made = BIT.write(config, module(*weight.shape), BIT.quantize(config, module(*weight.shape), weight))
    return {f"fc.{name}": tensor for name, tensor in made.items()}


@parametrize("bitnet")
def test_a_real_checkpoint_is_written_as_it_is_read(folder: Path) -> None:
    assert written_again(folder)


@parametrize("bitnet")
def test_the_original_weights_give_the_stored_bytes(folder: Path) -> None:
    source: Any = SafetensorsFolder(folder)
    found = parse_config(None, model_config(folder)["quantization_config"], source)  # type: ignore[arg-type]
    assert found is not None and isinstance(found[1], BitNetConfig)
    config = replace(found[1], use_rms_norm=False)
    reference, seen = load_file(folder / "reference.safetensors"), 0
    for name, weight in reference.items():
        path = name.removesuffix(".source_weight")
        if path == name or config.online:
            continue
        made = BIT.quantize(config, linear(path, *weight.shape, dtype="bf16"), weight)
        assert torch.equal(made.tensors["weight"], source.read(f"{path}.weight"))
        assert torch.equal(made.tensors["scale"], source.read(f"{path}.weight_scale"))
        seen += 1
    assert seen or config.online


@CLASSES
@pytest.mark.parametrize("norm", [False, True])
def test_what_is_written_is_read_again(config: BitNetConfig, norm: bool) -> None:
    config = replace(config, use_rms_norm=norm)
    tensors = stored(replace(config, use_rms_norm=False), sample())
    tensors |= {"fc.rms_norm.weight": torch.rand(K).bfloat16()} if norm else {}
    first = read(config, tensors)
    written = {f"fc.{name}": tensor for name, tensor in BIT.write(config, module(), first).items()}
    again = BitNetConfig.from_dict(BIT.stored_config(config, {"fc": first}))
    assert same(first, read(again, written)) and [x.transform.kind for x in first.before][-1] == "round-int"
    assert config.online or (again == config and written.keys() == tensors.keys())


def test_all_classes_compute_one_function() -> None:
    weight, x = sample(dtype=torch.float32), torch.randn(5, K)
    one, two, three = (read(c, stored(c, weight)) for c in (BitNetConfig(), AUTO, ONLINE))
    scale = 1 / weight.abs().mean()
    expected = (weight * scale).round().clamp(-1, 1) / scale
    assert torch.allclose(value(one), expected, rtol=5e-3) and torch.allclose(value(two), expected, rtol=5e-3)
    assert torch.equal(value(three), expected)
    by = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    assert torch.equal(three.before[0](x), (x * by).round().clamp(-128, 127) / by)
    assert torch.equal(three.before[0](torch.zeros(2, K)), torch.zeros(2, K))


def test_rows_are_packed_in_blocks_and_odd_ones_stay_float() -> None:
    codes = torch.randint(-1, 2, (7, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_rows(pack_rows(codes), 7), codes.to(torch.int8))
    assert pack_rows(torch.tensor([[-1], [0], [1], [1]])).item() == 0b10_10_01_00
    tensors = stored(AUTO, sample(7, 5))
    assert tensors["fc.weight"].shape == (7, 5) and tensors["fc.weight"].dtype == torch.bfloat16
    assert value(read(AUTO, tensors, module(7, 5))).unique().numel() == 3
    with pytest.raises(ConfigError) as caught:
        BIT.quantize(BitNetConfig(), module(7, 5), sample(7, 5))
    assert str(caught.value) == (
        "bitnet cannot store this module's weight\n"
        "  where:    fc [7, 5]\n"
        "  found:    N = 7\n"
        "  expected: a multiple of 4, the rows in a byte of a bitlinear\n"
        "  try:      name the module in modules_to_not_convert, or set linear_class to 'autobitlinear'"
    )


def test_an_offline_autobitlinear_scales_its_bias() -> None:
    with_bias = module(bias="fc.bias")
    tensors = stored(AUTO, sample()) | {"fc.bias": torch.randn(N).bfloat16()}
    packed = read(AUTO, tensors, with_bias)
    assert packed.bias is not None
    assert torch.equal(packed.bias, tensors["fc.bias"].float() * tensors["fc.weight_scale"].float())
    written = BIT.write(AUTO, with_bias, packed)
    assert torch.equal(written["bias"], tensors["fc.bias"])  # the product of two short floats is exact
    plain = stored(BitNetConfig(), sample()) | {"fc.bias": torch.randn(N).bfloat16()}
    assert read(BitNetConfig(), plain, with_bias).bias is None
    with pytest.raises(ConfigError, match="was not made for that"):
        BIT.write(AUTO, with_bias, BIT.quantize(AUTO, with_bias, sample()))


def test_a_matrix_of_zeros() -> None:
    packed = BIT.quantize(BitNetConfig(), module(), torch.zeros(N, K))
    assert packed.tensors["scale"].float().item() == pytest.approx(1e5, rel=5e-3) and value(packed).eq(0).all()


def test_which_modules() -> None:
    head = linear("lm_head", N, K, output_embedding=True)
    modules = {"fc": module(), "lm_head": head}
    source = InMemory({"fc.weight": sample(), "lm_head.weight": sample()})
    for config in (BitNetConfig(), ONLINE):
        chosen = BIT.select(config, head, source, modules)
        assert chosen == Skip("it is the output embedding, and such modules stay dense by default")
        named = replace(config, modules_to_not_convert=["fc"])
        assert BIT.select(named, module(), source, modules) == Skip("modules_to_not_convert has 'fc'")
        assert isinstance(BIT.select(named, head, source, modules), Quantized)
    packed = InMemory(stored(BitNetConfig(), sample()) | {"lm_head.weight": sample()})
    assert BIT.select(BitNetConfig(), head, packed, modules) == Skip("the checkpoint stores its weight dense")


DAMAGE = "the file is damaged, or the quantization that wrote it failed for this module"
BROKEN: list[tuple[BitNetConfig, str, torch.Tensor | None, str]] = [
    (
        BitNetConfig(use_rms_norm=True),
        "",
        None,
        "a module quantized with bitnet lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    weight, weight_scale\n"
        "  expected: rms_norm.weight\n"
        "  try:      the checkpoint is incomplete: it must hold fc.rms_norm.weight",
    ),
    (
        BitNetConfig(),
        "fc.weight",
        torch.zeros(N, K, dtype=torch.uint8),
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight (module fc, 8 outputs, 24 inputs)\n"
        "  found:    u8 [8, 24]\n"
        "  expected: u8 [2, 24]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged",
    ),
    (
        BitNetConfig(),
        "fc.weight",
        torch.full((2, K), 0b01_11_00_10, dtype=torch.uint8),
        "a stored code is not ternary\n"
        "  where:    fc.weight (module fc)\n"
        "  found:    114 at [0, 0]\n"
        "  expected: four fields of 0, 1 or 2 in each byte\n"
        "  try:      the file is damaged, or it holds the weights of an online checkpoint: see quantization_mode",
    ),
    (
        AUTO,
        "fc.weight",
        torch.full((N, K), 0.5),
        "a stored code is not ternary\n"
        "  where:    fc.weight (module fc)\n"
        "  found:    0.5 at [0, 0]\n"
        "  expected: -1, 0 or 1\n"
        "  try:      the file is damaged, or it holds the weights of an online checkpoint: see quantization_mode",
    ),
    (
        BitNetConfig(),
        "fc.weight_scale",
        torch.tensor([torch.nan]),
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.weight_scale (module fc)\n"
        "  found:    nan at [0]\n"
        f"  expected: finite numbers\n  try:      {DAMAGE}",
    ),
    (
        BitNetConfig(),
        "fc.weight_scale",
        torch.zeros(1),
        "a scale is not positive\n"
        "  where:    fc.weight_scale (module fc)\n"
        "  found:    0.0\n"
        f"  expected: a number above 0\n  try:      {DAMAGE}",
    ),
]


@pytest.mark.parametrize("config, name, tensor, message", BROKEN)
def test_a_broken_checkpoint_is_said_in_full(
    config: BitNetConfig, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = stored(replace(config, use_rms_norm=False), sample())
    with pytest.raises(CheckpointError) as caught:
        read(config, tensors | ({name: tensor} if tensor is not None else {}))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "fields, field, expected",
    [
        ({"linear_class": "linear"}, "linear_class", "bitlinear, autobitlinear"),
        ({"quantization_mode": "both"}, "quantization_mode", "online, offline"),
    ],
)
def test_what_transformers_refuses_is_refused(fields: dict[str, str], field: str, expected: str) -> None:
    with pytest.raises(ValueError):
        pytest.importorskip("transformers").BitNetQuantConfig(**fields)
    with pytest.raises(ConfigError) as caught:
        BitNetConfig.from_dict(fields)
    assert str(caught.value) == (
        "the bitnet config has a value out of range\n"
        f"  where:    field '{field}'\n  found:    '{fields[field]}'\n  expected: {expected}"
    )


def test_norms_cannot_be_added_on_the_fly() -> None:
    with pytest.raises(ConfigError, match="bitnet cannot add norms to a model that was trained without them"):
        BIT.select(BitNetConfig(use_rms_norm=True), module(), InMemory({"fc.weight": sample()}), {"fc": module()})
    with pytest.raises(ConfigError, match="unknown field in the bitnet config"):
        BitNetConfig.from_dict({"linear_clas": "bitlinear"})


def test_fields_without_effect_are_reported() -> None:
    assert BIT.effects(BitNetConfig(quantization_mode="online", rms_norm_eps=1e-5)) == [
        ("quantization_mode", "a bitlinear has no mode: its checkpoints hold rounded weights"),
        ("rms_norm_eps", "use_rms_norm is False: there are no norms"),
    ]
    assert BIT.effects(ONLINE) == BIT.effects(BitNetConfig(use_rms_norm=True, rms_norm_eps=1e-5)) == []
