"""TorchAO's configs: all the ways to say a recipe, and every wrong one by its full message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from in_memory import InMemory
from one_module import fc
from torchao_cases import AO, FP4, GROUP, ROW, enum, made_of, per, said, sample

from qcompile.errors import ConfigError
from qcompile.methods.index import parse_config
from qcompile.methods.torchao_config import TorchAoConfig
from qcompile.methods.torchao_recipes import Int4WeightOnlyConfig


def test_other_ways_to_say_a_recipe() -> None:
    whole = made_of(said("Int8WeightOnly"))
    assert TorchAoConfig(said("Int8WeightOnly")).recipe == whole.recipe
    assert TorchAoConfig("int8_weight_only").recipe == whole.recipe
    old = {"quant_type": "int4_weight_only", "group_size": 64}
    assert TorchAoConfig.from_dict(old).recipe == Int4WeightOnlyConfig(64, int4_packing_format="TILE_PACKED_TO_4D")
    kept = TorchAoConfig.from_dict({"quant_type": "int8_weight_only", "quant_type_kwargs": {"group_size": 32}})
    assert kept.recipe == made_of(said("Int8WeightOnly", granularity=per("PerGroup", group_size=32))).recipe
    dynamic = TorchAoConfig.from_dict({"quant_type": "int8_dynamic_activation_int8_weight"})
    assert dynamic.recipe == made_of(said("Int8DynamicActivationInt8Weight")).recipe
    again = TorchAoConfig.from_dict(json.loads(json.dumps(kept.to_dict())))
    assert again == kept and again.to_dict()["quant_method"] == "torchao"


def test_torchaos_own_objects_are_taken() -> None:
    pytest.importorskip("torchao")
    from torchao.core.config import config_to_dict
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig, PerRow
    from transformers import TorchAoConfig as Theirs

    for theirs in (
        Int4WeightOnlyConfig(group_size=32),
        MXDynamicActivationMXWeightConfig(),
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    ):
        ours = TorchAoConfig(theirs)
        assert ours.quant_type == {"default": config_to_dict(theirs)}
        found = parse_config(Theirs(theirs))
        assert found is not None and found[1] == ours


def test_fields_that_steer_kernels_are_reported() -> None:
    config = made_of(said("MXDynamicActivationMXWeight", 1, kernel_preference=enum("KernelPreference", "TORCH")))
    note = "kernels are generated: no other package's kernel is chosen"
    assert AO.effects(config) == [("quant_type, kernel_preference", note)]


ERRORS: list[tuple[Any, str]] = [
    (
        {"quant_type": {"int8": {}}},
        "quant_type is not a torchao config\n"
        "  where:    field 'quant_type'\n"
        "  found:    {'int8': {}}\n"
        '  expected: {"default": {"_type": a class, "_version": a number, "_data": {field: value}}}, or torchao\'s own object',
    ),
    (
        {"quant_type": "int4_weight"},
        "an unknown torchao quantization, did you mean 'int4_weight_only'?\n"
        "  where:    field 'quant_type'\n"
        "  found:    'int4_weight'\n"
        "  expected: a torchao config object, its JSON, or one of int4_weight_only, int8_weight_only, "
        "int8_dynamic_activation_int8_weight, float8_weight_only, float8_dynamic_activation_float8_weight",
    ),
    (
        {"quant_type": "int8_weight_only", "groupsize": 3},
        "an option that torchao's int8_weight_only has not, or that has no meaning here\n"
        "  where:    field 'quant_type_kwargs'\n"
        "  found:    groupsize\n"
        "  expected: group_size",
    ),
    (
        {"quant_type": said("Int8WeightOnly", 1)},
        "a torchao config has a version that is not supported\n"
        "  where:    quant_type, Int8WeightOnlyConfig\n"
        "  found:    version 1\n"
        "  expected: version 2\n"
        "  try:      quantize the model with a present torchao, which has removed the older versions",
    ),
    (
        {"quant_type": said("Int4WeightOnly", groupsize=32)},
        "unknown field in torchao's Int4WeightOnlyConfig\n"
        "  where:    quant_type\n"
        "  found:    'groupsize', did you mean 'group_size'?\n"
        "  expected: group_size, int4_choose_qparams_algorithm, int4_packing_format, int4_tile_packed_ntile, set_inductor_config",
    ),
    (
        {"quant_type": said("Int4WeightOnly", int4_packing_format=enum("Int4PackingFormat", "PRESHUFFLED"))},
        "the torchao config has a value out of range\n"
        "  where:    quant_type, Int4WeightOnlyConfig, field 'int4_packing_format'\n"
        "  found:    PRESHUFFLED\n"
        "  expected: PLAIN or TILE_PACKED_TO_4D\n"
        "  try:      the others are for one device's own operator",
    ),
    (
        {"quant_type": said("IntxWeightOnly", granularity=per("PerAxis", axis=1))},
        "the torchao config has a value out of range\n"
        "  where:    quant_type, IntxWeightOnlyConfig, field 'granularity'\n"
        "  found:    PerAxis(1)\n"
        "  expected: PerGroup or PerAxis",
    ),
    (
        {"quant_type": said("Float8WeightOnli")},
        "a torchao config class that is not supported\n"
        "  where:    quant_type\n"
        "  found:    'Float8WeightOnliConfig', did you mean 'Float8WeightOnlyConfig'?\n"
        "  expected: Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, "
        "Int8DynamicActivationIntxWeightConfig, Int4WeightOnlyConfig, Float8WeightOnlyConfig, "
        "Float8DynamicActivationFloat8WeightConfig, MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig, "
        "NVFP4DynamicActivationNVFP4WeightConfig, FqnToConfig, ModuleFqnToConfig, AWQConfig, SmoothQuantConfig, "
        "Int8StaticActivationInt8WeightConfig, Float8DynamicActivationInt4WeightConfig",
    ),
]


@pytest.mark.parametrize("data, message", ERRORS)
def test_what_is_wrong_with_a_config_is_said_in_full(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TorchAoConfig.from_dict(data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "recipe",
    [
        said("Int8WeightOnly", group_size=32),
        said("Int8WeightOnly", granularity=per("PerBlock", block_size=[1, 128])),
        said("Int8DynamicActivationInt8Weight", granularity=GROUP),
        said("Int8DynamicActivationIntxWeight", act_mapping_type=enum("MappingType", "SYMMETRIC")),
        said("Float8DynamicActivationFloat8Weight", granularity=[ROW, per("PerTensor")]),
        said("Float8DynamicActivationFloat8Weight", granularity=[ROW]),
        said("MXDynamicActivationMXWeight", 1, weight_dtype=FP4),
        said("Int4WeightOnly", int4_choose_qparams_algorithm=enum("Int4ChooseQParamsAlgorithm", "HQQ")),
        said("FqnTo", 1, fqn_to_config={"re:(": None}),
        {"_type": "Int8WeightOnlyConfig"},
        7,
    ],
    ids=str,
)
def test_recipes_that_torchao_refuses(recipe: Any) -> None:
    with pytest.raises(ConfigError):
        TorchAoConfig(recipe)


def test_what_needs_data_is_not_made() -> None:
    config, module = made_of(said("AWQ", 1, base_config=None)), fc(16, 32)
    with pytest.raises(ConfigError) as caught:
        AO.select(config, module, InMemory({"fc.weight": sample(16, 32)}), {"fc": module})
    assert str(caught.value) == (
        "torchao's AWQConfig quantizes nothing here\n"
        "  where:    field 'quant_type'\n"
        "  expected: a config whose result depends on the weight alone\n"
        "  try:      quantize the model with torchao itself: its checkpoint is read"
    )
    with pytest.raises(ConfigError) as caught:
        AO.select(made_of(said("NVFP4WeightOnly", 1)), fc(16, 24), InMemory({"fc.weight": sample(16, 24)}), {})
    assert str(caught.value) == (
        "torchao cannot quantize a weight of this shape\n"
        "  where:    fc\n"
        "  found:    [16, 24]\n"
        "  expected: multiples of 16\n"
        "  try:      choose another granularity, or leave the module dense by modules_to_not_convert"
    )
