"""Quark: configs by layer, checkpoints of every scheme, min-max quantization, and what is said about broken files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import parametrize
from in_memory import InMemory, linear
from stored_modules import StoredModule, call, read, same_bits, stored_modules, value

from qcompile.errors import CheckpointError, ConfigError
from qcompile.format import Packed
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import parse_config
from qcompile.methods.quark import Quark, QuarkConfig
from qcompile.methods.quark_narrow import written
from qcompile.methods.quark_spec import RANGES
from qcompile.program import Module

N, K = 48, 64


def spec(dtype: str = "int8", qscheme: str = "per_channel", **more: Any) -> dict[str, Any]:
    """The config of a tensor as quark writes it."""
    return {
        "dtype": dtype, "qscheme": qscheme, "ch_axis": 0 if qscheme == "per_channel" else -1, "group_size": 16,
        "block_size": None, "is_dynamic": False, "symmetric": True, "round_method": "half_even", "scale_type": "float",
        "observer_cls": "PerTensorMinMaxObserver", "scale_format": None, "scale_calculation_mode": None,
        "zero_point_type": "int32",
    } | more  # fmt: skip


def config(weight: Any = None, **more: Any) -> QuarkConfig:
    layer = {name: more.pop(name, None) for name in ("input_tensors", "output_tensors", "bias")}
    return QuarkConfig(layer | {"weight": spec() if weight is None else weight}, **more)


MX = {"scale_format": "e8m0", "observer_cls": "PerBlockMXObserver", "symmetric": None}
ACTIVATIONS = {"is_dynamic": True, "observer_cls": "PerTensorMinMaxObserver"}
FC = linear("fc", N, K)


def sample(n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight with a row of zeros, a constant row, one that is positive and one with an outlier."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0], weight[1], weight[2], weight[3, 0] = 0.0, 0.3, weight[2].abs() + 0.01, 4.0
    return weight.to(dtype)


def again(said: QuarkConfig, packed: Packed, module: Module = FC) -> Packed:
    """What is read of a checkpoint that holds the packed weight."""
    made = Quark().write(said, module, packed)
    return read(Quark(), said, module, InMemory({f"{module.path}.{name}": t for name, t in made.items()}))


# Checkpoints


@parametrize("quark")
def test_modules_of_checkpoints(folder: Path) -> None:
    count = 0
    for each in stored_modules(folder):
        assert torch.equal(value(each.packed), each.weight)
        assert same_bits(Quark().write(each.config, each.module, each.packed), each.stored())
        layer = each.config.global_quant_config | {"input_tensors": None}
        made = Quark().quantize(replace(each.config, global_quant_config=layer), each.module, each.source_weight)
        assert made.format == each.packed.format and same_bits(made.tensors, each.packed.tensors)
        probed(each)
        count += 1
    assert count == 4


def probed(each: StoredModule) -> None:
    """The layer's output is the original's, but for the rounding of weights to the model's dtype there."""
    if each.probe is not None:
        bound = {"f32": 1e-6, "f16": 5e-4, "bf16": 3e-3}[each.module.dtype]
        y = each.probe[1]
        assert (call(each.packed, each.probe[0]) - y).norm() <= bound * y.norm()


# Configs


def test_which_config_holds_for_a_layer() -> None:
    said = config(
        layer_quant_config={"*.k_proj": {"weight": spec("uint8")}, "*_proj": {"weight": None}},
        layer_type_quant_config={"Linear": {"weight": spec("fp8_e4m3", "per_tensor")}},
        exclude=["lm_head", "*.1.*"],
    )
    found = {
        path: Quark().select(said, linear(path, N, K), InMemory({"a.weight_scale": torch.ones(1)}), {})
        for path in ("lm_head", "l.1.k_proj", "l.0.v_proj")
    }
    assert found == {
        "lm_head": Skip("exclude has 'lm_head'"),
        "l.1.k_proj": Skip("exclude has '*.1.*'"),
        "l.0.v_proj": Skip("the config quantizes no weight of it"),
    }
    modules = {path: linear(path, N, K) for path in ("lm_head", "l.1.fc", "l.0.fc", "l.0.k_proj")}
    floats = InMemory({module.weight: torch.zeros(N, K) for module in modules.values()})
    kinds = [Quark().select(said, modules[path], floats, modules) for path in ("l.0.fc", "l.0.k_proj")]
    assert [each.format.kind for each in kinds if isinstance(each, Quantized)] == ["fp8", "int8"]
    table = Module("embed", "Embedding", N, K, "embed.weight")
    assert Quark().select(said, table, floats, modules) == Skip(
        "Embedding is not converted by the method (only Linear)"
    )
    with pytest.raises(ConfigError) as caught:
        Quark().select(replace(said, exclude=["head"]), modules["l.0.fc"], floats, modules)
    assert str(caught.value) == (
        "the quark config has a pattern that matches no module\n"
        "  where:    field 'exclude'\n"
        "  found:    'head'\n"
        "  expected: one of 4 modules with a weight, such as lm_head\n"
        "  try:      correct the pattern, or take it out"
    )


