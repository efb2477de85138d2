"""AutoRound: configs, every packing, layers that differ, plain rounding, and what is said about broken files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from in_memory import InMemory, linear

from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.methods.auto_round import AutoRound, AutoRoundConfig, Scheme
from qcompile.methods.awq import AwqConfig
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import method
from qcompile.pack import unpack
from qcompile.program import Module

N, K = 64, 96
METHOD = AutoRound()


def sample(n: int = N, k: int = K) -> torch.Tensor:
    """A weight with a row of zeros, a constant one, and rows of one sign."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(2)) * 0.05
    weight[0], weight[1] = 0.0, 0.3
    weight[2], weight[3] = weight[2].abs() + 0.1, -weight[3].abs()
    return weight


def stored(config: AutoRoundConfig, weight: torch.Tensor | None = None) -> InMemory:
    weight = sample() if weight is None else weight
    module = linear("fc", *weight.shape)
    made = METHOD.write(config, module, METHOD.quantize(config, module, weight))
    return InMemory({f"fc.{name}": tensor for name, tensor in made.items()})


def chosen(config: AutoRoundConfig, source: InMemory) -> Quantized | Skip:
    module = linear("fc", N, K)
    return METHOD.select(config, module, source, {"fc": module})


# Configs


def test_the_fields_are_those_of_transformers() -> None:
    config = pytest.importorskip("transformers").AutoRoundConfig
    assert AutoRoundConfig.from_dict(config().to_dict()) == AutoRoundConfig()
    theirs = config(bits=3, group_size=-1, sym=False, packing_format="auto_round", iters=200)
    ours = AutoRoundConfig(3, -1, False, packing_format="auto_round")
    assert replace(AutoRoundConfig.from_dict(theirs.to_dict()), unused={}) == ours
    assert AutoRoundConfig.from_dict(ours.to_dict()) == ours


@pytest.mark.parametrize(
    ("fields", "where", "found", "expected"),
    [
        ({"bits": 9}, "field 'bits'", "9", "an integer from 2 to 8"),
        ({"group_size": 0}, "field 'group_size'", "0", "-1 (the whole row) or a positive integer"),
        ({"packing_format": "auto_round:x"}, "field 'packing_format'", "'auto_round:x'", "auto_round:gptq, auto_round:auto_gptq,"
         " auto, auto_round, auto_round:gptqmodel, auto_round:awq, auto_round:auto_awq, auto_round:llm_compressor, "
         "auto_round:fp8_static, auto_round:fp8"),
        ({"extra_config": {"fc": {"bits": 1}}}, "field 'extra_config', 'fc', field 'bits'", "1", "an integer from 2 to 8"),
    ],
)  # fmt: skip
def test_values_out_of_range(fields: dict[str, Any], where: str, found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        AutoRoundConfig(**fields)
    assert str(error.value) == (
        "the auto-round config has a value out of range\n"
        f"  where:    {where}\n  found:    {found}\n  expected: {expected}"
    )


@pytest.mark.parametrize("fields", [{"data_type": "mx_int"}, {"act_bits": 8}, {"super_bits": 6}])
def test_schemes_that_are_not_read_are_refused(fields: dict[str, Any]) -> None:
    for data in (fields, {"extra_config": {"fc": fields}}):
        with pytest.raises(ConfigError, match="export the model in another scheme"):
            AutoRoundConfig.from_dict(data)


def test_names_come_before_patterns_and_patterns_in_blocks_stay_there() -> None:
    config = AutoRoundConfig(
        extra_config={
            ".*k_proj.*": {"bits": 8, "group_size": 64},
            "model.layers.1.k_proj": {"sym": False},
            "head": {"bits": 3},
            ".*up.*": {"bits": 16},
        }
    )
    assert config.scheme("model.layers.0.k_proj") == Scheme(8, 64, True)
    assert config.scheme("model.layers.1.k_proj") == Scheme(4, 128, False)
    assert config.scheme("lm_head") == Scheme(3, 128, True)
    assert config.scheme("model.layers.0.up_proj") is None
    assert config.scheme("model.layers.0.q_proj") == Scheme(4, 128, True)
    assert config.own("lm_head", ("model.layers.0.head",)) is None


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"sym": True}, "auto_round:gptq"),
        ({"sym": False}, "auto_round:auto_awq"),
        ({"sym": False, "bits": 2}, "auto_round"),
        ({"sym": False, "extra_config": {"fc": {"bits": 8}}}, "auto_round"),
        ({"sym": False, "extra_config": {"fc": {"bits": 16}}}, "auto_round:auto_awq"),
        ({"sym": False, "packing_format": "auto_round:gptqmodel"}, "auto_round:gptqmodel"),
    ],
)
def test_the_packing_is_the_one_that_auto_round_chooses(fields: dict[str, Any], kind: str) -> None:
    assert AutoRoundConfig(**fields).packing() == kind


