"""FBGEMM FP8, FineGrainedFP8 and MXFP8: configs, checkpoints, the rounding of weights and activations, broken files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import parametrize
from in_memory import InMemory, linear
from stored_modules import call, read, same_bits, stored_modules, value

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.fbgemm_fp8 import FbgemmFp8, FbgemmFp8Config
from qcompile.methods.fp8 import FineGrainedFp8, FineGrainedFp8Config, Mxfp8, Mxfp8Config
from qcompile.methods.index import method, parse_config
from qcompile.program import Module

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def sample(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Numbers in bfloat16 with a row of zeros, and one that is large."""
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    made[0], made[1, 0] = 0.0, 5.0
    return made.bfloat16()


# Checkpoints


@parametrize("fbgemm_fp8", "finegrained_fp8")
def test_modules_of_checkpoints(folder: Path) -> None:
    count = 0
    for each in stored_modules(folder):
        assert torch.equal(value(each.packed), each.weight)
        config = each.config
        assert same_bits(each.method.write(config, each.module, each.packed), each.stored())
        if getattr(config, "activation_scheme", "") == "static":
            config = replace(config, activation_scheme="dynamic")
        made = each.method.quantize(config, each.module, each.source_weight)
        assert made.format == each.packed.format and same_bits(made.tensors, each.packed.tensors)
        assert each.probe is not None
        x, y = each.probe
        # The original rounds y to bfloat16; where a sum lies between two numbers another order decides.
        difference = (call(each.packed, x).bfloat16().float() - y).abs()
        assert difference.count_nonzero() <= 3 and difference.max() <= 2**-7 * y.abs().max()
        count += 1
    assert count == 3


# Configs


@pytest.mark.parametrize(
    "name, fields",
    [
        ("fbgemm_fp8", {"activation_scale_ub": 1.5, "modules_to_not_convert": ["lm_head"]}),
        ("fp8", {"activation_scheme": "STATIC", "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}),
        ("fp8", {"weight_block_size": None, "dequantize": True, "modules_to_convert": ["embed_tokens"]}),
        ("fp8", {"ignored_layers": ["lm_head"], "expert_dtype": "fp4"}),
        ("mxfp8", {"weight_block_size": (1, 32), "scale_fmt": "ue8m0"}),
    ],
)
def test_a_transformers_config_means_the_same(name: str, fields: dict[str, Any]) -> None:
    mapping = pytest.importorskip("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    theirs = mapping[name](**fields, **({"quant_method": name} if name == "mxfp8" else {}))
    found = parse_config(theirs)
    assert found is not None
    assert found[1].to_dict() == method(name).Config.from_dict(fields).to_dict()
    said = {key: list(v) if isinstance(v, list | tuple) else v for key, v in found[1].to_dict().items()}
    assert said == {key: list(v) if isinstance(v, list | tuple) else v for key, v in theirs.to_dict().items()}


def test_defaults() -> None:
    assert FbgemmFp8Config.from_dict({}) == FbgemmFp8Config(1200.0, None)
    assert FineGrainedFp8Config.from_dict({}).weight_block_size == (128, 128)
    assert Mxfp8Config.from_dict({}).to_dict() == {
        "quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": (1, 32), "dequantize": False,
        "modules_to_not_convert": None, "modules_to_convert": None, "scale_fmt": "ue8m0", "expert_dtype": "fp8",
    }  # fmt: skip


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("fbgemm_fp8", {"activation_scale_ub": 0}, "0", "a positive number"),
    ("fbgemm_fp8", {"modules_to_not_convert": "lm_head"}, "'lm_head'", "None or a list of module names"),
    ("fp8", {"activation_scheme": "none"}, "'none'", "'dynamic' or 'static'"),
    ("fp8", {"weight_block_size": [128]}, "[128]", "None or two positive integers"),
    ("fp8", {"weight_block_size": [128, 0]}, "[128, 0]", "None or two positive integers"),
    ("fp8", {"scale_fmt": "e8m0"}, "'e8m0'", "'float' or 'ue8m0'"),
    ("fp8", {"expert_dtype": "fp6"}, "'fp6'", "'fp8' or 'fp4'"),
    ("mxfp8", {"dequantize": 1}, "1", "True or False"),
]


@pytest.mark.parametrize("name, fields, found, expected", WRONG)
def test_wrong_values_are_said_in_full(name: str, fields: dict[str, Any], found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"quant_method": name} | fields)
    (field,) = fields
    assert str(caught.value) == (
        f"the {name} config has a value out of range\n"
        f"  where:    field {field!r}\n"
        f"  found:    {found}\n"
        f"  expected: {expected}"
    )


def test_how_to_load_may_be_said_beside_a_checkpoint() -> None:
    said = {"quant_method": "fp8", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}
    found = parse_config(FineGrainedFp8Config(dequantize=True), said)
    assert found is not None and found[1].dequantize and found[0].effects(found[1]) == []  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="differs from the fp8 config"):
        parse_config(FineGrainedFp8Config(weight_block_size=(64, 64)), said)