def test_an_older_config_and_what_has_no_effect() -> None:
    old = spec() | {"dynamic": False, "axis": 0}
    del old["is_dynamic"], old["ch_axis"], old["observer_cls"]
    said = {
        "quant_method": "quark", "global_quant_config": {"weight": old}, "layer_quant_config": None, "exclude": None,
        "layer_type_quant_config": None, "kv_cache_quant_config": {"*k_proj": {}}, "version": "0.8",
    }  # fmt: skip
    found = parse_config(None, said)
    assert found is not None and isinstance(found[1], QuarkConfig)
    assert found[1].to_dict() == QuarkConfig.from_dict(found[1].to_dict()).to_dict()
    assert found[0].effects(found[1]) == [
        ("kv_cache_quant_config", "key-value caches stay float, as when transformers loads such a checkpoint")
    ]


class Holder:
    """Stands for quark's own config objects, which transformers' QuarkConfig holds."""

    def __init__(self, said: dict[str, Any]):
        self.__dict__.update(said)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def test_the_object_of_transformers() -> None:
    said = {"global_quant_config": {"weight": spec()}, "exclude": ["lm_head"], "quant_method": "quark"}
    held = {
        "quant_config": Holder(said),
        "json_export_config": Holder({"pack_method": "order"}),
        "custom_mode": "quark",
    }
    found = parse_config(Holder(held | {"quant_method": "quark", "legacy": False}))
    assert found is not None and isinstance(found[1], QuarkConfig)
    assert found[1] == replace(config(exclude=["lm_head"], export={"pack_method": "order"}), unused=found[1].unused,
                               global_quant_config={"weight": spec()})  # fmt: skip


def test_what_is_written_has_every_key_that_quark_reads() -> None:
    short = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    said = Quark().stored_config(
        config(short, layer_quant_config={"a": {"weight": spec("fp4", "per_group", **MX)}}), {}
    )
    assert said["exclude"] == [] and said["layer_type_quant_config"] == {}
    assert said["export"] == {"pack_method": "reorder", "weight_format": "real_quantized"}
    weight = said["global_quant_config"]["weight"]
    assert weight["observer_cls"] == "PerTensorMinMaxObserver" and weight["group_size"] is None
    assert said["layer_quant_config"]["a"]["input_tensors"] is None
    written, plain = QuarkConfig.from_dict(said).specs("x"), config(short).specs("x")
    assert isinstance(written, dict) and isinstance(plain, dict)
    assert (
        written["weight"]
        and plain["weight"]
        and written["weight"] == replace(plain["weight"], observer=weight["observer_cls"])
    )


WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"weight": spec("int5")}, "field global_quant_config, 'weight', 'dtype'", "'int5'", "int2, uint2, int3, int4, "),
    ({"weight": spec(is_dynamic=None)}, "field global_quant_config, 'weight', 'is_dynamic'", "None", "a value, which int8 needs"),
    ({"weight": spec(symmetric=None)}, "field global_quant_config, 'weight', 'symmetric'", "None", "a value, which int8 needs"),
    ({"weight": spec(qscheme="per_row")}, "field global_quant_config, 'weight', 'qscheme'", "'per_row'", "per_tensor, per_ch"),
    ({"weight": spec(ch_axis=None)}, "field global_quant_config, 'weight', 'ch_axis'", "None", "an integer, for per_channel"),
    (
        {"weight": spec(qscheme="per_group", group_size=0)},
        "field global_quant_config, 'weight', 'group_size'", "0", "a positive integer or -1 (the whole row)",
    ),
    ({"weight": [spec("fp4"), spec()]}, "field global_quant_config, 'weight'", "2 stages", "one stage"),
    ({"weight": "int8"}, "field global_quant_config, 'weight'", "str", "None or the config of a tensor"),
]  # fmt: skip


