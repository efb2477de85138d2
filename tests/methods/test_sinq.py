"""SINQ: configs, the sidecar, the quantizer, tiles of both kinds, and what is said about broken files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoints import config as model_config
from checkpoints import parametrize
from in_memory import InMemory, linear
from safetensors.torch import load_file

from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import Packed
from qcompile.formats.tables import NF4
from qcompile.methods import sinq_rounding
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.index import parse_config
from qcompile.methods.sinq import SIDECAR, Sinq, SinqConfig
from qcompile.pack import unpack
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder

N, K = 64, 128
METHOD = Sinq()
MODULE = linear("fc", N, K)


def sample(n: int = N, k: int = K) -> torch.Tensor:
    """A weight whose columns differ, with a row of zeros and a constant one."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, k, generator=generator) * 0.05 * (0.5 + torch.rand(k, generator=generator))
    weight[0], weight[1] = 0.0, 0.02
    return weight


def stored(config: SinqConfig, weight: torch.Tensor | None = None) -> InMemory:
    """A checkpoint that holds one module "fc", as the method writes it."""
    weight = sample() if weight is None else weight
    module = linear("fc", *weight.shape)
    packed = METHOD.quantize(config, module, weight)
    made = METHOD.write(config, module, packed)
    tensors = {f"fc.{name}": tensor for name, tensor in made.items()}
    return InMemory(tensors, sidecars=METHOD.sidecars(config, {"fc": packed}))


def read(config: SinqConfig, source: InMemory, module: Module = MODULE) -> Packed:
    selected = METHOD.select(config, module, source, {"fc": module})
    assert isinstance(selected, Quantized)
    assert {*selected.names.values(), *selected.also_claims} == source.tensors.keys()
    return METHOD.read(config, module, selected, source)


def value(packed: Packed) -> torch.Tensor:
    """The weight that acts on the layer's own input."""
    held = dequantize(packed.format, packed.tensors, packed.N, packed.K)
    return packed.before[0].weight(held) if packed.before else held


def same(left: Packed, right: Packed) -> bool:
    pairs = [(left.tensors, right.tensors)]
    pairs += [(a.tensors, b.tensors) for a, b in zip(left.before, right.before, strict=True)]
    return left.format == right.format and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs
    )


# Configs


