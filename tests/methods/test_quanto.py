"""Quanto: weights of 8, 4 and 2 bits stored and on the fly, optimum's map, static activations, and broken checkpoints."""

from __future__ import annotations

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

from qcompile.errors import CheckpointError, ConfigError
from qcompile.format import Packed
from qcompile.formats.quanto import group_of
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import parse_config
from qcompile.methods.quanto import MAP, Quanto, QuantoConfig
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder

Q = Quanto()
LONG = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CASES = [  # weights, outputs, inputs, dtype, how far values may be from the weight as a share of the largest
    ("int8", 19, 33, "f32", 0.005),
    ("int8", 1, 16, "bf16", 0.01),
    ("float8", 7, 24, "f16", 0.04),
    ("float8", 1, 5, "f32", 0.04),
    ("int4", 19, 33, "f32", 0.07),
    ("int4", 5, 160, "f16", 0.07),
    ("int2", 7, 384, "bf16", 0.4),
    ("int2", 5, 40, "f32", 0.4),
    ("int4", 3, 200, "f32", 0.07),
]


def sample(n: int, k: int, dtype: str = "f32") -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(FLOATS[dtype])


def stored(config: QuantoConfig, packed: Packed) -> InMemory:
    """The module "fc" as optimum saves it."""
    written = Q.write(config, fc(packed.N, packed.K), packed)
    return InMemory(
        {f"fc.{name}": tensor for name, tensor in written.items()}, sidecars=Q.sidecars(config, {"fc": packed})
    )


def read(source: InMemory, module: Module) -> Packed:
    found = Q.recognise({}, source)
    assert found is not None
    config = QuantoConfig.from_dict(found)
    selected = Q.select(config, module, source, {module.path: module})
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims} == set(source.names())
    return Q.read(config, module, selected, source)


@parametrize("quanto")
def test_a_real_checkpoint_is_recognised_read_written_and_made_again(folder: Path) -> None:
    source: Any = SafetensorsFolder(folder)
    found = parse_config(None, None, source, model_config(folder))
    assert found is not None and isinstance(found[1], QuantoConfig)
    config, dtype, seen = found[1], LONG[str(model_config(folder)["dtype"])], 0
    data, whole = load_file(folder / "reference.safetensors"), source.sidecar(MAP)
    for name, weight in data.items():
        path = name.removesuffix(".weight_original")
        if path == name:
            continue
        module = linear(path, *weight.shape, dtype=dtype)
        mine = {n: source.read(n) for n in source.names() if n.startswith(f"{path}.")}
        packed = read(InMemory(mine, sidecars={MAP: whole}), module)
        assert torch.equal(value(packed), data[f"{path}.weight"].float())
        made = Q.quantize(replace(config, activations=None), module, weight)
        assert same(replace(made, before=packed.before, after=packed.after), packed)
        assert same_bits({f"{path}.{n}": t for n, t in Q.write(config, module, packed).items()}, mine)
        assert Q.sidecars(config, {path: packed})[MAP][path] == whole[path]
        if f"{path}.probe_input" in data:
            x = data[f"{path}.probe_input"].float()
            for each in packed.before:
                x = each(x)
            y = torch.nn.functional.linear(x, value(packed))
            for each in packed.after:
                y = each(y)
            expected = data[f"{path}.probe_output"].float()  # rounded to the model's dtype
            assert (y - expected).norm() <= {"f32": 1e-6, "f16": 1e-3, "bf16": 4e-3}[dtype] * expected.norm()
        seen += 1
    assert seen == 4 and Q.stored_config(config, {}) == {}


@pytest.mark.parametrize("weights, n, k, dtype, step", CASES)
def test_what_is_made_is_what_is_announced_and_comes_back(
    weights: str, n: int, k: int, dtype: str, step: float
) -> None:
    config, module, weight = QuantoConfig(weights), fc(n, k, dtype), sample(n, k, dtype)
    selected = Q.select(config, module, InMemory({"fc.weight": weight}), {"fc": module})
    packed = Q.quantize(config, module, weight)
    assert selected == Quantized(packed.format)
    assert (value(packed) - weight.float()).abs().max() <= step * weight.float().abs().max()
    assert same(read(stored(config, packed), module), packed)
    assert value(Q.quantize(config, module, torch.zeros_like(weight))).eq(0).all()
    constant = Q.quantize(config, module, torch.full_like(weight, 0.5))
    assert (value(constant) - 0.5).abs().max() < 5e-3