# Quantization on the fly


@pytest.mark.parametrize("block", [(16, 32), (1, 32), None], ids=str)
@pytest.mark.parametrize("fmt", ["float", "ue8m0"])
def test_blocks_are_quantized_by_their_largest_weight(block: tuple[int, int] | None, fmt: str) -> None:
    weight, config = sample(48, 64), FineGrainedFp8Config(weight_block_size=block, scale_fmt=fmt)
    packed = FineGrainedFp8().quantize(config, linear("fc", 48, 64), weight)
    rows, columns = block or (48, 64)
    for n in range(0, 48, rows):
        for k in range(0, 64, columns):
            part = weight[n : n + rows, k : k + columns].float()
            found, most = packed.tensors["scale"][n // rows, k // columns].float(), part.abs().max()
            factor = 448 / most if most > 0 else torch.tensor(1.0)
            if fmt == "ue8m0":
                factor = 1 / 2.0 ** torch.ceil(torch.log2(1 / factor))
            assert found == 1 / factor
            codes = packed.tensors["weight"][n : n + rows, k : k + columns]
            assert torch.equal(codes.float(), (part * factor).clamp(-448, 448).to(E4M3).float())
            assert (codes.float() * found - part).abs().max() <= 2**-4 * part.abs().max()


def test_short_blocks_follow_the_config() -> None:
    """192 rows in blocks of 128 are 128 and 64, not twice 96."""
    weight, config = sample(192, 200), FineGrainedFp8Config()
    packed = FineGrainedFp8().quantize(config, linear("fc", 192, 200), weight)
    assert packed.tensors["scale"].shape == (2, 2)
    assert packed.tensors["scale"][1, 1] == 1 / (448 / weight[128:, 128:].float().abs().max())
    source = InMemory(
        {f"fc.{name}": t for name, t in FineGrainedFp8().write(config, linear("fc", 192, 200), packed).items()}
    )
    again = read(FineGrainedFp8(), config, linear("fc", 192, 200), source)
    assert same_bits(again.tensors, packed.tensors) and again.before == packed.before
    assert (value(again) - weight.float()).abs().max() <= 2**-4 * 5


@pytest.mark.parametrize("made", ["float32", "bfloat16"])
def test_fbgemm_rounds_rows(made: str) -> None:
    weight = sample(24, 40).to(getattr(torch, made))
    packed = FbgemmFp8().quantize(FbgemmFp8Config(), linear("fc", 24, 40), weight)
    assert packed.tensors["scale"].shape == (24, 1) and not packed.tensors["weight"][0].float().any()
    assert (value(packed) - weight.float()).abs().max() <= 2**-4 * 5


def test_a_row_of_activations_counts_up_to_the_bound() -> None:
    weight = torch.eye(16)
    packed = FbgemmFp8().quantize(FbgemmFp8Config(activation_scale_ub=2.0), linear("fc", 16, 16), weight)
    x = torch.tensor([[4.0, 1.0, -0.5] + [0.0] * 13])
    assert call(packed, x)[0, :3].tolist() == pytest.approx([2.0, 1.0, -0.5])
    assert not call(packed, torch.zeros(1, 16)).any()


def test_mx_activations_have_powers_of_two() -> None:
    packed = Mxfp8().quantize(Mxfp8Config(), linear("fc", 64, 64), torch.eye(64))
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1] = 449.0, 17.0  # the scale is 2, so that steps of 1 in 8 .. 16 are steps of 2 in 16 .. 32
    assert call(packed, x)[0, :2].tolist() == [448.0, 16.0]
    assert packed.tensors["scale"].dtype == E8M0


