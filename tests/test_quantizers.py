"""On the fly: codes and scales equal those that the real packages write for the same weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoints import ROOT, parametrize
from checkpoints import config as model_config
from in_memory import InMemory, linear
from safetensors.torch import load_file

from qcompile.dtypes import DTYPES
from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.format import Packed
from qcompile.methods.awq import AwqConfig
from qcompile.methods.base import MethodConfig, Quantized
from qcompile.methods.bitsandbytes import BnbConfig
from qcompile.methods.eetq import EetqConfig
from qcompile.methods.gptq import GptqConfig, find
from qcompile.methods.hqq import HqqConfig, HqqLayer, optimize
from qcompile.methods.index import method, parse_config
from qcompile.pack import unpack
from qcompile.safetensors_folder import SafetensorsFolder

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def sample(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A weight with a row of zeros, a constant row and an outlier where it has that many rows."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    if n > 3:
        weight[1], weight[2], weight[3, 0] = 0.0, 0.3, 4.0
    return weight.to(dtype)


def quantize(name: str, config: MethodConfig, weight: torch.Tensor) -> Packed:
    dtype = next(name for name, dtype in DTYPES.items() if dtype == weight.dtype)
    return method(name).quantize(config, linear("fc", *weight.shape, dtype=dtype), weight)


def value(packed: Packed) -> torch.Tensor:
    return dequantize(packed.format, packed.tensors, packed.N, packed.K)


@parametrize("bitsandbytes", "hqq", "eetq")
def test_a_checkpoints_original_weights_give_its_tensors(folder: Path) -> None:
    source: Any = SafetensorsFolder(folder)
    found = parse_config(None, cast(Any, model_config(folder)["quantization_config"]), source)
    assert found is not None
    reference, seen = load_file(folder / "reference.safetensors"), 0
    kept = model_config(folder).get("dtype") or model_config(folder)["torch_dtype"]
    short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[str(kept)]
    for name, weight in reference.items():
        path = name.removesuffix(".weight_original").removeprefix("original.").removesuffix(".weight")
        if name not in (f"{path}.weight_original", f"original.{path}.weight"):
            continue
        module = linear(path, *weight.shape, dtype=short)
        selected = found[0].select(found[1], module, source, {path: module})
        assert isinstance(selected, Quantized)
        stored, made = (
            found[0].read(found[1], module, selected, source),
            found[0].quantize(found[1], module, weight),
        )
        assert made.format == stored.format
        for tensor in stored.tensors:
            assert torch.equal(made.tensors[tensor], stored.tensors[tensor]), (path, tensor)
        seen += 1
    assert seen


@pytest.mark.parametrize("shape", [(64, 128), (33, 7), (5, 13), (128, 100), (1, 64), (1, 1), (300, 257)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4_bit_equals_the_package(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, double: bool
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = sample(*shape, dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    config = BnbConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    packed = quantize("bitsandbytes", config, weight)
    expected = {"weight": codes.reshape(-1, 1), "absmax": state.absmax}
    if double:
        expected["nested_absmax"] = state.state2.absmax
        assert packed.format.to_json()["offset"] == float(state.offset)
    assert packed.tensors.keys() == expected.keys()
    assert all(torch.equal(packed.tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_of_equal_blocks_equals_the_package(double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in (torch.zeros(4, 64), torch.full((4, 64), 0.5), sample(8, 64) * 1e-38):
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
        config = BnbConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
        packed = quantize("bitsandbytes", config, weight)
        assert torch.equal(packed.tensors["weight"], codes)
        assert torch.equal(packed.tensors["absmax"], state.absmax)


def test_double_quantized_scales_equal_the_package_for_many_values() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from qcompile.methods.bitsandbytes import quantize_scales

    scales = torch.rand(200_000, generator=torch.Generator().manual_seed(3))
    codes, absmax, offset = quantize_scales(scales)
    expected, state = functional.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert torch.equal(codes, expected) and torch.equal(absmax, state.absmax) and offset == float(scales.mean())


@pytest.mark.parametrize("dtype", FLOATS)
def test_bitsandbytes_int8_equals_the_package(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = sample(65, 100, dtype)
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    packed = quantize("bitsandbytes", BnbConfig(load_in_8bit=True), weight)
    assert torch.equal(packed.tensors["weight"], codes) and torch.equal(packed.tensors["SCB"], scale)


@pytest.mark.parametrize(
    "shape, group", [((64, 128), 64), ((96, 40), 8), ((333, 64), 64), ((48, 96), 96), ((320, 512), 128)]
)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_hqq_equals_the_package(shape: tuple[int, int], group: int, axis: int, nbits: float) -> None:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = sample(*shape)
    codes, meta = quantizer.quantize(
        weight.clone(), nbits=nbits, group_size=group, round_zero=nbits == 4, axis=axis, device="cpu", bitpack=False
    )
    grouped = weight.reshape(-1, group) if axis == 1 else weight.reshape(group, -1)
    code, scale, zero = optimize(grouped, HqqLayer(nbits, group, axis=axis))
    assert torch.equal(code, codes.float().reshape(code.shape))
    assert torch.equal(scale, meta["scale"]) and torch.equal(zero, meta["zero"])


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_hqq_packs_as_the_package(nbits: int, axis: int, dtype: torch.dtype) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    weight = sample(80, 128, dtype)
    layer = torch.nn.Linear(128, 80, bias=False, dtype=dtype)
    layer.weight.data.copy_(weight)
    config = hqq.BaseQuantizeConfig(nbits=nbits, group_size=64, axis=axis)
    theirs = hqq.HQQLinear(layer, quant_config=config, compute_dtype=dtype, device="cpu")
    packed = quantize("hqq", HqqConfig(nbits=nbits, group_size=64, axis=axis), weight)
    assert torch.equal(packed.tensors["W_q"], theirs.W_q.data)
    assert torch.equal(packed.tensors["scale"], theirs.meta["scale"])
    assert torch.equal(packed.tensors["zero"], theirs.meta["zero"])
    assert torch.equal(value(packed), theirs.dequantize().float())


def test_hqq_without_a_group_size_takes_whole_rows() -> None:
    packed = quantize("hqq", HqqConfig(group_size=None), sample(16, 40))
    assert packed.tensors["scale"].shape == (16, 1)


def gptq_row(weight: list[float], bits: int, sym: bool) -> tuple[list[int], float, int]:
    """GPTQ's rounding of one group, a number at a time: codes, scale and zero."""
    lo, hi = min(0.0, *weight), max(0.0, *weight)
    if sym:
        hi = max(-lo, hi)
        lo = -hi if lo < 0 else 0.0
    if lo == hi == 0:
        lo, hi = -1.0, 1.0
    top = 2**bits - 1
    scale = float(torch.tensor(hi, dtype=torch.float32) - torch.tensor(lo, dtype=torch.float32)) / top
    scale = float(torch.tensor(scale, dtype=torch.float32))
    zero = 2 ** (bits - 1) if sym else round(float(torch.tensor(-lo) / torch.tensor(scale)))
    return [min(max(round(float(torch.tensor(w) / torch.tensor(scale))) + zero, 0), top) for w in weight], scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_rounds_to_nearest_by_its_own_formula(bits: int, sym: bool) -> None:
    weight = sample(32, 96)
    weight[4] = weight[4].abs()  # a group without a negative weight has its own rule
    packed = quantize("gptq", GptqConfig(bits, group_size=32, sym=sym), weight)
    fields = unpack(packed.format, packed.tensors, 32, 96)
    for n in range(32):
        for at in range(0, 96, 32):
            codes, scale, zero = gptq_row(weight[n, at : at + 32].tolist(), bits, sym)
            assert fields["code"][n, at : at + 32].tolist() == codes
            assert fields["zero"][n, at] == zero
            assert fields["scale"][n, at] == torch.tensor(scale).half()