def test_the_fields_are_those_of_transformers() -> None:
    config = pytest.importorskip("transformers").SinqConfig
    assert SinqConfig.from_dict(config().to_dict()).to_dict() == SinqConfig().to_dict()
    theirs = config(nbits="8", group_size=128, tiling_mode="2D", method="ASINQ", modules_to_not_convert=["lm_head"])
    ours = SinqConfig.from_dict(theirs.to_dict())
    assert (ours.nbits, ours.group_size, ours.tiling_mode, ours.algorithm) == (8, 128, "2D", "asinq")
    said = ours.to_dict()
    assert said == {name: item for name, item in theirs.to_dict().items() if name != "_extra_kwargs"}
    assert SinqConfig.from_dict(said).to_dict() == said
    assert SinqConfig.from_dict({"nbits": "3", "group_size": "32"}) == SinqConfig(3, 32)


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"nbits": 7}, "nbits", "8, 6, 5, 4, 3, 2, 1"),
        ({"group_size": 20}, "group_size", "a multiple of 8"),
        ({"tiling_mode": "3D"}, "tiling_mode", "'1D' or '2D'"),
        (
            {"algorithm": "sink"},
            "algorithm",
            "sinq, asinq, or parts joined by _: sinq, rtn, dual, hqq, awq, l1, l2, nf4, nf3, noz, quantaux, nogemlite",
        ),
        ({"algorithm": "sinq_nf4", "nbits": 3}, "nbits", "4, the bits of sinq_nf4"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        SinqConfig(**fields)
    assert str(error.value) == (
        f"the sinq config has a value out of range\n  where:    field {name!r}\n"
        f"  found:    {fields[name]!r}\n  expected: {expected}"
    )


def test_an_unknown_field() -> None:
    with pytest.raises(ConfigError, match="unknown field in the sinq config"):
        SinqConfig.from_dict({"nbit": 4})


def test_asinq_is_not_made_on_the_fly() -> None:
    with pytest.raises(ConfigError) as error:
        METHOD.select(SinqConfig(algorithm="asinq"), MODULE, InMemory({"fc.weight": sample()}), {"fc": MODULE})
    assert str(error.value) == (
        "asinq cannot quantize on the fly\n  where:    field 'method'\n  found:    'asinq'\n"
        "  expected: 'sinq', or a checkpoint that was quantized with it\n"
        "  try:      quantize with the sinq package and activations, or choose the method 'sinq'"
    )


# Checkpoints


@parametrize("sinq")
def test_original_weights_give_the_checkpoint_and_it_is_written_back(folder: Path) -> None:
    source, data = SafetensorsFolder(folder), cast(Any, model_config(folder))
    found = parse_config(None, data["quantization_config"], source, data)
    assert found is not None
    sinq, config = cast(tuple[Sinq, SinqConfig], found)
    for name, weight in load_file(folder / "reference.safetensors").items():
        if not name.endswith(".source_weight"):
            continue
        path = name.removesuffix(".source_weight")
        module = linear(path, *weight.shape)
        selected = sinq.select(config, module, source, {path: module})
        assert isinstance(selected, Quantized)
        held = sinq.read(config, module, selected, source)
        assert same(held, sinq.quantize(config, module, weight))
        for key, tensor in sinq.write(config, module, held).items():
            assert torch.equal(tensor, source.read(f"{path}.{key}")), key
        (said,) = sinq.sidecars(config, {path: held}).values()
        sidecar = source.sidecar(SIDECAR)
        assert sidecar is not None
        kept = {"compute_dtype": sidecar[path]["meta"]["compute_dtype"]}
        assert said[path]["meta"] | kept == sidecar[path]["meta"]


CONFIGS = [
    *(SinqConfig(nbits, 32, mode) for nbits in (8, 6, 5, 4, 3, 2, 1) for mode in ("1D", "2D")),
    *(SinqConfig(4, 32, mode, f"{name}_nf4") for mode in ("1D", "2D") for name in ("sinq", "rtn")),
    SinqConfig(3, 64, "1D", "sinq_nf3"),
    *(SinqConfig(nbits, 64, mode, "sinq_noz") for nbits in (4, 3) for mode in ("1D", "2D")),
    SinqConfig(4, 64, "1D", "sinq_nf4_quantaux"),
    SinqConfig(4, 64, "2D", "sinq_noz_quantaux"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.algorithm}-{c.nbits}-{c.tiling_mode}")
def test_what_is_written_is_read_back(config: SinqConfig) -> None:
    made = METHOD.quantize(config, MODULE, sample())
    source = stored(config)
    assert same(read(config, source), made)
    error = (value(made) - sample()).norm() / sample().norm()
    assert error < {1: 1.2, 2: 0.55, 3: 0.4}.get(config.nbits, 0.2)


def test_the_columns_of_a_tile_are_evened_out() -> None:
    size = torch.linspace(1, 3, 64).repeat(2)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(4)) * size
    plain = value(METHOD.quantize(SinqConfig(4, 64, algorithm="rtn"), MODULE, weight))
    even = value(METHOD.quantize(SinqConfig(4, 64), MODULE, weight))
    assert ((even - weight) / size).norm() < 0.9 * ((plain - weight) / size).norm()


def test_heavy_tails_are_rounded_as_they_are() -> None:
    weight = sample()
    weight[5, 7] = 30.0
    packed = METHOD.quantize(SinqConfig(4, 64), MODULE, weight)
    assert packed.before[0].tensors["scale"].eq(1).all()
    with_table = METHOD.quantize(SinqConfig(4, 64, algorithm="sinq_nf4"), MODULE, weight)
    assert same(with_table, METHOD.quantize(SinqConfig(4, 64, algorithm="rtn_nf4"), MODULE, weight))


@pytest.mark.parametrize(("k", "group"), [(96, 32), (48, 16), (128, 64)])
def test_groups_are_halved_until_they_divide_the_inputs(k: int, group: int) -> None:
    module, config = linear("fc", 64, k), SinqConfig(4, 64)
    made = METHOD.quantize(config, module, sample(64, k))
    assert made.format.to_json()["group"] == group
    assert same(read(config, stored(config, sample(64, k)), module), made)


def test_a_single_row_is_rounded_as_it_is() -> None:
    weight = sample()[2:3]
    packed = METHOD.quantize(SinqConfig(4, 64, algorithm="sinq_nf4"), linear("fc", 1, K), weight)
    assert packed.before[0].tensors["scale"].eq(1).all()
    assert (value(packed) - weight).abs().max() < 0.2 * weight.abs().max()


def test_the_nearest_entry_of_a_table_is_the_lower_of_two() -> None:
    table = torch.tensor(NF4)
    values = torch.cat([torch.linspace(-2, 2, 4001), table, (table[1:] + table[:-1]) / 2])
    expected = (values[:, None] - table).abs().argmin(-1)
    assert torch.equal(sinq_rounding._nearest(values, NF4).long(), expected)


def test_scales_of_8_bits_are_rounded_after_both_steps() -> None:
    packed = METHOD.quantize(SinqConfig(4, 64), MODULE, sample())
    held, tensors = unpack(packed.format, packed.tensors, N, K), packed.tensors
    scale = (tensors["scale_x"] * tensors["scale_s"] + tensors["scale_m"]).reshape(N, 2, 1)
    zero = (tensors["zero_x"] * tensors["zero_s"] + tensors["zero_m"]).reshape(N, 2, 1)
    assert scale.dtype == torch.float16
    expected = (held["code"].reshape(N, 2, 64) - zero.float()) * scale.float()
    assert torch.equal(dequantize(packed.format, tensors, N, K), expected.reshape(N, K))


# Which modules


def test_which_modules_are_quantized() -> None:
    embedding = Module("embed", "Embedding", 64, K, "embed.weight")
    head = linear("lm_head", 64, K, output_embedding=True)
    modules = {module.path: module for module in (embedding, MODULE, head)}
    source = InMemory({module.weight: torch.zeros(module.n, module.k) for module in modules.values()})

    def dense(config: SinqConfig) -> dict[str, str]:
        said = {path: METHOD.select(config, module, source, modules) for path, module in modules.items()}
        return {path: found.reason for path, found in said.items() if isinstance(found, Skip)}

    common = {"embed": "Embedding is not converted by the method (only Linear)"}
    assert dense(SinqConfig()) == common
    skipped = SinqConfig(modules_to_not_convert=["lm_head"])
    assert dense(skipped) == common | {"lm_head": "modules_to_not_convert has 'lm_head'"}
    with pytest.raises(ConfigError, match="matches no module"):
        dense(SinqConfig(modules_to_not_convert=["head2"]))
    modules["lm_head"] = replace(head, weight="embed.weight", tied=("embed",))
    assert dense(SinqConfig()) == common | {"lm_head": "its weight is tied to embed"}


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((64, 40), {}, "K = 40, groups of 64\n  expected: a multiple of 16 or more of the group halved"),
        ((33, 128), {"tiling_mode": "2D"}, "N = 33\n  expected: a multiple of the group, 64"),
        ((5, 64), {}, "5 rows of 64\n  expected: a multiple of 2"),
        ((6, 64), {}, "6 rows of 64\n  expected: a multiple of 32, whose scales share a range"),
    ],
)
def test_shapes_that_cannot_be_tiled(shape: tuple[int, int], fields: dict[str, Any], message: str) -> None:
    module = linear("fc", *shape)
    with pytest.raises(ConfigError) as error:
        METHOD.select(SinqConfig(**fields), module, InMemory({"fc.weight": torch.zeros(shape)}), {"fc": module})
    assert message in str(error.value)


