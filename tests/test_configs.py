"""Configs: the fields, defaults and rules of transformers, every wrong value by its full message."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from in_memory import InMemory

from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods.awq import AwqConfig
from qcompile.methods.bitsandbytes import BnbConfig
from qcompile.methods.eetq import EetqConfig
from qcompile.methods.gguf import GgufConfig
from qcompile.methods.gptq import GptqConfig
from qcompile.methods.hqq import HqqConfig
from qcompile.methods.index import METHODS, method, parse_config

# What a config needs beside its defaults, where it needs something.
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4},
    "bitsandbytes": {"load_in_4bit": True},
    "mxfp8": {"weight_block_size": (1, 32), "scale_fmt": "ue8m0"},
    "quark": {"global_quant_config": {"weight": None}},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}},
}
METHOD_NAMES = ", ".join(METHODS)


def parsed(config: Any, **kwargs: Any) -> Any:
    found = parse_config(config, **kwargs)
    assert found is not None
    return found[1]


def theirs(name: str, **fields: Any) -> Any:
    """The config object of transformers for a method."""
    mapping = pytest.importorskip("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    if name == "torchao":
        pytest.skip("transformers makes a torchao config of torchao's own objects only")
    if name == "mxfp8":  # the class of fp8 too
        fields = fields | {"quant_method": name}
    try:
        return mapping["bitsandbytes_4bit" if name == "bitsandbytes" else name](**fields)
    except ImportError as error:
        pytest.skip(f"transformers makes a {name} config with the package of the method only: {error}")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_knows_its_name(name: str) -> None:
    found = method(name)
    assert found.name == found.Config.method == name


@pytest.mark.parametrize("name", METHODS)
def test_configs_survive_json(name: str) -> None:
    config = method(name).Config.from_dict(CONFIGS.get(name, {}))
    again = parsed(json.dumps(config.to_dict()))
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["quant_method"] == name


@pytest.mark.parametrize("name", METHODS)
def test_fields_and_defaults_are_those_of_transformers(name: str) -> None:
    fields = CONFIGS.get(name, {})
    ours, other = method(name).Config.from_dict(fields).to_dict(), theirs(name, **fields).to_dict()
    shared = ours.keys() & other.keys()
    assert {field: ours[field] for field in shared} == {field: other[field] for field in shared}
    missing = {field for field in other.keys() - ours.keys() if not field.startswith("_load_in")}
    assert missing <= set(method(name).Config.foreign), f"fields of transformers that we do not know: {missing}"


@pytest.mark.parametrize(
    "name, fields",
    [
        ("gptq", {"bits": 3, "group_size": -1, "desc_act": True, "format": "gptq_v2", "sym": False}),
        ("awq", {"group_size": 64, "zero_point": False, "version": "GEMV", "backend": "autoawq"}),
        ("awq", {"backend": "llm-awq", "modules_to_not_convert": ["k_proj"]}),
        ("bitsandbytes", {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": ["lm_head"]}),
        ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}),
        ("hqq", {"nbits": 8, "group_size": 128, "axis": 0}),
        ("hqq", {"dynamic_config": {"self_attn.q_proj": {"nbits": 4, "group_size": 64}}, "skip_modules": []}),
        ("eetq", {"modules_to_not_convert": ["lm_head"]}),
        ("gguf", {"dequantize": True}),
    ],
)
def test_a_transformers_config_means_the_same_as_ours(name: str, fields: dict[str, Any]) -> None:
    other = theirs(name, **fields)
    from_object, own = parsed(other), method(name).Config.from_dict(fields)
    assert from_object.to_dict() == own.to_dict()
    auto = pytest.importorskip("transformers.quantizers.auto").AutoQuantizationConfig
    back = auto.from_dict(own.to_dict()).to_dict()  # and transformers reads what we write
    assert {field: back[field] for field in own.to_dict().keys() & back.keys()} == {
        field: value for field, value in own.to_dict().items() if field in back
    }


ERRORS: list[tuple[Any, str]] = [
    (
        {"quant_method": "gtpq"},
        "unknown quantization method\n"
        "  where:    field 'quant_method'\n"
        "  found:    'gtpq', did you mean 'gptq'?\n"
        f"  expected: {METHOD_NAMES}",
    ),
    (
        {"bits": 4},
        "a quantization config does not name its method\n"
        "  found:    bits\n"
        f"  expected: the field 'quant_method': {METHOD_NAMES}",
    ),
    (
        4,
        "this is not a quantization config\n  found:    int\n  expected: a config object, a dict, JSON text or None",
    ),
    (
        "{",
        "a quantization config is not JSON\n"
        "  where:    '{'\n"
        "  found:    Expecting property name enclosed in double quotes: line 1 column 2 (char 1)\n"
        '  expected: {"quant_method": ...}',
    ),
    ({"quant_method": "gptq"}, "the gptq config needs the field 'bits'\n  found:    no field"),
    (
        {"quant_method": "gptq", "bits": 9},
        "the gptq config has a value out of range\n"
        "  where:    field 'bits'\n"
        "  found:    9\n"
        "  expected: an integer from 2 to 8",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 0},
        "the gptq config has a value out of range\n"
        "  where:    field 'group_size'\n"
        "  found:    0\n"
        "  expected: -1 (the whole row) or a positive integer",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "the gptq config has a value out of range\n"
        "  where:    field 'format'\n"
        "  found:    'marlin'\n"
        "  expected: gptq, gptq_v2, gptq_p\n"
        "  try:      convert a marlin or bitblas checkpoint back to gptq",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down": {"bits": 1}}},
        "the gptq config has a value out of range\n"
        "  where:    field 'dynamic', '+:.*down', field 'bits'\n"
        "  found:    1\n"
        "  expected: an integer from 2 to 8",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}},
        "the gptq config has a pattern that is not a regular expression\n"
        "  where:    field 'dynamic'\n"
        "  found:    '-:(' (missing ), unterminated subpattern at position 0)\n"
        "  expected: a regular expression of module paths",
    ),
    (
        {"quant_method": "awq", "group_sise": 64},
        "unknown field in the awq config\n"
        "  found:    'group_sise', did you mean 'group_size'?\n"
        "  expected: bits, group_size, zero_point, backend, modules_to_not_convert, format\n"
        "  try:      correct the name, or leave the field out",
    ),
    (
        {"quant_method": "awq", "version": "marlin"},
        "the awq config has a value out of range\n"
        "  where:    field 'format'\n"
        "  found:    'marlin'\n"
        "  expected: gemm, gemv, gemv_fast, llm-awq",
    ),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True},
        "the bitsandbytes config has a value out of range\n"
        "  where:    field 'load_in_4bit'\n"
        "  found:    True\n"
        "  expected: exactly one of load_in_4bit and load_in_8bit is True",
    ),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        "the bitsandbytes config has a value out of range\n"
        "  where:    field 'bnb_4bit_quant_type'\n"
        "  found:    'int4'\n"
        "  expected: 'fp4' or 'nf4'",
    ),
    (
        {"quant_method": "hqq", "nbits": 7},
        "the hqq config has a value out of range\n"
        "  where:    field 'nbits'\n"
        "  found:    7\n"
        "  expected: 8, 6, 5, 4, 3, 2, 1.58, 1",
    ),
    (
        {"quant_method": "hqq", "dynamic_config": {"self_attn.q_proj": {"group_size": 12}}},
        "the hqq config has a value out of range\n"
        "  where:    field dynamic_config, 'self_attn.q_proj', 'group_size'\n"
        "  found:    12\n"
        "  expected: None or a multiple of 8",
    ),
    (
        {"quant_method": "eetq", "weights": "int4"},
        "the eetq config has a value out of range\n  where:    field 'weights'\n  found:    'int4'\n  expected: 'int8'",
    ),
]


@pytest.mark.parametrize("config, message", ERRORS)
def test_what_is_wrong_is_said_in_full(config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name, fields",
    [
        ("gptq", {"bits": 1}),
        ("gptq", {"bits": 4, "group_size": -2}),
        ("gptq", {"bits": 4, "damp_percent": 1.0}),
        ("gptq", {"bits": 4, "dataset": "wikitext"}),
        ("awq", {"format": "marlin"}),
        ("awq", {"backend": "cublas"}),
        ("bitsandbytes", {"load_in_8bit": True, "load_in_4bit": True}),
        ("bitsandbytes", {"load_in_8bit": True, "llm_int8_threshold": 6}),
        ("bitsandbytes", {"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}),
        ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_storage": "int4"}),
        ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_use_double_quant": 1}),
        ("hqq", {"axis": 2}),
        ("eetq", {"weights": "int4"}),
    ],
)
def test_what_transformers_refuses_is_refused(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        theirs(name, **fields)
    with pytest.raises(ConfigError):
        method(name).Config.from_dict(fields)


def test_fields_without_effect_are_reported() -> None:
    config = GptqConfig(4, backend="marlin", dataset="c4", desc_act=True)
    assert dict(method("gptq").effects(config)) == {
        "backend": "kernels are generated: no other package's kernel is chosen",
        "dataset": "it steers calibration, which is not run here",
        "act_group_aware": "it steers calibration, which is not run here",
    }
    assert method("bitsandbytes").effects(BnbConfig(load_in_8bit=True)) == []
    half = BnbConfig(load_in_4bit=True, bnb_4bit_compute_dtype="torch.bfloat16")
    assert [field for field, _ in method("bitsandbytes").effects(half)] == ["bnb_4bit_compute_dtype"]
    assert method("awq").effects(AwqConfig()) == method("eetq").effects(EetqConfig()) == []


def test_what_hqq_has_withdrawn_is_reported() -> None:
    saved: dict[str, Any] = HqqConfig(nbits=3).to_dict()["quant_config"] | {"zero_quant_params": {"nbits": 8}}
    said = [("quant_config", "scales and zeros stay floats, as in hqq, which has withdrawn their quantization")]
    for quant_config, expected in ((saved, said), ({"q_proj": saved}, said), (saved | {"zero_quant_params": None}, [])):
        config = parsed(None, stored={"quant_method": "hqq", "quant_config": quant_config, "skip_modules": []})
        assert [effect for effect in method("hqq").effects(config) if effect[0] == "quant_config"] == expected


def test_unknown_fields_of_a_checkpoint_are_reported_and_those_of_a_caller_refused() -> None:
    fields = {"quant_method": "eetq", "zebra": 1}
    found = parse_config(None, fields)
    assert found is not None
    assert found[0].effects(found[1]) == [("zebra", "not a field of eetq: ignored")]
    with pytest.raises(ConfigError, match="unknown field in the eetq config"):
        parse_config(fields)
    with pytest.raises(ConfigError, match="did you mean 'weights'"):  # a near miss is an error wherever it comes from
        parse_config(None, {"quant_method": "eetq", "weight": "int8"})
    found = parse_config(None, {"quant_method": "gptq", "bits": 4, "act_bits": 16})  # as AutoRound's exports have it
    assert found is not None and dict(found[1].unused) == {"act_bits": 16}


def test_where_a_config_comes_from() -> None:
    assert parse_config(None) is None
    assert parsed(None, stored={"quant_method": "gguf"}) == GgufConfig()
    old = {"load_in_8bit": True, "llm_int8_threshold": 6.0}  # bitsandbytes configs once had no quant_method
    assert parsed(None, stored=old) == BnbConfig(load_in_8bit=True)
    config = HqqConfig(nbits=3)
    assert parsed(config) is config


def test_a_config_beside_the_checkpoints_own_must_agree() -> None:
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    assert parsed(GptqConfig(4, group_size=64, backend="marlin"), stored=stored).group_size == 64
    with pytest.raises(ConfigError) as caught:
        parse_config(GptqConfig(4), stored)
    assert str(caught.value) == (
        "the config differs from the gptq config that the checkpoint was quantized with\n"
        "  found:    group_size: 128, checkpoint 64\n"
        "  expected: no config, or the checkpoint's own\n"
        "  try:      leave the config out, or start from the float model"
    )
    with pytest.raises(ConfigError) as caught:
        parse_config(HqqConfig(), stored)
    assert str(caught.value) == (
        "the checkpoint is already quantized with another method\n"
        "  found:    config: hqq, checkpoint: gptq\n"
        "  expected: no config, or the checkpoint's own\n"
        "  try:      leave the config out, or start from the float model"
    )


def test_a_checkpoint_must_hold_what_its_config_promises() -> None:
    source, stored = InMemory({"fc.weight": torch.zeros(64, 64)}), {"quant_method": "gptq", "bits": 4}
    with pytest.raises(CheckpointError) as caught:
        parse_config(None, stored, source)
    assert str(caught.value) == (
        "the checkpoint says it is quantized with gptq, but holds no such weight\n"
        "  where:    tensors in memory\n"
        "  found:    fc.weight\n"
        "  expected: tensors as gptq stores them\n"
        "  try:      complete the checkpoint, or take quantization_config out of its config.json to quantize it anew"
    )
    whole = InMemory({"fc.qweight": torch.zeros(8, 64, dtype=torch.int32)})
    assert parsed(None, stored=stored, source=whole) == GptqConfig(4)
    assert parsed(GptqConfig(4), source=source) == GptqConfig(4)  # a caller's config quantizes a float model
