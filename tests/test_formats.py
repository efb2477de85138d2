"""Formats against the truth: checkpoints made by the real packages, and gguf's own decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcompile.errors import ArtifactError, CheckpointError
from qcompile.evaluate import dequantize
from qcompile.format import FORMATS, Format, Packed, format_class, format_from_json
from qcompile.formats.awq import Awq, AwqGemv, AwqGemvFast
from qcompile.formats.bitsandbytes import Bnb4, BnbInt8
from qcompile.formats.dense import Dense
from qcompile.formats.eetq import Eetq
from qcompile.formats.gptq import Gptq
from qcompile.formats.hqq import Hqq
from qcompile.formats.lanes import lanes_for
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
    dtype = {"torch.float16": "f16", "torch.bfloat16": "bf16", "torch.float32": "f32"}[text(t["compute_dtype"])]
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
            # The reference is the GEMM twin; this layout stores float16(scale * zero), one rounding of at most 15 scales.
            bound = packed.tensors["scales"].float().abs().max() * 15 * 2**-10
            assert (got - true).abs().max() <= bound, path
        else:
            assert torch.equal(got, true.float()), path
        count += 1
    assert count > 0