# Broken checkpoints


def said(source: InMemory, config: SinqConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        read(config or SinqConfig(), source)
    return str(error.value)


def test_a_missing_sidecar() -> None:
    source = stored(SinqConfig())
    source.sidecars = {}
    assert said(source) == (
        "a module quantized with sinq is not described\n  where:    fc, tensors in memory\n  found:    no such file\n"
        f"  expected: an entry of 'fc' in {SIDECAR}\n  try:      the checkpoint is incomplete: get that file too"
    )


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("shape", [64, 64], "[64, 128]"),
        ("packing", "7bit", "8bit_u8, 6bit_32, 5bit_32, 4bit_u8, 3bit_32, 2bit_u8, 1bit_u8"),
        ("method", None, "the name of a method"),
        ("scale.shape", [4], "[rows, 1] or [tiles, rows, 1]"),
    ],
)
def test_a_wrong_sidecar(name: str, wrong: object, expected: str) -> None:
    source = stored(SinqConfig())
    source.sidecars[SIDECAR]["fc"]["meta"][name] = wrong
    assert said(source) == (
        f"a module quantized with sinq has a wrong {name}\n  where:    {SIDECAR}, fc\n  found:    {wrong!r}\n"
        f"  expected: {expected}\n"
        "  try:      the checkpoint does not belong to this architecture, or the file is damaged"
    )


def test_a_missing_tensor() -> None:
    source = stored(SinqConfig())
    del source.tensors["fc.meta.zero.s"]
    assert said(source).splitlines()[-1] == "  try:      the checkpoint is incomplete: it must hold fc.meta.zero.s"


def test_words_of_another_size() -> None:
    source = stored(SinqConfig())
    source.tensors["fc.W_q"] = source.tensors["fc.W_q"][:-1]
    assert said(source) == (
        "a stored tensor has the wrong shape\n  where:    fc.W_q (module fc, 64 outputs, 128 inputs)\n"
        "  found:    u8 [63, 64]\n  expected: u8 [64, 64]\n"
        "  try:      the checkpoint and its quantization_config do not belong together, or a file is damaged"
    )


@pytest.mark.parametrize("name", ["meta.scale.s", "meta.scale2"])
def test_a_number_that_is_not_finite(name: str) -> None:
    source = stored(SinqConfig())
    source.tensors[f"fc.{name}"] = source.tensors[f"fc.{name}"].clone()
    source.tensors[f"fc.{name}"][0, 1] = float("nan")
    assert said(source) == (
        f"a stored tensor holds a number that is not finite\n  where:    fc.{name} (module fc)\n"
        "  found:    nan at [0, 1]\n  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module"
    )