# Checkpoints


PACKINGS = [
    *((bits, "auto_round:auto_gptq", True) for bits in range(2, 9)),
    *((bits, "auto_round", False) for bits in range(2, 9)),
    *((bits, "auto_round:auto_awq", False) for bits in (4, 5, 6, 7)),
    (4, "auto_round:gptqmodel", False),
]


@pytest.mark.parametrize(("bits", "packing", "sym"), PACKINGS)
@pytest.mark.parametrize("group", [32, -1])
def test_what_is_written_is_read_back(bits: int, packing: str, sym: bool, group: int) -> None:
    config = AutoRoundConfig(bits, group, sym, packing_format=packing)
    made, source = METHOD.quantize(config, linear("fc", N, K), sample()), stored(config)
    assert ("fc.g_idx" in source.tensors) == packing.endswith("gptqmodel")
    selected = chosen(config, source)
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims} == source.tensors.keys()
    read = METHOD.read(config, linear("fc", N, K), selected, source)
    assert read.format == made.format
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in made.tensors.items())
    error = (dequantize(made.format, made.tensors, N, K) - sample()).norm() / sample().norm()
    assert error < 1.5 / 2**bits


def test_what_a_zero_means_in_each_packing() -> None:
    """5 bits: the same words are one more, or not, and never wrap; AWQ's order is another one."""
    for packing, expected in (("auto_round:auto_gptq", (32, 1)), ("auto_round", (31, 0))):
        config = AutoRoundConfig(5, 32, False, packing_format=packing)
        source = stored(config)
        source.tensors["fc.qzeros"] = torch.full_like(source.tensors["fc.qzeros"], -1)
        source.tensors["fc.qzeros"][0] = 0
        selected = chosen(config, source)
        assert isinstance(selected, Quantized)
        read = METHOD.read(config, linear("fc", N, K), selected, source)
        zero = unpack(read.format, read.tensors, N, K)["zero"]
        assert (zero[:, 32:] == expected[0]).all() and (zero[:, :32] == expected[1]).all()


def test_symmetric_scales_are_signed() -> None:
    packed = METHOD.quantize(AutoRoundConfig(group_size=32), linear("fc", N, K), sample())
    scales = packed.tensors["scales"]
    assert (scales[:, 2] < 0).all() and (scales[:, 3] > 0).all()
    assert packed.tensors["qzeros"].eq(0x77777777).all()
    value = dequantize(packed.format, packed.tensors, N, K)
    most = sample().abs().reshape(N, -1, 32).argmax(-1) + torch.arange(0, K, 32)
    rows = torch.arange(4, N)[:, None]  # without the rows of zeros and of equal values
    assert torch.allclose(value[rows, most[4:]], sample()[rows, most[4:]], rtol=1e-3)


def test_a_zero_of_0_is_stored_as_the_original_clamps_it() -> None:
    config = AutoRoundConfig(4, 32, False, packing_format="auto_round:auto_gptq")
    packed = METHOD.quantize(config, linear("fc", N, K), sample())
    assert (unpack(packed.format, packed.tensors, N, K)["zero"][2] == 1).all()


def test_the_config_that_is_stored_says_the_packing() -> None:
    for fields, said in (({}, "auto_round:auto_gptq"), ({"sym": False}, "auto_round:auto_awq"),
                         ({"sym": False, "bits": 3}, "auto_round")):  # fmt: skip
        config = AutoRoundConfig(group_size=32, **fields)
        weights = {"fc": METHOD.quantize(config, linear("fc", N, K), sample())}
        assert METHOD.stored_config(config, weights) == {
            "quant_method": "auto-round", "bits": config.bits, "group_size": 32, "sym": config.sym,
            "packing_format": said, "data_type": "int"
        }  # fmt: skip


def test_awq_exports_of_5_to_7_bits_keep_the_order_of_eight() -> None:
    for bits in (4, 5, 6, 7):
        weight, module = sample(), linear("fc", N, K)
        config = AutoRoundConfig(bits, 32, False, packing_format="auto_round:auto_awq")
        source = stored(config, weight)
        data = {"bits": bits, "group_size": 32, "provider": "auto-round", "iters": 6, "sym": False, "version": "gemm"}
        awq = AwqConfig.from_dict(AwqConfig.from_dict(data, lenient=True).to_dict())
        selected = method("awq").select(awq, module, source, {"fc": module})
        assert isinstance(selected, Quantized)
        assert selected.format == METHOD.quantize(config, module, weight).format
        plain = AwqConfig.from_dict(data | {"provider": "gptqmodel"}, lenient=True)
        assert plain.interleaved == (bits == 4)