def test_which_modules_are_converted() -> None:
    fc, head = linear("model.fc", 128, 256), linear("lm_head", 128, 256, output_embedding=True)
    odd, table = linear("model.odd", 130, 256), Module("model.embed", "Embedding", 128, 256, "model.embed.weight")
    modules = {module.path: module for module in (table, fc, odd, head)}
    source = InMemory({module.weight: torch.zeros(module.n, module.k) for module in modules.values()})

    def reasons(config: FineGrainedFp8Config) -> dict[str, str]:
        made = {path: FineGrainedFp8().select(config, module, source, modules) for path, module in modules.items()}
        return {path: each.reason for path, each in made.items() if isinstance(each, Skip)}

    ragged = "[130, 256] is not made of whole blocks [128, 128]: it stays dense"
    assert reasons(FineGrainedFp8Config()) == {
        "model.embed": "Embedding is not converted by the method (only Linear and Experts)",
        "model.odd": ragged,
        "lm_head": "it is the output embedding, and such modules stay dense by default",
    }
    assert reasons(FineGrainedFp8Config(modules_to_not_convert=["fc"])).keys() == {
        "model.embed",
        "model.fc",
        "model.odd",
    }
    assert reasons(FineGrainedFp8Config(dequantize=True))["model.fc"] == "dequantize is true: no weight is quantized"
    assert "model.odd" not in reasons(FineGrainedFp8Config(weight_block_size=None))
    with pytest.raises(ConfigError) as caught:
        reasons(FineGrainedFp8Config(activation_scheme="static"))
    assert str(caught.value) == (
        "fp8 cannot quantize on the fly with static activation scales\n"
        "  where:    model.fc\n"
        "  found:    activation_scheme 'static' and a float weight\n"
        "  expected: scales from a calibration, as a checkpoint holds them\n"
        "  try:      use activation_scheme 'dynamic'"
    )


# What checkpoints may hold


