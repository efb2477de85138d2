"""CompressedTensors: its formats, by the folders of the real package and by weights quantized here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import parametrize
from in_memory import InMemory, linear
from safetensors.torch import load_file, save_file

import qcompile
from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import Packed
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.compressed_tensors_config import CompressedTensorsConfig
from qcompile.methods.index import method, parse_config
from qcompile.program import Module
from qcompile.repack import repack
from qcompile.safetensors_folder import SafetensorsFolder

CT = method("compressed-tensors")
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def config(*groups: Any, **fields: Any) -> CompressedTensorsConfig:
    named = {f"group_{i}": {"targets": ["Linear"]} | group for i, group in enumerate(groups)}
    return CompressedTensorsConfig.from_dict({"config_groups": named} | fields, lenient=True)


def weights(**args: Any) -> dict[str, Any]:
    return {"weights": args}


def random(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.3
    made[1] = 0.0
    return made.to(dtype)


def stored(c: CompressedTensorsConfig, module: Module, packed: Packed) -> InMemory:
    """What a checkpoint of this one module holds."""
    return InMemory({f"{module.path}.{name}": value for name, value in CT.write(c, module, packed).items()})


def read(c: CompressedTensorsConfig, module: Module, source: InMemory) -> Packed:
    selected = CT.select(c, module, source, {module.path: module})
    assert isinstance(selected, Quantized)
    every = {*selected.names.values(), *selected.also_claims}
    assert every == set(source.names()), "a tensor that nothing claims"
    return CT.read(c, module, selected, source)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: -0.0 compares too."""
    return tensor.flatten().clone().view(torch.uint8)


def same(a: Packed, b: Packed) -> bool:
    return a.format == b.format and all(torch.equal(raw(a.tensors[name]), raw(b.tensors[name])) for name in b.tensors)


# Folders of the real package


def modules(folder: Path, source: SafetensorsFolder, dtype: str) -> dict[str, Module]:
    """The linear modules of a folder, by the shapes in its config.json."""
    c = json.loads((folder / "config.json").read_text())
    hidden, kv = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    shapes |= {f"mlp.{name}_proj": (c["intermediate_size"], hidden) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, c["intermediate_size"])
    layers = range(c["num_hidden_layers"])
    paths = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}
    paths["lm_head"] = (c["vocab_size"], hidden)
    return {path: linear(path, *shape, dtype=dtype) for path, shape in paths.items()}


