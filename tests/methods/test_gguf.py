"""GGUF: a file with every block type, compiled whole; blocks made of float weights against the gguf package's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_memory import InMemory, linear
from stored_modules import value
from torch import nn

import qcompile
from qcompile.capture.gguf import FAMILIES
from qcompile.errors import ConfigError
from qcompile.format import FORMATS, format_class
from qcompile.methods.base import Quantized, Skip
from qcompile.methods.gguf import ENCODINGS, Gguf, GgufConfig
from qcompile.program import Module

gguf = pytest.importorskip("gguf")
METHOD = Gguf()
# Where the blocks of a type hold float16 scales, which must be finite and small.
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
ROLES = {  # the largest value of a code times a whole scale is near 1 for each of these, with the scales below
    "self_attn.q_proj": "q4_k", "self_attn.k_proj": "q5_k", "self_attn.v_proj": "q6_k", "self_attn.o_proj": "q3_k",
    "mlp.gate_proj": "q2_k", "mlp.up_proj": "iq4_xs", "mlp.down_proj": "iq4_nl", "embed_tokens": "q4_k",
    "lm_head": "q5_k",
}  # fmt: skip
SIZE = {"q2_k": 2e-3, "q3_k": 1e-3, "q4_k": 1e-4, "q5_k": 1e-4, "q6_k": 3e-5, "iq4_nl": 8e-4, "iq4_xs": 3e-5}


def random_blocks(encoding: str, n: int, k: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Blocks u8 [n, bytes of a row] of random codes under small scales."""
    rng = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding.upper()]]
    data = rng.integers(0, 256, (n, k // size[0], size[1]), dtype=np.uint8)
    for at in HALVES[encoding]:
        half = (rng.random((n, k // size[0], 1), dtype=np.float32) + 0.5) * SIZE.get(encoding, 1e-2)
        data[:, :, at : at + 2] = half.astype("<f2").view(np.uint8)
    return data.reshape(n, -1)


def write(path: Path, model: nn.Module) -> None:
    """A file of a Qwen 3 whose matrices are random blocks, of which the model gets the values."""
    family, config = FAMILIES["qwen3"], model.config
    back = {to: old for old, to in family.names.items()}
    writer = gguf.GGUFWriter(path, "qwen3")
    for key, field in family.keys.items():
        found = config.rope_parameters["rope_theta"] if field == "rope_theta" else getattr(config, field)
        add = writer.add_float32 if isinstance(found, float) else writer.add_uint32
        add(f"qwen3.{key}", found)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(config.vocab_size)])
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        stem, _, end = name.rpartition(".")
        layer = next((part for part in stem.split(".") if part.isdigit()), "")
        pattern = ".".join("#" if part.isdigit() else part for part in stem.split("."))
        old = f"{back[pattern].replace('#', layer)}.{end}"
        encoding = next((kind for role, kind in ROLES.items() if stem.endswith(role) and end == "weight"), None)
        if encoding is None:
            writer.add_tensor(old, tensor.numpy())
            continue
        kind = gguf.GGMLQuantizationType[encoding.upper()]
        data = random_blocks(encoding, *tensor.shape, seed=index)
        writer.add_tensor(old, data, raw_dtype=kind)
        tensor.copy_(torch.from_numpy(gguf.dequantize(data, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_file_of_many_block_types(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)).eval()
    write(tmp_path / "m.gguf", model)
    ids = torch.arange(10).reshape(2, 5)
    expected = model(ids).logits
    for target in ("reference", "cpu"):
        compiled = qcompile.compile(tmp_path / "m.gguf", target=target)
        rows = compiled.report.weights
        assert {row.format.removeprefix("gguf-") for row in rows.values()} == set(ROLES.values())
        for path in rows:
            assert torch.equal(compiled.weight(path), model.get_submodule(path).weight), path
        if target == "cpu":  # scales and minimums lie in the fast layout
            assert {row.layout for row in rows.values() if row.path != "model.embed_tokens"} == {"lanes"}
        found = compiled(input_ids=ids).logits
        assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_every_type_has_its_scales_here() -> None:
    assert {kind.removeprefix("gguf-") for kind in FORMATS if kind.startswith("gguf-")} == HALVES.keys()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_float_weights_become_the_blocks_of_the_package(encoding: str) -> None:
    weight = torch.randn(70, 160, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1, :32], weight[2, 5], weight[3, :2] = 0.0, 3.0, 100.0, torch.tensor([-4.0, 4.0])
    weight[4] = torch.arange(160) * 0.25 - 20  # ties
    packed = METHOD.quantize(GgufConfig(encoding=encoding), linear("fc", 70, 160), weight)
    kind = gguf.GGMLQuantizationType[encoding.upper()]
    assert np.array_equal(packed.tensors["data"].numpy(), gguf.quantize(weight.numpy(), kind))
    half = METHOD.quantize(GgufConfig(encoding=encoding), linear("fc", 70, 160), weight.bfloat16())
    assert np.array_equal(half.tensors["data"].numpy(), gguf.quantize(weight.bfloat16().float().numpy(), kind))


@torch.no_grad()
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_float_model_with_odd_sizes_and_a_bias(target: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 7), nn.Linear(7, 5)).eval()
    x = torch.randn(3, 96)
    compiled = qcompile.compile(model, {"quant_method": "gguf", "encoding": "q5_1"}, example_inputs=(x,), target=target)
    for path in ("0", "2"):
        layer = model.get_submodule(path)
        layer.weight.copy_(
            value(METHOD.quantize(GgufConfig(encoding="q5_1"), linear(path, *layer.weight.shape), layer.weight))
        )
    found = compiled(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, model(x), rtol=1e-4, atol=1e-4)


def test_which_modules_become_blocks() -> None:
    config, source = GgufConfig(encoding="q8_0"), InMemory({"fc.weight": torch.zeros(4, 64)})
    table = Module("wte", "Embedding", 4, 64, "wte.weight")
    chosen = METHOD.select(config, linear("fc", 4, 64), source, {})
    assert isinstance(chosen, Quantized) and chosen.format == format_class("gguf-q8_0")()
    assert METHOD.select(config, linear("fc", 4, 40), source, {}) == Skip("its 40 inputs are no whole blocks of 32")
    assert METHOD.select(config, table, source, {}) == Skip(
        "Embedding is not converted by the method (only Linear, Conv1D, and what is tied to them)"
    )
    tied = Module("wte", "Embedding", 4, 64, "wte.weight", tied=("lm_head",))
    assert isinstance(METHOD.select(config, tied, source, {}), Quantized)
    assert METHOD.select(GgufConfig(), linear("fc", 4, 64), source, {}) == Skip(
        "the source stores its weight dense, and the gguf config has no encoding"
    )


def test_what_cannot_be_made_is_said_in_full() -> None:
    with pytest.raises(ConfigError) as caught:
        GgufConfig(encoding="q4_k")
    assert str(caught.value) == (
        "the gguf config has a value out of range\n"
        "  where:    field 'encoding'\n"
        "  found:    'q4_k'\n"
        "  expected: None, q4_0, q4_1, q5_0, q5_1, q8_0"
    )
    with pytest.raises(ConfigError) as caught:
        METHOD.quantize(GgufConfig(), linear("fc", 4, 64), torch.zeros(4, 64))
    assert str(caught.value) == (
        "gguf reads files and quantizes nothing unless its config has an encoding\n"
        "  where:    fc\n"
        "  found:    a float weight\n"
        "  expected: a .gguf file as the model, or encoding: q4_0, q4_1, q5_0, q5_1, q8_0\n"
        "  try:      set encoding, or quantize with llama.cpp first"
    )