@pytest.mark.parametrize("layer, where, found, expected", WRONG)
def test_wrong_values_are_said(layer: dict[str, Any], where: str, found: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"quant_method": "quark", "global_quant_config": layer})
    start = (
        f"the quark config has a value out of range\n  where:    {where}\n  found:    {found}\n  expected: {expected}"
    )
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"export": {"weight_format": "fake_quantized"}}, "weight_format 'real_quantized'"),
        ({"export": {"pack_method": "other"}}, "pack_method 'reorder' or 'order'"),
        ({"algo_config": [{"name": "rotation", "r3": True}]}, "no rotation of keys and queries (r3)"),
        ({"exclude": "lm_head"}, "None or a list of module names"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**fields)
    assert caught.value.expected == found


# Integers of 2 and 3 bits, and rotated inputs


PACKED = {  # by the packing of amd-quark 0.13: integers [8, 16] and zero points [8, 8] of 8 groups
    "uint2": ("03ea0fe90fa53ea5fe94fa54ea50e940a543a503940f543f503e40fa43fa03e9", "2c71c61b6cb1c71861b2cb1c71861b2c"),
    "int3": (
        "24f9ff92da1600b6d9761292fc7f496d0b00db6c3b0949febfa4b605806db69d8424ff5f52db02c036db4e4292ff2fa9",
        "7c9717a660becb0b5330dfe5852998eff2c214cc7779610a",
    ),
}


@pytest.mark.parametrize("dtype", ["int2", *PACKED])
def test_integers_of_2_and_3_bits_lie_as_quark_packs_them(dtype: str) -> None:
    low, high = RANGES[dtype]
    integers = torch.arange(128) * 37 % 29 % (high - low + 1) + low
    zeros = torch.arange(64) * 11 % 13 % (high - low + 1) + low
    integers, zeros, scale = integers.reshape(8, 16), zeros.reshape(8, 8), torch.arange(1.0, 65.0).reshape(8, 8) / 8
    said, module = config(spec(dtype, "per_group", group_size=2, symmetric=False)), linear("fc", 8, 16)
    own = said.specs("fc")
    assert isinstance(own, dict) and own["weight"] is not None
    tensors = written(own["weight"], integers, scale, zeros)
    if dtype == "int2":  # a word for each, the other way round
        assert torch.equal(tensors["weight"], integers.t().int())
        assert torch.equal(tensors["weight_zero_point"], zeros.t().int())
    else:
        made = [bytes(tensors[name].flatten().tolist()).hex() for name in ("weight", "weight_zero_point")]
        assert tuple(made) == PACKED[dtype]
    packed = read(Quark(), said, module, InMemory({f"fc.{name}": tensor for name, tensor in tensors.items()}))
    wide = (each.repeat_interleave(2, 1) for each in (zeros, scale))
    assert torch.equal(value(packed), (integers - next(wide)) * next(wide))
    assert same_bits(Quark().write(said, module, packed), tensors)
    if dtype != "int2":
        with pytest.raises(ConfigError, match="whole groups, and whole bytes"):
            Quark().select(said, linear("fc", 6, 12), InMemory({"fc.weight": sample(6, 12)}), {"fc": FC})


def rotated(size: int | None = None) -> QuarkConfig:
    online = {"online_rotation_layers": ["fc"], "shared_parallel": False, "use_input_prescale": False}
    return config(algo_config=[{"name": "rotation", "r1": True, "rotation_size": size, "online_config": online}])