@parametrize("compressed_tensors")
def test_a_folder_of_the_real_package(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    source = SafetensorsFolder(folder)
    found, c = parse_config(None, data["quantization_config"], source) or (CT, CompressedTensorsConfig())
    assert found.name == "compressed-tensors" and isinstance(c, CompressedTensorsConfig)
    dtype = DTYPES[data.get("dtype") or data["torch_dtype"]]
    expected, here = load_file(folder / "reference.safetensors"), modules(folder, source, dtype)
    legacy = "marlin" in folder.name or "sparse" in folder.name
    for path, module in here.items():
        selected = CT.select(c, module, source, here)
        if isinstance(selected, Skip):
            assert path == "lm_head" and selected.reason == "ignore has 'lm_head'"
            continue
        packed = CT.read(c, module, selected, source)
        again = CT.write(c, module, packed)
        for name, tensor in again.items() if not legacy else ():
            assert torch.equal(raw(tensor), raw(source.read(f"{path}.{name}")))
            assert tensor.shape == source.read(f"{path}.{name}").shape
        weight = dequantize(packed.format, packed.tensors, module.n, module.k)
        if f"{path}.weight" in expected:
            assert torch.equal(weight, expected[f"{path}.weight"].float())
        if f"{path}.weight_original" in expected and not legacy:
            _the_same_on_the_fly(c, module, packed, expected[f"{path}.weight_original"].to(TORCH[dtype]))
        if f"{path}.probe_input" in expected:
            _the_same_layer(packed, weight, expected[f"{path}.probe_input"], expected[f"{path}.probe_output"], dtype)


def _the_same_on_the_fly(c: CompressedTensorsConfig, module: Module, packed: Packed, weight: torch.Tensor) -> None:
    """The weight alone: static activations would need calibration."""
    alone = {name: scheme.to_dict() | {"input_activations": None} for name, scheme in c.schemes.items()}
    alone = {name: scheme | {"format": c.stored_format(c.schemes[name])} for name, scheme in alone.items()}
    assert same(CT.quantize(replace(c, config_groups=alone), module, weight), packed)


def _the_same_layer(packed: Packed, weight: torch.Tensor, x: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    """One call of the layer. The package rounds activations in the model's dtype: in bfloat16, codes of values near the
    middle of two differ, by 2 ** -4 of the value for e4m3 and more for e2m1."""
    rounded = x.float()
    for each in packed.before:
        rounded = each(rounded)
    error = float((rounded @ weight.t() - want.float()).norm() / want.float().norm())
    assert error <= (1e-6 if dtype == "f32" else 3e-2 if packed.before else 3e-3)


def test_rounding_in_bfloat16_is_the_package_s() -> None:
    """With the package's own dtype the probes of an FP8 folder agree to the last rounding of the output."""
    from checkpoints import ROOT

    from qcompile.transforms.round_float import RoundFloat

    folder = ROOT / "compressed_tensors-float-fp8-dynamic"
    if not folder.exists():
        pytest.skip("no checkpoints on this machine")
    expected = load_file(folder / "reference.safetensors")
    for path in (name.removesuffix(".probe_input") for name in expected if name.endswith(".probe_input")):
        x, want = expected[f"{path}.probe_input"], expected[f"{path}.probe_output"].float()
        y = RoundFloat(dtype="bf16").apply(x.float(), {}).bfloat16().float() @ expected[f"{path}.weight"].float().t()
        assert float((y - want).norm() / want.norm()) < 3e-3


# Weights quantized here


def cases() -> list[tuple[dict[str, Any], int, int]]:
    out: list[tuple[dict[str, Any], int, int]] = []
    for bits in range(1, 9):
        for symmetric in (True, False):
            packed = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32}
            out.append((weights(**packed), 40, 96))
    out += [(weights(num_bits=3, symmetric=False, strategy="channel"), 21, 45)]
    out += [(weights(num_bits=4, symmetric=False, strategy="tensor"), 21, 45)]
    rounded = {"input_activations": {"strategy": "token", "dynamic": True}}
    for symmetric in (True, False):
        for more in ({"strategy": "channel"}, {"strategy": "tensor"}, {"strategy": "group", "group_size": 16}):
            out.append((weights(num_bits=8, symmetric=symmetric, **more) | rounded, 20, 48))
        out.append((weights(num_bits=4, symmetric=symmetric, strategy="channel") | rounded, 20, 48))
        block = {"strategy": "block", "block_structure": [16, 32]}
        out.append((weights(num_bits=8, symmetric=symmetric, **block) | rounded, 20, 48))
    fp8 = {"type": "float", "num_bits": 8}
    out += [(weights(**fp8, strategy="block", block_structure="16x32"), 20, 48)]
    out += [(weights(**fp8, strategy=s), 20, 48) for s in ("tensor", "channel")]
    mx = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    out += [(weights(num_bits=bits, **mx), 20, 64) for bits in (4, 6, 8)]
    out += [
        (weights(type="float", num_bits=4, strategy="tensor_group", group_size=16, scale_dtype="float8_e4m3fn"), 20, 64)
    ]
    return out


CASES = cases()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("group, n, k", CASES, ids=str)
def test_what_is_quantized_is_written_and_read(group: dict[str, Any], n: int, k: int, dtype: str) -> None:
    c, module = config(group), linear("up", n, k, dtype=dtype)
    weight = random(n, k, TORCH[dtype])
    selected = CT.select(c, module, InMemory({module.weight: weight}), {module.path: module})
    packed = CT.quantize(c, module, weight)
    assert isinstance(selected, Quantized) and selected.format == packed.format
    value = dequantize(packed.format, packed.tensors, n, k)
    args = next(iter(c.schemes.values())).weights
    assert args is not None
    step = (
        2 * float(weight.abs().max()) / (2**args.num_bits - 1) if args.type == "int" else float(weight.abs().max()) / 8
    )
    assert float((value - weight.float()).abs().max()) <= step * 1.1 or args.num_bits == 1
    source = stored(c, module, packed)
    again = read(c, module, source)
    assert same(packed, again) and again.before == packed.before
    written = CT.stored_config(c, {module.path: packed})
    assert written["quantization_status"] == "compressed" and written["format"] == selected_format(c)
    assert CompressedTensorsConfig.from_dict(written).to_dict() == written | {"quant_method": "compressed-tensors"}


def selected_format(c: CompressedTensorsConfig) -> str:
    return c.stored_format(next(iter(c.schemes.values())))


@pytest.mark.parametrize("group, n, k", CASES, ids=str)
def test_the_package_makes_and_reads_the_same(group: dict[str, Any], n: int, k: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(targets=["Linear"], **group)
    args, c = scheme.weights, config(group)
    for dtype in ("f32", "bf16"):
        module, weight = linear("up", n, k, dtype=dtype), random(n, k, TORCH[dtype])
        packed = CT.quantize(c, module, weight)
        ours = CT.write(c, module, packed)
        from qcompile.methods.compressed_tensors_quantize import _extremes

        low, high = _extremes(weight, next(iter(c.schemes.values())).weights)  # type: ignore[arg-type]
        state = {"weight": weight}
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
        scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
        scale = scale.reshape(1) if args.strategy == "tensor" else scale
        zero = zero.reshape(1) if args.strategy == "tensor" else zero
        state |= {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(selected_format(c))
        theirs = compressor.compress(state, scheme)
        assert {name: tuple(t.shape) for name, t in theirs.items()} == {n_: tuple(t.shape) for n_, t in ours.items()}
        for name, tensor in theirs.items():
            assert torch.equal(raw(tensor), raw(ours[name])), name
        back = compressor.decompress(dict(ours), scheme)["weight"]
        assert torch.equal(back.float(), dequantize(packed.format, packed.tensors, n, k))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("k", [96, 16])  # 16 codes of 3 bits take as many words either way
def test_the_packing_before_0_18_is_told_apart(bits: int, k: int) -> None:
    group = weights(num_bits=bits, symmetric=False, strategy="group", group_size=16)
    new, old = config(group, version="0.18.0"), config(group, version="0.12.2")
    module = linear("up", 16, k, dtype="bf16")
    packed = CT.quantize(new, module, random(16, k, torch.bfloat16))
    padded = replace(packed.format, padded=True)  # type: ignore[type-var]
    tensors = repack(packed, padded).tensors
    source = stored(new, module, packed)
    source.tensors |= {"up.weight_packed": tensors["packed"], "up.weight_zero_point": tensors["zero"]}
    found = read(old, module, source)
    assert found.format == padded
    # It is written as it would be today.
    assert same(read(new, module, stored(old, module, found)), packed)


def test_a_stored_order_of_the_groups() -> None:
    c = config(weights(num_bits=4, strategy="group", group_size=16, actorder="group", symmetric=False))
    module = linear("up", 24, 64, dtype="f16")
    plain = CT.quantize(
        config(weights(num_bits=4, strategy="group", group_size=16, symmetric=False)), module, random(24, 64)
    )
    source = stored(c, module, plain)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int32) // 16
    source.tensors["up.weight_g_idx"] = order
    packed = read(c, module, source)
    codes = dequantize(replace(plain.format, scale="f32"), plain.tensors | {"scale": torch.ones(24, 4)}, 24, 64)  # type: ignore[type-var]
    zero = CT.write(c, module, plain)  # codes less their own zeros: undo these, and take those of the order
    assert zero["weight_zero_point"].shape == (3, 4)
    from qcompile.pack import unpack

    fields = unpack(plain.format, plain.tensors, 24, 64)
    zeros, scales = fields["zero"][:, ::16], plain.tensors["scale"]
    want = ((fields["code"] - zeros[:, order.long()]).half() * scales[:, order.long()]).float()
    assert torch.equal(dequantize(packed.format, packed.tensors, 24, 64), want)
    assert not torch.equal(want, codes)
    source.tensors["up.weight_g_idx"] = torch.arange(64, dtype=torch.int32) // 16
    assert same(read(c, module, source), plain)
    with pytest.raises(ConfigError, match="an order of the columns by their activations needs calibration data"):
        CT.select(c, module, InMemory({"up.weight": random(24, 64)}), {"up": module})


@pytest.mark.parametrize("dense", [True, False])
def test_a_bit_mask_of_what_is_not_0(dense: bool) -> None:
    module, weight = linear("up", 6, 20, dtype="bf16"), random(6, 20, torch.bfloat16)
    weight[torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) < 0.6] = 0
    sparse = {"sparsity_config": {"format": "sparse-bitmask"}}
    c = config(**sparse) if dense else config(weights(type="float", strategy="channel"), **sparse)
    scale = torch.rand(6, 1).bfloat16()
    values = weight if dense else weight.to(torch.float8_e4m3fn)
    mask = values.float() != 0
    bits = torch.nn.functional.pad(mask, (0, 4)).reshape(6, 3, 8).long() << torch.arange(8)
    tensors = {"compressed": values.view(torch.int16 if dense else torch.uint8)[mask].view(values.dtype)}
    tensors |= {"bitmask": bits.sum(-1).to(torch.uint8), "shape": torch.tensor([6, 20])}
    tensors |= {"row_offsets": mask.sum(1).cumsum(0)} | ({} if dense else {"weight_scale": scale})
    source = InMemory({f"up.{name}": tensor for name, tensor in tensors.items()})
    packed = read(c, module, source)
    want = weight if dense else values.bfloat16() * scale
    assert torch.equal(dequantize(packed.format, packed.tensors, 6, 20), want.float())
    source.tensors["up.compressed"] = tensors["compressed"][:-1]
    with pytest.raises(CheckpointError, match="a bit mask does not fit what is kept"):
        read(c, module, source)


def test_float_weights_with_their_scales_are_rounded_by_them() -> None:
    c = config(weights(num_bits=4, strategy="group", group_size=16, symmetric=False), quantization_status="frozen")
    module, weight = linear("up", 8, 32), random(8, 32)
    packed = CT.quantize(c, module, weight)
    zero = torch.zeros(8, 2, dtype=torch.int8)
    scale = torch.full((8, 2), 0.1)
    source = InMemory({"up.weight": weight, "up.weight_scale": scale, "up.weight_zero_point": zero})
    found = read(c, module, source)
    assert found.format == packed.format
    want = torch.round(weight / 0.1).clamp(-8, 7) * scale[0, 0]
    assert torch.equal(dequantize(found.format, found.tensors, 8, 32), want)


# Which modules


def test_names_come_before_patterns_and_these_before_classes() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}},
        "b": {"targets": ["re:.*k_proj", "re:.*layers.1.*"], "weights": {"num_bits": 4, "strategy": "channel"}},
        "c": {"targets": ["model.layers.1.k_proj"], "weights": {"num_bits": 2, "strategy": "channel"}},
        "d": {"targets": ["re:model.layers.1"], "weights": {"num_bits": 3, "strategy": "channel"}},
    }
    c = CompressedTensorsConfig.from_dict({"config_groups": groups, "ignore": ["lm_head", "re:.*o_proj$"]})

    def bits(path: str, kind: Any = "Linear") -> int | None:
        scheme = c.scheme(replace(linear(path, 4, 4), kind=kind))
        return None if scheme is None or scheme.weights is None else scheme.weights.num_bits

    paths = ("model.layers.1.k_proj", "model.layers.0.k_proj", "model.layers.1.q_proj", "model.layers.0.q_proj")
    assert [bits(path) for path in paths] == [2, 4, 4, 8]
    assert bits("model.embed_tokens", "Embedding") is None
    assert c.ignored(linear("model.layers.0.o_proj", 4, 4)) == "re:.*o_proj$"
    assert c.ignored(linear("model.lm_head", 4, 4)) is None
    here = {path: linear(path, 4, 4) for path in (*paths, "lm_head")}
    floats = InMemory({m.weight: random(4, 4) for m in here.values()})
    with pytest.raises(ConfigError, match="the compressed-tensors config has a pattern that matches no module"):
        CT.select(c, here["lm_head"], floats, here)
    c = replace(c, ignore=["lm_head"])
    assert CT.select(c, here["lm_head"], floats, here) == Skip("ignore has 'lm_head'")
    none = CompressedTensorsConfig.from_dict({"config_groups": {"UNQUANTIZED": ["Linear"]}})
    assert CT.select(none, here["lm_head"], floats, here) == Skip("its scheme quantizes nothing")
    assert CT.select(CompressedTensorsConfig(), here["lm_head"], floats, here) == Skip(
        "no target of config_groups names it"
    )


