"""Formats against the truth: checkpoints made by the real packages, and gguf's own decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qcompile.dtypes import DTYPES, NAMES
from qcompile.errors import ArtifactError, CheckpointError
from qcompile.evaluate import dequantize
from qcompile.format import FORMATS, Packed, format_class, format_from_json
from qcompile.formats.awq import Awq, AwqGemv, AwqGemvFast
from qcompile.formats.bitsandbytes import Bnb4, BnbInt8
from qcompile.formats.dense import Dense
from qcompile.formats.eetq import Eetq
from qcompile.formats.gptq import Gptq
from qcompile.formats.hqq import Hqq
from qcompile.formats.tables import entries

CHECKPOINTS = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"
FOLDERS = sorted(
    path.name for method in ("gptq", "awq", "bitsandbytes", "hqq", "eetq") for path in CHECKPOINTS.glob(method + "*")
)
Tensors = dict[str, torch.Tensor]


def text(tensor: torch.Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def gptq(t: Tensors, config: dict) -> Packed:
    K, N = t["g_idx"].numel(), t["scales"].shape[1]
    bits = round(t["qweight"].shape[0] * 32 / K)
    group = K // t["scales"].shape[0]
    flavour = config.get("checkpoint_format") or config["format"]
    indirect = not torch.equal(t["g_idx"], torch.arange(K, dtype=torch.int32) // group)
    if not indirect:
        del t["g_idx"]
    return Packed(Gptq(bits, group, flavour == "gptq", indirect, bits in (5, 6, 7) or flavour == "gptq_p"), t, N, K)


def awq(t: Tensors, config: dict) -> Packed:
    if config["version"] == "gemm":
        K, N = t["qweight"].shape[0], t["scales"].shape[1]
        return Packed(Awq(config["bits"], K // t["scales"].shape[0], config["bits"] == 4), t, N, K)
    if config["version"] == "gemv":
        N, K = t["qweight"].shape[0], t["qweight"].shape[1] * 8
        return Packed(AwqGemv(config["group_size"]), t, N, K)
    N, K = t["qweight"].shape[0] * 4, t["qweight"].shape[1]
    return Packed(AwqGemvFast(config["group_size"]), t, N, K)


def bitsandbytes(t: Tensors, config: dict) -> Packed:
    if config["load_in_8bit"]:
        N, K = t["weight"].shape
        return Packed(BnbInt8(), {"weight": t["weight"], "SCB": t["SCB"]}, N, K)
    kind = next(kind for kind in ("nf4", "fp4") if f"weight.quant_state.bitsandbytes__{kind}" in t)
    state = json.loads(text(t[f"weight.quant_state.bitsandbytes__{kind}"]))
    N, K = state["shape"]
    stored = {"weight": t["weight"].view(torch.uint8).reshape(-1, 1), "absmax": t["weight.absmax"]}
    if "nested_offset" not in state:
        assert tuple(t["weight.quant_map"].tolist()) == entries(kind)
        return Packed(Bnb4(kind, state["blocksize"]), stored, N, K)
    stored["nested_absmax"] = t["weight.nested_absmax"]
    assert tuple(t["weight.nested_quant_map"].tolist()) == entries("dynamic")
    return Packed(Bnb4(kind, state["blocksize"], state["nested_blocksize"], state["nested_offset"]), stored, N, K)


def hqq(t: Tensors, config: dict) -> Packed:
    N, K = t["shape"].tolist()
    bits = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1, "3bit_32": 3}[text(t["packing"])]
    dtype = NAMES[getattr(torch, text(t["compute_dtype"]).removeprefix("torch."))]
    stored = {name: t[name] for name in ("W_q", "scale", "zero")}
    if t["view_as_float"].item():
        stored["W_q"] = stored["W_q"].view(torch.int32 if bits == 3 else torch.uint8)
    return Packed(Hqq(bits, t["group_size"].item(), t["axis"].item(), dtype), stored, N, K)


def eetq(t: Tensors, config: dict) -> Packed:
    K, N = t["weight"].shape
    return Packed(Eetq(), {name: t[name] for name in ("weight", "weight_scales")}, N, K)


READERS = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes, "hqq": hqq, "eetq": eetq}


def modules(folder: str) -> Iterator[tuple[str, Packed, torch.Tensor]]:
    """The quantized modules of a checkpoint folder that have a reference: path, stored weight, true weight f32."""
    config = json.loads((CHECKPOINTS / folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(CHECKPOINTS / folder / "model.safetensors")
    reference = load_file(CHECKPOINTS / folder / "reference.safetensors")
    marks = ("qweight", "W_q", "weight_scales", "SCB", "weight.absmax")
    for path in sorted(name.removesuffix(".weight") for name in reference if name.endswith(".weight")):
        own = {name[len(path) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(path + ".")}
        if any(mark in own for mark in marks):
            own.pop("bias", None)
            yield path, READERS[folder.split("-")[0]](own, config), reference[path + ".weight"]


@pytest.mark.skipif(not FOLDERS, reason=f"no checkpoints in {CHECKPOINTS}")
@pytest.mark.parametrize("folder", FOLDERS)
def test_checkpoint_weights_equal_the_packages_own_bit_for_bit(folder: str) -> None:
    count = 0
    for path, packed, true in modules(folder):
        packed.check(path)
        got = dequantize(packed.format, packed.tensors, packed.N, packed.K)
        if isinstance(packed.format, AwqGemvFast):
            # The reference is the GEMM twin; this layout rounds scale * zero, at most 15 scales.
            bound = packed.tensors["scales"].float().abs().max() * 15 * 2**-10
            assert (got - true).abs().max() <= bound, path
        else:
            assert torch.equal(got, true.float()), path
        count += 1
    assert count > 0


GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", GGUF)
def test_gguf_blocks_decode_as_ggufs_own_package_decodes_them(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    N, K = 7, 512
    format = format_class(f"gguf-{name.lower()}")()
    size = format.stored(N, K)[0].shape
    data = torch.randint(0, 256, size, dtype=torch.uint8)
    got = dequantize(format, {"data": data}, N, K)
    with np.errstate(invalid="ignore"):  # random bytes hold infinite scales
        true = torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind))
    assert torch.equal(got.nan_to_num(), true.nan_to_num())
    assert torch.equal(got.isnan(), true.isnan())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_is_json_and_back(kind: str) -> None:
    format = format_class(kind)()
    assert format_from_json(json.loads(json.dumps(format.to_json()))) == format
    assert format.to_json()["kind"] == kind


def test_what_is_not_a_format_is_refused_with_its_reason() -> None:
    with pytest.raises(ArtifactError) as error:
        format_from_json({"kind": "gtpq"})
    start = "unknown format, did you mean 'gptq'?\n  found:    'gtpq'\n  expected: gptq, awq, "
    assert str(error.value).startswith(start)
    with pytest.raises(ArtifactError) as error:
        format_from_json({"kind": "gptq", "group_size": 32})
    assert str(error.value) == (
        "format 'gptq' has no parameter 'group_size', did you mean 'group'?\n"
        "  expected: bits, group, v1, indirect, planar, scale, by_field, word"
    )
    with pytest.raises(ArtifactError) as error:
        format_from_json({"kind": "gptq", "bits": "4"})
    assert str(error.value) == "format 'gptq' has a wrong 'bits'\n  found:    '4'\n  expected: int"
    with pytest.raises(ArtifactError):
        format_from_json({"kind": "gptq", "v1": 1})


def test_a_packed_weight_checks_its_tensors() -> None:
    packed = Packed(Dense("f16"), {"weight": torch.zeros(3, 4)}, 3, 4)
    with pytest.raises(CheckpointError) as error:
        packed.check("model.head")
    assert str(error.value) == (
        "stored tensor 'weight' has the wrong dtype or shape\n"
        "  where:    model.head\n  found:    f32 [3, 4]\n  expected: f16 [3, 4]"
    )
    with pytest.raises(CheckpointError, match="stored tensors are not those of format 'dense'"):
        Packed(Dense(), {}, 3, 4).check()
    with pytest.raises(CheckpointError) as error:
        Packed(Awq(4, 32), {}, 16, 40).check("layer")
    assert str(error.value) == (
        "format 'awq' cannot hold a weight [16, 40]\n"
        "  where:    layer\n  found:    K = 40\n  expected: a multiple of the group, 32"
    )


def test_sizes_are_known_without_data() -> None:
    assert Bnb4(block=64).bits_per_weight(1024, 1024) == 4.5
    assert Dense("bf16").bits_per_weight(3, 5) == 16
    assert Gptq(4, 128).group_size(64, 256) == 128
    assert Gptq(4, 128, indirect=True).group_size(64, 256) is None
    assert Hqq(4, 64, axis=0).group_size(64, 256) == 1
    assert Hqq(4, 96, axis=1).group_size(64, 128) == 32  # groups straddle rows


def test_named_rows_are_decoded_alone() -> None:
    packed = Packed(Gptq(3, 32), {}, 9, 64)
    tensors = {s.name: torch.ones(s.shape, dtype=DTYPES[s.dtype]) for s in packed.format.stored(9, 64)}
    tensors["qweight"] = torch.randint(-(2**31), 2**31, tensors["qweight"].shape, dtype=torch.int32)
    rows = torch.tensor([8, 0, 8])
    assert torch.equal(dequantize(packed.format, tensors, 9, 64, rows), dequantize(packed.format, tensors, 9, 64)[rows])


def test_bitsandbytes_tables() -> None:
    assert len(entries("dynamic")) == 256
    assert entries("dynamic") == tuple(sorted(entries("dynamic")))
    assert entries("fp4")[8:] == tuple(0 - x for x in entries("fp4")[:8])