@pytest.mark.parametrize("weights, n, k, dtype, step", CASES)
def test_parts_equal_the_packages(weights: str, n: int, k: int, dtype: str, step: float) -> None:
    nn = pytest.importorskip("optimum.quanto.nn")
    layer = torch.nn.Linear(k, n, bias=False, dtype=FLOATS[dtype])
    layer.weight = torch.nn.Parameter(sample(n, k, dtype), requires_grad=False)
    theirs = nn.QLinear.from_module(layer, weights={"float8": "qfloat8_e4m3fn"}.get(weights, f"q{weights}"))
    theirs.freeze()
    config = QuantoConfig(weights)
    packed = Q.quantize(config, fc(n, k, dtype), sample(n, k, dtype))
    assert same_bits(Q.write(config, fc(n, k, dtype), packed), dict(theirs.state_dict()))
    if weights in ("int8", "float8"):  # the others unpack with a compiled extension
        assert torch.equal(value(packed), theirs.weight.dequantize().float())


def test_groups() -> None:
    assert [group_of(k) for k in (96, 128, 256, 192, 160, 416, 129)] == [0, 0, 128, 96, 32, 32, 0]


def test_a_zero_point_is_an_integer() -> None:
    packed = Q.quantize(QuantoConfig("int4"), fc(4, 8), sample(4, 8))
    source = stored(QuantoConfig("int4"), packed)
    zero = torch.tensor([[3], [0], [15], [8]], dtype=torch.uint8)
    source.tensors["fc.weight._shift"] = zero
    found = read(source, fc(4, 8))
    data = packed.tensors["data"]
    codes = torch.cat([data & 15, data >> 4]).float()
    assert torch.equal(value(found), (codes - zero) * packed.tensors["scale"])


def test_static_scales_round_what_goes_in_and_what_comes_out() -> None:
    config, module = QuantoConfig("int8"), fc(2, 4)
    source = stored(config, Q.quantize(config, module, sample(2, 4)))
    source.sidecars[MAP]["fc"]["activations"] = "qint8"
    source.tensors |= {"fc.input_scale": torch.tensor(0.5), "fc.output_scale": torch.tensor(2.0)}
    packed = read(source, module)
    ((before,), (after,)) = packed.before, packed.after
    x = torch.tensor([[0.3, 0.75, -1.25, 100.0]])
    assert torch.equal(before(x), torch.tensor([[0.5, 1.0, -1.0, 63.5]]))
    assert torch.equal(before(before(x)), before(x))
    assert torch.equal(after(x), torch.tensor([[0.0, 0.0, -2.0, 100.0]]))
    again = stored(config, packed)
    assert same_bits(again.tensors, source.tensors) and again.sidecars == source.sidecars
    source.sidecars[MAP]["fc"]["activations"] = "qfloat8_e5m2"
    float8 = read(source, module)
    assert float8.before[0](torch.tensor([[0.6]])).item() == 0.625
    assert Q.sidecars(config, {"fc": float8}) == source.sidecars


def test_outputs_of_norms_are_rounded() -> None:
    source = InMemory(
        {"norm.input_scale": torch.ones(()), "norm.output_scale": torch.tensor(0.25)},
        sidecars={
            MAP: {
                "norm": {"weights": "none", "activations": "qint8"},
                "gone": {"weights": "none", "activations": "qint8"},
            }
        },
    )
    found = Q.outputs(QuantoConfig(activations="int8"), source)
    assert found.keys() == {"norm"} and found["norm"].claims == ("norm.input_scale", "norm.output_scale")
    assert torch.equal(found["norm"].applied(torch.tensor([0.3, 99.0])), torch.tensor([0.25, 31.75]))


def test_what_the_map_does_not_quantize_stays_dense() -> None:
    config = QuantoConfig("int8")
    source = stored(config, Q.quantize(config, fc(2, 4), sample(2, 4)))
    source.tensors["lm_head.weight"] = torch.zeros(3, 4)
    assert Q.select(config, linear("lm_head", 3, 4), source, {}) == Skip("the checkpoint stores its weight dense")


def test_a_float_model_without_a_map_is_none_of_quantos() -> None:
    assert Q.recognise({}, InMemory({"fc.weight": torch.zeros(2, 2)})) is None