def test_presets_are_those_of_the_package() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    from qcompile.methods.compressed_tensors_presets import PRESETS

    assert set(PRESETS) == set(PRESET_SCHEMES)
    for name in PRESETS:
        theirs = QuantizationConfig(config_groups={name: ["Linear"]}).to_dict()
        ours = CompressedTensorsConfig.from_dict({"config_groups": {name: ["Linear"]}})
        assert CompressedTensorsConfig.from_dict(theirs).schemes == ours.schemes
        again = QuantizationConfig.model_validate(ours.to_dict()).to_dict()
        assert again["config_groups"] == theirs["config_groups"]


# What is wrong


def error(message: str, where: str, found: str, expected: str, remedy: str = "") -> str:
    text = f"{message}\n  where:    {where}\n  found:    {found}\n  expected: {expected}"
    return text + (f"\n  try:      {remedy}" if remedy else "")


RANGE = "the compressed-tensors config has a value out of range"
STRATEGIES = "tensor, channel, group, block, token, tensor_group, attn_head"
WEIGHTS = "field 'config_groups', 'group_0', 'weights'"
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        weights(num_bit=4),
        error(
            "unknown field in the compressed-tensors config",
            WEIGHTS,
            "'num_bit', did you mean 'num_bits'?",
            "num_bits, type, symmetric, group_size, strategy, block_structure, dynamic, actorder, scale_dtype, "
            "zp_dtype, observer, observer_kwargs",
            "correct the name, or leave the field out",
        ),
    ),
    (weights(num_bits=0), error(RANGE, f"{WEIGHTS}, 'num_bits'", "0", "an integer from 1 to 32")),
    (weights(num_bits=5, type="float"), error(RANGE, f"{WEIGHTS}, 'num_bits'", "5", "4, 6 or 8 for floats")),
    (weights(strategy="row"), error(RANGE, f"{WEIGHTS}, 'strategy'", "'row'", STRATEGIES)),
    (
        weights(strategy="group"),
        error(RANGE, f"{WEIGHTS}, 'group_size'", "None", "a positive integer for the strategy 'group'"),
    ),
    (
        weights(strategy="channel", group_size=32),
        error(RANGE, f"{WEIGHTS}, 'group_size'", "32", "None or -1 unless the strategy is 'group' or 'tensor_group'"),
    ),
    (
        weights(group_size=-2),
        error(
            RANGE,
            f"{WEIGHTS}, 'group_size'",
            "-2",
            "None, -1 (strategy 'channel') or a positive integer (strategy 'group')",
        ),
    ),
    (
        weights(strategy="block"),
        error(RANGE, f"{WEIGHTS}, 'block_structure'", "None", "[rows, columns] with the strategy 'block' only"),
    ),
    (
        weights(strategy="block", block_structure=[0, 4]),
        error(RANGE, f"{WEIGHTS}, 'block_structure'", "[0, 4]", "a list of positive integers [rows, columns]"),
    ),
    (
        {"input_activations": {"strategy": "token"}},
        error(
            RANGE,
            "field 'config_groups', 'group_0', 'input_activations', 'dynamic'",
            "False",
            "True for the strategy 'token'",
        ),
    ),
    (
        {"input_activations": {"strategy": "channel"}},
        error(
            RANGE,
            "field 'config_groups', 'group_0', 'input_activations', 'strategy'",
            "'channel'",
            "token, tensor, group, tensor_group or attn_head",
        ),
    ),
    (
        {"targets": "Linear"},
        error(
            RANGE,
            "field 'config_groups', 'group_0', 'targets'",
            "'Linear'",
            "a list of module names, 're:' patterns or class names",
        ),
    ),
]