def block(n: int = 64, k: int = 96, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A module "fc" in blocks [32, 32]."""
    codes = torch.randn(n, k, generator=torch.Generator().manual_seed(3)).to(E4M3)
    scale = torch.rand(math.ceil(n / 32), math.ceil(k / 32), generator=torch.Generator().manual_seed(4)) + 0.5
    return {"fc.weight": codes, "fc.weight_scale_inv": scale} | {f"fc.{name}": t for name, t in more.items()}


BLOCKS = FineGrainedFp8Config(weight_block_size=(32, 32))
FC = linear("fc", 64, 96, bias="fc.bias")


@pytest.mark.parametrize("name", ["scale", "qscale_weight", "weight_scale_inv"])
def test_scales_have_three_names(name: str) -> None:
    tensors = block()
    tensors[f"fc.{name}"] = tensors.pop("fc.weight_scale_inv")
    assert torch.equal(
        value(read(FineGrainedFp8(), BLOCKS, FC, InMemory(tensors))),
        value(read(FineGrainedFp8(), BLOCKS, FC, InMemory(block()))),
    )


def test_bytes_are_exponents() -> None:
    tensors = block()
    exponents = torch.randint(120, 130, tensors["fc.weight_scale_inv"].shape, dtype=torch.uint8)
    tensors["fc.weight_scale_inv"] = exponents
    packed = read(FineGrainedFp8(), BLOCKS, FC, InMemory(tensors))
    wide = (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(value(packed), tensors["fc.weight"].float() * wide)


def test_pairs_of_fp4() -> None:
    weight = torch.randint(-128, 128, (64, 48), dtype=torch.int8)
    scale = torch.full((64, 3), 2.0).to(E8M0)
    packed = read(FineGrainedFp8(), BLOCKS, FC, InMemory({"fc.weight": weight, "fc.weight_scale_inv": scale}))
    assert packed.format.kind == "fp4" and packed.before[0].transform.summary() == "mx f8e4m3 per group of 32"
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = torch.stack((weight.view(torch.uint8) & 15, weight.view(torch.uint8) >> 4), -1).flatten(1)
    assert torch.equal(value(packed), table[pairs.long()] * 2)
    assert torch.equal(FineGrainedFp8().write(BLOCKS, FC, packed)["weight"], weight)


@pytest.mark.parametrize("one", [(), (1,)])
def test_static_scales(one: tuple[int, ...]) -> None:
    config = replace(BLOCKS, activation_scheme="static")
    source = InMemory(block(activation_scale=torch.full(one, 0.25)))
    packed = read(FineGrainedFp8(), config, FC, source)
    assert packed.before[0].tensors["scale"].tolist() == [0.25]
    assert packed.before[0](torch.tensor([[1000.0, 1.0]])).tolist() == [[112.0, 1.0]]
    # One block: the original rounds by rows and does not use the scale, but its layer has one.
    whole = replace(config, weight_block_size=None)
    source.tensors["fc.weight_scale_inv"] = torch.ones(one)
    packed = read(FineGrainedFp8(), whole, FC, source)
    assert packed.before[0].transform.summary() == "f8e4m3 per token"
    assert FineGrainedFp8().write(whole, FC, packed)["activation_scale"] == 1


def test_dequantize_leaves_activations_alone() -> None:
    packed = read(FineGrainedFp8(), replace(BLOCKS, dequantize=True), FC, InMemory(block()))
    assert packed.before == ()


def test_an_embedding_with_one_scale() -> None:
    table = Module("embed", "Embedding", 20, 16, "embed.weight")
    codes = torch.randn(20, 16).to(E4M3)
    source = InMemory({"embed.weight": codes, "embed.weight_scale": torch.tensor([0.5])})
    config = FineGrainedFp8Config(modules_to_convert=["embed"])
    packed = read(FineGrainedFp8(), config, table, source)
    assert packed.before == () and torch.equal(value(packed), codes.float() * 0.5)
    assert same_bits(
        {f"embed.{name}": t for name, t in FineGrainedFp8().write(config, table, packed).items()}, source.tensors
    )
    plain = InMemory({"embed.weight": torch.zeros(20, 16), **block()})
    assert FineGrainedFp8().select(config, table, plain, {}) == Skip("the checkpoint stores its weight dense")


def test_older_fbgemm_files_hold_the_bound() -> None:
    source = InMemory(
        {
            "fc.weight": torch.ones(64, 96).to(E4M3),
            "fc.weight_scale": torch.ones(64, 1, dtype=torch.bfloat16),
            "fc.input_scale_ub": torch.tensor([1200.0]),
        }
    )
    selected = FbgemmFp8().select(FbgemmFp8Config(), FC, source, {})
    assert isinstance(selected, Quantized) and selected.also_claims == ("fc.input_scale_ub",)
    assert torch.equal(value(read(FbgemmFp8(), FbgemmFp8Config(), FC, source)), torch.ones(64, 96))


DAMAGED = "the checkpoint and its quantization_config do not belong together, or a file is damaged"
NAN = torch.ones(2, 3)
NAN[1, 2] = math.nan
BROKEN: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {"fc.weight_scale_inv": None},
        "a module quantized with fp8 lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    activation_scale, weight\n"
        "  expected: weight, weight_scale_inv\n"
        "  try:      the checkpoint is incomplete: it must hold fc.weight_scale_inv",
    ),
    (
        {"fc.activation_scale": None},
        "a module quantized with fp8 lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    weight, weight_scale_inv\n"
        "  expected: weight, weight_scale_inv, activation_scale\n"
        "  try:      the checkpoint is incomplete: it must hold fc.activation_scale",
    ),
    (
        {"fc.weight_scale_inv": torch.ones(2, 2)},
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight_scale_inv (module fc, 64 outputs, 96 inputs)\n"
        "  found:    f32 [2, 2]\n"
        "  expected: f32 or bf16 or f16 or f8e8m0 or u8 [2, 3]\n"
        f"  try:      {DAMAGED}",
    ),
    (
        {"fc.weight": torch.ones(64, 96)},
        "a stored tensor has the wrong dtype\n"
        "  where:    fc.weight (module fc, 64 outputs, 96 inputs)\n"
        "  found:    f32 [64, 96]\n"
        "  expected: f8e4m3 [64, 96]\n"
        f"  try:      {DAMAGED}",
    ),
    (
        {"fc.weight_scale_inv": NAN},
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.weight_scale_inv (module fc)\n"
        "  found:    nan at [1, 2]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
]


@pytest.mark.parametrize("changed, message", BROKEN)
def test_a_broken_checkpoint_is_said_in_full(changed: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {name: t for name, t in (block(activation_scale=torch.ones(())) | changed).items() if t is not None}
    with pytest.raises(CheckpointError) as caught:
        read(FineGrainedFp8(), replace(BLOCKS, activation_scheme="static"), FC, InMemory(tensors))
    assert str(caught.value) == message


def test_a_broken_fbgemm_checkpoint() -> None:
    tensors = {"fc.weight": torch.ones(64, 96).to(E4M3), "fc.weight_scale": torch.ones(64)}
    with pytest.raises(CheckpointError) as caught:
        read(FbgemmFp8(), FbgemmFp8Config(), FC, InMemory(tensors))
    assert str(caught.value) == (
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight_scale (module fc, 64 outputs, 96 inputs)\n"
        "  found:    f32 [64]\n"
        "  expected: f32 or bf16 or f16 [64, 1]\n"
        f"  try:      {DAMAGED}"
    )
    with pytest.raises(CheckpointError, match="lacks a stored tensor"):
        other = {"a.weight_scale": torch.ones(1, 1), "fc.weight": torch.ones(64, 96).to(E4M3)}
        read(FbgemmFp8(), FbgemmFp8Config(), FC, InMemory(other))