# Which modules


def test_which_modules_are_quantized() -> None:
    embedding = Module("model.embed", "Embedding", 64, K, "model.embed.weight")
    head = linear("lm_head", 64, K, output_embedding=True)
    names = ("q_proj", "k_proj", "odd")
    layers = [linear(f"model.layers.{i}.{name}", 40 if name == "odd" else N, K) for i in range(2) for name in names]
    modules = {module.path: module for module in (embedding, *layers, head)}
    source = InMemory({module.weight: torch.zeros(module.n, module.k) for module in modules.values()})

    def dense(config: AutoRoundConfig) -> dict[str, str]:
        said = {path: METHOD.select(config, module, source, modules) for path, module in modules.items()}
        return {path: value.reason for path, value in said.items() if isinstance(value, Skip)}

    outside = "it is outside of the blocks that are quantized"
    common = {"model.embed": "Embedding is not converted by the method (only Linear and Conv1D)"}
    odd = {f"model.layers.{i}.odd": f"[40, {K}] are no multiples of 32" for i in range(2)}
    assert dense(AutoRoundConfig()) == common | odd | {"lm_head": outside}
    extra = {"lm_head": {"bits": 8}, ".*k_proj": {"bits": 16}}
    sixteen = {f"model.layers.{i}.k_proj": "extra_config gives it 16 bits" for i in range(2)}
    assert dense(AutoRoundConfig(extra_config=extra)) == common | odd | sixteen
    skipped = AutoRoundConfig(block_name_to_quantize="model.layers.1", modules_to_not_convert=["q_proj"])
    assert dense(skipped) == common | {"lm_head": outside, "model.layers.1.odd": odd["model.layers.1.odd"]} | {
        **{f"model.layers.0.{name}": outside for name in names},
        "model.layers.1.q_proj": "modules_to_not_convert has 'q_proj'",
    }
    for fields in ({"block_name_to_quantize": "layers"}, {"extra_config": {"fd": {}}}):
        with pytest.raises(ConfigError, match="the auto-round config has a pattern that matches no module"):
            dense(AutoRoundConfig(**fields))


# Broken checkpoints


def said(config: AutoRoundConfig, source: InMemory) -> str:
    with pytest.raises(CheckpointError) as error:
        selected = chosen(config, source)
        assert isinstance(selected, Quantized)
        METHOD.read(config, linear("fc", N, K), selected, source)
    return str(error.value)


def test_a_missing_tensor() -> None:
    source = stored(AutoRoundConfig())
    del source.tensors["fc.qzeros"]
    assert said(AutoRoundConfig(), source) == (
        "a module quantized with auto-round lacks a stored tensor\n"
        "  where:    fc\n  found:    qweight, scales\n  expected: qweight, qzeros, scales\n"
        "  try:      the checkpoint is incomplete: it must hold fc.qzeros"
    )


def test_another_packing_than_the_config_says() -> None:
    assert said(AutoRoundConfig(packing_format="auto_round:awq"), stored(AutoRoundConfig())) == (
        "a stored tensor has the wrong shape\n"
        "  where:    fc.qweight (module fc, 64 outputs, 96 inputs)\n  found:    i32 [12, 64]\n  expected: i32 [96, 8]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged"
    )


def test_a_scale_that_is_not_a_number() -> None:
    source = stored(AutoRoundConfig())
    source.tensors["fc.scales"][0, 5] = float("inf")
    assert said(AutoRoundConfig(), source) == (
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.scales (module fc)\n  found:    inf at [0, 5]\n  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module"
    )


def test_inputs_in_another_order() -> None:
    config = AutoRoundConfig(group_size=32, packing_format="auto_round:gptqmodel", sym=False)
    source = stored(config)
    source.tensors["fc.g_idx"] = source.tensors["fc.g_idx"].flip(0)
    assert said(config, source) == (
        "an auto-round checkpoint has inputs in another order\n"
        "  where:    fc.g_idx (module fc)\n  found:    input 0 in group 2\n"
        "  expected: group 0: AutoRound keeps the order of inputs\n"
        "  try:      the file is damaged, or its quant_method is gptq"
    )


def test_a_dense_layer_that_is_quantized() -> None:
    config = AutoRoundConfig(extra_config={"fc": {"bits": 16}})
    assert said(config, stored(AutoRoundConfig())) == (
        "a module that the config leaves dense is quantized\n"
        "  where:    fc\n  found:    fc.qweight\n  expected: a dense weight: extra_config gives it 16 bits\n"
        "  try:      the checkpoint and its quantization_config do not belong together"
    )