@pytest.mark.parametrize("kind", ["hadamard", "other", "trained", "shared", "scaled"])
def test_rotated_inputs(kind: str) -> None:
    """x @ W.T of the weight that was rotated with x: 1 and -1 are divided by the root of the matrix's size."""
    signs = torch.ones(1, 1)
    while len(signs) < 16:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
    if kind == "other":
        signs = signs[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    matrix = (
        torch.linalg.qr(sample(16, 16).double() + torch.eye(16))[0].contiguous()
        if kind == "trained"
        else signs.to(torch.int8)
    )
    if kind == "shared":
        matrix = torch.kron(torch.ones(1), torch.kron(signs, torch.tensor([[1, 1], [1, -1]]))).to(torch.int8)
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]])).to(torch.int8)
    said, x = rotated(16), torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    tensors = Quark().write(config(), FC, Quark().quantize(config(), FC, sample()))
    source = InMemory({f"fc.{name}": tensor for name, tensor in tensors.items()})
    source.tensors["model.shared_input_rotation_64" if kind == "shared" else "fc.input_rotation"] = matrix
    scale = torch.linspace(0.5, 1.5, K) if kind == "scaled" else torch.ones(K)
    if kind == "scaled":
        source.tensors["fc.input_prescale"] = scale
    selected = Quark().select(said, FC, source, {"fc": FC})
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims} == source.tensors.keys()
    packed = Quark().read(said, FC, selected, source)
    kinds = {"other": ["rotate"], "trained": ["rotate"], "scaled": ["scale", "hadamard"]}
    assert [each.transform.kind for each in packed.before] == kinds.get(kind, ["hadamard"])
    turn = matrix.double() if kind == "trained" else matrix.double() / len(matrix) ** 0.5
    want = (((x * scale).double().reshape(3, -1, len(turn)) @ turn).flatten(1) @ value(packed).double().t()).float()
    assert (call(packed, x) - want).norm() <= 1e-6 * want.norm()
    made = Quark().write(said, FC, packed)
    assert torch.equal(made["input_rotation"], matrix.float() if kind == "trained" else matrix)
    assert made["input_rotation"].dtype == (torch.float32 if kind == "trained" else torch.int8)
    assert ("input_prescale" in made) == (kind == "scaled")
    assert same_bits(again(said, packed).tensors, packed.tensors)


def test_a_rotation_without_its_matrix() -> None:
    tensors = Quark().write(config(), FC, Quark().quantize(config(), FC, sample()))
    with pytest.raises(CheckpointError) as caught:
        read(Quark(), rotated(), FC, InMemory({f"fc.{name}": tensor for name, tensor in tensors.items()}))
    assert str(caught.value) == (
        "a module whose input is rotated has no matrix\n"
        "  where:    fc\n"
        "  found:    weight, weight_scale, weight_zero_point\n"
        "  expected: input_rotation, or shared_input_rotation_64 for all modules with 64 inputs\n"
        "  try:      the checkpoint is incomplete: algo_config names this module in online_rotation_layers"
    )
    with pytest.raises(ConfigError, match="quark cannot quantize this module on the fly"):
        Quark().select(rotated(), FC, InMemory({"fc.weight": sample()}), {"fc": FC})


# Quantization, and every scheme there and back

SCHEMES: list[tuple[dict[str, Any], float]] = [  # and the largest error as a share of the largest weight of a scale
    *((spec(dtype, scheme, symmetric=symmetric), 1 / 120)
      for dtype, symmetric in (("int8", True), ("uint8", False), ("int8", False))
      for scheme in ("per_tensor", "per_channel", "per_group")),
    (spec("int8", "per_channel", ch_axis=1), 1 / 120),
    *((spec(dtype, scheme, symmetric=dtype == "int4"), 1 / 7)
      for dtype in ("int4", "uint4") for scheme in ("per_tensor", "per_channel", "per_group")),
    (spec("uint4", "per_group", group_size=-1, symmetric=False), 1 / 7),
    *((spec(dtype, scheme, symmetric=symmetric, group_size=8), bound) for scheme in ("per_channel", "per_group")
      for dtype, symmetric, bound in (("int2", True, 1.01), ("uint2", False, 0.7), ("int3", True, 0.4), ("int3", False, 0.3))),
    *((spec("fp8_e4m3", scheme), 1 / 16) for scheme in ("per_tensor", "per_channel")),
    (spec("fp8_e5m2", "per_channel"), 1 / 8),
    (spec("fp8_e4m3", "per_block", block_size=[16, 32]), 1 / 16),
    *((spec(dtype, "per_group", group_size=32, scale_calculation_mode=mode, **MX), bound)
      for dtype, bound in (("fp4", 1 / 3), ("fp6_e2m3", 1 / 8), ("fp6_e3m2", 1 / 6)) for mode in ("even", "floor", "ceil")),
]  # fmt: skip


