"""AutoRound's floats: layers that auto-round 0.16.1 packed and ran, what is written and read, and broken files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from in_memory import InMemory, linear
from stored_modules import call, value

from qcompile.errors import CheckpointError, ConfigError
from qcompile.format import Packed
from qcompile.methods.auto_round import NOTE, AutoRound, AutoRoundConfig
from qcompile.methods.base import Quantized, Skip
from qcompile.program import Module

METHOD = AutoRound()
WEIGHT = ((torch.arange(64) * 37 % 61 - 30) / 64).reshape(2, 32)
X = ((torch.arange(64) * 29 % 53 - 26) / 16).reshape(2, 32)
MX = {"data_type": "mx_fp", "group_size": 32, "act_group_size": 32, "act_dynamic": True, "act_sym": True}
NV = {"data_type": "nv_fp", "bits": 4, "group_size": 16}
NV_ROUNDED = NV | {"act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_dynamic": True}
FP = {"data_type": "fp", "bits": 8, "group_size": -1}
FP_STATIC = FP | {"act_bits": 8, "act_data_type": "fp", "act_dynamic": False, "packing_format": "auto_round:fp8_static"}


@dataclass(frozen=True)
class Layer:
    """A layer of the package: its scheme, the bytes of its tensors, and what it makes of X."""

    said: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    y: list[list[float]]


def raw(text: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).reshape(shape)


FP4 = "4f6efae4975f7df0d5176f7ce2c6376efae4a74f7ef8d5076f7cf2c6276efbe4"
FP8 = (
    "fe6ef87ae8fe71f77be0fd73f57c00fc75f37d60fb77f17e68fa78ee7e6cf97a"
    "eafe70f87ae4fe72f67cd8fc74f47c58fc76f27e64fa78f07e6afa79ecfe6ef8"
)
EIGHT = torch.float8_e4m3fn
LAYERS = {
    "mxfp4": Layer(
        MX | {"bits": 4, "act_bits": 4, "act_data_type": "mx_fp"},
        {"weight_packed": raw(FP4, torch.uint8, 2, 16), "weight_scale": raw("7b7b", torch.uint8, 2, 1)},
        [[0.1640625, -0.296875], [-0.69140625, 1.4296875]],
    ),
    "mxfp8": Layer(
        MX | {"bits": 8, "act_bits": 8, "act_data_type": "mx_fp"},
        {"weight": raw(FP8, EIGHT, 2, 32), "weight_scale": raw("7575", torch.uint8, 2, 1)},
        [[0.4013671875, -0.4228515625], [-0.83984375, 1.404296875]],
    ),
    "mxfp4-rceil": Layer(
        MX | {"bits": 4, "act_bits": 4, "act_data_type": "mx_fp_rceil"},
        {"weight_packed": raw(FP4, torch.uint8, 2, 16), "weight_scale": raw("7b7b", torch.uint8, 2, 1)},
        [[0.1171875, -0.265625], [-0.8046875, 1.546875]],
    ),
    "nvfp4": Layer(
        NV_ROUNDED,
        {
            "weight_packed": raw(
                "3f6dfad4964f6de0c5175e7ce2b5276efad3964f6df8c4075e7ce1b5276efad3", torch.uint8, 2, 16
            ),
            "weight_scale": raw("7e7e7e7e", EIGHT, 2, 2),
            "weight_global_scale": raw("3433b345", torch.float32, 1),
            "input_global_scale": raw("edc4ce44", torch.float32, 1),
        },
        [[0.39295002818107605, 0.1692708134651184], [-0.872802734375, 1.523437261581421]],
    ),
    "fp8": Layer(
        FP_STATIC,
        {
            "weight": raw(
                "fe6df879e7fd70f67adffc72f47b00fb74f27c5ffa76f07d67f978ed7e6bf879"
                "e9fe6ff77ae3fd71f57bd7fc73f37c57fb75f17d63fa77ef7e69f978ebfe6df8",
                EIGHT,
                2,
                32,
            ),
            "weight_scale": raw("893a893a", torch.bfloat16, 2),
            "input_scale": raw("6e3b", torch.bfloat16, 1),
        },
        [[0.3984375, -0.55078125], [-0.71484375, 1.4453125]],
    ),
}


def read(config: AutoRoundConfig, module: Module, tensors: dict[str, torch.Tensor]) -> Packed:
    source = InMemory({f"fc.{name}": tensor for name, tensor in tensors.items()})
    selected = METHOD.select(config, module, source, {"fc": module})
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims} == source.tensors.keys()
    return METHOD.read(config, module, selected, source)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    names = ours.keys() == theirs.keys()
    return names and all(
        ours[name].shape == tensor.shape and torch.equal(bits(ours[name]), bits(tensor))
        for name, tensor in theirs.items()
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_the_real_package(name: str) -> None:
    layer = LAYERS[name]
    config = AutoRoundConfig.from_dict(
        layer.said | {"packing_format": layer.said.get("packing_format", "auto_round:llm_compressor")}
    )
    module = linear("fc", 2, 32, dtype="bf16")
    packed = read(config, module, layer.tensors)
    y = call(packed, X)
    assert torch.allclose(y, torch.tensor(layer.y), rtol=0, atol=4e-3 if name == "fp8" else 1e-6)
    assert same(METHOD.write(config, module, packed), layer.tensors)
    written = METHOD.stored_config(config, {"fc": packed})
    assert replace(AutoRoundConfig.from_dict(written), unused={}) == replace(config, unused={})
    assert written["act_sym"] is True and written["act_group_size"] == {"fp": 0, "nv_fp": 16}.get(config.data_type, 32)
    if config.data_type == "mx_fp":
        made = METHOD.quantize(config, module, WEIGHT)
        assert same(METHOD.write(config, module, made), layer.tensors) and made.before == packed.before


SCHEMES: list[dict[str, Any]] = [
    MX | {"bits": 4, "act_bits": 8}, MX | {"bits": 8}, NV, NV_ROUNDED, FP, FP | {"group_size": 0}, FP | {"group_size": 16},
    FP_STATIC,
]  # fmt: skip


@pytest.mark.parametrize("said", SCHEMES, ids=lambda said: "-".join(map(str, said.values())))
def test_what_is_stored_is_read_and_written(said: dict[str, Any]) -> None:
    """Tensors by the documented layout; what they are worth by its formula."""
    config, module = AutoRoundConfig.from_dict(said), linear("fc", 6, 64, dtype="bf16")
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(6, 4, generator=generator) + 0.5
    four = config.bits == 4
    codes = torch.randint(0, 256, (6, 32), generator=generator).to(torch.uint8)
    floats = (torch.randn(6, 64, generator=generator) * 50).to(EIGHT)
    tensors = {"weight_packed" if four else "weight": codes if four else floats}
    entries = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    plain = entries[torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()] if four else floats.float()
    if config.data_type == "mx_fp":
        tensors["weight_scale"] = torch.randint(110, 130, (6, 2), generator=generator).to(torch.uint8)
        want = plain * torch.exp2(tensors["weight_scale"].float() - 127).repeat_interleave(32, 1)
    elif config.data_type == "nv_fp":
        tensors |= {"weight_scale": scale.to(EIGHT), "weight_global_scale": torch.tensor([7.5])}
        want = plain * (scale.to(EIGHT).float() / 7.5).repeat_interleave(16, 1)
    else:
        count = {-1: 6, 0: 1, 16: 24}[config.group_size]
        stored = scale.flatten()[:count].bfloat16()
        tensors["weight_scale"] = stored
        wide = stored.reshape(-1, 4).repeat_interleave(16, 1) if count == 24 else stored[:, None]
        want = (plain * wide.float()).bfloat16().float()
    static = {"nv_fp": "input_global_scale", "fp": "input_scale"}.get(config.data_type, "")
    if static and config.act_bits is not None:
        tensors[static] = torch.tensor([3.25]) if static == "input_global_scale" else torch.tensor([0.125]).bfloat16()
    packed = read(config, module, tensors)
    assert torch.equal(value(packed), want) and len(packed.before) == (config.act_bits is not None)
    assert same(METHOD.write(config, module, packed), tensors)


def test_layers_that_differ_and_dense_ones() -> None:
    own = {
        "fc.up": {"bits": 8, "act_bits": 8},
        "fc.gate": {"bits": 16, "act_bits": 16},
        "fc.int": {"data_type": "int", "act_bits": 16},
    }
    config = AutoRoundConfig.from_dict(MX | {"bits": 4, "act_bits": 4, "act_data_type": "mx_fp", "extra_config": own})
    found = {name: config.floats(f"fc.{name}") for name in ("up", "down", "int")}
    assert found["up"] is not None and (found["up"].bits, found["up"].act_bits) == (8, 8)
    assert found["down"] is not None and found["down"].bits == 4 and found["int"] is None
    gate = linear("fc.gate", 2, 32)
    source = InMemory({"fc.gate.weight": WEIGHT, "fc.up.weight_scale": torch.zeros(2, 1)})
    assert METHOD.select(config, gate, source, {}) == Skip("the checkpoint stores its weight dense")
    layers = {path: linear(path, 32, 32) for path in ("model.layers.0.down", "lm_head")}
    config = replace(config, extra_config=None)
    floats = InMemory({module.weight: torch.ones(32, 32) for module in layers.values()})
    selected = METHOD.select(config, layers["model.layers.0.down"], floats, layers)
    assert isinstance(selected, Quantized) and selected.format.kind == "fp4" and selected.note == NOTE


def message(error: type[Exception], call_: Any) -> str:
    with pytest.raises(error) as caught:
        call_()
    return str(caught.value)


@pytest.mark.parametrize(
    ("said", "field", "found"),
    [
        (MX | {"bits": 6}, "bits", "6 with data_type 'mx_fp'"),
        (NV | {"group_size": 32}, "group_size", "32 with data_type 'nv_fp'"),
        (FP | {"sym": False}, "sym", "False with data_type 'fp'"),
        (NV | {"act_bits": 4}, "act_bits", "4, act_data_type 'nv_fp' with data_type 'nv_fp'"),
        (FP_STATIC | {"act_dynamic": True}, "act_bits", "8, act_data_type 'fp' with data_type 'fp'"),
        (MX | {"bits": 4, "extra_config": {"fc": {"bits": 3}}}, "extra_config', 'fc', field 'bits", "3 with data_type 'mx_fp'"),
    ],
)  # fmt: skip
def test_schemes_that_no_layer_loads(said: dict[str, Any], field: str, found: str) -> None:
    text = message(ConfigError, lambda: AutoRoundConfig.from_dict(said))
    assert text.startswith(
        f"the auto-round config has a value out of range\n  where:    field '{field}'\n  found:    {found}\n"
    )


def test_broken_files_and_what_needs_calibration() -> None:
    layer, module = LAYERS["mxfp4"], linear("fc", 2, 32)
    config = AutoRoundConfig.from_dict(layer.said)
    assert message(CheckpointError, lambda: read(config, module, {"weight_scale": layer.tensors["weight_scale"]})) == (
        "a module quantized with auto-round lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    weight_scale\n"
        "  expected: weight_packed, weight_scale\n"
        "  try:      the checkpoint is incomplete: it must hold fc.weight_packed"
    )
    short = layer.tensors | {"weight_scale": torch.zeros(2, 2, dtype=torch.uint8)}
    assert "a stored tensor has the wrong shape" in message(CheckpointError, lambda: read(config, module, short))
    nan = layer.tensors | {"weight_scale": torch.tensor([[123], [255]], dtype=torch.uint8)}
    assert "found:    the byte 255 at [1, 0]" in message(CheckpointError, lambda: read(config, module, nan))
    assert "AutoRound's floats with float scales come from checkpoints only" in message(
        ConfigError, lambda: METHOD.quantize(AutoRoundConfig.from_dict(NV), module, WEIGHT)
    )