def test_the_head_stays_dense_on_the_fly() -> None:
    head, module = linear("lm_head", 8, 4, output_embedding=True), fc(2, 4)
    modules = {"fc": module, "lm_head": head}
    source = InMemory({each.weight: torch.zeros(each.n, each.k) for each in modules.values()})
    found = Q.select(QuantoConfig(), head, source, modules)
    assert found == Skip("it is the output embedding, and such modules stay dense by default")
    by_name = QuantoConfig(modules_to_not_convert=["fc"])
    assert Q.select(by_name, module, source, modules) == Skip("modules_to_not_convert has 'fc'")
    assert isinstance(Q.select(by_name, head, source, modules), Quantized)


ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"weights": "int3"},
        "the quanto config has a value out of range\n"
        "  where:    field 'weights'\n"
        "  found:    'int3'\n"
        "  expected: float8, int8, int4 or int2",
    ),
    (
        {"activations": "int4"},
        "the quanto config has a value out of range\n"
        "  where:    field 'activations'\n"
        "  found:    'int4'\n"
        "  expected: None, int8 or float8",
    ),
    (
        {"weight": "int8"},
        "unknown field in the quanto config\n"
        "  found:    'weight', did you mean 'weights'?\n"
        "  expected: weights, activations, modules_to_not_convert\n"
        "  try:      correct the name, or leave the field out",
    ),
]


@pytest.mark.parametrize("data, message", ERRORS)
def test_what_is_wrong_with_a_config_is_said_in_full(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantoConfig.from_dict(data)
    assert str(caught.value) == message


def test_activations_need_data() -> None:
    module, config = fc(2, 4), QuantoConfig(activations="int8")
    with pytest.raises(ConfigError) as caught:
        Q.select(config, module, InMemory({"fc.weight": sample(2, 4)}), {"fc": module})
    assert str(caught.value) == (
        "the quanto config has a value out of range\n"
        "  where:    field 'activations'\n"
        "  found:    'int8'\n"
        "  expected: None: their scales need data\n"
        "  try:      calibrate the model with optimum-quanto and save it: its checkpoint is read"
    )


WRONG = "the checkpoint and its quantization_config do not belong together, or a file is damaged"
BROKEN: list[tuple[str, Any, str]] = [  # a tensor to replace, or None to remove it; or the map's entry
    (
        "weight._shift",
        None,
        "a module quantized with quanto lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    input_scale, output_scale, weight._data._data, weight._scale\n"
        "  expected: weight._data._data, weight._scale, weight._shift, input_scale, output_scale\n"
        "  try:      the checkpoint is incomplete: it must hold fc.weight._shift",
    ),
    (
        "weight._data._data",
        torch.zeros(3, 160, dtype=torch.uint8),
        "a stored tensor has the wrong shape\n"
        "  where:    fc.weight._data._data (module fc, 5 outputs, 160 inputs)\n"
        "  found:    u8 [3, 160]\n"
        "  expected: u8 [13, 32]\n"
        f"  try:      {WRONG}",
    ),
    (
        "weight._scale",
        torch.full((25, 1), math.inf),
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.weight._scale (module fc)\n"
        "  found:    inf at [0, 0]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        "weight",
        torch.zeros(5, 160),
        "a module quantized with quanto also has a dense weight\n"
        "  where:    fc\n"
        "  found:    fc.weight and fc.weight._data._data\n"
        "  expected: one of them\n"
        "  try:      the checkpoint says the weight twice: remove the one that is not meant",
    ),
    (
        "map",
        {"weights": "qint3", "activations": "none"},
        "quanto_qmap.json says of a module what is not supported\n"
        "  where:    quanto_qmap.json, 'fc'\n"
        "  found:    {'weights': 'qint3', 'activations': 'none'}\n"
        "  expected: weights and activations: none, qint8, qint4, qint2, qfloat8_e4m3fn, qfloat8_e5m2 "
        "(activations of 8 bits)",
    ),
    (
        "map",
        None,
        "quanto_qmap.json says of a module what is not supported\n"
        "  where:    quanto_qmap.json, 'fc'\n"
        "  found:    no entry\n"
        "  expected: an entry for each module that is stored quantized",
    ),
    (
        "input_scale",
        torch.tensor(0.0),
        "a scale of activations is not a positive number\n"
        "  where:    fc.input_scale (module fc)\n"
        "  found:    0.0\n"
        "  expected: a positive, finite number\n"
        "  try:      calibrate the model again",
    ),
]


@pytest.mark.parametrize("name, new, message", BROKEN)
def test_a_broken_checkpoint_is_said_in_full(name: str, new: Any, message: str) -> None:
    config, module = QuantoConfig("int4"), fc(5, 160, "f32")
    source = stored(config, Q.quantize(config, module, sample(5, 160)))
    source.sidecars[MAP]["fc"]["activations"] = "qint8"
    target: dict[str, Any] = source.sidecars[MAP] if name == "map" else source.tensors
    key = "fc" if name == "map" else f"fc.{name}"
    target.pop(key, None)
    if new is not None:
        target[key] = new
    with pytest.raises(CheckpointError) as caught:
        read(source, module)
    assert str(caught.value) == message
