"""Methods: which modules they take, what they claim of a checkpoint, and what they say about a wrong one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config as model_config
from checkpoints import parametrize, reference
from in_memory import InMemory, linear

from qcompile.capture.module import weight_modules
from qcompile.errors import CheckpointError, ConfigError
from qcompile.evaluate import dequantize
from qcompile.formats.tables import entries
from qcompile.ledger import Ledger
from qcompile.methods import skip
from qcompile.methods.awq import AwqConfig
from qcompile.methods.base import Method, MethodConfig, Quantized, Skip
from qcompile.methods.bitsandbytes import BnbConfig
from qcompile.methods.eetq import EetqConfig
from qcompile.methods.gguf import GgufConfig
from qcompile.methods.gptq import GptqConfig
from qcompile.methods.hqq import HqqConfig, tag
from qcompile.methods.index import method, parse_config
from qcompile.program import Module
from qcompile.safetensors_folder import SafetensorsFolder
from qcompile.sources import ModuleState

N, K = 64, 128


def stored_config(folder: Path) -> Any:
    return model_config(folder)["quantization_config"]


def llama(tied: bool = False) -> dict[str, Module]:
    """The modules of a model of two layers."""
    embedding = Module(
        "model.embed_tokens", "Embedding", 96, K, "model.embed_tokens.weight", tied=("lm_head",) if tied else ()
    )
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    layers = [linear(f"model.layers.{i}.{name}", N, K) for i in range(2) for name in names]
    head = linear("lm_head", 96, K, output_embedding=True, last_parameter=not tied)
    if tied:
        head = replace(head, weight=embedding.weight, tied=("model.embed_tokens",))
    return {module.path: module for module in (embedding, *layers, head)}


def floats(modules: dict[str, Module]) -> InMemory:
    """A checkpoint of a float model."""
    return InMemory({m.weight: torch.zeros(m.n, m.k) for m in modules.values()})


def dense(found: Method, config: MethodConfig, modules: dict[str, Module]) -> dict[str, str]:
    """The modules that a method leaves dense when it quantizes a float model, with its reasons."""
    source = floats(modules)
    decided = {path: found.select(config, module, source, modules) for path, module in modules.items()}
    return {path: value.reason for path, value in decided.items() if isinstance(value, Skip)}


# Which modules


@pytest.mark.parametrize(
    "pattern",
    ["lm_head", "layers.1", "model.layers.1", "proj", "model.layers.*", "q_proj|k_proj", "model", "", "l.*1", ".mlp"],
)
@pytest.mark.parametrize(
    "path",
    ["lm_head", "model.layers.1.mlp", "model.layers.11.mlp", "model.layers.1.self_attn.q_proj", "mod.l1", "a.lm_head"],
)
def test_patterns_match_as_in_transformers(pattern: str, path: str) -> None:
    theirs = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    assert skip.matches(pattern, path) is not theirs(path, [pattern])


SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
ARCHITECTURES = [
    ("LlamaConfig", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": False}),
    ("LlamaConfig", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    ("LlamaConfig", "LlamaForSequenceClassification", SMALL | {"num_labels": 3}),
    ("BertConfig", "BertModel", SMALL),
    ("ViTConfig", "ViTForImageClassification", SMALL | {"image_size": 16, "patch_size": 8}),
    ("GPT2Config", "GPT2LMHeadModel", dict(n_embd=64, n_layer=1, n_head=2, vocab_size=32)),
    ("T5Config", "T5EncoderModel", dict(d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=32)),
]


@pytest.mark.parametrize("skips", [None, [], ["layer"]], ids=str)
@pytest.mark.parametrize("config_name, model_name, fields", ARCHITECTURES, ids=lambda value: str(value)[:24])
def test_the_same_modules_stay_dense_as_in_transformers(
    config_name: str, model_name: str, fields: dict[str, Any], skips: list[str] | None
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    with torch.device("meta"):
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**fields))
    patterns = HfQuantizer.get_modules_to_not_convert(model, skips, model._keep_in_fp32_modules)
    modules = weight_modules(model, ModuleState(model), model.get_output_embeddings())
    linears = {path: module for path, module in modules.items() if module.kind != "Embedding"}
    theirs = {path for path in linears if not should_convert_module(path, patterns)}
    ours = {
        path
        for path, module in linears.items()
        if skip.dense(module, modules, "field", skips, kinds=("Linear", "Conv1D")) is not None
    }
    assert ours == theirs


def test_the_default_leaves_the_head_dense() -> None:
    embedding = "Embedding is not converted by the method (only Linear and Conv1D)"
    head = "it is the output embedding, and such modules stay dense by default"
    config = BnbConfig(load_in_4bit=True)
    assert dense(method("bitsandbytes"), config, llama()) == {"model.embed_tokens": embedding, "lm_head": head}
    assert dense(method("bitsandbytes"), config, llama(tied=True)).keys() == {"model.embed_tokens", "lm_head"}
    assert dense(method("eetq"), EetqConfig(), llama()).keys() >= {"lm_head"}


def test_a_list_replaces_the_default_except_for_awq() -> None:
    modules = {path: replace(module, n=128, k=128) for path, module in llama().items()}
    skips = ["model.layers.0", "k_proj"]
    expected = {
        "model.layers.0.self_attn.q_proj": "llm_int8_skip_modules has 'model.layers.0'",
        "model.layers.0.self_attn.k_proj": "llm_int8_skip_modules has 'model.layers.0'",
        "model.layers.0.mlp.down_proj": "llm_int8_skip_modules has 'model.layers.0'",
        "model.layers.1.self_attn.k_proj": "llm_int8_skip_modules has 'k_proj'",
        "model.embed_tokens": "Embedding is not converted by the method (only Linear and Conv1D)",
    }
    config: MethodConfig = BnbConfig(load_in_8bit=True, llm_int8_skip_modules=skips)
    assert dense(method("bitsandbytes"), config, modules) == expected
    assert dense(method("eetq"), EetqConfig(modules_to_not_convert=skips), modules).keys() == expected.keys()
    both = dense(method("awq"), AwqConfig(modules_to_not_convert=skips), modules)
    assert both.keys() == {*expected, "lm_head"}


def test_last_parameters_and_float32_modules_stay_dense() -> None:
    modules = llama()
    path = "model.layers.1.mlp.down_proj"
    found, config = method("bitsandbytes"), BnbConfig(load_in_4bit=True)
    last = dense(found, config, modules | {path: replace(modules[path], last_parameter=True)})
    assert last[path] == "it holds the model's last parameter, and such modules stay dense by default"
    kept = dense(
        found, replace(config, llm_int8_skip_modules=[]), modules | {path: replace(modules[path], keep_f32=True)}
    )
    assert kept == {
        path: "the architecture keeps it in float32",
        "model.embed_tokens": "Embedding is not converted by the method (only Linear and Conv1D)",
    }


def test_conv1d_is_for_bitsandbytes_and_gptq() -> None:
    module = Module("h.0.attn.c_attn", "Conv1D", N, K, "h.0.attn.c_attn.weight")
    modules = {module.path: module}
    assert not dense(method("bitsandbytes"), BnbConfig(load_in_4bit=True), modules)
    assert not dense(method("gptq"), GptqConfig(4), modules)
    for name in ("awq", "eetq", "hqq"):
        config = method(name).Config.from_dict({})
        assert dense(method(name), config, modules) == {
            module.path: "Conv1D is not converted by the method (only Linear)"
        }


def test_gptq_takes_the_decoder_blocks() -> None:
    found, modules = method("gptq"), llama()
    assert dense(found, GptqConfig(4), modules) == {
        "model.embed_tokens": "Embedding is not converted by the method (only Linear and Conv1D)",
        "lm_head": "it is the output embedding and lm_head is false",
    }
    assert "lm_head" not in dense(found, GptqConfig(4, lm_head=True), modules)
    inside = dense(
        found, GptqConfig(4, modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.down_proj"]]), modules
    )
    assert inside["model.layers.0.self_attn.k_proj"] == "modules_in_block_to_quantize does not list it"
    assert "model.layers.0.self_attn.q_proj" not in inside
    dynamic = {r"-:model\.layers\.0\.": {}, r"+:.*down_proj": {"bits": 8}}
    by_layer = GptqConfig(4, dynamic=dynamic)
    assert dense(found, by_layer, modules)["model.layers.0.mlp.down_proj"] == "dynamic leaves it dense"
    chosen = found.select(by_layer, modules["model.layers.1.mlp.down_proj"], floats(modules), modules)
    assert isinstance(chosen, Quantized) and chosen.format.to_json()["bits"] == 8
    with pytest.raises(ConfigError, match="names blocks that do not exist"):
        dense(found, GptqConfig(4, block_name_to_quantize="transformer.h"), modules)


def test_hqq_goes_by_tags() -> None:
    assert tag("model.layers.31.self_attn.k_proj") == "self_attn.k_proj"
    modules = {path: module for path, module in llama().items() if module.kind == "Linear"}
    found = method("hqq")
    assert dense(found, HqqConfig(), modules) == {"lm_head": "skip_modules has 'lm_head'"}
    by_tag = HqqConfig(dynamic_config={"self_attn.q_proj": {"nbits": 8}}, skip_modules=[])
    left = dense(found, by_tag, modules)
    assert left["model.layers.0.mlp.down_proj"] == "the config has no entry for 'mlp.down_proj'"
    assert "model.layers.1.self_attn.q_proj" not in left


PATTERNS: list[tuple[str, MethodConfig, str]] = [
    (
        "bitsandbytes",
        BnbConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_haed"]),
        "the bitsandbytes config has a pattern that matches no module\n"
        "  where:    field 'llm_int8_skip_modules'\n"
        "  found:    'lm_haed'\n"
        "  expected: one of 8 modules with a weight, such as lm_head\n"
        "  try:      correct the pattern, or take it out",
    ),
    (
        "awq",
        AwqConfig(modules_to_not_convert=["visual"]),
        "the awq config has a pattern that matches no module\n"
        "  where:    field 'modules_to_not_convert'\n"
        "  found:    'visual'\n"
        "  expected: one of 8 modules with a weight\n"
        "  try:      correct the pattern, or take it out",
    ),
    (
        "eetq",
        EetqConfig(modules_to_not_convert=["layers.("]),
        "the eetq config has a pattern that is not a regular expression\n"
        "  where:    field 'modules_to_not_convert'\n"
        "  found:    'layers.(' (missing ), unterminated subpattern at position 7)\n"
        "  expected: a module name or a regular expression",
    ),
    (
        "hqq",
        HqqConfig(skip_modules=["q_proj"]),
        "the hqq config has a pattern that matches no module\n"
        "  where:    field 'skip_modules'\n"
        "  found:    'q_proj'\n"
        "  expected: one of 8 modules with a weight, such as self_attn.q_proj\n"
        "  try:      correct the pattern, or take it out",
    ),
]


@pytest.mark.parametrize("name, config, message", PATTERNS)
def test_a_pattern_that_matches_nothing_is_an_error(name: str, config: MethodConfig, message: str) -> None:
    modules = llama()
    with pytest.raises(ConfigError) as caught:
        method(name).select(config, modules["lm_head"], floats(modules), modules)
    assert str(caught.value) == message


SHAPES: list[tuple[str, MethodConfig, Module, str]] = [
    (
        "awq",
        AwqConfig(group_size=96),
        linear("model.layers.0.mlp.up_proj", N, K),
        "awq cannot store this module's weight\n"
        "  where:    model.layers.0.mlp.up_proj [64, 128]\n"
        "  found:    K = 128\n"
        "  expected: a multiple of the group, 96\n"
        "  try:      choose another group size or method, or leave the module dense by the config's skip list",
    ),
    (
        "hqq",
        HqqConfig(group_size=24),
        linear("fc", N, K),
        "hqq cannot store this module's weight\n"
        "  where:    fc [64, 128]\n"
        "  found:    N * K = 8192\n"
        "  expected: a multiple of the group, 24\n"
        "  try:      choose another group size or method, or leave the module dense by the config's skip list",
    ),
    (
        "eetq",
        EetqConfig(),
        linear("fc", 60, K),
        "eetq cannot store this module's weight\n"
        "  where:    fc [60, 128]\n"
        "  found:    [60, 128]\n"
        "  expected: multiples of 64\n"
        "  try:      choose another group size or method, or leave the module dense by the config's skip list",
    ),
]


@pytest.mark.parametrize("name, config, module, message", SHAPES)
def test_a_shape_that_does_not_fit_is_an_error(name: str, config: MethodConfig, module: Module, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method(name).select(config, module, floats({module.path: module}), {module.path: module})
    assert str(caught.value) == message


# Checkpoints


@parametrize("gptq", "awq", "bitsandbytes", "hqq", "eetq")
def test_a_checkpoint_is_read_bit_for_bit(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    found = parse_config(None, stored_config(folder), source)
    assert found is not None and found[0].prequantized(found[1], source)
    for path, weight in reference(folder).weights.items():
        module = linear(path, *weight.shape)
        selected = found[0].select(found[1], module, source, {path: module})
        assert isinstance(selected, Quantized)
        packed = found[0].read(found[1], module, selected, source)
        value = dequantize(packed.format, packed.tensors, packed.N, packed.K)
        # gemv_fast stores scale * zero rounded to float16; its reference is the unrounded twin.
        bound = 3e-4 if folder.name == "awq-gemv_fast" else 0.0
        assert (value - weight).abs().max() <= bound, path
        claimed = {*selected.names.values(), *selected.also_claims}
        stored = {name for name in source.names() if name.startswith(f"{path}.")}
        assert stored - {f"{path}.bias"} == claimed


@parametrize("gptq-dynamic", "hqq-dynamic", "eetq-skip")
def test_what_a_checkpoint_stores_dense_stays_dense(folder: Path) -> None:
    source = SafetensorsFolder(folder)
    found = parse_config(None, stored_config(folder), source)
    assert found is not None
    quantized = ("qweight", "W_q", "weight_scales")
    paths = [name.removesuffix(".weight") for name in source.names() if name.endswith("proj.weight")]
    plain = [path for path in paths if not any(f"{path}.{name}" in source.names() for name in quantized)]
    assert plain
    for path in plain:
        module = linear(path, *source.info(f"{path}.weight").shape)
        assert found[0].select(found[1], module, source, {}) == Skip("the checkpoint stores its weight dense")
    embedding = Module("model.embed_tokens", "Embedding", 96, 192, "model.embed_tokens.weight")
    assert isinstance(found[0].select(found[1], embedding, source, {}), Skip)


def gptq() -> dict[str, torch.Tensor]:
    """A GPTQ module "fc" of 4 bits in groups of 32."""
    return {
        "fc.qweight": torch.zeros(K // 8, N, dtype=torch.int32),
        "fc.qzeros": torch.zeros(K // 32, N // 8, dtype=torch.int32),
        "fc.scales": torch.ones(K // 32, N, dtype=torch.float16),
        "fc.g_idx": (torch.arange(K) // 32).int(),
    }


NAN_SCALE = torch.ones(K // 32, N, dtype=torch.float16)
NAN_SCALE[1, 3] = math.nan


WRONG = "the checkpoint and its quantization_config do not belong together, or a file is damaged"
DAMAGED: list[tuple[str, torch.Tensor | None, str]] = [  # the tensor to replace, or None to remove it
    (
        "fc.scales",
        None,
        "a module quantized with gptq lacks a stored tensor\n"
        "  where:    fc\n"
        "  found:    g_idx, qweight, qzeros\n"
        "  expected: qweight, qzeros, scales\n"
        "  try:      the checkpoint is incomplete: it must hold fc.scales",
    ),
    (
        "fc.weight",
        torch.zeros(N, K),
        "a module quantized with gptq also has a dense weight\n"
        "  where:    fc\n"
        "  found:    fc.weight and fc.qweight\n"
        "  expected: one of them\n"
        "  try:      the checkpoint says the weight twice: remove the one that is not meant",
    ),
    (
        "fc.qweight",
        torch.zeros(K // 4, N, dtype=torch.int32),
        "a stored tensor has the wrong shape\n"
        "  where:    fc.qweight (module fc, 64 outputs, 128 inputs)\n"
        "  found:    i32 [32, 64]\n"
        "  expected: i32 [16, 64]\n"
        f"  try:      {WRONG}",
    ),
    (
        "fc.qzeros",
        torch.zeros(K // 32, N // 8, dtype=torch.int64),
        "a stored tensor has the wrong dtype\n"
        "  where:    fc.qzeros (module fc, 64 outputs, 128 inputs)\n"
        "  found:    i64 [4, 8]\n"
        "  expected: i32 [4, 8]\n"
        f"  try:      {WRONG}",
    ),
    (
        "fc.g_idx",
        torch.full((K,), 4, dtype=torch.int32),
        "a group index is out of range\n"
        "  where:    fc.g_idx (module fc)\n"
        "  found:    4 to 4\n"
        "  expected: 0 to 3\n"
        "  try:      the file is damaged, or group_size is not the one it was made with",
    ),
    (
        "fc.scales",
        NAN_SCALE,
        "a stored tensor holds a number that is not finite\n"
        "  where:    fc.scales (module fc)\n"
        "  found:    nan at [1, 3]\n"
        "  expected: finite numbers\n"
        "  try:      the file is damaged, or the quantization that wrote it failed for this module",
    ),
    (
        "fc",
        None,
        "a module has no weight in the checkpoint\n"
        "  where:    fc\n"
        "  found:    no tensor of the module\n"
        "  expected: fc.weight, or qweight as gptq stores it\n"
        "  try:      the checkpoint is incomplete, or it belongs to another architecture",
    ),
]


@pytest.mark.parametrize("name, value, message", DAMAGED)
def test_a_damaged_checkpoint_is_said_in_full(name: str, value: torch.Tensor | None, message: str) -> None:
    tensors = {"other.qweight": torch.zeros(1)} | {key: t for key, t in gptq().items() if not key.startswith(name)}
    if value is not None:
        tensors[name] = value
    found, source, module = method("gptq"), InMemory(tensors), linear("fc", N, K)
    config = GptqConfig(4, group_size=32)
    with pytest.raises(CheckpointError) as caught:
        selected = found.select(config, module, source, {"fc": module})
        assert isinstance(selected, Quantized)
        found.read(config, module, selected, source)
    assert str(caught.value) == message


@pytest.mark.parametrize("nbits", [3, 4])
def test_hqq_codes_may_be_labelled_as_floats(nbits: int) -> None:
    found, config, module = method("hqq"), HqqConfig(nbits=nbits, group_size=32), linear("fc", N, K, dtype="f16")
    packed = found.quantize(config, module, torch.randn(N, K).half())
    tensors = found.write(config, module, packed)
    viewed = {"W_q": tensors["W_q"].view(torch.float16), "view_as_float": torch.tensor(1, dtype=torch.uint8)}
    source = InMemory({f"fc.{name}": tensor for name, tensor in (tensors | viewed).items()})
    selected = found.select(config, module, source, {})
    assert isinstance(selected, Quantized)
    assert torch.equal(found.read(config, module, selected, source).tensors["W_q"], packed.tensors["W_q"])


def test_gptq_keeps_a_group_index_only_where_it_says_something() -> None:
    found, config, module = method("gptq"), GptqConfig(4, group_size=32), linear("fc", N, K)
    plain = found.select(config, module, InMemory(gptq()), {})
    assert isinstance(plain, Quantized) and plain.also_claims == ("fc.g_idx",)
    shuffled = gptq() | {"fc.g_idx": (torch.arange(K) // 32).flip(0).int()}
    indirect = found.select(config, module, InMemory(shuffled), {})
    assert isinstance(indirect, Quantized) and indirect.names["g_idx"] == "fc.g_idx" and not indirect.also_claims
    bare = gptq()
    del bare["fc.g_idx"]  # older makers leave it out when it is in order
    assert isinstance(found.select(config, module, InMemory(bare), {}), Quantized)
    with pytest.raises(CheckpointError, match="lacks a stored tensor"):
        found.select(replace(config, desc_act=True), module, InMemory(bare), {})


def test_a_left_over_tensor_is_an_error() -> None:
    found, module = method("gptq"), linear("fc", N, K)
    ledger = Ledger(InMemory(gptq() | {"fc.qscale": torch.zeros(1)}))
    selected = found.select(GptqConfig(4, group_size=32), module, ledger.source, {})
    assert isinstance(selected, Quantized)
    for name in (*selected.names.values(), *selected.also_claims):
        ledger.claim(name, "fc")
    with pytest.raises(CheckpointError, match="tensors that did not end in exactly one place") as caught:
        ledger.check()
    assert caught.value.found == "fc.qscale: not used"


def bnb(**state: Any) -> dict[str, torch.Tensor]:
    """A bitsandbytes nf4 module "fc" as it is written by `quantize`, with changes to its state."""
    found, module = method("bitsandbytes"), linear("fc", N, K)
    packed = found.quantize(BnbConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), module, torch.ones(N, K))
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [N, K]} | state
    return {
        "fc.weight": packed.tensors["weight"],
        "fc.weight.absmax": packed.tensors["absmax"],
        "fc.weight.quant_map": torch.tensor(entries("nf4")),
        "fc.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_bitsandbytes_reads_bytes_under_any_label(storage: torch.dtype) -> None:
    tensors = bnb()
    expected = tensors["fc.weight"]
    tensors["fc.weight"] = expected.reshape(-1).view(storage)[:, None]
    found, config, module = method("bitsandbytes"), BnbConfig(load_in_4bit=True), linear("fc", N, K)
    selected = found.select(config, module, InMemory(tensors), {})
    assert isinstance(selected, Quantized)
    assert torch.equal(found.read(config, module, selected, InMemory(tensors)).tensors["weight"], expected)


@pytest.mark.parametrize(
    "state, found, expected",
    [
        ({"shape": [K, N]}, "shape: [128, 64]", "shape: [64, 128]"),
        ({"blocksize": 48}, "blocksize: 48", "blocksize: a power of two from 16 to 4096"),
        ({"quant_type": "fp4"}, "quant_type: 'fp4'", "quant_type: 'nf4', as the tensor's name says"),
        ({"nested_offset": "1"}, "nested_blocksize: None", "nested_blocksize: a power of two from 16 to 4096"),
    ],
)
def test_a_wrong_quant_state_is_said_in_full(state: dict[str, Any], found: str, expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        method("bitsandbytes").select(BnbConfig(load_in_4bit=True), linear("fc", N, K), InMemory(bnb(**state)), {})
    assert str(caught.value) == (
        "a 4-bit weight has a wrong quant_state\n"
        "  where:    fc.weight.quant_state.bitsandbytes__nf4 (module fc)\n"
        f"  found:    {found}\n"
        f"  expected: {expected}\n"
        "  try:      the checkpoint does not belong to this architecture, or the file is damaged"
    )


def test_a_table_of_its_own_is_refused() -> None:
    tensors = bnb()
    tensors["fc.weight.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(CheckpointError, match="a stored table is not the nf4 table"):
        method("bitsandbytes").select(BnbConfig(load_in_4bit=True), linear("fc", N, K), InMemory(tensors), {})


def test_gguf_keeps_blocks_and_names_what_it_cannot_read() -> None:
    found, module = method("gguf"), linear("fc", N, K)
    data = torch.randint(0, 60, (N, K // 32 * 18), dtype=torch.uint8)
    source = InMemory({"fc.weight": data, "norm.weight": torch.ones(3)}, {"fc.weight": "q4_0"})
    config = GgufConfig()
    assert found.prequantized(config, source)
    selected = found.select(config, module, source, {})
    assert isinstance(selected, Quantized) and selected.format.kind == "gguf-q4_0"
    packed = found.read(config, module, selected, source)
    assert packed.tensors["data"] is data
    unpacked = GgufConfig(dequantize=True)
    plain = found.select(unpacked, module, source, {})
    assert isinstance(plain, Quantized)
    value = found.read(unpacked, module, plain, source).tensors["weight"]
    assert torch.equal(value, dequantize(packed.format, packed.tensors, N, K))
    with pytest.raises(CheckpointError) as caught:
        found.select(config, module, InMemory({"fc.weight": data}, {"fc.weight": "iq2_xxs"}), {})
    assert str(caught.value).startswith(
        "a GGUF encoding is not supported\n  where:    fc.weight (module fc)\n  found:    iq2_xxs\n  expected: q4_0, "
    )
    with pytest.raises(ConfigError, match="gguf reads files and quantizes nothing"):
        found.quantize(config, module, torch.zeros(N, K))