@pytest.mark.parametrize(
    "weight, bound", SCHEMES, ids=lambda x: f"{x['dtype']}-{x['qscheme']}" if isinstance(x, dict) else ""
)
def test_every_scheme_there_and_back(weight: dict[str, Any], bound: float) -> None:
    for order in ("reorder", "order"):
        said = config(weight, export={"pack_method": order})
        packed = Quark().quantize(said, FC, sample())
        back = again(said, packed)
        assert back.format == packed.format and same_bits(back.tensors, packed.tensors)
        selected = Quark().select(said, FC, InMemory({"fc.weight": sample()}), {"fc": FC})
        assert isinstance(selected, Quantized) and selected.format == packed.format
        assert (value(packed) - sample()).abs().max() <= bound * 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_are_computed_in_the_models_dtype(dtype: torch.dtype) -> None:
    weight, module = sample(dtype=dtype), linear("fc", N, K, dtype={4: "f32"}.get(dtype.itemsize, str(dtype)[6:]))
    module = replace(module, dtype={"float16": "f16", "bfloat16": "bf16"}.get(module.dtype, module.dtype))
    packed = Quark().quantize(config(), module, weight)
    expected = (weight.abs().amax(1) / 127.5).clamp(min=2.0**-23)
    assert packed.tensors["scale"].dtype == dtype and torch.equal(packed.tensors["scale"].flatten(), expected)
    codes = torch.round(weight.float() * (1 / expected.float()[:, None])).clamp(-128, 127)
    assert torch.equal(packed.tensors["weight"].float(), codes)
    wide = Quark().quantize(config(spec(scale_type="float32")), module, weight)
    assert wide.tensors["scale"].dtype == torch.float32


# Activations


def rounded(x: torch.Tensor, **more: Any) -> torch.Tensor:
    """x after the rounding of a layer's input."""
    packed = Quark().quantize(config(input_tensors=spec(**(ACTIVATIONS | more))), FC, sample())
    (applied,) = packed.before
    return applied(x)