@pytest.mark.parametrize("group, message", WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_with_a_scheme(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(group)
    assert str(caught.value) == message


@pytest.mark.parametrize("group, _", WRONG, ids=lambda value: str(value)[:40])
def test_the_package_refuses_it_too(group: dict[str, Any], _: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    if group == weights(num_bits=0):
        return  # it takes any number
    with pytest.raises((ValueError, NotImplementedError, TypeError)):
        QuantizationConfig(config_groups={"group_0": {"targets": ["Linear"]} | group})


def test_what_is_wrong_with_a_config() -> None:
    with pytest.raises(ConfigError) as caught:
        CompressedTensorsConfig.from_dict({"config_groups": {"W9A16": ["Linear"]}})
    assert str(caught.value).startswith(
        error(RANGE, "field 'config_groups', 'W9A16'", "'W9A16'", "a preset: UNQUANTIZED, W4A16_ASYM")
    )
    transform = "field 'transform_config', 'config_groups', 'R1'"
    nowhere = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight"}]}
    for fields, where in (
        ({"format": "packed"}, "field 'format'"),
        ({"quantization_status": "done"}, "field 'quantization_status'"),
        ({"ignore": ["re:("]}, "fields 'targets' and 'ignore'"),
        ({"sparsity_config": {"format": "2:4"}}, "field 'sparsity_config', 'format'"),
        ({"kv_cache_scheme": {"num_bits": 8, "bits": 4}}, "field 'kv_cache_scheme'"),
        ({"transform_config": {"groups": {}}}, "field 'transform_config'"),
        ({"transform_config": {"config_groups": {"R1": {"type": "givens"}}}}, f"{transform}, 'type'"),
        ({"transform_config": {"config_groups": {"R1": nowhere}}}, f"{transform}, 'apply', 0, 'location'"),
        ({"transform_config": {"config_groups": {"R1": nowhere | {"head_dim": 0}}}}, f"{transform}, 'head_dim'"),
    ):
        with pytest.raises(ConfigError) as caught:
            config(weights(), **fields)
        assert caught.value.where == where
    assert CompressedTensorsConfig.from_dict({"run_compressed": False}).dequantize


def test_what_a_config_cannot_do_without_data() -> None:
    module = linear("up", 16, 32)
    source = InMemory({"up.weight": random(16, 32)})
    static = {"input_activations": {"type": "float", "strategy": "tensor", "dynamic": False}}
    group = weights(type="float") | static
    with pytest.raises(ConfigError) as caught:
        CT.select(config(group), module, source, {"up": module})
    assert str(caught.value) == error(
        "scales that are fixed before the model runs need calibration data",
        "up, 'input_activations'",
        "dynamic: False",
        "dynamic: True",
        "choose a scheme with dynamic activations, or start from a checkpoint that was calibrated",
    )
    with pytest.raises(ConfigError) as caught:
        CT.select(config(weights(num_bits=4, group_size=24)), module, source, {"up": module})
    assert str(caught.value) == error(
        "the group size does not divide the inputs of a module",
        "up [16, 32]",
        "group_size: 24",
        "a divisor of 32",
        "choose another group_size, or leave the module out by 'ignore'",
    )


def broken(change: Any) -> CheckpointError:
    c, module = config(weights(num_bits=4, group_size=16)), linear("up", 16, 32, dtype="bf16")
    source = stored(c, module, CT.quantize(c, module, random(16, 32, torch.bfloat16)))
    change(source.tensors)
    with pytest.raises(CheckpointError) as caught:
        read(c, module, source)
    return caught.value


def test_what_is_wrong_with_a_checkpoint() -> None:
    assert str(broken(lambda t: t.pop("up.weight_scale"))) == error(
        "a module quantized with compressed-tensors lacks a stored tensor",
        "up",
        "weight_packed, weight_shape",
        "weight_packed, weight_scale",
        "the checkpoint is incomplete: it must hold up.weight_scale",
    )
    wrong = broken(lambda t: t.update({"up.weight_packed": torch.zeros(16, 3, dtype=torch.int32)}))
    assert str(wrong) == error(
        "a stored tensor has the wrong shape",
        "up.weight_packed (module up, 16 outputs, 32 inputs)",
        "i32 [16, 3]",
        "i32 [16, 4]",
        "the checkpoint and its quantization_config do not belong together, or a file is damaged",
    )
    wrong = broken(lambda t: t["up.weight_scale"].__setitem__((2, 1), torch.nan))
    assert str(wrong) == error(
        "a stored tensor holds a number that is not finite",
        "up.weight_scale (module up)",
        "nan at [2, 1]",
        "finite numbers",
        "the file is damaged, or the quantization that wrote it failed for this module",
    )
    wrong = broken(lambda t: t.update({"up.weight_shape": torch.tensor([32, 16])}))
    assert str(wrong).splitlines()[0] == "a packed weight has another shape than its module"
    wrong = broken(lambda t: t.update({"up.weight_zero_point": torch.ones(16, 2, dtype=torch.int8)}))
    assert str(wrong).splitlines()[0] == "a symmetric weight has zero points"


def test_rounded_activations_alone() -> None:
    """A scheme without weights leaves them dense, in a checkpoint of floats and beside quantized ones."""
    rounded = {"input_activations": {"strategy": "token", "dynamic": True}}
    up, down = linear("up", 16, 32), linear("down", 16, 32)
    here = {"up": up, "down": down}
    groups = {"a": {"targets": ["up"]} | weights(strategy="channel"), "b": {"targets": ["down"]} | rounded}
    c = CompressedTensorsConfig.from_dict({"config_groups": groups})
    source = InMemory({m.weight: random(16, 32) for m in here.values()})
    assert isinstance(CT.select(c, down, source, here), Quantized)
    packed = CT.quantize(c, down, random(16, 32))
    assert packed.format.kind == "dense" and torch.equal(packed.tensors["weight"], random(16, 32))
    assert [each.transform.summary() for each in packed.before] == ["int8 per token"]
    alone = config(rounded)
    assert CT.prequantized(alone, source)
    again = CT.read(alone, down, CT.select(alone, down, source, here), source)  # type: ignore[arg-type]
    assert again.before == packed.before
    plain = replace(alone, dequantize=True)
    assert CT.read(plain, down, CT.select(plain, down, source, here), source).before == ()  # type: ignore[arg-type]


def test_an_order_of_columns_needs_packed_integers() -> None:
    args = {"num_bits": 8, "strategy": "group", "group_size": 16, "actorder": "group"}
    c, module = config(weights(**args) | {"format": "int-quantized"}), linear("up", 16, 32)
    source = stored(c, module, CT.quantize(c, module, random(16, 32)))
    source.tensors["up.weight_g_idx"] = torch.arange(32, dtype=torch.int32) % 2
    with pytest.raises(CheckpointError, match="an order of the columns is supported for packed integers only"):
        read(c, module, source)
    source.tensors["up.weight_g_idx"] = torch.full((32,), -1, dtype=torch.int32)
    assert read(c, module, source).format.kind == "int8"


def test_an_exponent_that_is_no_number() -> None:
    mx = weights(type="float", num_bits=4, group_size=32, scale_dtype="torch.uint8")
    c, module = config(mx), linear("up", 16, 64)
    source = stored(c, module, CT.quantize(c, module, random(16, 64)))
    source.tensors["up.weight_scale"][3, 1] = 255
    with pytest.raises(CheckpointError, match=r"the byte 255 at \[3, 1\]"):
        read(c, module, source)


# Whole models


class Layers(torch.nn.Module):
    """Two layers with odd sizes and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(33, 47)
        self.down = torch.nn.Linear(47, 21)
        for parameter in self.parameters():
            parameter.data = random(parameter.numel(), 2)[:, 0].reshape(parameter.shape).clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(torch.relu(self.up(x)))
        return made


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_odd_sizes_biases_and_rounded_outputs(target: str) -> None:
    model = Layers()
    c = config(
        weights(num_bits=8, strategy="channel")
        | {
            "input_activations": {"strategy": "token", "dynamic": True, "symmetric": False},
            "output_activations": {"type": "float", "strategy": "token", "dynamic": True},
        }
    )
    x = random(5, 33)[None]
    compiled = qcompile.compile(model, c, target=target, example_inputs=(x,))
    y = x
    for layer, path in ((model.up, "up"), (model.down, "down")):
        low, high = y.amin(-1, keepdim=True).clamp(max=0), y.amax(-1, keepdim=True).clamp(min=0)
        s = torch.where(high == low, 2.0**-23, (high - low) / 255)
        z = torch.round((-128 - low / s).clamp(-128, 127))
        y = (torch.round((y / s + z).clamp(-128, 127)) - z) * s
        y = y @ compiled.weight(path).t() + layer.bias
        s = y.abs().amax(-1, keepdim=True) / 448
        y = (y / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
        y = torch.relu(y) if path == "up" else y
    with torch.no_grad():
        found = compiled(x)
    # An accumulation in another order may move a value over the middle between two codes.
    assert float((found - y).norm() / y.norm()) < (1e-6 if target == "reference" else 2e-2)


@pytest.fixture(scope="module")
def with_cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of the package with scales for its keys and values, and where it came from."""
    from checkpoints import ROOT

    source = ROOT / "compressed_tensors-int-w8a8"
    if not source.exists():
        pytest.skip("no checkpoints on this machine")
    folder = tmp_path_factory.mktemp("cache")
    data = json.loads((source / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    data["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(data))
    tensors = load_file(source / "model.safetensors")
    for i in range(data["num_hidden_layers"]):
        tensors |= {f"model.layers.{i}.self_attn.{side}_scale": torch.tensor([0.01]) for side in "kv"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, source


def test_keys_and_values_are_rounded(with_cache: tuple[Path, Path]) -> None:
    folder, source = with_cache
    expected = load_file(source / "reference.safetensors")
    ids, plain = expected["input_ids"], expected["logits"]
    ours = {target: qcompile.compile(folder, target=target) for target in ("reference", "cpu")}
    logits = {target: model(input_ids=ids).logits for target, model in ours.items()}
    assert float((logits["cpu"] - logits["reference"]).norm() / plain.norm()) < 1e-5
    assert float((logits["reference"] - plain).norm() / plain.norm()) > 1e-3
    said = "model.layers.0.self_attn: keys and values are rounded, f8e4m3 static"
    assert said in ours["cpu"].report.notes and not ours["cpu"].report.fallbacks
    both = [model.generate(ids[:1], max_new_tokens=4) for model in ours.values()]
    assert torch.equal(*both)


def test_rounded_keys_and_values_are_those_of_the_package(with_cache: tuple[Path, Path]) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    folder, source = with_cache
    ids = load_file(source / "reference.safetensors")["input_ids"]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    ours = qcompile.compile(folder, target="reference")(input_ids=ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_a_missing_scale_of_keys(with_cache: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(with_cache[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="an attention module lacks a scale for its keys or values"):
        qcompile.compile(folder, target="reference")