def test_gptq_packs_words_of_16_and_8_bits() -> None:
    """gptqmodel's `pack_dtype`, a word as it says: code 0 in the lowest bits."""
    weight = sample(9, 32)
    wide = quantize("gptq", GptqConfig(4, group_size=16), weight)
    for size, dtype in ((16, "int16"), (8, "int8")):
        narrow = quantize("gptq", GptqConfig(4, group_size=16, pack_dtype=dtype), weight)
        assert torch.equal(value(narrow), value(wide))
        assert (
            narrow.tensors["qweight"].shape == (128 // size, 9)
            and str(narrow.tensors["qweight"].dtype) == f"torch.{dtype}"
        )
        assert int(narrow.tensors["qweight"][0, 4]) & 0xFF == int(wide.tensors["qweight"][0, 4]) & 0xFF
    with pytest.raises(ConfigError, match="in words of 8"):
        method("gptq").select(GptqConfig(3, pack_dtype="int8"), linear("fc", 8, 32), InMemory({}), {})


def test_gptq_takes_a_short_last_group_and_whole_rows() -> None:
    weight = sample(32, 80)
    packed = quantize("gptq", GptqConfig(4, group_size=64), weight)
    assert packed.tensors["scales"].shape == (2, 32)
    alone = quantize("gptq", GptqConfig(4, group_size=16), weight[:, 64:].contiguous())
    assert torch.equal(value(packed)[:, 64:], value(alone))
    assert quantize("gptq", GptqConfig(4, group_size=-1), weight).tensors["scales"].shape == (1, 32)


@pytest.mark.parametrize("case, group, sym", [("actorder-static", 32, True), ("channel", 192, False)])
def test_gptq_scales_are_those_of_the_real_solver(case: str, group: int, sym: bool) -> None:
    path = ROOT / "gptq" / "solver.safetensors"
    if not path.is_file():
        pytest.skip(f"no checkpoints at {ROOT.name}")
    data = load_file(path)  # two of its cases find their groups before the solver moves weights
    weight = data["weight"].clone()
    if case == "actorder-static":  # this one after inputs that were never seen are dropped
        weight[:, data["hessian"].diagonal() == 0] = 0
    scale, zero = find(weight.reshape(48, -1, group), 4, sym)
    assert torch.allclose(scale, data[f"{case}.scale"], rtol=1e-6, atol=0)
    assert torch.equal(zero, data[f"{case}.zero"])


@pytest.mark.parametrize("bits, group, order", [(4, 64, "gemm"), (8, 128, "gemm"), (3, 32, "gemm"), (4, 64, "gemv")])
@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_rounds_to_nearest_by_its_own_formula(bits: int, group: int, order: str, zero_point: bool) -> None:
    weight = sample(64, 128)
    config = AwqConfig(bits, group, zero_point, format=order)
    packed = quantize("awq", config, weight)
    groups, top = weight.half().reshape(-1, group), 2**bits - 1
    if zero_point:  # autoawq's pseudo_quantize_tensor
        high, low = groups.amax(dim=1, keepdim=True), groups.amin(dim=1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / top
        zero = (-torch.round(low / scale)).clamp_(0, top)
        expected = (torch.clamp(torch.round(groups / scale) + zero, 0, top) - zero) * scale
    else:
        scale = groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
        expected = torch.clamp(torch.round(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    assert torch.equal(value(packed), expected.reshape(64, 128).float())


def test_awq_gemv_fast_differs_by_the_rounding_of_its_stored_product() -> None:
    weight = sample(64, 128)
    fast, plain = (quantize("awq", AwqConfig(group_size=64, format=order), weight) for order in ("gemv_fast", "gemm"))
    scale = unpack(plain.format, plain.tensors, 64, 128)["scale"].float()
    assert ((value(fast) - value(plain)).abs() <= scale * 15 * 2**-10).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_eetq_rounds_half_away_from_zero(dtype: torch.dtype) -> None:
    weight = torch.zeros(64, 64)
    weight[0, :6] = torch.tensor([128.0, 2.5, -2.5, 0.5, -0.5, 3.25])  # scale 1
    weight[1, :2] = torch.tensor([-128.0, 127.5])
    packed = quantize("eetq", EetqConfig(), weight.to(dtype))
    codes = unpack(packed.format, packed.tensors, 64, 64)["code"] - 128
    assert codes[0, :6].tolist() == [127, 3, -3, 1, -1, 3]
    assert codes[1, :2].tolist() == [-128, 127]
    assert (codes[2] == 127).all() and value(packed)[2].eq(0).all()  # an output of zeros
    assert packed.tensors["weight_scales"].dtype == (torch.float16 if dtype == torch.float16 else torch.float32)


@pytest.mark.parametrize(
    "name, config",
    [
        ("bitsandbytes", BnbConfig(load_in_4bit=True)),
        ("bitsandbytes", BnbConfig(load_in_8bit=True)),
        ("hqq", HqqConfig()),
        ("eetq", EetqConfig()),
        ("gptq", GptqConfig(4)),
        ("awq", AwqConfig()),
    ],
)
def test_select_announces_what_quantize_makes(name: str, config: MethodConfig) -> None:
    weight, module = sample(64, 128), linear("fc", 64, 128)
    selected = method(name).select(config, module, InMemory({"fc.weight": weight}), {"fc": module})
    assert isinstance(selected, Quantized) and not selected.names
    packed = method(name).quantize(config, module, weight)
    assert packed.format == selected.format
    assert selected.note.startswith("round-to-nearest: ") is (name in ("gptq", "awq"))
    worst = (value(packed) - weight)[4:].abs().max()
    assert worst < 0.05  # rows without an outlier come back to within a step


@pytest.mark.parametrize("name", ["bitsandbytes", "hqq", "eetq", "gptq", "awq"])
def test_a_weight_that_is_not_finite_is_an_error(name: str) -> None:
    required: dict[str, Any] = {"gptq": {"bits": 4}, "bitsandbytes": {"load_in_4bit": True}}.get(name, {})
    weight = sample(64, 128)
    weight[5, 7] = torch.inf
    with pytest.raises(CheckpointError) as caught:
        quantize(name, method(name).Config.from_dict(required), weight)
    assert str(caught.value) == (
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.weight (module fc)\n"
        "  found:    inf at [5, 7]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module"
    )


def test_hqq_refuses_a_module_without_an_entry() -> None:
    config = HqqConfig(dynamic_config={"q_proj": {"nbits": 4}})
    with pytest.raises(ConfigError, match="does not quantize this module"):
        quantize("hqq", config, sample(64, 128))
    assert quantize("hqq", replace(config, dynamic_config={"fc": {"nbits": 4}}), sample(64, 128)).N == 64