def test_dynamic_activations() -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(5))
    scale = x.abs().max() / 127.5
    assert torch.equal(rounded(x, qscheme="per_tensor"), torch.round(x * (1 / scale)).clamp(-128, 127) * scale)
    # One scale for a position: the batch shares it.
    scale = x.abs().amax((0, 2), keepdim=True) / 448
    ptpc = rounded(x, dtype="fp8_e4m3", ch_axis=1)
    assert torch.equal(ptpc, (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    most = torch.zeros(1, 32)
    most[0, :3] = torch.tensor([7.0, 1.0, 0.3])  # up to 8 at one bit of mantissa, so the scale is 2
    mx = rounded(most, dtype="fp4", qscheme="per_group", group_size=32, **MX)
    assert mx[0, :3].tolist() == [8.0, 1.0, 0.0]
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = torch.tensor((high - low) / 255)
    zero = -torch.round(torch.tensor(low) / step)
    codes = (torch.round(x * (1 / step)) + zero).clamp(0, 255)
    assert torch.allclose(rounded(x, dtype="uint8", qscheme="per_tensor", symmetric=False), (codes - zero) * step)


def test_static_activations_and_outputs() -> None:
    said = config(
        spec("fp8_e4m3", "per_tensor"),
        input_tensors=spec("uint8", "per_tensor", symmetric=False),
        output_tensors=spec("fp8_e4m3", "per_tensor"),
    )
    plain = Quark().write(said, FC, Quark().quantize(config(spec("fp8_e4m3", "per_tensor")), FC, sample()))
    static = {"input_scale": torch.tensor(0.5), "input_zero_point": torch.tensor(10, dtype=torch.uint8),
              "output_scale": torch.tensor(0.25)}  # fmt: skip
    packed = read(Quark(), said, FC, InMemory({f"fc.{name}": t for name, t in (plain | static).items()}))
    assert packed.before[0](torch.tensor([[-100.0, 0.3, 1000.0]])).tolist() == [[-5.0, 0.5, 122.5]]
    assert packed.after[0](torch.tensor([[500.0, 0.3]])).tolist() == [[112.0, 0.3125]]
    assert same_bits(again(said, packed).before[0].tensors, packed.before[0].tensors)
    assert Quark().write(said, FC, packed).keys() == (plain | static).keys()
    cache = replace(said, global_quant_config=said.global_quant_config | {"output_tensors": None})
    source = InMemory({f"fc.{name}": t for name, t in (plain | static).items()})
    selected = Quark().select(cache, FC, source, {})
    assert isinstance(selected, Quantized) and selected.note == "the scale of a key-value cache is not used"
    assert read(Quark(), cache, FC, source).after == ()


@pytest.mark.parametrize(
    "said, message",
    [
        (
            config(input_tensors=spec(qscheme="per_tensor")),
            "quark cannot quantize this module on the fly\n"
            "  where:    fc\n"
            "  found:    static scales for input_tensors\n"
            "  expected: is_dynamic true, or a checkpoint with scales\n"
            "  try:      quantize and export the model with quark, and compile that checkpoint",
        ),
        (
            config(spec(observer_cls="PerTensorPercentileObserver")),
            "quark cannot quantize this module on the fly\n"
            "  where:    fc\n"
            "  found:    PerTensorPercentileObserver\n"
            "  expected: a min-max observer\n"
            "  try:      quantize and export the model with quark, and compile that checkpoint",
        ),
        (
            config(bias=spec()),
            "quark's bias of this kind is not supported\n"
            "  where:    fc\n"
            "  found:    int8, per_channel, ch_axis 0, static\n"
            "  expected: no quantized bias\n"
            "  try:      export the model without it, or leave the module dense by 'exclude'",
        ),
        (
            config(spec("uint4", "per_group", group_size=48)),
            "quark cannot store this module's weight\n"
            "  where:    fc [48, 64]\n"
            "  found:    K = 64\n"
            "  expected: a multiple of the group, 48\n"
            "  try:      choose another group size or method, or leave the module dense by the config's skip list",
        ),
    ],
)
def test_what_needs_data_or_does_not_fit(said: QuarkConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Quark().select(said, FC, InMemory({"fc.weight": sample()}), {"fc": FC})
    assert str(caught.value) == message


BAD_SCALE = torch.ones(N)
BAD_SCALE[3] = torch.nan
DAMAGED = "the checkpoint and its quantization_config do not belong together, or a file is damaged"
BROKEN: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {"weight_zero_point": None},
        "a module quantized with quark lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    weight, weight_scale\n"
        "  expected: weight, weight_scale, weight_zero_point\n"
        "  try:      the checkpoint is incomplete: it must hold fc.weight_zero_point",
    ),
    (
        {"weight": torch.zeros(K, N, dtype=torch.int8)},
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight (module fc, 48 outputs, 64 inputs)\n"
        "  found:    i8 [64, 48]\n"
        "  expected: i8 [48, 64]\n"
        f"  try:      {DAMAGED}",
    ),
    (
        {"weight_scale": BAD_SCALE},
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.weight_scale (module fc)\n"
        "  found:    nan at [3]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        {"weight_zero_point": torch.ones(N, dtype=torch.int8)},
        "a symmetric weight has zero points\n"
        "  where:    fc.weight_zero_point (module fc)\n"
        "  found:    48 that are not 0\n"
        "  expected: nothing but 0\n"
        "  try:      correct 'symmetric' in the quantization_config, or export the model again",
    ),
]


@pytest.mark.parametrize("changed, message", BROKEN)
def test_a_broken_checkpoint_is_said_in_full(changed: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = Quark().write(config(), FC, Quark().quantize(config(), FC, sample())) | changed
    with pytest.raises(CheckpointError) as caught:
        read(Quark(), config(), FC, InMemory({f"fc.{name}": t for name, t in tensors.items() if t is not None}))
    assert str(caught.value) == message
